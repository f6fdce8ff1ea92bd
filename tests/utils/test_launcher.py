"""Programs end with the script or program that started them, and with nobody else."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from latentwire.utils import launcher
from latentwire.utils.cli import has_driver
from latentwire.utils.surroundings import cores

ROOT = Path(__file__).parents[2]
WITHIN_S = 2.0
# Says that it works, and works; PROGRAM_STARTS names a program that it starts first.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path

from latentwire.utils import launcher
from latentwire.utils.cli import run

folder = Path(sys.argv[1])


if "stubborn" in sys.argv:
    launcher._GRACE_S = 0.5


def saved(*_):
    time.sleep(1.5 if "slow" in sys.argv else 0)
    (folder / f"asked {os.getpid()}").touch()
    if "stubborn" not in sys.argv:
        sys.exit(143)


def main():
    signal.signal(signal.SIGTERM, saved)
    (folder / f"works {os.getpid()}").touch()
    if "starts" in sys.argv:
        subprocess.run([sys.executable, __file__, sys.argv[1]])
    while True:
        time.sleep(0.1)


run(main)
"""
OURS = {
    "program": 'logged "$PYTHON" -u {program} {folder}',
    "stubborn": 'logged "$PYTHON" -u {program} {folder} stubborn',
    "slow": 'logged "$PYTHON" -u {program} {folder} slow',
    "inner": "bash {inner}",
    "torchrun": 'logged "$PYTHON" -u -m latentwire.utils.launcher torch.distributed.run --standalone '
    "--nproc_per_node=2 {program} {folder}",
    "replaced": 'exec "$PYTHON" -u {program} {folder} starts',
}


@pytest.fixture
def start(tmp_path):
    """Start a launcher of one of OURS, or any shell text; gives its process and those that work when `count` do."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != launcher.VARIABLE and not k.startswith("TORCHELASTIC")}
    environment |= {"PYTHON": sys.executable, "OUTPUT_DIR": str(tmp_path / "logs"), "PYTHONPATH": str(ROOT)}
    tops = []

    def begin(text, count=1, ours=True):
        names = {"program": tmp_path / "program.py", "folder": tmp_path, "inner": tmp_path / "program.sh"}
        for name, line in (OURS | {"started": text}).items():
            head = f"source {ROOT}/scripts/common.sh\n" if ours or name in OURS else ""
            (tmp_path / f"{name}.sh").write_text(head + line.format(**names) + "\necho the end\n")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        top = subprocess.Popen(["bash", str(tmp_path / "started.sh")], env=environment, **quiet)
        tops.append(top)
        until = time.monotonic() + 60
        while len(working(tmp_path)) < count and time.monotonic() < until:
            time.sleep(0.05)
        assert len(working(tmp_path)) == count, "it did not start"
        return top, working(tmp_path)

    yield begin
    for process in (*working(tmp_path), *tops):
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            process.kill()
    for top in tops:
        top.wait()


def working(folder):
    found = [int(path.name.split()[1]) for path in folder.glob("works *")]
    return [psutil.Process(pid) for pid in found if lives(pid)]


def lives(pid):
    """Whether a process is there and no mere entry that nobody has asked for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_after(pids, seconds=WITHIN_S):
    """Which of the processes still live after so many seconds, or sooner when none does."""
    until = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return [pid for pid in pids if lives(pid)]


@pytest.mark.parametrize(
    ("name", "count"), [("program", 1), ("stubborn", 1), ("slow", 1), ("inner", 1), ("torchrun", 2), ("replaced", 2)]
)
def test_nothing_outlives_a_launcher_that_is_killed(start, tmp_path, name, count):
    top, workers = start(OURS[name], count)
    tree = [process.pid for process in psutil.Process(top.pid).children(recursive=True)]
    assert {worker.pid for worker in workers} - {top.pid} <= set(tree)
    top.kill()  # nobody asks for its status, as in a container without init
    assert not left_after(tree, 10.0)  # much sooner on a machine that has little else to do
    asked = {int(path.name.split()[1]) for path in tmp_path.glob("asked *")}
    assert asked == {worker.pid for worker in workers} - {top.pid}, "each had a moment to save"


@pytest.mark.parametrize(("flag", "expected"), [("--nproc_per_node=2", str(max(1, cores() // 2))), ("more", "")])
def test_processes_share_the_processors(tmp_path, flag, expected):
    """torchrun would give each of them one thread."""
    (tmp_path / "says.py").write_text("import os\nprint(os.environ.get('OMP_NUM_THREADS', ''))")
    command = [sys.executable, "-m", "latentwire.utils.launcher", "says", flag]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == expected


def test_a_torchrun_that_is_still_importing_ends_with_its_launcher(start):
    top, _ = start(OURS["torchrun"], count=0)
    until = time.monotonic() + 60
    while not (tree := of_torchrun(top)) and time.monotonic() < until:
        time.sleep(0.01)
    assert tree, "torchrun was not found"
    time.sleep(0.5)  # importing torch takes longer
    assert of_torchrun(top) == tree, "it has started no worker yet"
    top.kill()
    assert not left_after(tree)


def of_torchrun(top):
    """Ids of the processes that torchrun's command line names, and of those that they started."""
    children = [child for child in psutil.Process(top.pid).children() if "torch.distributed.run" in line_of(child)]
    return [process.pid for child in children for process in (child, *child.children(recursive=True))]


def line_of(process):
    """The command line of a process; none of one that has ended since it was listed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie, too
        return []


def test_workers_of_torchrun_end_with_torchrun_alone(start):
    _, workers = start(OURS["torchrun"], 2)
    workers[0].parent().kill()
    assert not left_after([worker.pid for worker in workers])


@pytest.mark.parametrize("by_hand", ["{python} {program} {folder}", "nohup {python} {program} {folder} &\nsleep 60"])
def test_a_program_that_was_started_by_hand_outlives_its_shell(start, by_hand):
    top, (worker,) = start(by_hand.replace("{python}", sys.executable), ours=False)
    top.kill()
    top.wait()
    assert left_after([worker.pid], WITHIN_S) == [worker.pid]


def test_a_launcher_in_the_background_outlives_the_shell_that_started_it(start, tmp_path):
    top, (worker,) = start(f"nohup bash {tmp_path}/program.sh &", ours=False)
    assert top.wait(timeout=10) == 0
    assert left_after([worker.pid], WITHIN_S) == [worker.pid]
    launcher_of = worker.parent()
    launcher_of.kill()
    assert not left_after([worker.pid, launcher_of.pid])


def test_a_program_whose_launcher_is_gone_already_ends_at_once(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = os.environ | {launcher.VARIABLE: str(gone.pid), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "program.py", tmp_path], env=environment, timeout=20)
    assert done.returncode in (143, -signal.SIGTERM)


@pytest.mark.parametrize("forbidden", [AttributeError, OSError])
def test_where_the_system_does_not_tell_of_an_end_it_is_looked_for(monkeypatch, forbidden):
    def refuse(pid):
        raise forbidden

    monkeypatch.setattr(launcher.os, "pidfd_open", refuse, raising=False)
    monkeypatch.setattr(launcher, "_LOOK_S", 0.02)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    waiting = threading.Thread(target=launcher._wait, args=(other.pid,), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    other.kill()
    other.wait()
    waiting.join(1)
    assert not waiting.is_alive()


def test_a_process_of_somebody_else_lives(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(launcher.os, "kill", refuse)
    assert launcher._lives(1)


def test_a_program_is_a_launcher_of_what_it_starts_once(monkeypatch):
    monkeypatch.setenv(launcher.VARIABLE, "")
    for _ in range(2):
        launcher.end_with_launchers()
        assert os.environ[launcher.VARIABLE] == str(os.getpid())


@pytest.mark.parametrize("chosen", [None, ""])
def test_what_it_starts_has_jemalloc_unless_another_allocator_was_chosen(tmp_path, chosen):
    (tmp_path / "starts.py").write_text("import subprocess; subprocess.run(['cat', '/proc/self/maps'])")
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    environment |= {} if chosen is None else {"LD_PRELOAD": chosen}
    command = [sys.executable, "-m", "latentwire.utils.launcher", "starts"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, "a library that cannot be loaded is told there"
    assert ("libjemalloc.so" in done.stdout) == (chosen is None and not has_driver())


def test_an_allocator_that_ld_preload_cannot_name_is_left_out(monkeypatch, tmp_path):
    for folder, there in (("rays", True), ("my rays", False), ("a:b", False)):
        library = tmp_path / folder / "core" / "libjemalloc.so"
        library.parent.mkdir(parents=True)
        library.touch()
        spec = SimpleNamespace(origin=str(tmp_path / folder / "__init__.py"))
        monkeypatch.setattr(launcher, "find_spec", lambda _, spec=spec: spec)
        assert launcher.allocator() == (str(library) if there else "")
