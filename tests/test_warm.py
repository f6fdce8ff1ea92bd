"""Programs that warm.py starts end, are stopped and hear as those that Python starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time

print(os.getpid(), sys.argv[1:], os.getcwd(), os.environ["FOR_IT"], __name__, flush=True)
print("heard", sys.stdin.read(), file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.fixture
def begin(warm, tmp_path):
    """begin(python, code): a program that tells what it sees, then runs the code."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | warm | {"FOR_IT": "a value"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return lambda python, code: subprocess.Popen(
        [python, "-u", "program.py", code], cwd=tmp_path, env=environment, text=True, **pipes
    )


@pytest.mark.parametrize(
    "code", ["0", "sys.exit(3)", "sys.exit('no')", "1 / 0", "os._exit(7)", "os.kill(os.getpid(), 9)", "os.abort()"]
)
def test_a_program_hears_says_and_ends_as_with_python(begin, warm, code):
    found = []
    for python in (warm["PYTHON"], sys.executable):
        running = begin(python, code)
        out, err = running.communicate("a question")
        found.append((running.returncode, out.split(maxsplit=1)[1], err.splitlines()[0], err.splitlines()[-1]))
    assert found[0] == found[1]


def test_signals_reach_it_and_it_ends_with_who_stands_for_it(begin, warm):
    running = begin(
        warm["PYTHON"], "import signal; signal.signal(15, lambda *_: sys.exit(4)); print(1); time.sleep(60)"
    )
    pid = int(running.stdout.readline().split()[0])
    running.stdin.close()
    assert running.stdout.readline() == "1\n" and pid != running.pid
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 4
    running = begin(warm["PYTHON"], "time.sleep(60)")
    pid = int(running.stdout.readline().split()[0])
    running.kill()
    running.communicate(timeout=20)
    assert not Path(f"/proc/{pid}").exists()
