"""What is trained changes, what is frozen does not, and training sees what an evaluation will."""

import copy
from dataclasses import replace

import pytest
import torch

from latentwire.conditions.base import CONDITIONS, Sender, Setting
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import Adapter
from latentwire.models.backbones import ByteBackbone, load_backbone
from latentwire.models.encoders.base import ResamplingEncoder, SelectingEncoder
from latentwire.models.latentwire import SOFT_VECTORS, LatentWire, SoftPrompts
from latentwire.models.stage0 import closed_form
from latentwire.training.losses import answer_sums, span_sum

M, D_Z, K = 16, 24, 4
HF = {"codebook", "backbone", "score", "span", "residual"}


@pytest.fixture(scope="module")
def stage0(llms, texts):
    return closed_form(llms, texts, D_Z)[:2]


@pytest.fixture
def model_of(llms, stage0, encoder_folder):
    def make(kind="hf", source="prompt", pooling="select"):
        codebook, closed = stage0
        adapters = {name: copy.deepcopy(adapter) for name, adapter in closed.items()}
        torch.manual_seed(0)
        backbone = ByteBackbone() if kind == "byte" else load_backbone(encoder_folder)
        if kind == "hf":
            encoder = SelectingEncoder(codebook.tokenizer, *codebook.codebook.weight.shape, backbone, pooling)
            encoder.codebook.load_state_dict(codebook.codebook.state_dict())
        else:
            encoder = ResamplingEncoder(codebook.tokenizer, D_Z, backbone, M)
        return LatentWire(encoder, adapters, source, M)

    return make


@pytest.fixture
def settings(llms, texts, questions):
    return [
        Setting(llm, PromptBuilder(llm.tokenizer, "prompt", "zero_shot"), None, None, "fp16", D_Z, texts, questions, 0)
        for llm in llms.values()
    ]


def answer_loss(setting, slots, batch):
    """Cross-entropy of the answers that one LLM gives to its slots."""
    prompts = setting.prompts
    tails, labels = [prompts.tail(q.question) for q in batch], [prompts.label_ids(q.answers[0], K) for q in batch]
    scored = setting.llm.loss_with_prefix(prompts.head, slots.embeds[setting.llm.name], tails, labels)
    return answer_sums(scored)["ce"]


def norm(parameters):
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("hf", HF), ("queries", {"backbone", "resampler"}), ("byte", {"backbone", "resampler"})],
)
def test_every_parameter_belongs_to_one_component(model_of, kind, expected):
    model = model_of(kind)
    components = model.components()
    assert components.keys() == expected | {"adapter_llama", "adapter_qwen"}
    named = [id(p) for params in components.values() for p in params]
    assert sorted(named) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(("kind", "pooling"), [("hf", "select"), ("hf", "cif"), ("queries", ""), ("byte", "")])
def test_the_answers_loss_reaches_every_component_and_no_llm(model_of, settings, questions, kind, pooling):
    model, batch = model_of(kind, pooling=pooling), questions[:1]
    for setting in settings:
        model.zero_grad()
        answer_loss(setting, model(batch), batch).backward()
        found = {name: norm(params) for name, params in model.components().items()}
        other = next(f"adapter_{s.llm.name}" for s in settings if s is not setting)
        assert found.pop(other) == 0, "one LLM's loss is none of the other's business"
        assert all(value > 0 for value in found.values()), found
        assert all(p.grad is None for p in setting.llm.model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_step_changes_every_component_and_leaves_the_llms_bit_identical(model_of, settings, questions):
    model, batch = model_of(), questions[:3]
    frozen = [setting.llm.weights_sha256() for setting in settings]
    before = {name: [p.detach().clone() for p in params] for name, params in model.components().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        slots = model(batch)
        loss = sum(answer_loss(setting, slots, batch) for setting in settings) + span_sum(slots.encoded, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, params in model.components().items():
        assert any(not torch.equal(p, old) for p, old in zip(params, before[name], strict=True)), name
    assert [setting.llm.weights_sha256() for setting in settings] == frozen
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("source", ["prompt", "context"])
def test_all_llms_read_one_z_and_training_sees_what_is_evaluated(model_of, settings, questions, source):
    model, batch = model_of(source=source).eval(), questions[:9:3]
    torch.nn.init.normal_(model.encoder.score.weight)
    with torch.no_grad():
        slots = model(batch)
    for setting in settings:
        name = setting.llm.name
        setting.sender, setting.adapter = Sender(model.encoder, source, "fp16"), model.adapters[name]
        sent = CONDITIONS["latentwire"].build(setting, batch, M)
        for row, (slot, evaluated) in enumerate(zip(slots.embeds[name], sent, strict=True)):
            torch.testing.assert_close(slot, evaluated.embeds, atol=5e-3, rtol=5e-3)  # fp16 on the wire
            torch.testing.assert_close(slot, model.adapters[name](slots.encoded.z[row]), atol=1e-5, rtol=1e-5)


def test_places_that_a_short_text_leaves_empty_are_not_in_the_slot(model_of, questions):
    model = model_of(source="context")
    model.m = 60
    short = min(questions, key=lambda q: len(q.context))
    brief = type(short)(**vars(short) | {"context": "Two herons.", "answers": ("Two",), "starts": (0,)})
    slots = model([questions[0], brief])
    tokens = len(model.encoder.tokenizer(" Two herons.", add_special_tokens=False)["input_ids"])
    assert [len(row) for row in slots.embeds["llama"]] == [60, tokens] and tokens < 20


@pytest.mark.parametrize("condition", ["text", "token_budget"])
def test_soft_prompts_train_on_the_slots_that_are_evaluated(settings, questions, condition):
    model, batch = SoftPrompts(settings, condition, M), questions[:3]
    assert [*model.components()] == ["soft_prompt_llama", "soft_prompt_qwen"]
    with torch.no_grad():
        for vectors in model.vectors.values():
            vectors.add_(0.1)
    slots = model(batch)
    for setting in settings:
        name = setting.llm.name
        setting.soft_prompts = {f"{condition}_tuned": model.prompts()[name]}
        sent = CONDITIONS[f"{condition}_tuned"].build(setting, batch, M)
        assert all(torch.equal(row, slot.embeds) for row, slot in zip(slots.embeds[name], sent, strict=True))


def test_soft_prompts_start_as_the_instruction_and_are_all_that_changes(settings, questions):
    model, batch = SoftPrompts(settings, "token_budget", M), questions[:3]
    frozen = [setting.llm.weights_sha256() for setting in settings]
    for setting in settings:
        start = setting.llm.embed(setting.prompts.head[:SOFT_VECTORS])
        assert start.shape[0] == SOFT_VECTORS and torch.equal(model.prompts()[setting.llm.name], start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    slots = model(batch)
    sum(answer_loss(setting, slots, batch) for setting in settings).backward()
    optimizer.step()
    for setting in settings:
        start = setting.llm.embed(setting.prompts.head[:SOFT_VECTORS])
        assert (model.prompts()[setting.llm.name] != start).any(dim=1).all(), "every vector learns"
    assert [setting.llm.weights_sha256() for setting in settings] == frozen


def test_a_soft_prompt_learns_in_units_of_its_llms_embeddings(settings):
    """One learning rate has to fit LLMs whose embeddings differ eightfold; what is saved comes back bit by bit."""
    name, steps = settings[0].llm.name, []
    for factor in (1, 8):
        llm = copy.deepcopy(settings[0].llm)
        llm._rms = None
        with torch.no_grad():
            llm.embedding.weight.mul_(factor)
        setting = replace(settings[0], llm=llm)
        model, again = (SoftPrompts([setting], "token_budget", M) for _ in range(2))
        start = model.prompts()[name]
        model.vectors[name].grad = torch.ones_like(start)
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0).step()
        again.restore(model.prompts())
        assert torch.equal(again.vectors[name], model.vectors[name])
        steps.append((model.prompts()[name] - start).abs().mean())
        assert 0.005 < steps[-1] / llm.embedding_rms() < 0.02
    torch.testing.assert_close(steps[1], 8 * steps[0], rtol=1e-3, atol=0)


def test_an_adapter_learns_in_units_of_its_llms_embeddings(stage0):
    """Embeddings eightfold as large must not make a step eightfold as small."""
    weight, bias = torch.randn(48, D_Z), torch.randn(48)
    small, large = Adapter.from_closed_form(weight, bias), Adapter.from_closed_form(8 * weight, 8 * bias)
    torch.testing.assert_close(small.linear.weight, large.linear.weight)
    torch.testing.assert_close(small.linear.bias, large.linear.bias)
    assert abs(small.linear.weight.square().sum(dim=1).mean() - 1) < 1e-4
    z = torch.randn(5, D_Z)
    torch.testing.assert_close(small(z), z @ weight.T + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(large.linear(z) * large.scale, 8 * small.linear(z) * small.scale)
    assert {"scale"} == set(small.state_dict()) - set(dict(small.named_parameters())), "kept, and never trained"
