"""Training from end to end with small random models: what each stage changes, and that no kill changes the outcome."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentwire.data.squad import load_questions, split_by_article, subset
from latentwire.evaluation.evaluate import evaluate
from latentwire.llms.frozen import load_llm
from latentwire.models import checkpoint
from latentwire.models.backbones import load_backbone
from latentwire.models.checkpoint import load_checkpoint, load_soft_prompts, read_config, save_checkpoint
from latentwire.models.encoders.base import ResamplingEncoder
from latentwire.training import trainer as training
from latentwire.training.stages import train
from latentwire.training.trainer import Batches, Trainer, steps_of
from latentwire.utils.runs import RunFolder
from latentwire.utils.settings import TUNED, EvalConfig, TrainConfig

ROOT = Path(__file__).parents[2]
LLMS = ("llama", "qwen")
OF_A_STEP = {"step", "epoch", "loss", "lr", "examples_per_s", "memory_mb"}
OF_AN_LLM = ("ce", "first_ce", "first_token_acc", "kd", "prefix_rms", "grad_norm_adapter")
STEPS, PER_EPOCH = 6, 3

# Imports once; then one process for each way to die, as a user's would: the command line, killed from inside.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

import torch

from latentwire.utils.runs import cli
from latentwire.training.stages import main
from latentwire.training.trainer import Trainer


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def in_step(step, number=signal.SIGKILL):
    loss = Trainer._loss

    def dying(self, now):
        if now == step and (self.folder / "metrics.jsonl").is_file():  # not while the steps are timed
            kill(number)
        return loss(self, now)

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


ways = {
    "first_step": lambda: in_step(0),
    "step": lambda: in_step(4),
    "write": lambda: in_write(3),
    "renames": lambda: between_renames(3),
    "terminated": lambda: in_step(3, signal.SIGTERM),
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
            cli(main)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
print(json.dumps({way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for way, pid in pids.items()}))
"""
WAYS = {"first_step": -9, "step": -9, "write": -9, "renames": -9, "terminated": 143}


class Stopped(Exception):
    """Ends a run from inside."""


@pytest.fixture(scope="module", autouse=True)
def surroundings(llm_folders, tmp_path_factory):
    """Small models, a cache of their own, and no handler left behind."""
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in llm_folders.items():
            patch.setenv(name, folder)
        patch.setenv("LATENTWIRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SQUAD_DIR", raising=False)
        handler = signal.getsignal(signal.SIGTERM)
        yield
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def config(encoder_folder):
    """config(folder, **changes): settings of a short run."""

    def make(folder, **changes):
        defaults = {
            "dataset": "sample", "samples": 8 * PER_EPOCH, "val_samples": 6, "batch_size": 8, "d_z": 24, "k": 3,
            "latent_len": 16, "epochs": 1, "max_new_tokens": 3, "save_minutes": 0.0, "encoder_id": encoder_folder,
            "device": "cpu", "save_dir": str(folder),
        }  # fmt: skip
        return TrainConfig(**(defaults | changes))

    return make


@pytest.fixture(scope="module")
def codebook(config, tmp_path_factory):
    """checkpoint_best of stage codebook."""
    folder = tmp_path_factory.mktemp("stages") / "codebook"
    train(config(folder, stage="codebook"))
    return folder / "checkpoint_best"


@pytest.fixture(scope="module")
def scores(config, codebook):
    """The run folder of stage scores."""
    folder = codebook.parents[1] / "scores"
    train(config(folder, stage="scores", init=str(codebook)))
    return folder


@pytest.fixture(scope="module")
def adapters(config, scores):
    """The run folder of stage adapters."""
    folder = scores.parent / "adapters"
    train(config(folder, stage="adapters", init=str(scores / "checkpoint_best"), kd_weight=0.0))
    return folder


@pytest.fixture(scope="module")
def joint_config(config, adapters):
    """joint_config(folder, **changes): the run that is killed in every way, and never."""
    return lambda folder, **changes: config(
        folder, **({"init": str(adapters / "checkpoint_best"), "epochs": STEPS // PER_EPOCH} | changes)
    )


@pytest.fixture(scope="module")
def joint(joint_config, adapters):
    """The run folder of stage joint, never interrupted."""
    folder = adapters.parent / "joint"
    train(joint_config(folder))
    return folder


@pytest.fixture(scope="module")
def stopped_at_4(joint_config, adapters):
    """The same run, interrupted in its fifth step."""
    folder = adapters.parent / "stopped"
    with pytest.MonkeyPatch.context() as patch:
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
def killed(joint_config, joint, tmp_path_factory):
    """Runs that were killed: {way: (folder, exit status)}."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "driver.py").write_text(DRIVER)
    runs = {way: flags(joint_config(folder / way)) for way in WAYS}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(folder / "driver.py"), json.dumps([runs, torch.get_num_threads()])],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    return {way: (folder / way, statuses[way]) for way in WAYS}


def flags(config):
    return [f"--{k}={v}" for k, v in dataclasses.asdict(config).items() if v not in ("", None) and v is not False]


def stop_in_step(patch, step, error=Stopped):
    """Let the step's loss raise; not while the steps are timed before the first."""
    loss = Trainer._loss

    def stopping(self, now):
        if now == step and (self.folder / "metrics.jsonl").is_file():
            raise error
        return loss(self, now)

    patch.setattr(Trainer, "_loss", stopping)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_in(folder):
    return [line for line in lines_of(folder) if "validation" not in line]


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in ("examples_per_s", "memory_mb")} for line in lines]


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def changed(before, after, name):
    """Names of the tensors of FOLDER/name that two checkpoints do not share."""
    before, after = read(before / name), read(after / name)
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def assert_same_run(folder, other):
    """Same weights, optimizer, best checkpoint and metrics."""
    for part in ("checkpoint_last", "checkpoint_best"):
        names = sorted(path.name for path in (other / part).glob("*.pt"))
        assert names == sorted(path.name for path in (folder / part).glob("*.pt")) and len(names) >= 2
        for name in names:
            assert same(read(folder / part / name), read(other / part / name)), f"{part}/{name}"
        assert read_config(folder / part)["step"] == read_config(other / part)["step"]
    assert timeless(lines_of(folder)) == timeless(lines_of(other))
    left = {p.name for p in folder.iterdir() if p.name.startswith(".")}
    assert left <= {".lock"}, "nothing half-written stays"


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".pt", ".json", ".jsonl")}


def trained_on(config):
    """Questions that are trained on, and those that are held out."""
    pool, held = split_by_article(load_questions("sample", "train")[1])
    return subset(pool, config.samples, config.seed), subset(held, config.val_samples, config.seed)


def ready_trainer(config):
    """The trainer of a run that is about to begin."""
    found = []

    def keep(self):
        found.append(self)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "run", keep)
        train(config)
    return found[0]


def test_stage_scores_trains_backbone_and_scores_alone(scores, codebook, encoder_folder):
    before, after = read(codebook / "encoder.pt"), read(scores / "checkpoint_last" / "encoder.pt")
    assert torch.equal(before["codebook.weight"], after["codebook.weight"])
    assert all(not after[f"residual.{name}"].any() for name in ("weight", "bias"))
    pretrained = load_backbone(encoder_folder).state_dict()
    assert any(not torch.equal(tensor, after[f"backbone.{name}"]) for name, tensor in pretrained.items())
    for name in LLMS:
        assert not changed(codebook, scores / "checkpoint_last", f"adapter_{name}.pt")
    line = steps_in(scores)[0]
    assert {"grad_norm_backbone", "grad_norm_span", "span"} <= line.keys()
    assert not {key for key in line if key.endswith(LLMS)}, "no LLM takes part"
    held = lines_of(scores)[0]["validation"]
    assert held.keys() == {"answer_kept", "encoder_f1", "score"} and 0 <= held["answer_kept"] <= 1


def test_stage_adapters_trains_codebook_residual_and_adapters_alone(adapters, scores):
    before, after = scores / "checkpoint_best", adapters / "checkpoint_last"
    assert changed(before, after, "encoder.pt") == {"codebook.weight", "residual.weight", "residual.bias"}
    for name in LLMS:
        assert changed(before, after, f"adapter_{name}.pt") >= {"linear.weight", "linear.bias", "mlp.2.weight"}
    assert not {key for key in steps_in(adapters)[0] if key.startswith("kd")}, "no teacher without kd_weight"


def test_stage_joint_trains_everything(joint, adapters):
    before, after = adapters / "checkpoint_best", joint / "checkpoint_last"
    moved = changed(before, after, "encoder.pt")
    for part in ("codebook.weight", "outside", "score.weight", "span.weight", "residual.weight"):
        assert part in moved
    assert len([name for name in moved if name.startswith("backbone.model.encoder")]) > 10
    for name in LLMS:
        assert len(changed(before, after, f"adapter_{name}.pt")) == 6


def test_the_frozen_llms_stay_as_they_are_and_the_checkpoint_says_which_they_are(joint, codebook, scores, llm_folders):
    hashes = {name: load_llm(name, llm_folders[f"{name.upper()}_ID"], "cpu", "float32").weights_sha256()
              for name in LLMS}  # fmt: skip
    made = read_config(joint / "checkpoint_best")
    assert made["frozen_sha256"] == hashes == read_config(codebook)["frozen_sha256"]
    assert made["stage"] == "joint" and made["interface"] == read_config(codebook)["interface"]
    assert made["settings"]["lr"] == 5e-4 and made["init"].endswith("adapters/checkpoint_best")
    assert made["validation"]["score"] == max(x["validation"]["score"] for x in lines_of(joint) if "validation" in x)


def test_every_step_and_every_epoch_has_its_line(joint):
    lines = lines_of(joint)
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in steps] == [1] * PER_EPOCH + [2] * PER_EPOCH
    assert [line["step"] for line in lines if "validation" in line] == [0, PER_EPOCH, STEPS]
    for line in steps:
        assert line.keys() >= OF_A_STEP | {f"{part}_{name}" for part in OF_AN_LLM for name in LLMS}
        assert all(math.isfinite(value) for value in line.values())
        assert line["examples_per_s"] > 0 and line["memory_mb"] > 1
        for name in LLMS:
            assert 0 <= line[f"first_token_acc_{name}"] <= 1 and line[f"grad_norm_adapter_{name}"] > 0
            assert 0.1 < line[f"prefix_rms_{name}"] < 10, "a prefix is about as long as a token's embedding"
        parts = sum(line[f"ce_{n}"] + 0.5 * line[f"first_ce_{n}"] + 0.5 * line[f"kd_{n}"] for n in LLMS)
        assert line["loss"] == pytest.approx(parts + line["span"], rel=1e-4)
    for line in lines:
        held = line.get("validation", {"score": 0})
        assert "validation" not in line or {f"f1_{n}" for n in LLMS} | {"ce", "first_token_acc_qwen"} <= held.keys()


def test_the_loss_of_a_few_questions_falls(config, scores, tmp_path):
    settings = {"samples": 4, "batch_size": 4, "val_samples": 1, "epochs": 12, "lr": 5e-3, "kd_weight": 0.0}
    train(config(tmp_path / "r", stage="adapters", init=str(scores / "checkpoint_best"), **settings))
    losses = [line["loss"] for line in steps_in(tmp_path / "r")]
    assert losses[-1] < 0.85 * losses[0]


def test_the_curves_are_drawn(joint, scores):
    for path in (joint / "loss.png", joint / "first_token_accuracy.png", scores / "loss.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["queries", "byte"])
def test_free_queries_train_jointly_from_the_codebook(config, codebook, tmp_path, kind):
    settings = {"encoder_type": kind, "init": str(codebook), "kd_weight": 0.0, "epochs": 2}
    settings |= {"samples": 1, "batch_size": 1, "val_samples": 1}  # a from-scratch reader of bytes is slow
    train(config(tmp_path / "r", **settings))
    encoder, _, made = load_checkpoint(tmp_path / "r" / "checkpoint_last", read_config(codebook)["llms"])
    assert isinstance(encoder, ResamplingEncoder) and made["encoder"] == {"type": kind, "m": 16}
    lines = steps_in(tmp_path / "r")
    assert all(line["grad_norm_backbone"] > 0 and line["grad_norm_resampler"] > 0 for line in lines)
    assert "span" not in lines[0] and lines[1]["loss"] != lines[0]["loss"]


@pytest.mark.parametrize("kind", ["queries", "byte"])
@pytest.mark.parametrize("stage", ["scores", "adapters"])
def test_free_queries_have_no_stages_of_their_own(config, tmp_path, kind, stage):
    with pytest.raises(ValueError, match=f"stage='{stage}': encoder_type {kind} has no such stage"):
        config(tmp_path, stage=stage, encoder_type=kind, init="x")


@pytest.mark.parametrize("stage", TUNED)
def test_the_rivals_soft_prompts_train_and_a_stopped_run_ends_the_same(config, scores, tmp_path, monkeypatch, stage):
    settings = {"stage": stage, "samples": 16, "batch_size": 4, "kd_weight": 0.0, "val_samples": 2}
    settings |= {"llms": "qwen"} if stage == "text_tuned" else {}
    settings |= {"init": str(scores / "checkpoint_best")} if stage == "selected_text_tuned" else {}
    train(config(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(Stopped):
            train(config(tmp_path / "cut", **settings))
    train(config(tmp_path / "cut", **settings, resume=True))
    names = config(tmp_path, **settings).llm_names
    ids = {name: os.environ[f"{name.upper()}_ID"] for name in names}
    prompts = {part: load_soft_prompts(tmp_path / part / "checkpoint_last", ids) for part in ("whole", "cut")}
    assert same(prompts["whole"], prompts["cut"]) and prompts["whole"].keys() == set(names)
    assert timeless(lines_of(tmp_path / "whole")) == timeless(lines_of(tmp_path / "cut"))
    for name, prompt in prompts["whole"].items():
        table = load_llm(name, ids[name], "cpu", "float32").embedding_table()
        assert len(prompt) == 16 and torch.cdist(prompt, table.float()).min(dim=1).values.min() > 0
    assert [line["step"] for line in steps_in(tmp_path / "cut")] == [1, 2, 3, 4]
    assert read_config(tmp_path / "cut" / "checkpoint_best")["stage"] == stage


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_continues_to_the_same_bits(killed, joint_config, joint, way):
    folder, status = killed[way]
    assert status == WAYS[way]
    done = {"first_step": None, "step": 4, "write": 2, "renames": 2, "terminated": 4}[way]
    last = folder / "checkpoint_last"
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
    train(joint_config(folder, resume=True))
    assert_same_run(folder, joint)


def test_a_finished_run_is_not_run_again(joint, joint_config, capsys, monkeypatch):
    monkeypatch.setattr("latentwire.train.load_llm", lambda *a: pytest.fail("loaded a model"))
    before = files(joint)
    train(joint_config(joint, resume=True))
    assert files(joint) == before and "finished already" in capsys.readouterr().out


def test_a_finished_codebook_is_not_built_again(codebook, config, monkeypatch):
    monkeypatch.setattr("latentwire.train.load_llm", lambda *a: pytest.fail("loaded a model"))
    before = files(codebook)
    train(config(codebook.parent, stage="codebook", resume=True))
    assert files(codebook) == before
    with pytest.raises(ValueError, match="holds a run already"):
        train(config(codebook.parent, stage="codebook"))
    with pytest.raises(ValueError, match="d_z: 24 there, 16 now"):
        train(config(codebook.parent, stage="codebook", d_z=16, resume=True))


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(stopped, joint_config, joint, monkeypatch):
    def full(state, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint_last.*No space left on device.*previous one is kept"):
            train(joint_config(stopped, resume=True))
    assert read_config(stopped / "checkpoint_last")["step"] == 4
    train(joint_config(stopped, resume=True))
    assert_same_run(stopped, joint)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_any_weight_changes(stopped, joint_config, joint, monkeypatch, what):
    whole = Trainer._loss

    def spoiled(self, step):
        loss, parts, ids = whole(self, step)
        nothing = sum(p.sum() for p in self.components["codebook"]) * 0
        return loss + (nothing / 0 if what == "loss" else nothing.sqrt()), parts, ids

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", spoiled)
        with pytest.raises(ValueError, match=f"the {what} is n") as error:
            train(joint_config(stopped, resume=True))
    config = joint_config(stopped)
    ids = [q.id for q in Batches(config, trained_on(config)[0], 1)[4]]
    assert f"at step 4 (questions {', '.join(ids)})" in str(error.value)
    train(joint_config(stopped, resume=True))
    assert_same_run(stopped, joint)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_tells_the_steps_size_and_a_smaller_batch(stopped, joint_config, joint, monkeypatch, error):
    def full(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", full)
        with pytest.raises(ValueError, match=r"out of memory at step 4: 8 questions .* try BATCH_SIZE=4 in another"):
            train(joint_config(stopped, resume=True))
    train(joint_config(stopped, resume=True))
    assert_same_run(stopped, joint)


def test_weights_that_are_not_numbers_stop_the_first_step(joint_config, adapters, tmp_path):
    ids = read_config(adapters / "checkpoint_best")["llms"]
    encoder, mappings, made = load_checkpoint(adapters / "checkpoint_best", ids)
    mappings["qwen"].linear.bias.data[0] = torch.nan
    save_checkpoint(tmp_path / "spoiled", encoder, mappings, made)
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 \(questions "):
        train(joint_config(tmp_path / "r", init=str(tmp_path / "spoiled"), kd_weight=0.0))
    assert not (tmp_path / "r" / "checkpoint_last").exists()


def test_a_folder_that_holds_a_run_is_refused_without_resume(stopped, joint_config):
    before = files(stopped)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        train(joint_config(stopped))
    assert files(stopped) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 1e-3}, "lr: 0.0005 there, 0.001 now"),
        ({"kd_weight": 0.0}, "kd_weight: 0.5 there, 0.0 now"),
        ({"samples": 32}, "questions_sha256: .*samples: 24 there, 32 now"),
        ({"llms": "qwen"}, "llm_ids"),
    ],
)
def test_another_configuration_is_not_continued_and_its_key_is_named(stopped, joint_config, change, match):
    before = files(stopped)
    with pytest.raises(ValueError, match=match):
        train(joint_config(stopped, resume=True, **change))
    assert files(stopped) == before


def test_another_number_of_processes_is_not_continued(stopped, joint_config, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match="processes: None there, 2 now"):
        train(joint_config(stopped, resume=True))


def test_another_init_is_not_continued(stopped, joint_config, scores):
    with pytest.raises(ValueError, match="init_sha256"):
        train(joint_config(stopped, resume=True, init=str(scores / "checkpoint_best")))


def test_a_folder_in_use_is_refused(stopped, joint_config):
    settings = json.loads((stopped / "config.json").read_text())["config"]
    with RunFolder(stopped, settings), pytest.raises(ValueError, match="in use by a running process"):
        train(joint_config(stopped, resume=True))


@pytest.mark.parametrize("name", ["encoder.pt", "adapter_qwen.pt", "training.pt"])
def test_a_cut_checkpoint_is_an_error_and_never_a_run(stopped, joint_config, name):
    path = stopped / "checkpoint_last" / name
    path.write_bytes(path.read_bytes()[:-500])
    before = files(stopped)
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        train(joint_config(stopped, resume=True))
    assert files(stopped) == before


def test_a_stage_needs_the_one_before(joint_config, config, codebook, tmp_path, llm_folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint in /no/such"):
        train(joint_config(tmp_path / "a", init="/no/such"))
    with pytest.raises(ValueError, match=r"d_z=16: .* has d_z=24"):
        train(joint_config(tmp_path / "b", d_z=16))
    cut = shutil.copytree(codebook, tmp_path / "cut")
    (cut / "encoder.pt").write_bytes((cut / "encoder.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"encoder.pt is cut or damaged"):
        train(config(tmp_path / "c", stage="scores", init=str(cut)))
    monkeypatch.setenv("QWEN_ID", llm_folders["LLAMA_ID"])
    with pytest.raises(ValueError, match=r"was made for qwen=.*QWEN_ID"):
        train(joint_config(tmp_path / "d"))
    for name in "abcd":
        assert not list((tmp_path / name).glob("checkpoint_*")), "a refused run leaves no checkpoint"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stage": "both"}, "stage='both'.*joint"),
        ({"init": ""}, "init='': stage joint starts from a checkpoint"),
        ({"samples": 0}, "samples=0"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"k": 0}, "k=0"),
        ({"kd_weight": -0.5}, "kd_weight=-0.5: must not be negative"),
        ({"span_weight": -1.0}, "span_weight=-1.0"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"encoder_type": "lstm"}, "encoder_type='lstm'.*queries"),
        ({"pooling": "mean"}, "pooling='mean'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"source": "book"}, "source='book'"),
        ({"llms": ","}, "llms=','"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(config, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **({"init": "x"} | change))


def test_held_out_articles_are_never_trained_on(joint_config, tmp_path):
    config = joint_config(tmp_path / "r", kd_weight=0.0)
    trainer = ready_trainer(config)
    questions, held = trained_on(config)
    titles = {q.title for q in held}
    assert list(trainer.job.questions) == questions and len(held) == 5, "the sample's article has no more"
    for step in range(STEPS):
        assert not titles & {q.title for q in Batches(config, trainer.job.questions, 1)[step]}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_asks_each_question_at_most_once_in_an_order_of_its_own(config, tmp_path, processes):
    settings = config(tmp_path, samples=45, epochs=3, stage="text_tuned")
    questions, _ = trained_on(settings)
    each, total = steps_of(settings, len(questions), processes)
    assert (each, total) == (45 // (8 * processes), 3 * each)
    epochs = [
        [q.id for step in range(e * each, (e + 1) * each) for q in Batches(settings, questions, processes)[step]]
        for e in range(3)
    ]
    for ids in epochs:
        assert len(ids) == len(set(ids)) == each * 8 * processes
    assert epochs[0] != epochs[1] != epochs[2] and set(epochs[0]) != set(epochs[1])
    again = [q.id for step in range(each) for q in Batches(settings, questions, processes)[step]]
    assert again == epochs[0]
    other = dataclasses.replace(settings, seed=1)
    assert [q.id for step in range(each) for q in Batches(other, questions, processes)[step]] != epochs[0]


def test_fewer_questions_than_a_batch_are_still_a_step(config, tmp_path):
    settings = config(tmp_path, samples=5, stage="text_tuned")
    questions, _ = trained_on(settings)
    assert steps_of(settings, 5, 1) == (1, 1) and len(Batches(settings, questions, 1)[0]) == 5


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_two_processes_mean_the_loss_and_gradient_of_one(joint_config, tmp_path, kd_weight):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=kd_weight))
    trainer.model.eval()  # no dropout, which differs between processes
    weight = trainer.job.model.encoder.codebook.weight

    def loss_and_gradient(rank, processes):
        trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        trainer.job.config.batch_size = 8 // processes
        loss, parts, ids = trainer._loss(1)
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient, parts, ids

    whole = loss_and_gradient(0, 1)
    halves = [loss_and_gradient(rank, 2) for rank in range(2)]
    assert halves[0][3] == halves[1][3] == whole[3] and len(whole[3]) == 8
    assert halves[0][0] != halves[1][0]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, whole[1], rtol=1e-3, atol=1e-5)
    assert ("kd_qwen" in whole[2]) == bool(kd_weight)
    for key in whole[2].keys() - {"prefix_rms_llama", "prefix_rms_qwen"}:  # root mean squares do not add up
        total = halves[0][2][key] + halves[1][2][key]
        torch.testing.assert_close(total, whole[2][key], rtol=1e-4, atol=1e-5)


def test_timing_the_steps_changes_nothing(joint_config, tmp_path):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    before = {name: tensor.clone() for name, tensor in trainer.job.model.state_dict().items()}
    assert trainer.seconds_per_step() > 0
    assert same(before, dict(trainer.job.model.state_dict())) and trainer.step == 0
    assert all(p.grad is None for p in trainer.job.model.parameters())


def test_an_estimate_trains_nothing(config, scores, tmp_path, capsys):
    train(config(tmp_path / "a", stage="joint", init=str(scores / "checkpoint_best"), kd_weight=0.0, estimate=True))
    said = capsys.readouterr().out
    assert "estimate: 0 minutes for 3 steps" in said and "held out:" not in said
    assert not list((tmp_path / "a").glob("checkpoint*")) and not (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_long_training_says_how_long_and_stops_on_a_cpu_unless_asked_for_by_hand(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("latentwire.train.LONGEST_S", 0)
    settings = {"stage": "token_budget_tuned", "llms": "qwen", "kd_weight": 0.0}
    with contextlib.suppress(Stopped), monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "run", lambda self: (_ for _ in ()).throw(Stopped))
        train(config(tmp_path / "a", **settings))
    assert "estimate: 0 minutes for 3 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"questions would take .* hours on this CPU.*SAMPLES"):
        train(config(tmp_path / "b", **settings, samples=None))


def test_a_trained_checkpoint_is_evaluated_and_a_cut_one_is_not(joint, tmp_path):
    ckpt = shutil.copytree(joint / "checkpoint_best", tmp_path / "ckpt")
    settings = {"dataset": "sample", "samples": 5, "batch_size": 4, "max_new_tokens": 3, "device": "cpu"}
    settings |= {"ckpt": str(ckpt), "conditions": "latentwire,selected_text,encoder_only,shuffled_z"}
    results = evaluate(EvalConfig(**settings, save_dir=str(tmp_path / "a")))
    rows = {(row["condition"], row["llm"]): row for row in results["results"]}
    for condition in ("latentwire", "selected_text", "shuffled_z"):
        assert {(condition, name) for name in LLMS} <= rows.keys()
    assert "encoder_only" in {condition for condition, _ in rows}
    assert rows["latentwire", "qwen"]["llm_positions"] == rows["shuffled_z", "qwen"]["llm_positions"] == 16
    assert results["train_seed"] == 0 and results["checkpoint"] == str(ckpt)
    for name in ("encoder.pt", "adapter_qwen.pt"):
        whole = (ckpt / name).read_bytes()
        (ckpt / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
            evaluate(EvalConfig(**settings, save_dir=str(tmp_path / name)))
        (ckpt / name).write_bytes(whole)
