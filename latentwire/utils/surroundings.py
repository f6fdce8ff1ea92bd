"""What surrounds a program: libraries, memory, processor, cards, hub and package index. Nothing slow is imported."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path

WITHIN_S = 2.5  # whoever is asked has to answer
_HUB_S = 5  # that the hub may take to answer who needs it
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 processors, and of ARM's


def installed(name: str) -> str:
    """The version of a library, "" where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads that a program computes with on a CPU, as far as can be told without PyTorch."""
    return int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or cores())  # "4,2": of nested levels


def memory_mb() -> float:
    """Memory of this machine, or of the container that this runs in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.is_file() else ""
        found = min(found, int(text)) if text.isdigit() else found
    return found / 1e6


def writable(folder: Path) -> bool:
    """Whether a file can be made in a folder; the permissions alone tell root nothing."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def native_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether the processor multiplies in bfloat16 itself; cpuinfo: text of /proc/cpuinfo."""
    if cpuinfo is None:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return bool(_BFLOAT16 & {flag for line in lines for flag in line.split()})


def cards() -> dict[str, int]:
    """Names of NVIDIA's GPUs, numbered, with their memory in megabytes, as the driver tells."""
    try:
        query = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split(", ") for line in told.stdout.splitlines()] if told.returncode == 0 else []
    told_of = [row for row in rows if len(row) == 3 and row[2].isdigit()]  # a driver may not know the memory
    return {f"{number}: {name}": int(memory) for number, name, memory in told_of}


def aside(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Begin to ask; what is given back waits for the answer, WITHIN_S at most, and then takes it for a no."""
    answer = []
    asking = threading.Thread(target=lambda: answer.append(ask()), daemon=True)  # a name server may keep it waiting
    asking.start()

    def wait() -> bool:
        asking.join(WITHIN_S)
        return answer == [True]

    return wait


def hub_is_there(within_s: float = WITHIN_S) -> bool:
    """Whether the model hub answers in time."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=within_s).close()
    except urllib.error.HTTPError:
        return True  # it answers, if with an error
    except OSError:
        return False
    return True


@cache
def hub_answers() -> bool:
    """Whether the model hub can be reached; asked once, because the hub's own client retries for most of a minute."""
    return hub_is_there(_HUB_S)


def index_is_there() -> bool:
    """Whether pip finds a package that the environment needs."""
    command = [sys.executable, "-m", "pip", "index", "versions", "filelock", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True).returncode == 0
