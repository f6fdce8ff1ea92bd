"""Looking at run folders, and ending a training from inside."""

import json

import pytest
import torch
from safetensors.torch import load_file

from latentwire.data.question import split_by_article, subset
from latentwire.data.squad import load
from latentwire.models.weights import read_config
from latentwire.training.running import train
from latentwire.training.trainer import Trainer

LLMS = ("llama", "qwen")
FORMS = (".pt", ".safetensors")


class Stopped(Exception):
    """Ends a run from inside."""


def stop_in_step(patch, step, error=Stopped):
    """Let the step's loss raise; not while the steps are timed before the first."""
    loss = Trainer._loss

    def stopping(self, now, *part):
        if now == step and (self.folder / "metrics.jsonl").is_file():
            raise error
        return loss(self, now, *part)

    patch.setattr(Trainer, "_loss", stopping)


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


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_in(folder):
    return [line for line in lines_of(folder) if "validation" not in line]


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in ("examples_per_s", "memory_mb")} for line in lines]


def read(path):
    """What a weights file holds."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def changed(before, after, stem):
    """Names of the tensors of FOLDER/stem that two checkpoints do not share, in either form."""
    found = []
    for form in FORMS:
        old, new = read(before / f"{stem}{form}"), read(after / f"{stem}{form}")
        assert old.keys() == new.keys()
        found.append({key for key in old if not torch.equal(old[key], new[key])})
    assert found[0] == found[1], "both forms hold the same"
    return found[0]


def assert_same_run(folder, other):
    """Same weights, optimizer, best checkpoint and metrics."""
    for part in ("checkpoint_last", "checkpoint_best"):
        names = sorted(path.name for path in (other / part).glob("*") if path.suffix in FORMS)
        assert names == sorted(path.name for path in (folder / part).glob("*") if path.suffix in FORMS)
        assert len(names) >= 4
        for name in names:
            assert same(read(folder / part / name), read(other / part / name)), f"{part}/{name}"
        assert read_config(folder / part)["step"] == read_config(other / part)["step"]
    assert timeless(lines_of(folder)) == timeless(lines_of(other))
    left = {p.name for p in folder.iterdir() if p.name.startswith(".")}
    assert left <= {".lock"}, "nothing half-written stays"


def files(folder):
    """Every file of a folder, byte by byte."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def trained_on(config):
    """Questions that are trained on, and those that are held out."""
    pool, held = split_by_article(load("sample", "train").questions)
    return subset(pool, config.samples, config.seed, config.source == "context"), subset(
        held, config.val_samples, config.seed
    )
