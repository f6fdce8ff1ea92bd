"""Everything in one command: a table of steps, what is done of it and how long the rest takes, and then the steps.

Each step is one or more programs in processes of their own, which keep what they have finished. Started again, the
suite goes through all of them once more, so that a program refuses what a changed setting would make different.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from latentwire.evaluation.results import critical_lines
from latentwire.studies.programs import Program, asked, program, teacher_seconds, torchrun
from latentwire.studies.scale.estimates import SAYS, predicted
from latentwire.studies.settings import SuiteSettings
from latentwire.training.settings import LaunchSettings, TrainSettings
from latentwire.training.stages import STAGES
from latentwire.utils.cli import has_gpu, parse, refuse_long, value_of
from latentwire.utils.files import read_json

# What the suite tells its programs by flags; an empty variable is not set.
_BY_FLAGS = dict.fromkeys(("OUTPUT_DIR", "CKPT", "TUNED", "REUSE"), "")
_ESTIMATE = ["--estimate", "--json"]
_CHUNK = 65536


@dataclass(frozen=True)
class Step:
    """A step of the suite. folder: where its logs go; done: a file that is there when it has ended; timing: the command
    that tells its time, None where it takes seconds; trains: whether it is a training."""

    name: str
    folder: Path
    commands: Sequence[Sequence[str]]
    done: Path
    timing: Sequence[str] | None = None
    trains: bool = False


def suite(config: SuiteSettings) -> None:
    """Print the plan, run its steps, and print the critical tests. A step that fails ends the program with its status.

    Raises ValueError where a step's time cannot be told, or where a training takes over LONGEST_S on a CPU and nobody
    chose the number of questions.
    """
    table = steps(config)
    seconds = _plan(config, table)
    if config.dry_run:
        return
    _refuse_long(table, seconds)
    signal.signal(signal.SIGTERM, _terminated)
    for step in table:
        for command in step.commands:
            status = logged(command, step.folder)
            if status:
                print(f"error: {step.name} ended with status {status}; see the log in {step.folder}", file=sys.stderr)
                sys.exit(status)
    print("the critical tests:")
    print(*critical_lines(read_json(Path(config.save_dir) / "eval" / "results.json")), sep="\n")


def steps(config: SuiteSettings) -> list[Step]:
    """The table of steps, in their order."""
    root = Path(config.save_dir)  # as it was given: records name it
    baselines, tuned, trained, judged = (root / name for name in ("baselines", "tuned", "latentwire", "eval"))
    rivals = [s.name for s in STAGES.values() if s.rival and not s.needs_checkpoint] if config.trained_rivals else []
    learned = ",".join(["learned", *rivals])
    with_rivals = ["--tuned", str(tuned)] if rivals else []
    begun = ["--ckpt", str(trained / "checkpoint_best"), "--reuse", str(baselines)]
    found = [str(folder) for folder in (judged, trained, *([tuned] if rivals else []))]

    def evaluation(folder: Path, conditions: str, *flags: str) -> list[str]:
        samples = ["--samples", str(config.eval_samples)]
        return program("eval", "--conditions", conditions, *samples, "--save_dir", str(folder), *flags)

    page = root / "report.html"
    first = evaluation(baselines, "baselines")
    last = evaluation(judged, f"baselines,{learned}", *begun, *with_rivals)
    # By then the baselines' answers are there; the untrained wire takes the time of the trained one.
    rest = evaluation(judged, learned, *with_rivals, *_ESTIMATE)
    return [
        Step(
            "baselines", baselines, [first, program("report", str(baselines))], baselines / "results.json",
            [*first, *_ESTIMATE],
        ),
        *(_training(f"tuned/{name}", tuned / name, "--stage", name, "--init", "") for name in rivals),
        _training("latentwire", trained, "--stage", "all"),
        Step("eval", judged, [last], judged / "results.json", rest),
        Step("report.html", root, [program("report", *found, "--html", str(page))], page),
    ]  # fmt: skip


def _training(name: str, folder: Path, *flags: str) -> Step:
    launch = parse(LaunchSettings, [])
    command = torchrun(launch.nproc, launch.rendezvous, *flags, "--save_dir", str(folder))
    return Step(name, folder, [command], folder / "loss.png", [*command, *_ESTIMATE], trains=True)


def _plan(config: SuiteSettings, table: Sequence[Step]) -> dict[str, float]:
    """Print what is done and what the rest takes, in words or as JSON; seconds by the name of a step, 0 if done."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if config.json else sys.stdout, flush=True)

    how = "timing a few steps and batches of what is to do" if config.time else SAYS
    say(f"plan, in {config.save_dir} ({how}):")
    seconds = {}
    for step in table:
        done = step.done.is_file()
        timed = step.timing and not done
        seconds[step.name] = _seconds(step, config.time) if timed else 0.0
        minutes = f"{seconds[step.name] / 60:4.0f} min" if timed else " " * 8
        say(f"  {minutes}  {'done ' if done else 'to do'}  {step.name}")
    total = sum(seconds.values())
    say(f"  {total / 60:4.0f} min  altogether")
    if config.json:
        rows = [{"name": s.name, "done": s.done.is_file(), "seconds": seconds[s.name]} for s in table]
        print(json.dumps({"steps": rows, "seconds": total}))
    return seconds


def _seconds(step: Step, measured: bool) -> float:
    wanted = Program(step.name, step.timing, _BY_FLAGS)
    found = asked(wanted) if measured else predicted(wanted, parse(LaunchSettings, []).nproc)
    return found["seconds"] + teacher_seconds(found)


def _refuse_long(table: Sequence[Step], seconds: dict[str, float]) -> None:
    """Refuse at once a training that takes too long, instead of when its turn comes."""
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    device = value_of(fields["device"], TrainSettings) or ("cuda" if has_gpu() else "cpu")
    by_hand = value_of(fields["samples"], TrainSettings) is not None
    for step in (step for step in table if step.trains):
        refuse_long(seconds[step.name], device, by_hand, f"{step.name} on all questions")


def logged(command: Sequence[str], folder: Path) -> int:
    """Run a command, whose output goes to the screen and into a log in `folder`; its status, as shells have it.

    What it started ends when this process is interrupted or ended by SIGTERM. Raises PermissionError for a folder that
    cannot be written.
    """
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
    except OSError as error:
        raise PermissionError(f"save_dir: {path} cannot be written ({error.strerror}); choose another one") from error
    wanted = Program(command[0], command, _BY_FLAGS)
    with (
        log,
        subprocess.Popen(command, env=wanted.everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running,
    ):

        def pass_on() -> None:
            while said := os.read(running.stdout.fileno(), _CHUNK):  # a progress bar shows before its line ends
                for out in (sys.stdout.buffer, log):
                    out.write(said)
                    out.flush()

        try:
            pass_on()
        except (KeyboardInterrupt, SystemExit):
            running.terminate()  # a training saves its checkpoint first
            pass_on()
            raise
    return running.returncode if running.returncode >= 0 else 128 - running.returncode


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)
