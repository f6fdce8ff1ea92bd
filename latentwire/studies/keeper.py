"""Run a program for a worker of Ray, and end it with all its children when that worker dies.

    python latentwire/keeper.py LOG PROGRAM [ARGUMENT ...]

What the program prints is added to LOG; its exit status is printed at the end. Standard input ends with the worker.
torchrun starts its workers in sessions of their own, so no signal to a process group would reach everything.
"""

import contextlib
import os
import subprocess
import sys
import threading

import psutil


def main() -> None:
    """Leave the worker's children, because Ray kills those first, and keep the program from there."""
    if os.fork():
        return
    threading.Thread(target=_end_with_worker, daemon=True).start()
    log, *program = sys.argv[1:]
    with open(log, "ab") as output:
        print(subprocess.run(program, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode)


def _end_with_worker() -> None:
    os.read(0, 1)  # nothing is ever written there: it returns when the worker is gone
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    main()
