"""A checkpoint is whole and fits, or it is refused."""

import hashlib
import json
import shutil

import pytest
import torch

from latentwire.models.adapters import Adapter
from latentwire.models.backbones import ByteBackbone, load_backbone
from latentwire.models.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    load_soft_prompts,
    load_training,
    save_checkpoint,
    save_soft_prompts,
)
from latentwire.models.encoders.base import CodebookEncoder, ResamplingEncoder, SelectingEncoder

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


def in_config(folder, **changes):
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def put(folder, name, content):
    """Replace a .pt file and its hash, as someone who means it would."""
    torch.save(content, folder / name)
    hashes = json.loads((folder / "config.json").read_text())["sha256"]
    in_config(folder, sha256=hashes | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


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


def test_saving_again_keeps_the_evaluations_in_the_folder(folder, parts):
    evaluation = folder / "eval_squad_prompt_n1000_seed0"
    evaluation.mkdir()
    (evaluation / "results.json").write_text("{}")
    save_checkpoint(folder, *parts, CONFIG)
    assert (evaluation / "results.json").read_text() == "{}" and load_checkpoint(folder, LLMS)


def test_a_write_that_fails_keeps_the_checkpoint_before_it(folder, parts, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentwire.checkpoint.write_json", full)
    before = (folder / "encoder.pt").read_bytes()
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(folder, *parts, CONFIG)
    assert (folder / "encoder.pt").read_bytes() == before
    load_checkpoint(folder, LLMS)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_checkpoint_and_nothing_else(
    folder, parts, monkeypatch, error, at
):
    before, real, calls = {p.name: p.read_bytes() for p in folder.glob("*.*")}, torch.save, []

    def full(content, path):
        calls.append(path.name)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise error
        real(content, path)

    monkeypatch.setattr(torch, "save", full)
    with torch.no_grad():
        parts[0].codebook.weight.zero_()
    with pytest.raises(OSError, match=r"best.*(No space|failed writing).*make room; the previous one is kept"):
        save_checkpoint(folder, *parts, CONFIG)
    assert len(calls) == at
    assert {p.name: p.read_bytes() for p in folder.glob("*.*")} == before
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_what_a_killed_save_left_behind_is_not_in_the_way(folder, parts):
    for end in ("part", "old"):
        folder.with_name(f".best.{end}").mkdir()
        (folder.with_name(f".best.{end}") / "junk.pt").write_bytes(b"half")
    save_checkpoint(folder, *parts, CONFIG)
    assert [p.name for p in folder.parent.iterdir()] == ["best"] and not (folder / "junk.pt").exists()
    load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("name", ["encoder.pt", "adapter_qwen.pt"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_file_is_named(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("name", ["encoder.pt", "adapter_qwen.pt"])
def test_a_single_altered_byte_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{folder / name} is cut or damaged"):
        load_checkpoint(folder, LLMS)


def test_a_damaged_or_missing_tokenizer_is_named(folder):
    (folder / "wire_tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="wire_tokenizer cannot be read"):
        load_checkpoint(folder, LLMS)
    shutil.rmtree(folder / "wire_tokenizer")
    with pytest.raises(ValueError, match="wire_tokenizer cannot be read"):
        load_checkpoint(folder, LLMS)


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("shape", [{"type": "magic"}, {"type": "hf", "vocabulary": 700}, {}])
def test_an_encoder_of_an_unknown_type_is_named(folder, shape):
    in_config(folder, encoder=shape)
    with pytest.raises(ValueError, match=r"config\.json describes an encoder that this program does not know: \{"):
        load_checkpoint(folder, LLMS)


def test_a_missing_file_is_named(folder):
    (folder / "adapter_llama.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_llama\.pt"):
        load_checkpoint(folder, LLMS)


def test_missing_unexpected_and_misshapen_keys_are_named(folder):
    put(folder, "adapter_llama.pt", {"linear.weight": torch.zeros(3, 8), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"adapter_llama\.pt does not fit") as error:
        load_checkpoint(folder, LLMS)
    assert all(word in str(error.value) for word in ("linear.bias", "extra", "linear.weight"))


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    put(folder, "adapter_llama.pt", {"linear.weight": print})
    with pytest.raises(ValueError, match=r"adapter_llama\.pt.*(?i:unsupported|weights.only)"):
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


def encoder_of(kind, llms, encoder_folder):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    if kind in ("select", "cif"):
        encoder = SelectingEncoder(tokenizer, len(tokenizer), 8, load_backbone(encoder_folder), kind)
        for head in (encoder.score, encoder.residual):
            torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(encoder.outside)
        return encoder
    backbone = ByteBackbone() if kind == "byte" else load_backbone(encoder_folder)
    return ResamplingEncoder(tokenizer, 8, backbone, 6, torch.rand(8))


@pytest.mark.parametrize("kind", ["select", "cif", "queries", "byte"])
def test_a_trained_encoder_gives_the_same_z_after_loading_without_its_origin(
    parts, llms, encoder_folder, tmp_path, questions, monkeypatch, kind
):
    encoder = encoder_of(kind, llms, encoder_folder)
    save_checkpoint(tmp_path / "best", encoder, parts[1], CONFIG)
    monkeypatch.setattr("latentwire.backbone.load_backbone", lambda *a: pytest.fail("asked for the origin"))
    torch.manual_seed(7)  # nothing random may stay
    loaded, adapters, config = load_checkpoint(tmp_path / "best", LLMS)
    assert type(loaded) is type(encoder) and config["encoder"]["type"] == {"select": "hf", "cif": "hf"}.get(kind, kind)
    for source in ("prompt", "context"):
        before, after = (e.encode(questions[:3], source, 6) for e in (encoder, loaded))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(adapters[n].linear.weight, parts[1][n].linear.weight) for n in LLMS)
    if kind in ("select", "cif"):
        assert loaded.read(questions[0]) == encoder.read(questions[0])


def test_a_backbone_that_cannot_be_read_is_named(parts, llms, encoder_folder, tmp_path):
    save_checkpoint(tmp_path / "best", encoder_of("queries", llms, encoder_folder), parts[1], CONFIG)
    (tmp_path / "best" / "backbone" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"backbone cannot be read"):
        load_checkpoint(tmp_path / "best", LLMS)


def test_some_of_the_trained_llms_can_be_loaded_alone_and_others_are_refused(folder):
    assert list(load_checkpoint(folder, {"qwen": "some/qwen"})[1]) == ["qwen"]
    with pytest.raises(ValueError, match=r"made for qwen='some/qwen', not 'other'.*QWEN_ID"):
        load_checkpoint(folder, LLMS | {"qwen": "other"})


def test_the_state_of_a_training_is_kept_beside_the_weights_and_found_again(folder, parts):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"step": 7, "best": None, "optimizer": optimizer.state_dict()}
    save_checkpoint(folder, *parts, CONFIG, state)
    found = load_training(folder)
    assert found["step"] == 7 and found["best"] is None
    again = torch.optim.AdamW(model.parameters())
    again.load_state_dict(found["optimizer"])
    assert torch.equal(again.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    load_checkpoint(folder, LLMS)
    save_checkpoint(folder, *parts, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"lacks .*training\.pt"):
        load_training(folder)


@pytest.fixture
def soft(tmp_path, llms):
    torch.manual_seed(0)
    prompts = {name: torch.randn(16, llms[name].width) for name in LLMS}
    save_soft_prompts(tmp_path / "soft", prompts, {"llms": LLMS, "stage": "text_tuned"}, {"step": 3})
    return tmp_path / "soft", prompts


def test_soft_prompts_are_loaded_bit_by_bit_with_the_state_of_their_training(soft):
    folder, prompts = soft
    loaded = load_soft_prompts(folder, LLMS)
    assert loaded.keys() == prompts.keys() and all(torch.equal(loaded[name], prompts[name]) for name in LLMS)
    assert load_training(folder) == {"step": 3}


def test_soft_prompts_that_do_not_fit_are_refused(soft, tmp_path):
    folder, _ = soft
    with pytest.raises(ValueError, match=r"soft was made for llama='some/llama'"):
        load_soft_prompts(folder, {"llama": "other"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_soft_prompts(tmp_path / "nowhere", LLMS)
    put(folder, "soft_prompt_llama.pt", {"step": 1})
    with pytest.raises(ValueError, match=r"soft_prompt_llama\.pt holds no soft prompt"):
        load_soft_prompts(folder, LLMS)
    data = (folder / "soft_prompt_qwen.pt").read_bytes()
    (folder / "soft_prompt_qwen.pt").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"soft_prompt_qwen\.pt is cut or damaged"):
        load_soft_prompts(folder, {"qwen": LLMS["qwen"]})


def test_one_hash_stands_for_weights_config_and_tokenizer(folder):
    hashes = {checkpoint_sha256(folder)}
    in_config(folder, note="x")
    hashes.add(checkpoint_sha256(folder))
    put(folder, "adapter_llama.pt", {})
    hashes.add(checkpoint_sha256(folder))
    (folder / "wire_tokenizer" / "tokenizer_config.json").write_text("{}")
    hashes.add(checkpoint_sha256(folder))
    assert len(hashes) == 4 and checkpoint_sha256(folder) in hashes
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint_sha256(folder / "nowhere")
