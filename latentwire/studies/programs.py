"""The package's programs, started by others: their commands, and how they run. It imports nothing that is slow.

Run as a program it is the keeper, which starts a program for a worker of Ray, and ends it with that worker and with
whoever started the worker:

    python latentwire/studies/programs.py LOG PROGRAM [ARGUMENT ...]

What the program prints is added to LOG; its exit status is printed at the end. torchrun starts its workers in sessions
of their own, so no signal to a process group would reach everything.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

from latentwire.llms.known import id_variable
from latentwire.utils.cli import Settings, as_variable, fields_of, variable_of
from latentwire.utils.launcher import VARIABLE, end_with_launchers, with_this_process

ROOT = Path(__file__).parents[2]
ERROR = "error.txt"  # in the folder of a trial that failed
_LOG_LINES = 20  # of a failed program's log, in error.txt
_ENDING = threading.Lock()  # held by whoever ends the keeper


@dataclass(frozen=True)
class Program:
    """A command with what it adds to the environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def everything(self) -> dict[str, str]:
        """The environment that it runs in."""
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | self.environment


def variables(cls: type[Settings], given: Mapping[str, object], llm_ids: Mapping[str, str]) -> dict[str, str]:
    """What a program finds in its environment: these settings and LLMs; all else is empty, which is not set."""
    found = {variable_of(field): as_variable(given.get(field.name)) for field in fields_of(cls) if variable_of(field)}
    return found | {id_variable(name): llm_id for name, llm_id in llm_ids.items()}


def program(name: str, *flags: str) -> list[str]:
    """Command of latentwire/NAME.py, by the interpreter that PYTHON names."""
    return [python(), "-u", str(ROOT / "latentwire" / f"{name}.py"), *flags]


def torchrun(processes: int, rendezvous: str, *flags: str) -> list[str]:
    """Command of latentwire/train.py in so many processes per machine; rendezvous: torchrun's flags."""
    launch = [*rendezvous.split(), f"--nproc_per_node={processes}"]
    watched = ["-m", "latentwire.utils.launcher", "torch.distributed.run"]  # as in scripts/common.sh
    return [python(), "-u", *watched, *launch, str(ROOT / "latentwire" / "train.py"), *flags]


def python() -> str:
    """The interpreter of all programs."""
    return os.environ.get("PYTHON") or sys.executable


def asked(wanted: Program) -> dict:
    """The JSON object that a program prints on standard output; ValueError with its reason when it fails."""
    return json.loads(captured(wanted).strip().splitlines()[-1])


def captured(wanted: Program) -> str:
    """What a program prints on standard output; ValueError with its reason when it fails."""
    done = subprocess.run(wanted.command, env=wanted.everything, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{wanted.name} ended with status {done.returncode}: {_reason(done.stdout + done.stderr)}")
    return done.stdout


def teacher_seconds(estimated: Mapping) -> float:
    """Seconds of an estimate in which the teacher reads: the stages of a training share what it found."""
    return max((stage["teacher_seconds"] for stage in estimated.get("stages", {}).values()), default=0.0)


def run_kept(wanted: Program, log: Path) -> str | None:
    """Run a program, which adds to `log` and dies with this process; None, or what went wrong, in its first line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.is_file() else 0
    with subprocess.Popen(
        [sys.executable, __file__, str(log), *wanted.command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env=wanted.everything | {VARIABLE: with_this_process()},
    ) as keeper:  # fmt: skip
        status = keeper.stdout.read().strip() or "unknown"
    if status == "0":
        return None
    said = log.read_bytes()[before:].decode(errors="replace")
    last = [line for line in said.splitlines() if line.strip()][-_LOG_LINES:]
    return "\n".join([f"{wanted.name} ended with status {status}: {_reason(said)}", "", *last]) + "\n"


def train_and_evaluate(folder: Path, programs: Sequence[Program]) -> dict[str, float]:
    """In a worker of Ray: a configuration's programs, then its F1s. RuntimeError, and error.txt, if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for wanted in programs:
        error = run_kept(wanted, folder / "trial.log")
        if error:
            (folder / ERROR).write_text(error, encoding="utf-8")
            raise RuntimeError(error.splitlines()[0])
    results = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))
    return {f"f1_{row['llm']}": row["f1"] for row in results["results"]}


def _reason(said: str) -> str:
    """The last error that a program named, else the last line that it printed."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def _keep() -> None:
    """Leave the worker's children, because Ray kills those first, and keep the program from there."""
    import psutil  # only a sweep needs it

    if os.fork():
        return
    end_with_launchers(partial(_end_everything, psutil))
    log, *command = sys.argv[1:]
    with open(log, "ab") as output:
        status = subprocess.run(command, stdout=output, stderr=output).returncode
    with _ENDING:
        print(status)


def _end_everything(psutil: ModuleType) -> None:
    _ENDING.acquire()  # for good: this process must not end, because its program did, before all others are killed
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    _keep()
