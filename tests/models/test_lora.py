"""An LLM's layers as the backbone: they look both ways; with LoRA their own weights stay, and lie in no checkpoint."""

import dataclasses
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.run_tools import ready_trainer

from latentwire.models.backbones import backbone_of_shape, load_backbone, save_backbone_shape
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.exporting import export
from latentwire.models.weights import read_config
from latentwire.training.running import train

RANK = 4


def states(backbone, *questions):
    with torch.no_grad():
        return backbone.eval()(questions, "context")


def test_an_llms_first_word_sees_its_last_and_no_padding(llm_folders, short_questions):
    backbone, (short, long) = load_backbone(llm_folders["LLAMA_ID"]), short_questions[:2]
    short = dataclasses.replace(short, context=short.context[:50])
    other = dataclasses.replace(short, context=short.context[:-1] + "?")
    alone, changed, both = states(backbone, short), states(backbone, other), states(backbone, short, long)
    assert (alone.hidden[0, 0] - changed.hidden[0, 0]).abs().max() > 1e-3
    assert not both.mask[0].all()
    torch.testing.assert_close(both.hidden[0, both.mask[0]], alone.hidden[0], atol=1e-5, rtol=1e-4)
    assert [s.hidden.shape for s in backbone.each([short, long], "context")] == [
        states(backbone, q).hidden.shape for q in (short, long)
    ]


@pytest.fixture
def changed(encoder_folder):
    """A backbone whose LoRA has learned something."""
    backbone = load_backbone(encoder_folder, RANK)
    for name, weight in backbone.named_parameters():
        torch.nn.init.normal_(weight) if "lora_B" in name else None
    return backbone


def test_lora_begins_as_the_backbone_and_holds_little_of_it(encoder_folder, changed, short_questions):
    plain, begun, q = load_backbone(encoder_folder), load_backbone(encoder_folder, RANK), short_questions[0]
    torch.testing.assert_close(states(plain, q).hidden, states(begun, q).hidden)
    assert not torch.allclose(states(changed, q).hidden, states(begun, q).hidden, atol=1e-2)
    assert all("lora_" in name for name, _ in begun.named_parameters())
    assert begun.state_dict().keys() == dict(begun.named_parameters()).keys()
    assert sum(map(torch.numel, begun.parameters())) < sum(map(torch.numel, plain.parameters())) / 2


def test_it_is_rebuilt_from_where_it_comes_from_and_from_no_other_weights(
    encoder_folder, changed, tmp_path, short_questions
):
    save_backbone_shape(changed, tmp_path)
    again = backbone_of_shape(tmp_path)
    again.load_state_dict(changed.state_dict())
    assert torch.equal(states(again, short_questions[0]).hidden, states(changed, short_questions[0]).hidden)
    changed.origin = changed.origin | {"sha256": "0" * 64}
    save_backbone_shape(changed, tmp_path)
    with pytest.raises(ValueError, match=f"trained on other weights of {encoder_folder}"):
        backbone_of_shape(tmp_path)


def test_a_backbone_without_a_pooler_is_the_same_one_each_time(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(kept) < len(weights)
    assert load_backbone(str(folder), RANK).origin == load_backbone(str(folder), RANK).origin


def test_without_peft_it_says_what_to_install(encoder_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'lora=4: peft is not installed: pip install -e "\.\[lora\]"'):
        load_backbone(encoder_folder, RANK)


@pytest.mark.usefixtures("surroundings")
def test_training_changes_loras_matrices_alone_and_a_checkpoint_gives_the_same_z(
    short, run_of, llm_folders, tmp_path, short_questions
):
    how = {"source": "context", "encoder_type": "anchors"}
    how["encoder"] = ENCODERS["anchors"].Settings(encoder_id=llm_folders["QWEN_ID"], lora=RANK)
    codebook = run_of(short(tmp_path / "codebook", stage="codebook", **how)) / "checkpoint_best"
    config = short(tmp_path / "r", init=str(codebook), encoder_lr=0.1, **how)
    frozen = load_backbone(llm_folders["QWEN_ID"]).state_dict()
    trainer = ready_trainer(config)
    trained = next(part for part in trainer.components if part.kind == "backbone").parameters
    before = [weight.clone() for weight in trained]
    for trainer.step in range(2):
        trainer.take_step()
    backbone = trainer.job.model.encoder.backbone
    assert all(not torch.equal(*pair) for pair in zip(before, trained, strict=True))
    kept = {name.replace("base_layer.", "").removeprefix("model."): weight for name, weight in backbone.named_buffers()}
    shared = {name: frozen[f"model.{name}"] for name in kept if f"model.{name}" in frozen}
    assert len(shared) == len(frozen) and all(torch.equal(kept[name], weight) for name, weight in shared.items())
    train(config)
    found = tmp_path / "r" / "checkpoint_last"
    encoder, *_ = load_checkpoint(found, read_config(found)["llms"])
    (z,) = encoder.encode(short_questions[:1], "context", 6)
    again, *_ = load_checkpoint(found, read_config(found)["llms"])
    assert torch.equal(z, again.encode(short_questions[:1], "context", 6)[0])
    with pytest.raises(ValueError, match=f"its LoRA needs the backbone in {llm_folders['QWEN_ID']}"):
        export(found, tmp_path / "shipped")
    other = dataclasses.replace(
        config, init=str(found), save_dir=str(tmp_path / "other"), encoder=how["encoder"].__class__(lora=8)
    )
    with pytest.raises(ValueError, match=r"lora=8: .* has 4; set that"):
        train(other)
