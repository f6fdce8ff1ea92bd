"""Checkpoints of every age and kind are evaluated, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from latentwire.conditions.base import CONDITIONS, condition, text_slot
from latentwire.data.squad import load
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import EvalSettings
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.weights import read_config

pytestmark = pytest.mark.usefixtures("surroundings")
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "latentwire_m32"


def config(folder, **changes):
    defaults = {
        "dataset": "sample", "samples": 5, "batch_size": 3, "max_new_tokens": 3, "device": "cpu",
        "save_dir": str(folder),
    }  # fmt: skip
    return EvalSettings(**(defaults | changes))


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_s")} for row in rows]


def with_older_form_alone(folder):
    """The checkpoint as older programs wrote it: .pt files, and nothing said of the kind of its adapters."""
    made = read_config(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
        del made["sha256"][path.name]
    del made["adapters"]
    (folder / "config.json").write_text(json.dumps(made))
    return folder


def test_an_older_checkpoint_is_evaluated_to_the_same_answers(codebook, tmp_path):
    older = with_older_form_alone(shutil.copytree(codebook, tmp_path / "older"))
    assert sorted(p.name for p in older.glob("*.*t*") if p.is_file() and p.suffix != ".json") == [
        "adapter_llama.pt", "adapter_qwen.pt", "encoder.pt",
    ]  # fmt: skip
    conditions = {"conditions": "latentwire,selected_text"}
    new, old = (
        evaluate(config(tmp_path / name, ckpt=str(ckpt), **conditions))
        for name, ckpt in (("a", codebook), ("b", older))
    )
    assert timeless(new["results"]) == timeless(old["results"]) and old["interface"] == new["interface"]
    encoder, adapters, _ = load_checkpoint(older, read_config(older)["llms"])
    assert type(encoder) is ENCODERS["codebook"] and {a.name for a in adapters.values()} == {"residual_mlp"}


def test_the_shipped_checkpoint_loads_and_encodes():
    encoder, adapters, made = load_checkpoint(SHIPPED, read_config(SHIPPED)["llms"])
    assert type(encoder) is SelectingEncoder and encoder.pooling == "select"
    assert (made["latent_len"], made["d_z"], made["source"]) == (32, 256, "prompt")
    (z,) = encoder.encode(load("sample", "dev").questions[:1], made["source"], made["latent_len"])
    assert z.shape == (32, 256) and torch.isfinite(z).all()
    for name, adapter in adapters.items():
        assert adapter.deep and adapter(z).shape == (adapter.constant + 32, made["widths"][name])


@pytest.fixture
def queries(codebook, encoder_folder, tmp_path):
    """A checkpoint of free queries, which choose no tokens."""
    before, adapters, made = load_checkpoint(codebook, read_config(codebook)["llms"])
    kind = ENCODERS["queries"]
    torch.manual_seed(0)
    encoder = kind.begin(before, kind.Settings(encoder_id=encoder_folder), made["latent_len"])
    save_checkpoint(tmp_path / "queries", encoder, adapters, made | {"stage": "joint"})
    return str(tmp_path / "queries")


@pytest.mark.parametrize("name", ["selected_text", "oracle_text", "oracle_wire", "encoder_only"])
def test_what_free_queries_cannot_serve_is_refused_by_name(queries, tmp_path, name, monkeypatch):
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=f"conditions='{name}': needs an encoder that"):
        evaluate(config(tmp_path / "r", ckpt=queries, conditions=f"text,{name}"))
    assert not (tmp_path / "r").exists()


def test_groups_leave_out_what_free_queries_cannot_serve(queries, tmp_path):
    results = evaluate(config(tmp_path / "r", ckpt=queries, conditions="learned,oracles", llms="llama"))
    served = ["latentwire", "untrained", "shuffled_z", "shuffled_context_z"]
    assert [row["condition"] for row in results["results"]] == served


def test_a_note_on_a_checkpoint_stays_out_of_an_estimate_for_programs(codebook, tmp_path, capsys):
    encoder, adapters, made = load_checkpoint(codebook, read_config(codebook)["llms"])
    save_checkpoint(tmp_path / "trained", encoder, adapters, made | {"stage": "joint"})
    more = {"source": "context", "conditions": "latentwire", "estimate": True, "json": True}
    evaluate(config(tmp_path / "r", ckpt=str(tmp_path / "trained"), **more))
    said = capsys.readouterr()
    assert json.loads(said.out)["answers"] == 10
    assert "trained with source 'prompt', and is evaluated with 'context'" in said.err


def test_a_run_with_a_condition_that_is_no_longer_known_is_refused_by_its_name(tmp_path):
    @condition("mine", "#112233", "nothing", default_in=())
    def mine(reader, questions, m, shared):
        return [text_slot(reader, []) for _ in questions]

    try:
        evaluate(config(tmp_path / "r", conditions="mine", llms="llama"))
    finally:
        del CONDITIONS["mine"]
    with pytest.raises(ValueError, match=r"'mine'.*no_context"):
        evaluate(config(tmp_path / "r", conditions="no_context", llms="llama"))
