"""What is shipped is the checkpoint that was trained, in half its size, and says what it is."""

import json
import sys
from pathlib import Path

import pytest
import torch

from latentwire.models.backbones import load_backbone
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.encoders.base import SelectingEncoder
from latentwire.models.stage0 import closed_form
from latentwire.reporting.card import export, main

ROOT = Path(__file__).parents[2]
MADE = {
    "stage": "joint", "source": "prompt", "latent_len": 16, "d_z": 24, "train_seed": 0, "samples": 8, "git": "abc",
    "encoder_id": "some/encoder", "init": "/home/me/runs/scores",
    "settings": {"epochs": 1, "batch_size": 4, "dtype": "float32", "dataset": "sample", "save_dir": "/home/me/runs"},
}  # fmt: skip


@pytest.fixture
def trained(llms, texts, encoder_folder, tmp_path):
    """A checkpoint of stage joint."""
    stage0, adapters, _ = closed_form(llms, texts, 24)
    encoder = SelectingEncoder(stage0.tokenizer, *stage0.codebook.weight.shape, load_backbone(encoder_folder), "select")
    save_checkpoint(tmp_path / "trained", encoder, adapters, MADE | {"llms": {"llama": "l", "qwen": "q"}})
    return tmp_path / "trained"


def test_an_exported_checkpoint_encodes_alike_from_half_the_bytes(trained, tmp_path, questions):
    export(trained, tmp_path / "shipped")
    ids = {"llama": "l", "qwen": "q"}
    before, after = (load_checkpoint(folder, ids) for folder in (trained, tmp_path / "shipped"))
    assert all(p.dtype == torch.float32 for p in after[0].parameters())
    for z, again in zip(*(found[0].encode(questions[:6], "prompt", 16) for found in (before, after)), strict=True):
        torch.testing.assert_close(again, z, rtol=2e-3, atol=2e-3)
    size, whole = ((folder / "encoder.pt").stat().st_size for folder in (tmp_path / "shipped", trained))
    assert size < 0.6 * whole


def test_the_card_names_what_was_done_and_no_place_of_ours(trained, tmp_path):
    export(trained, tmp_path / "shipped")
    said = (tmp_path / "shipped" / "README.md").read_text() + (tmp_path / "shipped" / "config.json").read_text()
    made = json.loads((tmp_path / "shipped" / "config.json").read_text())
    assert "/home/me" not in said and "Not evaluated yet" in said
    assert all(f"{digest}  {name}" in said for name, digest in made["sha256"].items())


def test_figures_of_another_checkpoint_are_refused(trained, tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (results / "table.md").write_text("| a table |\n")
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(sys, "argv", ["export.py", str(trained), str(shipped), "--results", str(results)])
    (results / "results.json").write_text(json.dumps({"checkpoint": str(trained)}))
    with pytest.raises(ValueError, match=f"is an evaluation of {trained}, not of {shipped}"):
        main()
    assert not shipped.exists()
    (results / "results.json").write_text(json.dumps({"checkpoint": str(shipped)}))
    main()
    assert "| a table |" in (shipped / "README.md").read_text()


def test_only_a_trained_checkpoint_is_exported(trained, tmp_path):
    record = trained / "config.json"
    record.write_text(record.read_text().replace('"joint"', '"scores"'))
    with pytest.raises(ValueError, match="stage joint"):
        export(trained, tmp_path / "shipped")
