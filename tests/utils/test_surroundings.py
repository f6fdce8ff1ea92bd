"""What surrounds a program is told without torch, and whoever does not answer in time has not answered."""

import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from latentwire.utils import surroundings
from latentwire.utils.surroundings import (
    aside,
    cards,
    cores,
    hub_answers,
    hub_is_there,
    index_is_there,
    installed,
    memory_mb,
    writable,
)

BFLOAT16 = {
    "flags\t\t: fpu avx512f avx512_bf16 sse": True,
    "flags\t\t: fpu avx512f amx_bf16": True,
    "Features\t: fp asimd bf16 i8mm": True,
    "flags\t\t: fpu avx512f avx2": False,
    "model name : bf16 machine\nflags\t: fpu": False,
    "": False,
}


@pytest.mark.parametrize("text", BFLOAT16)
def test_flags_tell_whether_a_processor_multiplies_in_bfloat16(text):
    assert surroundings.native_bfloat16(text) is BFLOAT16[text]


def test_libraries_memory_and_processors_are_those_of_this_machine():
    assert installed("torch") == torch.__version__ and installed("no-such-library") == ""
    assert 1 <= cores() <= 4096 and 100 < memory_mb() < 1e8


def test_a_folder_is_writable_when_a_file_can_be_made_in_it(tmp_path):
    (tmp_path / "file").touch()
    assert [writable(folder) for folder in (tmp_path, tmp_path / "file", Path("/proc"))] == [True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("0, NVIDIA H100 80GB HBM3, 81559\n1, NVIDIA A10, 23028\n",
         {"0: NVIDIA H100 80GB HBM3": 81559, "1: NVIDIA A10": 23028}),
        ("NVIDIA-SMI has failed\n", {}),
        ("0, NVIDIA GB10, [N/A]\n", {}),
    ],
)  # fmt: skip
def test_the_driver_tells_of_cards(monkeypatch, tmp_path, said, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert cards() == expected
    program.write_text("#!/bin/sh\nexit 9\n")
    assert cards() == {}
    monkeypatch.setenv("PATH", "")
    assert cards() == {}


def test_no_answer_in_time_is_a_no(monkeypatch):
    monkeypatch.setattr(surroundings, "WITHIN_S", 0.1)
    forever = threading.Event()
    started = time.monotonic()
    assert aside(forever.wait)() is False and time.monotonic() - started < 5
    forever.set()
    assert aside(lambda: True)() is True and aside(lambda: False)() is False


def test_a_hub_answers_if_with_an_error(monkeypatch):
    def answer(with_what):
        def urlopen(address, timeout):
            if isinstance(with_what, Exception):
                raise with_what
            return with_what

        monkeypatch.setattr(surroundings.urllib.request, "urlopen", urlopen)
        return hub_is_there()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert answer(SimpleNamespace(close=lambda: None)) is True
    assert answer(urllib.error.HTTPError("", 401, "", {}, None)) is True
    assert answer(urllib.error.URLError("no route")) is False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert answer(SimpleNamespace(close=lambda: None)) is False


@pytest.mark.parametrize("status", [0, 1])
def test_pip_tells_whether_there_is_an_index(monkeypatch, status):
    calls = []

    def fake(command, **how):
        calls.append(command)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(surroundings.subprocess, "run", fake)
    assert index_is_there() is (status == 0) and calls[0][:3] == [sys.executable, "-m", "pip"]


def test_nothing_slow_is_imported():
    slow = "{'torch', 'numpy', 'huggingface_hub'}"
    code = f"import sys, latentwire.utils.surroundings; print(sorted({slow} & {{*sys.modules}}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr


@pytest.fixture
def hub(monkeypatch):
    """Whether the hub answers; what was found once is forgotten before and after."""
    asked = []

    def ask(url, timeout):
        asked.append(url)
        if error:
            raise error[0]
        return SimpleNamespace(close=lambda: None)

    error = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", ask)
    hub_answers.cache_clear()
    yield asked, error
    hub_answers.cache_clear()


def test_the_hub_is_asked_once(hub):
    assert hub_answers() and hub_answers()
    assert hub[0] == [constants.ENDPOINT]


def test_a_hub_that_cannot_be_reached_does_not_answer(hub):
    hub[1].append(urllib.error.URLError("no route"))
    assert not hub_answers()


def test_a_hub_that_answers_with_an_error_answers(hub):
    hub[1].append(urllib.error.HTTPError(constants.ENDPOINT, 503, "busy", {}, None))
    assert hub_answers()


def test_a_machine_that_is_told_to_be_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers() and hub[0] == []
