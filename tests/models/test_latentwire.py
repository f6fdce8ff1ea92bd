"""What is trained changes, what is frozen does not, and training sees what an evaluation will."""

import copy
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared, begin_adapters
from latentwire.data.content import SOURCES
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import SOFT_VECTORS, DeepAdapter, ResidualAdapter
from latentwire.models.closed_form import closed_form
from latentwire.models.components import Component, component, require_complete
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.latentwire import LatentWire
from latentwire.training.losses import answer_sums, span_sum
from latentwire.training.soft_prompts import SoftPrompts
from latentwire.training.trainer import Trainer

M, D_Z, K = 16, 24, 4
HF = {"codebook", "backbone", "score", "span", "residual"}


@pytest.fixture(scope="module")
def closed(llms, texts):
    return closed_form(llms, texts, D_Z)[:2]


@pytest.fixture
def model_of(closed, encoder_folder):
    def make(kind="hf", source="prompt", pooling="select"):
        before, linear = closed
        adapters = {name: copy.deepcopy(adapter) for name, adapter in linear.items()}
        torch.manual_seed(0)
        given = {"encoder_id": encoder_folder, "pooling": pooling}
        known = {field.name for field in fields(ENCODERS[kind].Settings)}
        settings = ENCODERS[kind].Settings(**{name: value for name, value in given.items() if name in known})
        return LatentWire(ENCODERS[kind].begin(copy.deepcopy(before), settings, M), adapters, source, M)

    return make


@pytest.fixture
def readers(llms):
    return [Reader(llm, PromptBuilder(llm.tokenizer, "prompt", "zero_shot")) for llm in llms.values()]


@pytest.fixture
def shared(questions, texts):
    return Shared(questions, d_z=D_Z, train_texts=texts)


def answer_loss(reader, slots, batch):
    """Cross-entropy of the answers that one LLM gives to its slots."""
    prompts = reader.prompts
    tails, labels = [prompts.tail(q.question) for q in batch], [prompts.labels(q.answers[0], K) for q in batch]
    ids, learned = [one.ids for one in labels], [one.learned for one in labels]
    scored = reader.llm.loss_with_prefix(prompts.head, slots.embeds[reader.llm.name], tails, ids, learned=learned)
    return answer_sums(scored)["ce"]


def norm(parameters):
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("codebook", {"codebook"}),
        ("hf", HF),
        ("ids", HF - {"residual"}),
        ("ids_marked", HF - {"residual"} | {"marker"}),
        ("queries", {"backbone", "resampler"}),
        ("byte", {"backbone", "resampler"}),
        ("anchors", {"codebook", "backbone", "salience", "residual"}),
        ("lead", {"codebook", "backbone", "residual"}),
        ("windows", {"backbone", "windows"}),
    ],
)
def test_every_parameter_belongs_to_one_component(model_of, kind, expected):
    model = model_of(kind)
    components = model.components()
    names = [found.name for found in components]
    assert len(names) == len(set(names)) and set(names) == expected | {"adapter llama", "adapter qwen"}
    assert {found.llm: found.kind for found in components if found.llm} == {"llama": "adapter", "qwen": "adapter"}
    named = [id(p) for found in components for p in found.parameters]
    assert sorted(named) == sorted(id(p) for p in model.parameters())
    require_complete(model, components)


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("hf", "select"),
        ("hf", "cif"),
        ("ids", "select"),
        ("ids_marked", "cif"),
        ("queries", ""),
        ("byte", ""),
        ("anchors", ""),
        ("lead", ""),
        ("windows", ""),
    ],
)
def test_the_answers_loss_reaches_every_component_and_no_llm(model_of, readers, questions, kind, pooling):
    model, batch = model_of(kind, pooling=pooling), questions[:1]
    if kind in ("anchors", "lead"):  # the residual is zero at the start, and lets nothing through to the backbone
        torch.nn.init.normal_(model.encoder.residual.weight, std=0.01)
    for reader in readers:
        model.zero_grad()
        answer_loss(reader, model(batch), batch).backward()
        found = {part.name: norm(part.parameters) for part in model.components()}
        other = next(f"adapter {r.llm.name}" for r in readers if r is not reader)
        assert found.pop(other) == 0, "one LLM's loss is none of the other's business"
        assert all(value > 0 for value in found.values()), found
        assert all(p.grad is None for p in reader.llm.model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_step_changes_every_component_and_leaves_the_llms_bit_identical(model_of, readers, questions):
    model, batch = model_of(), questions[:3]
    frozen = [reader.llm.weights_sha256() for reader in readers]
    before = {part.name: [p.detach().clone() for p in part.parameters] for part in model.components()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        slots = model(batch)
        loss = sum(answer_loss(reader, slots, batch) for reader in readers) + span_sum(slots.encoded, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for part in model.components():
        changed = [not torch.equal(p, old) for p, old in zip(part.parameters, before[part.name], strict=True)]
        assert any(changed), part.name
    assert [reader.llm.weights_sha256() for reader in readers] == frozen
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("source", SOURCES)
def test_all_llms_read_one_z_and_training_sees_what_is_evaluated(model_of, readers, shared, questions, source):
    model, batch = model_of(source=source).eval(), questions[:9:3]
    torch.nn.init.normal_(model.encoder.score.weight)
    with torch.no_grad():
        slots = model(batch)
    shared.sender = Sender(model.encoder, source, "fp16")
    for reader in readers:
        name = reader.llm.name
        evaluating = replace(reader, adapter=model.adapters[name])
        sent = CONDITIONS["latentwire"].slots(evaluating, batch, M, shared)
        for row, (slot, evaluated) in enumerate(zip(slots.embeds[name], sent, strict=True)):
            torch.testing.assert_close(slot, evaluated.embeds, atol=5e-3, rtol=5e-3)  # fp16 on the wire
            torch.testing.assert_close(slot, model.adapters[name](slots.encoded.z[row]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_questions_on_a_text_share_its_slot_unless_the_encoder_reads_them(model_of, questions, source):
    text, other = questions[0].context, next(q for q in questions if q.context != questions[0].context)
    batch = [*[q for q in questions if q.context == text][:2], other]
    for rows in model_of(source=source)(batch).embeds.values():
        assert len(rows) == 3 and (rows[0] is rows[1]) == (source == "context") and rows[0] is not rows[2]


def test_places_that_a_short_text_leaves_empty_are_not_in_the_slot(model_of, questions):
    model = model_of(source="context")
    model.m = 60
    short = min(questions, key=lambda q: len(q.context))
    brief = type(short)(**vars(short) | {"context": "Two herons.", "answers": ("Two",), "starts": (0,)})
    slots = model([questions[0], brief])
    tokens = len(model.encoder.tokenizer(" Two herons.", add_special_tokens=False)["input_ids"])
    assert [len(row) for row in slots.embeds["llama"]] == [60, tokens] and tokens < 20


@pytest.mark.parametrize("condition", ["text", "token_budget"])
def test_soft_prompts_train_on_the_slots_that_are_evaluated(readers, shared, questions, condition):
    model, batch = SoftPrompts(readers, condition, M, shared), questions[:3]
    assert [part.name for part in model.components()] == ["soft_prompt llama", "soft_prompt qwen"]
    require_complete(model, model.components())
    with torch.no_grad():
        for vectors in model.vectors.values():
            vectors.add_(0.1)
    slots = model(batch)
    for reader in readers:
        name = reader.llm.name
        shared.soft_prompts = {f"{condition}_tuned": model.prompts()}
        sent = CONDITIONS[f"{condition}_tuned"].slots(reader, batch, M, shared)
        assert all(torch.equal(row, slot.embeds) for row, slot in zip(slots.embeds[name], sent, strict=True))


def test_soft_prompts_start_as_the_instruction_and_are_all_that_changes(readers, shared, questions):
    model, batch = SoftPrompts(readers, "token_budget", M, shared), questions[:3]
    frozen = [reader.llm.weights_sha256() for reader in readers]
    for reader in readers:
        start = reader.llm.embed(reader.prompts.head[:SOFT_VECTORS])
        assert start.shape[0] == SOFT_VECTORS and torch.equal(model.prompts()[reader.llm.name], start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    slots = model(batch)
    sum(answer_loss(reader, slots, batch) for reader in readers).backward()
    optimizer.step()
    for reader in readers:
        start = reader.llm.embed(reader.prompts.head[:SOFT_VECTORS])
        assert (model.prompts()[reader.llm.name] != start).any(dim=1).all(), "every vector learns"
    assert [reader.llm.weights_sha256() for reader in readers] == frozen


@pytest.mark.parametrize("kind", ["deep", "soft prompts"])
def test_a_step_reads_what_all_slots_begin_with_once_and_learns_what_it_does_elsewhere(
    model_of, readers, shared, questions, monkeypatch, kind
):
    if kind == "deep":
        model = model_of("codebook")
        made = {
            r.llm.name: DeepAdapter.from_closed_form(torch.randn(r.llm.width, D_Z), torch.randn(r.llm.width))
            for r in readers
        }
        begin_adapters(made, readers)
        model.adapters.update(made)
    else:
        model = SoftPrompts(readers, "token_budget", M, shared)
    config, batch = SimpleNamespace(k=K, first_token_ce_weight=0.5), questions[:4]
    for reader in readers:
        name, found, read = reader.llm.name, [], []
        layer = reader.llm.model.get_decoder().layers[0]
        for shares in (True, False):
            monkeypatch.setattr(reader.llm, "shares", shares)
            model.zero_grad()
            hook = layer.register_forward_hook(lambda *given, to=read: to.append(given[2].shape[-2]))
            loss, _ = Trainer._answer_loss(
                SimpleNamespace(job=SimpleNamespace(config=config, teacher={})), reader, model(batch), batch, batch
            )
            hook.remove()
            loss.backward()
            learned = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and name in key}
            found.append({"loss": loss, **learned})
        assert SOFT_VECTORS in read and found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(value, found[1][key], rtol=1e-3, atol=1e-5, msg=key)


def test_a_soft_prompt_learns_in_units_of_its_llms_embeddings(readers, shared):
    """One learning rate has to fit LLMs whose embeddings differ eightfold; what is saved comes back bit by bit."""
    name, steps = readers[0].llm.name, []
    for factor in (1, 8):
        llm = copy.deepcopy(readers[0].llm)
        llm._rms = None
        with torch.no_grad():
            llm.embedding.weight.mul_(factor)
        reader = replace(readers[0], llm=llm)
        model, again = (SoftPrompts([reader], "token_budget", M, shared) for _ in range(2))
        start = model.prompts()[name]
        model.vectors[name].grad = torch.ones_like(start)
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0).step()
        again.restore(model.prompts())
        assert torch.equal(again.vectors[name], model.vectors[name])
        steps.append((model.prompts()[name] - start).abs().mean())
        assert 0.005 < steps[-1] / llm.embedding_rms() < 0.02
    torch.testing.assert_close(steps[1], 8 * steps[0], rtol=1e-3, atol=0)


def test_an_adapter_learns_in_units_of_its_llms_embeddings():
    """Embeddings eightfold as large must not make a step eightfold as small."""
    weight, bias = torch.randn(48, D_Z), torch.randn(48)
    small, large = (ResidualAdapter.from_closed_form(factor * weight, factor * bias) for factor in (1, 8))
    torch.testing.assert_close(small.linear.weight, large.linear.weight)
    torch.testing.assert_close(small.linear.bias, large.linear.bias)
    assert abs(small.linear.weight.square().sum(dim=1).mean() - 1) < 1e-4
    z = torch.randn(5, D_Z)
    torch.testing.assert_close(small(z), z @ weight.T + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(large.linear(z) * large.scale, 8 * small.linear(z) * small.scale)
    assert {"scale"} == set(small.state_dict()) - set(dict(small.named_parameters())), "kept, and never trained"


def test_an_adapter_starts_as_the_closed_forms_linear_map_and_its_mlp_can_learn_from_there():
    weight, bias = torch.randn(48, D_Z), torch.randn(48)
    adapter, z = ResidualAdapter.from_closed_form(weight, bias), torch.randn(2, 5, D_Z)
    assert (adapter.d_z, adapter.width) == (D_Z, 48) and adapter(z).shape == (2, 5, 48)
    assert not adapter.mlp(z).any()
    adapter(z).square().sum().backward()
    assert adapter.mlp[2].weight.grad.abs().sum() > 0


def test_a_parameter_of_no_component_is_named_before_it_goes_untrained(model_of):
    model = model_of("byte")
    model.encoder.forgotten = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"LatentWire: .*encoder\.forgotten\.weight, encoder\.forgotten\.bias.*no comp"
    ):
        require_complete(model, model.components())
    require_complete(model, [*model.components(), component("extra", model.encoder.forgotten)])
    model.encoder.forgotten.requires_grad_(False)
    require_complete(model, model.components())


def test_a_component_holds_the_parameters_of_its_modules_and_says_how_they_learn(model_of):
    linear, alone = torch.nn.Linear(2, 3), torch.nn.Parameter(torch.ones(4))
    made = component("part", linear, alone, llm="qwen", rate="codebook_lr", weight_decay=0.5)
    assert made == Component("part", [linear.weight, linear.bias, alone], "qwen", "codebook_lr", 0.5)
    assert made.name == "part qwen"
    rates = {kind: {part.kind: part.rate for part in model_of(kind).components()} for kind in ("hf", "queries", "byte")}
    assert rates["hf"] == dict.fromkeys(HF | {"adapter"}, "lr") | {"codebook": "codebook_lr", "backbone": "encoder_lr"}
    assert rates["queries"]["backbone"] == "encoder_lr" and rates["byte"]["backbone"] == "lr", "pretrained or not"
    for kind in ("hf", "queries", "byte"):
        assert {part.kind for part in model_of(kind).components() if part.weight_decay} == {"backbone"}
