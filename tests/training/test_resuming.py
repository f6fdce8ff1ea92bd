"""No kill changes the outcome of a training, and nothing but the same training goes on in its folder."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_world
from training.run_tools import (
    Stopped,
    assert_same_run,
    files,
    lines_of,
    stop_in_step,
    trained_on,
)

from latentwire.models import checkpoint
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.weights import load_training, read_config
from latentwire.training.running import train
from latentwire.training.trainer import Batches, Trainer
from latentwire.utils.files import read_sealed, write_sealed
from latentwire.utils.runs import RunFolder

pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = Path(__file__).parents[2]
# Imports once; then one process for each way to die, as a user's would: the command line, killed from inside.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

import torch

from latentwire.train import main
from latentwire.training.trainer import Trainer
from latentwire.utils.cli import run


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def in_step(step, number=signal.SIGKILL):
    loss = Trainer._loss

    def dying(self, now, *part):
        if now == step and (self.folder / "metrics.jsonl").is_file():  # not while the steps are timed
            kill(number)
        return loss(self, now, *part)

    Trainer._loss = dying


def in_write(count):
    save, seen = torch.save, []

    def dying(state, path):
        if Path(path).name == "training.pt":
            seen.append(path)
            if len(seen) == count:
                Path(path).write_bytes(b"half a file")
                kill()
        save(state, path)

    torch.save = dying


def between_renames(count):
    rename, seen = Path.rename, []

    def dying(self, target):
        if self.name == ".checkpoint_last.part":
            seen.append(self)
            if len(seen) == count:
                kill()
        return rename(self, target)

    Path.rename = dying


def in_validation():
    validate = Trainer._validate

    def dying(self, log):
        if self.step:
            self.job.validate = kill
        validate(self, log)

    Trainer._validate = dying


def after_validation():
    note = Trainer._note

    def dying(self, log, line):
        note(self, log, line)
        if line["step"] and "validation" in line:
            kill()

    Trainer._note = dying


ways = {
    "first_step": lambda: in_step(0),
    "step": lambda: in_step(4),
    "write": lambda: in_write(3),
    "renames": lambda: between_renames(3),
    "terminated": lambda: in_step(3, signal.SIGTERM),
    "validation": in_validation,
    "validated": after_validation,
}
runs, threads = json.loads(sys.argv[1])
pids = {}
for way, flags in runs.items():
    pids[way] = os.fork()
    if pids[way] == 0:
        torch.set_num_threads(threads)
        sys.argv = ["train.py", *flags]
        ways[way]()
        try:
            run(main)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
print(json.dumps({way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for way, pid in pids.items()}))
"""
WAYS = {
    "first_step": -9, "step": -9, "write": -9, "renames": -9, "terminated": 143, "validation": -9, "validated": -9,
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped_at_4(joint_config, runs, variables):
    """The joint run, interrupted in its fifth step."""
    folder = runs / "stopped"
    with small_world(variables) as patch:
        stop_in_step(patch, 4)
        with pytest.raises(Stopped):
            train(joint_config(folder))
    assert read_config(folder / "checkpoint_last")["step"] == 4
    return folder


@pytest.fixture
def stopped(stopped_at_4, tmp_path):
    """A copy of the interrupted run that a test may change."""
    return shutil.copytree(stopped_at_4, tmp_path / "run")


@pytest.fixture(scope="module")
def killed(joint_config, joint, tmp_path_factory, variables):
    """Runs that were killed: {way: (folder, exit status)}."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "driver.py").write_text(DRIVER)
    runs = {way: flags(joint_config(folder / way)) for way in WAYS}
    done = subprocess.run(
        [sys.executable, str(folder / "driver.py"), json.dumps([runs, torch.get_num_threads()])],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    return {way: (folder / way, statuses[way]) for way in WAYS}


def flags(config):
    """The command line of these settings."""
    given = dataclasses.asdict(config)
    given |= given.pop("encoder")
    switches = [f"--{name}" if on else f"--no-{name}" for name, on in given.items() if isinstance(on, bool)]
    return switches + [f"--{k}={v}" for k, v in given.items() if v not in ("", None) and not isinstance(v, bool)]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_continues_to_the_same_bits(killed, joint_config, joint, way, capsys):
    folder, status = killed[way]
    assert status == WAYS[way]
    done = {
        "first_step": None, "step": 4, "write": 2, "renames": 2, "terminated": 4, "validation": 3, "validated": 3,
    }[way]  # fmt: skip
    last, judged = folder / "checkpoint_last", [0, 3] if done == 4 or way == "validated" else [0]
    assert [line["step"] for line in lines_of(folder) if "validation" in line] == judged
    if way in ("validation", "validated"):
        assert not load_training(last)["judged"], "a step is saved before it is validated"
    if way == "renames":
        assert not last.exists() and (folder / ".checkpoint_last.old").is_dir()
    if way == "write":
        assert (folder / ".checkpoint_last.part" / "training.pt").read_bytes() == b"half a file"
    if done is None:
        assert not last.exists() and (folder / "checkpoint_best").is_dir()
    else:
        assert read_config(last)["step"] == done
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 6, "lo')  # a kill may cut a line
    train(joint_config(folder))
    left = {"first_step": 3, "step": 1, "terminated": 1}.get(way, 2)
    assert f"and {left} validations on" in capsys.readouterr().out
    assert_same_run(folder, joint)


def test_a_finished_run_is_not_run_again(joint, joint_config, capsys, monkeypatch):
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    before = files(joint)
    train(joint_config(joint))
    assert files(joint) == before and "finished already" in capsys.readouterr().out


def test_a_finished_codebook_is_not_built_again(codebook, short, monkeypatch, capsys):
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    before = files(codebook.parent)
    train(short(codebook.parent, stage="codebook"))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run already"):
        train(short(codebook.parent, stage="codebook", resume=False))
    with pytest.raises(ValueError, match="d_z: 24 there, 16 now"):
        train(short(codebook.parent, stage="codebook", d_z=16))
    assert files(codebook.parent) == before


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(stopped, joint_config, joint, monkeypatch):
    def full(state, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint_last.*No space left on device.*previous one is kept"):
            train(joint_config(stopped))
    assert read_config(stopped / "checkpoint_last")["step"] == 4
    train(joint_config(stopped))
    assert_same_run(stopped, joint)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_any_weight_changes(stopped, joint_config, joint, monkeypatch, what):
    whole = Trainer._loss

    def spoiled(self, step, *part):
        loss, parts, ids = whole(self, step, *part)
        (codes,) = (found.parameters for found in self.components if found.kind == "codebook")
        nothing = sum(p.sum() for p in codes) * 0
        return loss + (nothing / 0 if what == "loss" else nothing.sqrt()), parts, ids

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", spoiled)
        with pytest.raises(ValueError, match=f"the {what} is n") as error:
            train(joint_config(stopped))
    config = joint_config(stopped)
    ids = [q.id for q in Batches(config, trained_on(config)[0], 1)[4]]
    assert f"at step 4 (questions {', '.join(ids)})" in str(error.value)
    train(joint_config(stopped))
    assert_same_run(stopped, joint)


def test_weights_that_are_not_numbers_stop_the_first_step(joint_config, adapters, tmp_path):
    ids = read_config(adapters / "checkpoint_best")["llms"]
    encoder, mappings, made = load_checkpoint(adapters / "checkpoint_best", ids)
    mappings["qwen"].linear.bias.data[0] = torch.nan
    save_checkpoint(tmp_path / "spoiled", encoder, mappings, made)
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 \(questions "):
        train(joint_config(tmp_path / "r", init=str(tmp_path / "spoiled"), kd_weight=0.0))
    assert not (tmp_path / "r" / "checkpoint_last").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_tells_the_steps_size_and_a_smaller_batch(stopped, joint_config, joint, monkeypatch, error):
    def full(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", full)
        with pytest.raises(ValueError, match=r"out of memory at step 4: 8 questions .* try MICRO_BATCH=4; what was"):
            train(joint_config(stopped))
    train(joint_config(stopped))
    assert_same_run(stopped, joint)


def test_a_folder_that_holds_a_run_is_refused_without_resume(stopped, joint_config):
    before = files(stopped)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        train(joint_config(stopped, resume=False))
    assert files(stopped) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 1e-3}, "lr: 0.0005 there, 0.001 now"),
        ({"kd_weight": 0.0}, "kd_weight: 0.75 there, 0.0 now"),
        ({"samples": 32}, "questions_sha256: .*samples: 24 there, 32 now"),
        ({"llms": "qwen"}, "llm_ids"),
    ],
)
def test_another_configuration_is_not_continued_and_its_key_is_named(stopped, joint_config, change, match):
    before = files(stopped)
    with pytest.raises(ValueError, match=match):
        train(joint_config(stopped, **change))
    assert files(stopped) == before


def test_other_weights_of_an_llm_are_not_trained_on(stopped, joint_config):
    path = stopped / "checkpoint_last" / "config.json"
    made = read_sealed(path)
    write_sealed(path, made | {"frozen_sha256": made["frozen_sha256"] | {"qwen": "of a newer upload"}})
    before = files(stopped)
    with pytest.raises(ValueError, match=r"llms='qwen': .*checkpoint_last was begun with other weights"):
        train(joint_config(stopped))
    assert files(stopped) == before


def test_what_changes_no_weight_may_change_between_two_starts(stopped, joint_config, joint):
    train(joint_config(stopped, save_minutes=9.0, ignore_memory=True))
    assert_same_run(stopped, joint)


def test_another_number_of_processes_is_not_continued(stopped, joint_config, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match="processes: None there, 2 now"):
        train(joint_config(stopped))


def test_another_init_is_not_continued(stopped, joint_config, scores):
    with pytest.raises(ValueError, match="init_sha256"):
        train(joint_config(stopped, init=str(scores / "checkpoint_best")))


def test_a_folder_in_use_is_refused(stopped, joint_config):
    settings = json.loads((stopped / "config.json").read_text())["config"]
    with RunFolder(stopped, settings), pytest.raises(ValueError, match="in use by a running process"):
        train(joint_config(stopped))


@pytest.mark.parametrize("name", ["encoder.safetensors", "adapter_qwen.safetensors", "training.pt"])
def test_a_cut_checkpoint_is_an_error_and_never_a_run(stopped, joint_config, name):
    path = stopped / "checkpoint_last" / name
    path.write_bytes(path.read_bytes()[:-500])
    before = files(stopped)
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        train(joint_config(stopped))
    assert files(stopped) == before


def test_a_checkpoint_with_the_older_form_alone_is_continued_to_the_same_bits(stopped, joint_config, joint):
    last = stopped / "checkpoint_last"
    made = read_config(last)
    for path in last.glob("*.safetensors"):
        path.unlink()
        del made["sha256"][path.name]
    (last / "config.json").write_text(json.dumps(made))
    train(joint_config(stopped))
    assert_same_run(stopped, joint)
    assert lines_of(stopped)[-1]["step"] == 6
