"""Programs end with the launcher that started them, however that ended.

A script of scripts/ and every program add their process id to LATENTWIRE_LAUNCHER, which whatever they start inherits.
A program watches all of them: where one is gone, kill -9 included, nobody waits for its work, and the same command,
started again, needs its folder. torchrun's workers watch torchrun, too. A program that was started by hand, with nohup
or without, has no launcher and watches nobody.

What is not ours, as torchrun, is watched from its first moment where it is run through this file, which also gives what
it starts another allocator:

    python -m latentwire.utils.launcher torch.distributed.run [ARGUMENT ...]
"""

import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "LATENTWIRE_LAUNCHER"  # process ids of the launchers, the outermost first
_LOOK_S = 0.5  # between two looks, where the system cannot tell of an end
_GRACE_S = 30  # for a training to end its step and save its checkpoint; torchrun gives as much


def end_with_launchers(end: Callable[[], None] | None = None) -> None:
    """Watch the launchers of this process from now on, and become one for what it starts. end: how it ends itself."""
    torchrun = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
    for pid in {*_launchers(), *torchrun} - {os.getpid()}:  # bash scripts/run_all.sh becomes its program
        threading.Thread(target=_end_with, args=(pid, end or _end), daemon=True).start()
    os.environ[VARIABLE] = with_this_process()


def with_this_process() -> str:
    """VARIABLE for what this process starts."""
    pids = _launchers()
    return " ".join(map(str, pids if os.getpid() in pids else [*pids, os.getpid()]))


def _launchers() -> list[int]:
    return [int(pid) for pid in os.environ.get(VARIABLE, "").split() if pid.isdigit()]


def _end_with(pid: int, end: Callable[[], None]) -> None:
    _wait(pid)
    end()


def _end() -> None:
    """End this process: with SIGTERM, and where that takes too long with SIGKILL."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or one that forbids it
        while _lives(pid):
            time.sleep(_LOOK_S)
        return
    end = select.poll()
    end.register(descriptor, select.POLLIN)
    end.poll()  # also where nobody has asked for its status yet
    os.close(descriptor)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and somebody else's
    return True


def allocator() -> str:
    """jemalloc, which Ray brings; "" where Ray is not installed, or lies where LD_PRELOAD cannot name it. With the C
    library's own, a training on a CPU becomes slower as it goes on, and takes more memory (LOG.md, entry 36)."""
    ray = find_spec("ray")
    found = "".join(map(str, Path(ray.origin).parent.glob("core/libjemalloc.so"))) if ray else ""
    return "" if set(found) & set(": ") else found


if __name__ == "__main__":
    from latentwire.utils.cli import has_driver  # which imports this file
    from latentwire.utils.surroundings import cores

    end_with_launchers()
    if not has_driver():
        os.environ.setdefault("LD_PRELOAD", allocator())
    processes = [int(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("--nproc_per_node=")]
    if processes and processes[0] > 1:  # else torchrun gives each one thread
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes[0])))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
