"""A checkpoint is whole and fits, or it is refused."""

import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latentwire.data.content import SOURCES
from latentwire.models.adapters import ADAPTERS, Adapter, ResidualAdapter
from latentwire.models.backbones import ByteBackbone, load_backbone
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint, save_soft_prompts
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.queries import ByteEncoder, QueryEncoder
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.weights import (
    checkpoint_sha256,
    load_soft_prompts,
    load_strict,
    load_training,
    read_config,
    train_seed,
    weights_bytes,
)
from latentwire.utils.files import json_text, write_sealed

LLMS = {"llama": "some/llama", "qwen": "some/qwen"}
CONFIG = {"d_z": 8, "llms": LLMS, "train_seed": None}
ENDS = ["safetensors", "pt"]
STEMS = ["encoder", "adapter_llama", "adapter_qwen"]


@pytest.fixture
def parts(llms):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return ClosedFormEncoder(tokenizer, 8, len(tokenizer)), {n: ResidualAdapter(8, llms[n].width) for n in LLMS}


@pytest.fixture
def folder(parts, tmp_path):
    save_checkpoint(tmp_path / "best", *parts, CONFIG)
    return tmp_path / "best"


def in_config(folder, **changes):
    """Change keys of config.json, as someone who means it would."""
    write_sealed(folder / "config.json", read_config(folder) | changes)


def only(folder, end):
    """Leave the weights in one form alone, as older checkpoints (.pt) and careful downloads (.safetensors) are."""
    for path in [path for other in ENDS if other != end for path in folder.glob(f"*.{other}")]:
        path.unlink()


def put(folder, name, content):
    """Replace a weights file and its hash, as someone who means it would."""
    (torch.save if name.endswith(".pt") else save_file)(content, folder / name)
    hashes = json.loads((folder / "config.json").read_text())["sha256"]
    in_config(folder, sha256=hashes | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def test_what_is_saved_is_loaded_bit_by_bit(folder, parts, questions):
    encoder, adapters, config = load_checkpoint(folder, LLMS)
    assert config["llms"] == LLMS
    for before, after in [(parts[0], encoder), *((parts[1][name], adapters[name]) for name in LLMS)]:
        assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    assert encoder.select(questions[:1], "prompt", 32) == parts[0].select(questions[:1], "prompt", 32)
    weights = {f"{stem}.{end}" for stem in STEMS for end in ENDS}
    assert {p.name for p in folder.iterdir()} == weights | {"config.json", "wire_tokenizer"}
    assert config["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in weights}


def test_both_forms_hold_the_same_weights(folder):
    for stem in STEMS:
        safe, pickled = load_file(folder / f"{stem}.safetensors"), torch.load(folder / f"{stem}.pt", weights_only=True)
        assert safe.keys() == pickled.keys() and all(torch.equal(value, pickled[key]) for key, value in safe.items())


@pytest.mark.parametrize("end", ENDS)
def test_either_form_alone_is_a_checkpoint(folder, parts, end):
    both = weights_bytes(folder)
    only(folder, end)
    encoder, adapters, _ = load_checkpoint(folder, LLMS)
    assert torch.equal(encoder.codebook.weight, parts[0].codebook.weight)
    for name, adapter in adapters.items():
        assert all(torch.equal(value, parts[1][name].state_dict()[key]) for key, value in adapter.state_dict().items())
    sizes = {path.stem: path.stat().st_size for path in folder.glob(f"*.{end}")}
    assert sizes.keys() == set(STEMS) and weights_bytes(folder) == sum(sizes.values())
    assert both == weights_bytes(folder) or end == "pt", "weights in two forms count once"


@pytest.mark.parametrize("end", ENDS)
def test_weights_in_half_precision_are_computed_with_in_full(folder, parts, end):
    only(folder, end)
    put(folder, f"adapter_qwen.{end}", parts[1]["qwen"].half().state_dict())
    loaded = load_checkpoint(folder, LLMS)[1]["qwen"]
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.linear.weight, parts[1]["qwen"].linear.weight.float())


def test_a_folder_without_weights_has_no_bytes_of_them(tmp_path):
    assert weights_bytes(tmp_path) == weights_bytes(tmp_path / "nowhere") == 0


def test_weights_that_share_memory_are_saved_each(parts, tmp_path):
    """safetensors refuses shared memory; a state dict of views must not stop a training at its first save."""
    encoder, adapters = parts
    adapters["qwen"].linear.bias = torch.nn.Parameter(adapters["qwen"].mlp[2].bias.data)
    save_checkpoint(tmp_path / "best", encoder, adapters, CONFIG)
    loaded = load_checkpoint(tmp_path / "best", LLMS)[1]["qwen"]
    assert torch.equal(loaded.linear.bias, adapters["qwen"].linear.bias)


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


def test_a_reader_in_the_moment_of_the_renaming_does_not_end_a_save(folder, parts, monkeypatch):
    rename, read = Path.rename, []

    def renamed(self, target):
        if self.name == ".best.part" and not read:
            read.append(read_config(folder))  # takes what it sees for a killed save
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    save_checkpoint(folder, *parts, CONFIG | {"train_seed": 7})
    assert read[0]["train_seed"] is None and read_config(folder)["train_seed"] == 7
    assert not list(folder.parent.glob(".*"))


def test_every_file_is_on_disk_before_the_checkpoint_before_it_goes(folder, parts, monkeypatch):
    sync, rename, synced, there = os.fsync, Path.rename, set(), []

    def noted(file):
        synced.add(os.fstat(file).st_ino)
        sync(file)

    def renamed(self, target):
        new = folder.with_name(".best.part")
        there.append({path.name: path.stat().st_ino in synced for path in new.rglob("*") if path.is_file()})
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    save_checkpoint(folder, *parts, CONFIG, {"step": 3})
    assert {f"{stem}.{end}" for stem in STEMS for end in ENDS} | {"training.pt", "tokenizer.json"} <= there[0].keys()
    assert all(there[0].values()), there[0]


def test_a_tokenizer_with_several_chat_templates_is_kept_whole(parts, tmp_path):
    tokenizer = parts[0].tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, {"default": "{{ a }}", "tool_use": "{{ b }}"}
    try:
        save_checkpoint(tmp_path / "best", *parts, CONFIG)
    finally:
        tokenizer.chat_template = before
    encoder, _, made = load_checkpoint(tmp_path / "best", LLMS)
    assert encoder.tokenizer.chat_template == {"default": "{{ a }}", "tool_use": "{{ b }}"}
    (nested,) = [name for name in made["parts_sha256"] if "tool_use" in name]
    whole = checkpoint_sha256(tmp_path / "best")
    (tmp_path / "best" / nested).write_text("{{ c }}")
    assert checkpoint_sha256(tmp_path / "best") != whole
    with pytest.raises(ValueError, match="tool_use"):
        load_checkpoint(tmp_path / "best", LLMS)


def test_the_seed_of_a_reader_is_that_of_its_joining():
    made = {"train_seed": 0, "joined": {"qwen": {"settings": {"seed": 3}}}}
    assert [train_seed(made, llms) for llms in (["llama"], ["qwen"], ["llama", "qwen"])] == [0, 3, None]
    assert train_seed({}, ["llama"]) is None


def test_a_write_that_fails_keeps_the_checkpoint_before_it(folder, parts, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentwire.models.checkpoint.write_sealed", full)
    before = (folder / "encoder.pt").read_bytes()
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(folder, *parts, CONFIG)
    assert (folder / "encoder.pt").read_bytes() == before
    load_checkpoint(folder, LLMS)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("torch.save", OSError(28, "No space left on device")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file")),
        ("latentwire.models.checkpoint.save_file", SafetensorError("I/O error: No space left on device")),
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_checkpoint_and_nothing_else(
    folder, parts, monkeypatch, where, error, at
):
    before, calls = {p.name: p.read_bytes() for p in folder.glob("*.*")}, []
    real = torch.save if where == "torch.save" else save_file

    def full(content, path):
        calls.append(path.name)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise error
        real(content, path)

    monkeypatch.setattr(where, full)
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


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stem", ["encoder", "adapter_qwen"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_file_is_named(folder, stem, end, keep):
    only(folder, end)
    name = f"{stem}.{end}"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stem", ["encoder", "adapter_qwen"])
def test_a_single_altered_byte_of_what_is_read_is_noticed(folder, stem, end, beside):
    """Also where the other form, whole, stands beside it; of two forms the first is read."""
    if not beside:
        only(folder, end)
    path = folder / f"{stem}.{end}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if beside and end == "pt":
        load_checkpoint(folder, LLMS)
        return
    with pytest.raises(ValueError, match=rf"{path} is cut or damaged"):
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
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        load_checkpoint(folder, LLMS)


def test_an_altered_config_is_named(folder):
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"train_seed": null', '"train_seed": 7'))
    with pytest.raises(ValueError, match=rf"{path} was altered; restore it, or take 'config_sha256' out of it"):
        load_checkpoint(folder, LLMS)
    path.write_text(json.dumps(json.loads(text), sort_keys=True))
    assert load_checkpoint(folder, LLMS)[2]["train_seed"] is None, "the same, written otherwise"
    config = json.loads(text)
    del config["config_sha256"]
    path.write_text(json.dumps(config | {"train_seed": 7}))
    assert load_checkpoint(folder, LLMS)[2]["train_seed"] == 7, "older checkpoints promise nothing"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"encoder": {"type": "codebook", "vocabulary": 10**12}},
            r"encoder\.safetensors does not fit .*\[1000000000000, 8\]",
        ),
        ({"encoder": {"type": "codebook", "vocabulary": 10**30}}, r"config\.json does not fit the encoder codebook"),
        ({"d_z": 10**10}, r"encoder\.safetensors does not fit .*10000000000\]"),
        ({"widths": {"llama": 10**12, "qwen": 64}}, r"adapter_llama\.safetensors does not fit .*1000000000000"),
        ({"widths": {"llama": -1, "qwen": 64}}, r"config\.json does not fit the adapter residual_mlp"),
        ({"widths": {"llama": "wide", "qwen": 64}}, r"config\.json does not fit the adapter residual_mlp"),
    ],
)
def test_a_config_that_claims_more_than_its_files_hold_is_refused_before_memory_is_taken(folder, changes, says):
    in_config(folder, **changes)
    with pytest.raises(ValueError, match=says):
        load_checkpoint(folder, LLMS)


def test_what_a_config_claims_is_gone_when_the_module_is_built(folder, parts):
    made, kept = [], []

    def build():
        kept.append([one() for one in made])
        module = ResidualAdapter(8, parts[1]["qwen"].width)
        made.append(weakref.ref(module))
        return module

    loaded = load_strict(build, folder, "adapter_qwen", "adapter residual_mlp")
    assert kept == [[], [None]] and made[1]() is loaded
    assert torch.equal(loaded.linear.weight, parts[1]["qwen"].linear.weight)


@pytest.mark.parametrize("shape", [{"type": "magic"}, {}])
def test_an_encoder_of_an_unknown_type_is_named_with_the_known_ones(folder, shape):
    in_config(folder, encoder=shape)
    named = repr(shape.get("type"))
    with pytest.raises(ValueError, match=rf"config\.json names the encoder_type {named}, .*it knows .*codebook.*hf"):
        load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("shape", [{"type": "codebook"}, {"type": "codebook", "vocabulary": 700, "depth": 3}])
def test_an_encoder_whose_shape_does_not_fit_its_type_is_named(folder, shape):
    in_config(folder, encoder=shape)
    with pytest.raises(ValueError, match=r"config\.json does not fit the encoder codebook \(.*(vocabulary|depth)"):
        load_checkpoint(folder, LLMS)


def test_adapters_of_an_unknown_type_are_named_with_the_known_ones(folder):
    in_config(folder, adapters={"llama": "residual_mlp", "qwen": "magic"})
    with pytest.raises(ValueError, match=r"config\.json names the adapter_type 'magic', .*it knows .*residual_mlp"):
        load_checkpoint(folder, LLMS)
    assert list(load_checkpoint(folder, {"llama": LLMS["llama"]})[1]) == ["llama"], "what is not read is not judged"


def test_a_checkpoint_that_does_not_say_what_its_adapters_are_has_the_first_kind(folder):
    config = read_config(folder)
    assert config.pop("adapters") == dict.fromkeys(LLMS, "residual_mlp")
    (folder / "config.json").write_text(json.dumps(config))
    assert {type(adapter) for adapter in load_checkpoint(folder, LLMS)[1].values()} == {ResidualAdapter}


def test_what_no_registry_knows_is_refused_before_anything_is_written(parts, tmp_path):
    class OtherEncoder(ClosedFormEncoder):
        """It has the name of its parent, and would come back as that."""

    class OtherAdapter(Adapter):
        """It has no name."""

    encoder, adapters = parts
    other = OtherEncoder.from_codebook(encoder.tokenizer, encoder.codebook.weight.detach())
    with pytest.raises(ValueError, match=r"OtherEncoder is not registered.*encoder_type: .*codebook"):
        save_checkpoint(tmp_path / "best", other, adapters, CONFIG)
    with pytest.raises(ValueError, match=r"OtherAdapter is not registered.*adapter_type: .*residual_mlp"):
        save_checkpoint(tmp_path / "best", encoder, adapters | {"qwen": OtherAdapter(8, 64)}, CONFIG)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_added_by_one_registered_class(parts, tmp_path, monkeypatch):
    class Mine(Adapter):
        """Without a bias."""

        def __init__(self, d_z, width):
            super().__init__(d_z, width)
            self.weight = torch.nn.Parameter(torch.randn(width, d_z))

        @classmethod
        def from_closed_form(cls, weight, bias):
            made = cls(*weight.T.shape)
            made.weight.data.copy_(weight)
            return made

        def forward(self, z):
            return z @ self.weight.T

    monkeypatch.setattr(Mine, "name", "mine", raising=False)
    monkeypatch.setitem(ADAPTERS, "mine", Mine)
    encoder, adapters = parts
    mixed = adapters | {"qwen": Mine.from_closed_form(torch.randn(64, 8), torch.zeros(64))}
    save_checkpoint(tmp_path / "best", encoder, mixed, CONFIG)
    loaded = load_checkpoint(tmp_path / "best", LLMS)[1]
    assert type(loaded["qwen"]) is Mine and type(loaded["llama"]) is ResidualAdapter
    assert torch.equal(loaded["qwen"].weight, mixed["qwen"].weight)


def test_a_missing_file_is_named(folder):
    (folder / "adapter_llama.pt").unlink()
    load_checkpoint(folder, LLMS)
    (folder / "adapter_llama.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_llama\.pt \(and \.safetensors\)"):
        load_checkpoint(folder, LLMS)


@pytest.mark.parametrize("end", ENDS)
def test_missing_unexpected_and_misshapen_keys_are_named(folder, end):
    only(folder, end)
    put(folder, f"adapter_llama.{end}", {"linear.weight": torch.zeros(3, 8), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"adapter_llama\.{end} does not fit") as error:
        load_checkpoint(folder, LLMS)
    assert all(word in str(error.value) for word in ("linear.bias", "extra", "linear.weight"))


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    only(folder, "pt")
    put(folder, "adapter_llama.pt", {"linear.weight": print})
    with pytest.raises(ValueError, match=r"adapter_llama\.pt.*(?i:unsupported|weights.only)"):
        load_checkpoint(folder, LLMS)


def test_a_file_that_is_no_safetensors_is_refused_although_its_hash_is_right(folder):
    (folder / "adapter_llama.safetensors").write_bytes(b"something else")
    hashes = json.loads((folder / "config.json").read_text())["sha256"]
    now = hashlib.sha256(b"something else").hexdigest()
    in_config(folder, sha256=hashes | {"adapter_llama.safetensors": now})
    with pytest.raises(ValueError, match=r"adapter_llama\.safetensors is cut or damaged"):
        load_checkpoint(folder, LLMS)


def test_no_checkpoint_and_foreign_folders_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere", LLMS)
    config = read_config(folder)
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
    if kind in ("ids", "ids_marked"):
        encoder = ENCODERS[kind](tokenizer, 8, len(tokenizer), load_backbone(encoder_folder), "select")
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.1)
        return encoder
    if kind in ("select", "cif", "low_rank"):
        how = {"pooling": "select", "residual_rank": 2} if kind == "low_rank" else {"pooling": kind}
        encoder = SelectingEncoder(tokenizer, 8, len(tokenizer), load_backbone(encoder_folder), **how)
        for head in (encoder.score, encoder.residual.up if kind == "low_rank" else encoder.residual):
            torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(encoder.outside)
        return encoder
    if kind == "byte":
        return ByteEncoder(tokenizer, 8, 6, ByteBackbone(), torch.rand(8))
    return QueryEncoder(tokenizer, 8, 6, load_backbone(encoder_folder), torch.rand(8))


@pytest.mark.parametrize("kind", ["select", "cif", "low_rank", "ids", "ids_marked", "queries", "byte"])
def test_a_trained_encoder_gives_the_same_z_after_loading_without_its_origin(
    parts, llms, encoder_folder, tmp_path, questions, monkeypatch, kind
):
    encoder = encoder_of(kind, llms, encoder_folder)
    save_checkpoint(tmp_path / "best", encoder, parts[1], CONFIG)
    for module in ("tokens", "queries"):
        origin = f"latentwire.models.encoders.{module}.load_backbone"
        monkeypatch.setattr(origin, lambda *a: pytest.fail("asked for the origin"))
    torch.manual_seed(7)  # nothing random may stay
    loaded, adapters, config = load_checkpoint(tmp_path / "best", LLMS)
    assert type(loaded) is type(encoder) is ENCODERS[config["encoder"]["type"]]
    assert config["encoder"]["type"] == {"select": "hf", "cif": "hf", "low_rank": "hf"}.get(kind, kind)
    for source in SOURCES:
        before, after = (e.encode(questions[:3], source, 6) for e in (encoder, loaded))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(adapters[n].linear.weight, parts[1][n].linear.weight) for n in LLMS)
    if kind in ("select", "cif"):
        assert loaded.read(questions[:1]) == encoder.read(questions[:1])


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


@pytest.mark.parametrize("end", ENDS)
def test_soft_prompts_that_do_not_fit_are_refused(soft, tmp_path, end):
    folder, _ = soft
    with pytest.raises(ValueError, match=r"soft was made for llama='some/llama'"):
        load_soft_prompts(folder, {"llama": "other"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_soft_prompts(tmp_path / "nowhere", LLMS)
    only(folder, end)
    put(folder, f"soft_prompt_llama.{end}", {"step": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"soft_prompt_llama\.{end} holds no soft prompt"):
        load_soft_prompts(folder, LLMS)
    data = (folder / f"soft_prompt_qwen.{end}").read_bytes()
    (folder / f"soft_prompt_qwen.{end}").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=rf"soft_prompt_qwen\.{end} is cut or damaged"):
        load_soft_prompts(folder, {"qwen": LLMS["qwen"]})


def test_soft_prompts_of_either_form_load_and_older_ones_hold_the_tensor_alone(soft):
    folder, prompts = soft
    only(folder, "pt")
    assert torch.equal(load_soft_prompts(folder, LLMS)["qwen"], prompts["qwen"])
    put(folder, "soft_prompt_qwen.pt", prompts["qwen"])
    assert torch.equal(load_soft_prompts(folder, LLMS)["qwen"], prompts["qwen"])


def test_one_hash_stands_for_weights_config_and_tokenizer(folder):
    hashes = {checkpoint_sha256(folder)}
    in_config(folder, note="x")
    hashes.add(checkpoint_sha256(folder))
    put(folder, "adapter_llama.pt", {})
    hashes.add(checkpoint_sha256(folder))
    put(folder, "encoder.safetensors", {})
    hashes.add(checkpoint_sha256(folder))
    (folder / "wire_tokenizer" / "tokenizer_config.json").write_text("{}")
    hashes.add(checkpoint_sha256(folder))
    assert len(hashes) == 5 and checkpoint_sha256(folder) in hashes
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint_sha256(folder / "nowhere")


def test_that_hash_is_of_whole_files_and_read_in_pieces(folder, monkeypatch):
    digest, names = hashlib.sha256(), ("*.safetensors", "*.pt", "wire_tokenizer/*", "config.json")
    for path in sorted(path for name in names for path in folder.glob(name)):
        config = path.name == "config.json" and path.parent == folder
        digest.update(path.name.encode() + (json_text(read_config(folder)).encode() if config else path.read_bytes()))
    assert checkpoint_sha256(folder) == digest.hexdigest()
    monkeypatch.setattr("latentwire.models.weights._PIECE", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read a whole file"))
    assert checkpoint_sha256(folder) == digest.hexdigest()


def test_a_checkpoint_may_be_the_folder_that_one_stands_in(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "joint"}')
    monkeypatch.chdir(tmp_path)
    assert read_config(Path(".")) == {"stage": "joint"}


def test_the_shipped_checkpoint_is_sealed_and_still_the_one_of_its_records():
    root = Path(__file__).parents[2]
    shipped = root / "checkpoints" / "latentwire_m32"
    assert "config_sha256" in json.loads((shipped / "config.json").read_text())
    record = json.loads((root / "results" / "41_scores" / "config.json").read_text())["config"]
    assert checkpoint_sha256(shipped)[:16] == record["checkpoint_sha256"]
