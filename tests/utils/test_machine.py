"""This machine: what it has, and what it does not have is refused."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentwire.utils import machine as this
from latentwire.utils.machine import (
    git_sha,
    give_memory_back,
    machine,
    machine_line,
    on_this_machine,
    peak_memory_mb,
)


@dataclass
class Config:
    device: str = ""
    dtype: str = ""
    other: int = 7


@pytest.fixture
def cards(monkeypatch):
    def have(number):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Test GPU")

    return have


def test_without_a_gpu_the_cpu_works_in_float32(cards):
    cards(0)
    assert on_this_machine(Config()) == Config("cpu", "float32")


def test_with_a_gpu_it_works_in_bfloat16(cards):
    cards(2)
    assert on_this_machine(Config()) == Config("cuda", "bfloat16")
    assert on_this_machine(Config("cuda:1")) == Config("cuda:1", "bfloat16")
    assert on_this_machine(Config("cpu")) == Config("cpu", "float32")


@pytest.mark.parametrize("able", [True, False])
def test_native_is_bfloat16_only_where_the_processor_computes_in_it(cards, monkeypatch, able):
    cards(0)
    monkeypatch.setattr("latentwire.utils.machine.native_bfloat16", lambda: able)
    assert on_this_machine(Config(dtype="native")) == Config("cpu", "bfloat16" if able else "float32")
    assert on_this_machine(Config()) == Config("cpu", "float32"), "exactness first, unless it is asked for"
    cards(1)
    assert on_this_machine(Config(dtype="native")) == Config("cuda", "bfloat16")


def test_what_is_named_stays(cards):
    cards(0)
    given = Config("cpu", "bfloat16", 3)
    assert on_this_machine(given) == given
    assert on_this_machine(Config(dtype="float16")).dtype == "float16"


@pytest.mark.parametrize(("number", "device"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_card_that_is_not_there_is_refused(cards, number, device):
    cards(number)
    with pytest.raises(ValueError, match=f"device='{device}': this machine has {number} CUDA devices; try cpu"):
        on_this_machine(Config(device))


def test_a_device_that_does_not_exist_is_refused_in_one_line(cards):
    cards(0)
    with pytest.raises(ValueError, match=r"device='toaster': .*toaster") as error:
        on_this_machine(Config("toaster"))
    assert "\n" not in str(error.value)


def test_the_record_of_a_machine_says_what_times_depend_on(cards):
    cards(2)
    record = machine()
    assert record["gpus"] == ["Test GPU"] * 2 and record["threads"] == torch.get_num_threads() and record["processor"]
    assert record["torch"] == torch.__version__.partition("+")[0] or record["torch"] == torch.__version__
    assert record.keys() == {"processor", "threads", "gpus", "python", "torch", "transformers", "numpy"}
    assert machine_line(record).startswith("2 x Test GPU, torch ")


def test_the_record_of_a_run_on_the_processor_names_no_card(cards, monkeypatch):
    cards(2)
    assert machine("cpu")["gpus"] == [] and "threads" in machine_line(machine("cpu"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e6)
    assert peak_memory_mb("cuda:1") == 5 and peak_memory_mb("cpu") > 5


def test_a_machine_in_one_line():
    record = {"processor": "AMD EPYC", "threads": 2, "gpus": [], "torch": "2.11", "transformers": "5.17"}
    assert machine_line(record) == "AMD EPYC, 2 threads, torch 2.11, transformers 5.17"
    assert machine_line(record | {"gpus": ["H100"]}) == "1 x H100, torch 2.11, transformers 5.17"


def test_the_commit_is_that_of_this_checkout_and_none_outside(monkeypatch):
    found = git_sha()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=this.Path(__file__).parent, capture_output=True, text=True)
    assert found is None if head.returncode else head.stdout.startswith(found.removesuffix("-dirty"))

    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(this.subprocess, "run", missing)
    assert git_sha() is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_memory_that_is_free_but_scattered_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [bytearray(60_000) for _ in range(2000)]  # 120 MB in pieces that glibc keeps
    kept = pieces[::100]
    before = resident()
    del pieces
    give_memory_back()
    assert before - resident() > 80e6 and len(kept) == 20
