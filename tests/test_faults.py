"""What happens to machines: kills at any moment, a full disk, a GPU that vanishes, a read-only checkout, a clock that
goes back, two runs in one folder. What was finished stays, and the same command ends with the results of a run that
nothing happened to.

    KILLS=20 bash scripts/test.sh tests/test_faults.py -k killed -s        # kills each program 20 times, not twice
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import small_world
from evaluation.evaluations import config as evaluation_config
from evaluation.evaluations import timeless
from studies.test_grid import FLAGS, STUB
from training.run_tools import assert_same_run, read, same

from latentwire.data.question import split_by_article
from latentwire.data.squad import load
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.predictions import Predictions
from latentwire.llms.frozen import FrozenLLM
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.weights import read_config
from latentwire.training.running import train
from latentwire.utils.cli import run
from latentwire.utils.files import read_json, read_lines

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))  # of each program, two in each folder


@pytest.fixture(scope="module")
def start(warm, variables):
    """start(program, argv, kill_after=None, file_bytes=0, **environment): (exit status, seconds, what it said)."""
    surroundings = {k: v for k, v in os.environ.items() if k not in ("SQUAD_DIR", "RAY_ADDRESS")} | warm | variables
    # As many threads as here: the last bits of a run depend on them.
    surroundings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start(program, argv, kill_after=None, file_bytes=0, **environment):
        def limit():
            if file_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)

        began = time.monotonic()
        running = subprocess.Popen(
            [warm["PYTHON"], f"latentwire/{program}.py", *argv], cwd=ROOT, env=surroundings | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit,
        )  # fmt: skip
        try:
            said, _ = running.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            running.kill()
            said, _ = running.communicate()
        return running.returncode, time.monotonic() - began, said

    return start


def flags(config):
    """The command line of these settings."""
    given = dataclasses.asdict(config)
    given |= given.pop("encoder", {})
    switches = [f"--{name}" if on else f"--no-{name}" for name, on in given.items() if isinstance(on, bool)]
    return switches + [f"--{k}={v}" for k, v in given.items() if v not in ("", None) and not isinstance(v, bool)]


def killed_often(once):
    """once(number) kills programs that work in a folder of this number, looks at what they did when they were left
    alone at last, and tells how many did not end before they were killed. KILLS of them at least."""
    killed = number = 0
    while killed < KILLS:
        killed, number = killed + once(str(number)), number + 1
    print(f"{killed} killed in {number} folders, and all ended alike")


def killed_until_done(start, program, argv, seconds, draw):
    """Kill a program twice, each time at some moment of what a whole run takes, then let it end. How many kills came
    in time."""
    moments = [draw.uniform(0, seconds) for _ in range(2)]
    ends = [start(program, argv, kill_after=moment) for moment in moments]
    assert {status for status, *_ in ends} <= {-9, 0}, ends
    status, _, said = start(program, argv)
    assert status == 0, said
    killed = [round(moment, 2) for moment, (status, *_) in zip(moments, ends, strict=True) if status]
    print(f"{program}: killed after {killed} of {seconds:.1f} s")
    return len(killed)


def assert_same_evaluation(folder, results):
    """The results of another run, and each answer once."""
    assert timeless(read_json(folder / "results.json")) == timeless(results)
    lines = read_lines(folder / "predictions.jsonl")
    keys = [(line["condition"], line["m"], line["llm"], line["id"]) for line in lines]
    assert len(set(keys)) == len(keys) == sum(1 if row["llm"] is None else results["n"] for row in results["results"])
    assert {path.name for path in folder.glob(".*")} <= {".lock"}, "nothing half-written stays"


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(seconds, results) of an evaluation that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, seconds, said = start("eval", flags(evaluation_config(folder)))
    assert status == 0, said
    return seconds, read_json(folder / "results.json")


def test_an_evaluation_that_is_killed_at_any_moment_ends_with_the_same_results(start, whole, tmp_path):
    seconds, results = whole
    draw = random.Random("evaluation")

    def once(number):
        killed = killed_until_done(start, "eval", flags(evaluation_config(tmp_path / number)), seconds, draw)
        assert_same_evaluation(tmp_path / number, results)
        return killed

    killed_often(once)


def test_a_training_that_is_killed_at_any_moment_ends_with_the_same_bits(start, joint_config, joint, tmp_path):
    _, seconds, _ = start("train", flags(joint_config(tmp_path / "whole")))
    assert_same_run(tmp_path / "whole", joint)
    draw = random.Random("training")

    def once(number):
        killed = killed_until_done(start, "train", flags(joint_config(tmp_path / number)), seconds, draw)
        assert_same_run(tmp_path / number, joint)
        return killed

    killed_often(once)


def test_an_export_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(start, joint, tmp_path):
    best, shipped, expected = joint / "checkpoint_best", tmp_path / "shipped", tmp_path / "expected"
    _, seconds, _ = start("export", [str(best), str(expected)])
    start("export", [str(best), str(shipped)])
    draw = random.Random("export")

    def once(_):
        status, _, said = start("export", [str(best), str(shipped)], kill_after=draw.uniform(0, seconds))
        assert status in (-9, 0), said
        load_checkpoint(shipped, read_config(shipped)["llms"])
        return status == -9

    killed_often(once)
    status, _, said = start("export", [str(best), str(shipped)])
    assert status == 0, said
    for path in expected.glob("*.safetensors"):
        assert same(read(path), read(shipped / path.name)), path.name
    assert {path.name for path in tmp_path.iterdir()} == {"shipped", "expected"}, "nothing half-written stays"


def test_a_sweep_that_is_killed_at_any_moment_ends_with_the_same_ranking(start, tmp_path):
    """With a stand-in for the programs of its trials, as tests/studies/test_grid.py has it."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    ids = [q.id for q in split_by_article(load("sample", "train").questions)[1]]
    start = partial(
        start, PYTHON=str(stub), WARM=sys.executable, CALLS=str(tmp_path / "calls"), STUB_IDS=json.dumps(ids)
    )

    def argv(name):
        given = FLAGS | {"latent_lens": "16", "ftce_weights": "0.5", "save_dir": tmp_path / name}
        return [f"--{k}={v}" for k, v in given.items()]

    status, seconds, said = start("sweep", argv("whole"))
    assert status == 0, said
    draw = random.Random("sweep")

    def once(number):
        killed = killed_until_done(start, "sweep", argv(number), seconds, draw)
        for name in ("sweep_summary.json", "sweep_results.csv"):
            assert (tmp_path / number / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        return killed

    killed_often(once)


SIZES = [100, 1500, 4000, 12_000, 60_000, 250_000, 2_000_000]  # bytes of a file before the disk is "full"


def told(status, said):
    """What a program said when it ended: done, or one line of an error and no traceback."""
    errors = re.findall("error: .*", said)  # behind a progress bar, too
    assert "Traceback" not in said, said
    assert (status == 0 and not errors) or (status == 2 and len(errors) == 1), said
    assert not errors or re.search("kept|in use|cannot write the run folder", errors[0]), errors
    return errors[0] if errors else ""


def test_a_full_disk_ends_an_evaluation_with_one_line_and_loses_nothing(start, whole, tmp_path):
    argv, errors = flags(evaluation_config(tmp_path / "run")), []
    for size in SIZES:  # one folder: each run goes on where the one before met the end of the disk
        status, _, said = start("eval", argv, file_bytes=size)
        errors.append(told(status, said))
    assert len([*filter(None, errors)]) >= 3 and not errors[-1], errors
    assert_same_evaluation(tmp_path / "run", whole[1])


def test_a_full_disk_ends_a_training_with_one_line_and_loses_nothing(start, joint_config, joint, tmp_path):
    argv, cache, errors = flags(joint_config(tmp_path / "run")), str(tmp_path / "cache"), []
    for size in (*SIZES, 0):
        status, _, said = start("train", argv, file_bytes=size, LATENTWIRE_CACHE=cache)
        errors.append(told(status, said))
    assert len([*filter(None, errors)]) >= 3 and not errors[-1], errors
    assert any("what the teacher read" in error for error in errors), errors
    assert any("checkpoint" in error for error in errors), errors
    assert_same_run(tmp_path / "run", joint)


def test_a_full_disk_ends_an_export_with_one_line_and_keeps_the_one_before(start, joint, tmp_path):
    argv = [str(joint / "checkpoint_best"), str(tmp_path / "shipped")]
    assert told(*start("export", argv)[::2]) == ""
    before = (tmp_path / "shipped" / "encoder.safetensors").read_bytes()
    for size in SIZES[:-2]:
        error = told(*start("export", argv, file_bytes=size)[::2])
        assert str(tmp_path / "shipped") in error and "previous one is kept" in error
        load_checkpoint(tmp_path / "shipped", read_config(tmp_path / "shipped")["llms"])
        assert (tmp_path / "shipped" / "encoder.safetensors").read_bytes() == before


def test_a_full_disk_ends_a_report_with_one_line_and_the_next_one_is_whole(start, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    errors = [told(*start("report", [str(folder)], file_bytes=size)[::2]) for size in (*SIZES, 0)]
    assert len([*filter(None, errors)]) >= 3 and not errors[-1], errors
    assert all((folder / name).stat().st_size for name in ("table.md", "summary.md", "headline.md", "report.html"))
    assert (folder / "hierarchy.png").read_bytes().endswith(b"IEND\xaeB`\x82"), "the whole chart"


def lose_after(patch, calls):
    """An LLM computes on a GPU that vanishes after so many prompts and tokens."""
    seen = []

    def losing(compute):
        def computed(self, *args, **kwargs):
            seen.append(self.name)
            if len(seen) > calls:
                raise torch.AcceleratorError("CUDA error: GPU is lost\nCUDA kernel errors might be reported elsewhere")
            return compute(self, *args, **kwargs)

        return computed

    for name in ("_read", "_forward"):
        patch.setattr(FrozenLLM, name, losing(getattr(FrozenLLM, name)))


@pytest.mark.parametrize(
    ("program", "calls"),
    [("evaluation", 1), ("evaluation", 20), ("evaluation", 100), ("training", 1), ("training", 40)],
)
def test_a_gpu_that_vanishes_ends_a_program_with_one_line_and_loses_nothing(
    variables, whole, joint_config, joint, tmp_path, capsys, program, calls
):
    """The error that PyTorch raises for it, in an LLM's forward pass."""
    folder = tmp_path / "run"
    work = {"evaluation": lambda: evaluate(evaluation_config(folder)), "training": lambda: train(joint_config(folder))}
    with small_world(variables) as patch:
        lose_after(patch, calls)
        with pytest.raises(SystemExit) as end:
            run(work[program])
    assert "the device failed (CUDA error: GPU is lost)" in told(end.value.code, capsys.readouterr().err)
    with small_world(variables):
        run(work[program])
    if program == "evaluation":
        assert_same_evaluation(folder, whole[1])
    else:
        assert_same_run(folder, joint)


# As a program, with a checkout that nothing can be written into: whatever tries is refused, as by a read-only disk.
READ_ONLY = """
import errno, os, runpy, sys

root = sys.argv.pop(1)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"}


def refuse(event, arguments):
    writes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(root + os.sep) and not path.startswith(os.path.join(root, ".venv")):
            print("tried to write", path, file=sys.stderr)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_read_only_checkout_is_enough_where_the_output_is_elsewhere(variables, whole, codebook, short, tmp_path):
    (tmp_path / "read_only.py").write_text(READ_ONLY)
    environment = {k: v for k, v in os.environ.items() if k != "SQUAD_DIR"} | variables
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    training = short(tmp_path / "trained", stage="scores", init=str(codebook))
    for program, argv in (
        ("eval", flags(evaluation_config(tmp_path / "run"))), ("report", [str(tmp_path / "run")]),
        ("train", flags(training)),
    ):  # fmt: skip
        command = [sys.executable, str(tmp_path / "read_only.py"), str(ROOT), f"{ROOT}/latentwire/{program}.py", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "tried to write" not in done.stderr, done.stderr[-2000:]
    assert_same_evaluation(tmp_path / "run", whole[1])
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "trained" / "loss.png").is_file()


def test_a_clock_that_goes_back_changes_nothing(variables, whole, joint_config, joint, tmp_path, monkeypatch):
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    with small_world(variables) as patch:
        patch.setattr("latentwire.evaluation.predictions.Predictions.append", ends_after(3))
        with pytest.raises(KeyboardInterrupt):
            evaluate(evaluation_config(tmp_path / "run"))
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (3e9, 3e9))  # written in what is the future by now
    with small_world(variables):
        results = evaluate(evaluation_config(tmp_path / "run"))
        train(joint_config(tmp_path / "trained"))
    assert timeless(results) == timeless(whole[1])
    assert_same_run(tmp_path / "trained", joint)


def ends_after(count):
    """Predictions.append that is interrupted after so many batches."""
    append, seen = Predictions.append, []

    def ending(self, lines):
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(lines)
        append(self, lines)

    return ending


def test_of_two_runs_in_one_folder_the_second_is_refused_and_the_first_is_named(start, whole, variables, tmp_path):
    argv = flags(evaluation_config(tmp_path / "run"))
    command = [sys.executable, "-c", f"{SLOW}\nrun(main)", *argv]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "predictions.jsonl").is_file() and first.poll() is None:
            time.sleep(0.02)
        status, _, said = start("eval", argv)
    finally:
        first.kill()
        first.wait()
    error = told(status, said)
    assert f"{tmp_path / 'run'} is in use by a running process (process {first.pid} on " in error, said
    assert f"--save_dir={tmp_path / 'run'}" in error, "its command line, too"
    status, _, said = start("eval", argv)
    assert status == 0, said
    assert_same_evaluation(tmp_path / "run", whole[1])


SLOW = """
import time
from latentwire.eval import main
from latentwire.evaluation.predictions import Predictions
from latentwire.utils.cli import run

append = Predictions.append
Predictions.append = lambda self, lines: (append(self, lines), time.sleep(60))
""".strip()
