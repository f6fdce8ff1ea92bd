"""This machine: its devices, its libraries, its commit."""

import ctypes
import dataclasses
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from latentwire.utils.surroundings import native_bfloat16

T = TypeVar("T")
NATIVE = "native"  # a dtype that the device decides
_CLEAR = "/proc/self/clear_refs"


def on_this_machine(config: T) -> T:
    """The settings with `device` and `dtype` filled in: CUDA and bfloat16 where there is a GPU, else CPU and float32.

    dtype "native": bfloat16 wherever the device computes in it.
    Raises ValueError for a device that this machine does not have.
    """
    device = device_of(config.device)
    fast = device != "cpu" or (config.dtype == NATIVE and native_bfloat16())
    dtype = config.dtype if config.dtype not in ("", NATIVE) else ("bfloat16" if fast else "float32")
    return dataclasses.replace(config, device=device, dtype=dtype)


def device_of(name: str) -> str:
    """The device of this name; "": CUDA where there is a GPU, else the CPU. ValueError for one that is not there."""
    if name == "cpu":
        return name
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    cards = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= cards:
        raise ValueError(f"device={device!r}: this machine has {cards} CUDA devices; try cpu")
    return device


def now(device: object) -> float:
    """Seconds on a clock, once a device has done what it was given: a GPU works on while Python goes on."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: str = "") -> dict:
    """Processor or accelerators and library versions: what times and last digits depend on. device: "cpu" leaves the
    accelerators out."""
    import torch

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(0 if device == "cpu" else torch.cuda.device_count())],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def peak_memory_mb(device: str) -> float:
    """Most memory so far, in MB: of the GPU, if it is one, else of the process."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def forget_peak(device: str) -> None:
    """Let `peak_mb` begin anew, where the system can."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif os.access(_CLEAR, os.W_OK):
        Path(_CLEAR).write_text("5")  # resets VmHWM (man proc_pid_clear_refs)


def peak_mb(device: str) -> float | None:
    """Most memory since `forget_peak`, in MB; None where the system does not tell."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1e3 if found else None


def give_memory_back() -> None:
    """Let glibc return what was freed: texts of many lengths leave holes, which add up (60 MB per 256 paragraphs)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def git_sha() -> str | None:
    """Commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(record: Mapping) -> str:
    """A record of `machine` in one line, for tables and logs."""
    gpus = record["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{record['processor']}, {record['threads']} threads"
    return f"{where}, torch {record['torch']}, transformers {record['transformers']}"
