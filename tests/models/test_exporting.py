"""What is shipped is the checkpoint that was trained, in half its size, and says what it is."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from latentwire.export import main
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.closed_form import closed_form
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.exporting import as_safetensors, export
from latentwire.models.weights import read_config
from latentwire.utils.files import write_sealed

MADE = {
    "stage": "joint", "source": "prompt", "latent_len": 16, "d_z": 24, "train_seed": 0, "samples": 8, "git": "abc",
    "encoder_id": "some/encoder", "init": "/home/me/runs/scores",
    "settings": {"epochs": 1, "batch_size": 4, "dtype": "float32", "dataset": "sample", "save_dir": "/home/me/runs"},
}  # fmt: skip


@pytest.fixture
def trained(llms, texts, encoder_folder, tmp_path):
    """A checkpoint of stage joint."""
    before, adapters, _ = closed_form(llms, texts, 24)
    settings = SelectingEncoder.Settings(encoder_id=encoder_folder, pooling="select")
    torch.manual_seed(0)
    encoder = SelectingEncoder.begin(before, settings, 16)
    save_checkpoint(tmp_path / "trained", encoder, adapters, MADE | {"llms": {"llama": "l", "qwen": "q"}})
    return tmp_path / "trained"


def test_an_exported_checkpoint_encodes_alike_from_half_the_bytes(trained, tmp_path, questions):
    export(trained, tmp_path / "shipped")
    ids = {"llama": "l", "qwen": "q"}
    before, after = (load_checkpoint(folder, ids) for folder in (trained, tmp_path / "shipped"))
    assert all(p.dtype == torch.float32 for p in after[0].parameters())
    for z, again in zip(*(found[0].encode(questions[:6], "prompt", 16) for found in (before, after)), strict=True):
        there = torch.isclose(again, z[:, None], rtol=2e-3, atol=2e-3).all(dim=2).any(dim=1)  # each latent, somewhere
        assert there.sum() >= len(z) - 1, "half precision may choose another token where two score alike"
    size, whole = ((folder / "encoder.safetensors").stat().st_size for folder in (tmp_path / "shipped", trained))
    assert size < 0.6 * whole and not list((tmp_path / "shipped").glob("*.pt")), "one form of the weights is shipped"


def test_the_card_names_what_was_done_and_no_place_of_ours(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export.py", str(trained), str(tmp_path / "shipped")])
    main()
    said = (tmp_path / "shipped" / "README.md").read_text() + (tmp_path / "shipped" / "config.json").read_text()
    made = json.loads((tmp_path / "shipped" / "config.json").read_text())
    assert "/home/me" not in said and "Not evaluated yet" in said
    assert all(f"{digest}  {name}" in said for name, digest in made["sha256"].items())
    data = ModelCard.load(tmp_path / "shipped" / "README.md").data
    assert data.license == "mit" and data.library_name == "latentwire" and data.base_model == ["l", "q"]


def test_of_folders_that_only_we_have_an_export_keeps_no_more_than_the_name(trained, tmp_path):
    private = {"teacher": "/home/me/teacher", "dataset": "/home/me/data/mine", "init": "/home/me/runs/adapters"}
    private |= {"encoder": {"encoder_id": "/home/me/models/bert", "pooling": "select"}}
    made = read_config(trained)
    made |= {"encoder_id": "/home/me/models/bert", "settings": made["settings"] | private}
    made |= {"joined": {"qwen": {"samples": 8, "settings": private}}}
    write_sealed(trained / "config.json", made)
    found = export(trained, tmp_path / "shipped")
    assert "/home/me" not in json.dumps(found) and found["encoder_id"] == "bert"
    for settings in (found["settings"], found["joined"]["qwen"]["settings"]):
        assert settings["dataset"] == "mine" and not settings.keys() & {"teacher", "init"}
        assert settings["encoder"] == {"encoder_id": "bert", "pooling": "select"}


def test_readers_come_with_a_checkpoint_that_tells_no_figures_of_its_own(trained, tmp_path):
    write_sealed(trained / "config.json", read_config(trained) | {"interface": None})
    encoder, adapters, made = load_checkpoint(trained, {"llama": "l", "qwen": "q"})
    adapters["qwen"].linear.bias.data += 1
    figures = {"qwen": {"explained_variance": 0.5}}
    joined = {"qwen": {"samples": 8, "settings": {"epochs": 1}}}
    save_checkpoint(tmp_path / "reader", encoder, adapters, made | {"interface": figures, "joined": joined})
    found = export(trained, tmp_path / "shipped", [tmp_path / "reader"])
    assert found["interface"] == figures and found["joined"] == joined


def test_nothing_but_a_checkpoint_is_replaced(trained, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    for folder, says in ((tmp_path / "photos", "other things than a checkpoint"), (trained, "lies there")):
        with pytest.raises(ValueError, match=says):
            export(trained, folder)
    write_sealed(tmp_path / "config.json", read_config(trained))
    with pytest.raises(ValueError, match="lies there, and would be replaced"):
        export(trained, tmp_path)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"a"
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="other things than a checkpoint"):
        export(trained, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert export(trained, tmp_path / "empty")["weights"] == "float16"


def test_an_export_through_a_link_leaves_the_link(trained, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large disk")
    for _ in range(2):
        export(trained, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large disk" / "encoder.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "large disk").rename(tmp_path / ".large disk.old")  # killed between the two renames
    assert read_config(tmp_path / "link")["weights"] == "float16" and (tmp_path / "large disk").is_dir()


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


def test_a_full_disk_is_told_with_the_folder(trained, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("latentwire.models.exporting.save_file", full)
    with pytest.raises(OSError, match=rf"cannot write the checkpoint {tmp_path} \(.*No space.*; make room"):
        as_safetensors(trained, tmp_path)


def test_only_a_trained_checkpoint_is_exported(trained, tmp_path):
    write_sealed(trained / "config.json", read_config(trained) | {"stage": "scores"})
    with pytest.raises(ValueError, match="stage joint"):
        export(trained, tmp_path / "shipped")
