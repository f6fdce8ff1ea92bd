"""The suite: its table, its plan, and that it ends with the first step that fails. Programs are stand-ins."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentwire.conditions.base import parse_conditions
from latentwire.evaluation.settings import EvalSettings
from latentwire.studies import suite as room
from latentwire.studies.settings import SuiteSettings
from latentwire.studies.suite import logged, steps, suite
from latentwire.training.settings import TrainSettings
from latentwire.utils.cli import fields_of, parse, variable_of

ROOT = Path(__file__).parents[2]
RIVALS = ["tuned/text_tuned", "tuned/token_budget_tuned"]
NAMES = ["baselines", *RIVALS, "latentwire", "eval", "report.html"]
STAGES = {"adapters": {"teacher_seconds": 60.0}, "joint": {"teacher_seconds": 60.0}}
COMPARISON = {
    "a": "latentwire", "b": "token_budget", "llm": "small", "m": 32, "critical": 1, "metric": "f1", "diff": 0.25,
    "ci95": [0.2, 0.3], "verdict": "PASS",
}  # fmt: skip
ROWS = [
    {"condition": name, "llm": "small", "m": 32, "llm_positions": 32, "wire_bytes": sent}
    for name, sent in (("latentwire", 100), ("token_budget", 90))
]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No setting of this machine's environment, and its handler of SIGTERM afterwards."""
    for field in (field for cls in (EvalSettings, TrainSettings, SuiteSettings) for field in fields_of(cls)):
        monkeypatch.delenv(variable_of(field) or "NONE", raising=False)
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("RENDEZVOUS", "--nnodes=1 --rdzv_backend=c10d")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        return SuiteSettings(**({"save_dir": str(tmp_path / "all"), "eval_samples": 7} | changes))

    return make


@pytest.fixture
def programs(monkeypatch):
    """Stand-ins: lists of what was timed (by step) and started (commands); FAILING in `ends` by a word of a command."""
    timed, started, ends = [], [], {}

    def asked(program):
        timed.append((program.name, flags_of(program.command)))
        return {"seconds": 600.0} | ({"stages": STAGES} if "train.py" in " ".join(program.command) else {})

    def run(command, folder):
        started.append((command, folder))
        done = {"eval.py": "results.json", "train.py": "loss.png"}
        for name, file in done.items():
            if name in " ".join(command):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(json.dumps({"comparisons": [COMPARISON], "results": ROWS}))
        return next((status for word, status in ends.items() if word in " ".join(command)), 0)

    monkeypatch.setattr(room, "asked", asked)
    monkeypatch.setattr(room, "predicted", lambda program, processes: asked(program))
    monkeypatch.setattr(room, "logged", run)
    return timed, started, ends


def flags_of(command):
    """What stands behind the program's name."""
    return list(command[command.index(_program(command)) + 1 :])


def settings_of(command):
    """The settings that a program reads from its flags, when what it begins from is there."""
    for flag, value in itertools.pairwise(command):
        if flag in ("--ckpt", "--reuse"):
            Path(value).mkdir(parents=True, exist_ok=True)
    return parse({"eval.py": EvalSettings, "train.py": TrainSettings}[Path(_program(command)).name], flags_of(command))


def _program(command):
    return next(part for part in command if part.endswith(".py"))


def test_every_step_is_a_command_that_its_program_knows(config, tmp_path):
    folder, table = tmp_path / "all", steps(config())
    assert [step.name for step in table] == NAMES
    by_name = {step.name: step for step in table}
    baselines, evaluation = (settings_of(by_name[name].commands[0]) for name in ("baselines", "eval"))
    assert (baselines.conditions, baselines.ckpt, baselines.tuned, baselines.reuse) == ("baselines", "", "", "")
    assert evaluation.conditions == "baselines,learned,text_tuned,token_budget_tuned"
    assert evaluation.ckpt == str(folder / "latentwire" / "checkpoint_best")
    assert evaluation.reuse == str(folder / "baselines") and evaluation.tuned == str(folder / "tuned")
    assert baselines.samples == evaluation.samples == 7
    for name, stage in zip([*RIVALS, "latentwire"], ["text_tuned", "token_budget_tuned", "all"], strict=True):
        (command,) = by_name[name].commands
        watched = ["-u", "-m", "latentwire.utils.launcher", "torch.distributed.run"]
        assert command[1:7] == [*watched, "--nnodes=1", "--rdzv_backend=c10d"]
        assert "--nproc_per_node=2" in command
        trained = settings_of(command)
        assert trained.stage == stage and trained.save_dir == str(folder / name) and trained.resume
    assert flags_of(by_name["report.html"].commands[0]) == [
        *(str(folder / name) for name in ("eval", "latentwire", "tuned")), "--html", str(folder / "report.html"),
    ]  # fmt: skip


def test_groups_stand_for_what_encoder_and_data_have(config):
    wanted = settings_of(steps(config())[-2].commands[0]).conditions
    able = {"chooses_tokens", "reads_answers", "spans"}
    everything = {(c.name, m) for c, m in parse_conditions(wanted, "prompt", 32, able)}
    assert {("token_budget", 64), ("pca_rank", 32), ("encoder_only", 32), ("text_tuned", 32)} <= everything
    assert not {"selected_text_tuned", "oracle_text"} & {name for name, _ in everything}
    few = {c.name for c, _ in parse_conditions(wanted, "context", 32, set())}
    assert "latentwire" in few and not {"encoder_only", "selected_text"} & few


def test_without_trained_rivals_none_is_trained_or_asked(config):
    table = steps(config(trained_rivals=False))
    assert [step.name for step in table] == [name for name in NAMES if name not in RIVALS]
    evaluation = settings_of(table[-2].commands[0])
    assert evaluation.conditions == "baselines,learned" and evaluation.tuned == ""
    assert "tuned" not in " ".join(table[-1].commands[0])


@pytest.mark.parametrize("time", [False, True])
def test_a_dry_run_says_what_is_to_do_and_how_long_and_leaves_nothing(
    config, programs, tmp_path, capsys, monkeypatch, time
):
    """By the cost model alone, or by measuring alone."""
    monkeypatch.setattr(room, "predicted" if time else "asked", lambda *_: pytest.fail("asked"))
    timed, started, _ = programs
    suite(config(dry_run=True, time=time))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"plan, in {tmp_path / 'all'}") and ("cost model" in said[0]) != time
    assert [line.split("to do")[1].split()[0] for line in said[1:-1]] == NAMES
    # Trainings of ten minutes, each with one for the teacher, whose answers its stages share.
    assert [line.split("to do")[0].split() for line in said[1:-1]] == [
        ["10", "min"], ["11", "min"], ["11", "min"], ["11", "min"], ["10", "min"], [],
    ]  # fmt: skip
    assert said[-1].split() == ["53", "min", "altogether"]
    assert not started and list(tmp_path.iterdir()) == []
    assert [name for name, _ in timed] == NAMES[:-1]
    for name, flags in timed:
        read = parse(EvalSettings if name in ("baselines", "eval") else TrainSettings, flags)
        assert read.estimate and read.json
    # It is timed before there is a checkpoint, and what it will take over is not timed again.
    evaluation = parse(EvalSettings, timed[-1][1])
    assert (evaluation.ckpt, evaluation.reuse) == ("", "") and evaluation.tuned
    assert evaluation.conditions == "learned,text_tuned,token_budget_tuned"


def test_json_is_one_object_and_words_go_aside(config, programs, capsys):
    suite(config(dry_run=True, json=True))
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [step["name"] for step in found["steps"]] == NAMES and not any(step["done"] for step in found["steps"])
    assert found["seconds"] == sum(step["seconds"] for step in found["steps"]) == 3180
    assert "altogether" in said.err


def test_all_steps_run_in_order_and_the_critical_tests_come_last(config, programs, tmp_path, capsys):
    _, started, _ = programs
    suite(config())
    folder = tmp_path / "all"
    named = [(Path(_program(command)).name, into) for command, into in started]
    assert named == [
        ("eval.py", folder / "baselines"), ("report.py", folder / "baselines"), ("train.py", folder / RIVALS[0]),
        ("train.py", folder / RIVALS[1]), ("train.py", folder / "latentwire"), ("eval.py", folder / "eval"),
        ("report.py", folder),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.index("plan, in") < said.index("the critical tests:\nPASS")
    assert said.splitlines()[-1].endswith(
        "F1 +0.250 [0.200, 0.300] against token_budget; positions 32 / 32, bytes 100 / 90"
    )


def test_started_again_it_times_only_what_is_left_and_lets_every_program_continue(config, programs, tmp_path, capsys):
    timed, started, ends = programs
    ends["--stage all"] = 9
    with pytest.raises(SystemExit, match="9"):
        suite(config())
    (tmp_path / "all" / "latentwire" / "loss.png").unlink()
    timed.clear()
    started.clear()
    ends.clear()
    capsys.readouterr()
    suite(config())
    assert [name for name, _ in timed] == ["latentwire", "eval"]
    assert len(started) == 7, "a program that is finished says so, or refuses other settings"
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:4]] == ["done"] * 3


@pytest.mark.parametrize(("word", "calls"), [("baselines --samples", 1), ("--stage text_tuned", 3), ("--html", 7)])
def test_a_failing_step_ends_the_suite_with_its_status(config, programs, capsys, word, calls):
    _, started, ends = programs
    ends[word] = 9
    with pytest.raises(SystemExit) as ended:
        suite(config())
    assert ended.value.code == 9 and len(started) == calls
    said = capsys.readouterr()
    assert "ended with status 9" in said.err and "critical" not in said.out


def test_a_step_that_cannot_be_timed_ends_it_before_anything_is_started(config, programs, monkeypatch):
    def refusing(program):
        raise ValueError(f"{program.name} ended with status 2: memory: too little")

    monkeypatch.setattr(room, "asked", refusing)
    with pytest.raises(ValueError, match="baselines ended with status 2: memory"):
        suite(config(time=True))
    assert not programs[1]


def test_a_training_of_a_size_that_nobody_chose_is_refused_before_anything_is_started(config, programs, monkeypatch):
    monkeypatch.setattr(room, "predicted", lambda program, processes: {"seconds": 3.0 * 3600, "stages": {}})
    monkeypatch.setenv("DEVICE", "cpu")
    with pytest.raises(ValueError, match=r"samples: tuned/text_tuned on all questions would take about 3\.0 hours"):
        suite(config())
    assert not programs[1]
    monkeypatch.setenv("SAMPLES", "1000")
    suite(config())
    assert len(programs[1]) == 7


def test_output_goes_to_the_screen_and_into_a_log(tmp_path, capfdbinary):
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(4)"
    assert logged([sys.executable, "-c", code], tmp_path / "a" / "b") == 4
    (log,) = (tmp_path / "a" / "b").glob("20*.log")
    assert log.read_text() == "out\nerr\n" and capfdbinary.readouterr().out == b"out\nerr\n"
    assert logged([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path) == 137
    with pytest.raises(PermissionError, match=r"save_dir: /proc/nothing/.* cannot be written"):
        logged(["true"], Path("/proc/nothing"))


def test_a_stopped_suite_lets_its_program_save_and_leaves_none_behind(tmp_path):
    saving = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(143)))\n"
        "print('begun', os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from latentwire.studies import suite\n"
        "signal.signal(signal.SIGTERM, suite._terminated)\n"
        f"suite.logged([sys.executable, '-c', {saving!r}], Path({str(tmp_path)!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    child = int(process.stdout.readline().split()[1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and process.stdout.read() == "saved\n"
    (log,) = tmp_path.glob("20*.log")
    assert log.read_text().endswith("saved\n")
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
