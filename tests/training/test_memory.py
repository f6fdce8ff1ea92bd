"""The plan of a training's memory: near what autograd keeps, and refused where it cannot be."""

import dataclasses
import shutil

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from latentwire.data.squad import load
from latentwire.llms.arithmetic import Shape, shape_in
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.weights import weights_bytes
from latentwire.training import memory
from latentwire.training.memory import kept_bytes, training_bytes, within_memory
from latentwire.training.settings import TrainSettings

CONFIG = TrainSettings(stage="joint", init="-", device="cpu", dtype="float32", batch_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "made"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_what_a_layer_keeps_is_what_autograd_keeps(kind, made, dtype):
    def saved(layers):
        model = kind(
            made(
                vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2,
            )
        ).to(dtype).requires_grad_(False)  # fmt: skip
        frozen = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
            return tensor

        embeds = torch.randn(4, 50, 64, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs_embeds=embeds, logits_to_keep=1).logits.float().sum()
        return sum(size for size, _ in kept.values()) / (4 * 50)

    expected = kept_bytes(Shape(1, 64, 160, 32, 50), torch.empty(0, dtype=dtype).element_size())
    assert saved(4) - saved(3) == pytest.approx(expected, rel=0.1)


def test_a_long_slot_keeps_what_is_planned(llms):
    """Through the LLM's own way of attention, by which the weights over a shared head are kept."""
    llm, own = llms["llama"], 400
    shape = shape_in(llm.model.config)
    frozen = {weight.untyped_storage().data_ptr() for weight in llm.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    head, embeds = tuple(range(3, 3 + memory._HEAD)), torch.randn(own, llm.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        llm.loss_with_prefix(head, [embeds], [[7] * memory._TAIL], [[8]]).nll.sum()
    positions = own + memory._TAIL
    attention = memory.attention_bytes(shape, 4, positions, "cpu")
    planned = shape.layers * positions * (kept_bytes(shape, 4) + attention)
    assert attention > kept_bytes(shape, 4), "else this tells nothing"
    assert sum(size for size, _ in kept.values()) == pytest.approx(planned, rel=0.25)


def test_more_questions_and_wider_numbers_need_more():
    shapes = {"llama": Shape(16, 2048, 8192, 512, 128256, counted=10**9)}

    def needed(longest=800, **changes):
        size = changes.pop("at_once", 32)
        return sum(training_bytes(dataclasses.replace(CONFIG, **changes), shapes, longest, size).values())

    assert needed(at_once=64) > 1.5 * needed(at_once=32)
    assert needed(dtype="bfloat16") < 0.7 * needed()
    assert needed(latent_len=64) > needed(latent_len=32)
    rival = {"stage": "text_tuned", "init": ""}
    assert needed(**rival, longest=3200) > 2 * needed(**rival)  # a batch of the longest texts decides, not a usual one
    assert needed(stage="token_budget_tuned", init="", longest=3200) == needed(stage="token_budget_tuned", init="")


def test_a_backbone_that_is_yet_to_be_loaded_counts(finished, trained, encoder_folder, tmp_path):
    """What stage codebook leaves has none; what other stages leave has it among its weights."""
    counted = sum(weight.numel() for weight in AutoModel.from_pretrained(encoder_folder).parameters())

    def needed(init, at_once, lora=0):
        settings = SelectingEncoder.Settings(encoder_id=str(encoder_folder), lora=lora)
        config = dataclasses.replace(CONFIG, init=str(init), encoder=settings)
        return training_bytes(config, {}, 800, at_once)["encoder and adapters"]

    codebook = finished[0] / "checkpoint_untrained"
    assert needed(codebook, 0) == 4 * weights_bytes(codebook) + 16 * counted
    assert needed(codebook, 0, lora=2) == 4 * weights_bytes(codebook) + 4 * counted
    assert needed(trained, 0) == 4 * weights_bytes(trained)
    with_lora = shutil.copytree(trained, tmp_path / "lora")
    (with_lora / "backbone" / "lora.json").write_text('{"rank": 2}')
    assert needed(with_lora, 0) == 4 * weights_bytes(trained) + 4 * counted, "a join has no setting of it"
    assert needed(trained, 1) - needed(trained, 0) == pytest.approx(60e6 * (2 * 32) / (6 * 384))


def test_an_impossible_plan_is_refused_with_the_numbers_and_what_to_change(tiny_models, monkeypatch):
    questions = load("sample", "train").questions
    config, said = within_memory(CONFIG, questions)
    assert said.startswith("memory: about 2.0 GB per process") and config.micro_batch is None
    monkeypatch.setattr(memory, "total_bytes", lambda device: 7 * 10**8)
    config, said = within_memory(CONFIG, questions)
    assert said.endswith("of 0.7 GB; 8 questions at a time") and (config.micro_batch, config.batch_size) == (8, 32)
    config, _ = within_memory(dataclasses.replace(CONFIG, ignore_memory=True), questions)
    assert config.micro_batch is None, "it starts as it is"
    config, _ = within_memory(dataclasses.replace(CONFIG, batch_size=21), questions)
    assert config.micro_batch == 6, "21, 11, 6"
    given = dataclasses.replace(CONFIG, micro_batch=32)
    with pytest.raises(ValueError, match=r"about 2\.0 GB .* 0\.7 GB are there; choose MICRO_BATCH .*below 32"):
        within_memory(given, questions)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"needs about .* GB .*0\.0 GB are there; choose DTYPE=bfloat16"):
        within_memory(CONFIG, questions)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10**7)
    smallest = dataclasses.replace(CONFIG, batch_size=1, llms="llama", dtype="bfloat16")
    with pytest.raises(
        ValueError, match="choose smaller LLMs, or a larger device; --ignore_memory starts it all the same"
    ):
        within_memory(smallest, questions)
    _, said = within_memory(dataclasses.replace(smallest, ignore_memory=True), questions)
    assert said.startswith("memory: about ") and said.endswith(", of 0.0 GB")
