"""A checkpoint is whole and fits, or it is refused."""

import json

import pytest
import torch

from latentwire.adapter import Adapter
from latentwire.checkpoint import load_checkpoint, save_checkpoint
from latentwire.encoder import CodebookEncoder

LLMS = {"llama": "some/llama", "qwen": "some/qwen"}
CONFIG = {"d_z": 8, "llms": LLMS, "train_seed": None}


@pytest.fixture
def parts(llms):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return CodebookEncoder(tokenizer, len(tokenizer), 8), {name: Adapter(8, llms[name].width) for name in LLMS}


@pytest.fixture
def folder(parts, tmp_path):
    save_checkpoint(tmp_path / "best", *parts, CONFIG)
    return tmp_path / "best"


def test_what_is_saved_is_loaded_bit_by_bit(folder, parts, questions):
    encoder, adapters, config = load_checkpoint(folder, LLMS)
    assert config["llms"] == LLMS
    for before, after in [(parts[0], encoder), *((parts[1][name], adapters[name]) for name in LLMS)]:
        assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    assert encoder.select(questions[0], "prompt", 32) == parts[0].select(questions[0], "prompt", 32)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "encoder.pt", "adapter_llama.pt", "adapter_qwen.pt", "wire_tokenizer",
    }  # fmt: skip


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(folder, parts):
    with torch.no_grad():
        parts[0].codebook.weight.zero_()
    save_checkpoint(folder, *parts, CONFIG)
    assert load_checkpoint(folder, LLMS)[0].codebook.weight.abs().sum() == 0
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_write_that_fails_keeps_the_checkpoint_before_it(folder, parts, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentwire.checkpoint.write_json", full)
    before = (folder / "encoder.pt").read_bytes()
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(folder, *parts, CONFIG)
    assert (folder / "encoder.pt").read_bytes() == before
    load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("name", ["encoder.pt", "adapter_qwen.pt"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_file_is_named(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        load_checkpoint(folder, LLMS)


def test_a_missing_file_is_named(folder):
    (folder / "adapter_llama.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_llama\.pt"):
        load_checkpoint(folder, LLMS)


def test_missing_unexpected_and_misshapen_keys_are_named(folder):
    torch.save({"linear.weight": torch.zeros(3, 8), "extra": torch.zeros(1)}, folder / "adapter_llama.pt")
    with pytest.raises(ValueError, match=r"adapter_llama\.pt does not fit") as error:
        load_checkpoint(folder, LLMS)
    assert all(word in str(error.value) for word in ("linear.bias", "extra", "linear.weight"))


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    torch.save({"linear.weight": print}, folder / "adapter_llama.pt")
    with pytest.raises(ValueError, match=r"adapter_llama\.pt"):
        load_checkpoint(folder, LLMS)


def test_no_checkpoint_and_foreign_folders_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere", LLMS)
    config = json.loads((folder / "config.json").read_text())
    del config["widths"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="widths"):
        load_checkpoint(folder, LLMS)


def test_a_save_killed_between_its_two_renames_is_undone(folder):
    folder.rename(folder.with_name(f".{folder.name}.old"))
    assert load_checkpoint(folder, LLMS)[2]["d_z"] == 8
    assert [p.name for p in folder.parent.iterdir()] == ["best"]
