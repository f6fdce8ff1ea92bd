"""Every condition fills the same slot under the same budget, and latents really travel as bytes."""

import dataclasses

import pytest
import torch

from latentwire.conditions.base import CONDITIONS, Sender, Setting, explained_variance, parse_conditions
from latentwire.llms.prompts import PromptBuilder
from latentwire.models import wire
from latentwire.models.adapters import Adapter
from latentwire.models.backbones import load_backbone
from latentwire.models.closed_form import build_interface, token_counts, wire_table
from latentwire.models.encoders.base import CodebookEncoder, SelectingEncoder
from latentwire.utils.settings import TUNED

M, D_Z, SOFT = 16, 24, 5


@pytest.fixture(scope="module")
def interface(llms, texts):
    tokenizer = llms["llama"].tokenizer
    tables = {name: wire_table(llm, tokenizer) for name, llm in llms.items()}
    return build_interface(tables, token_counts(tokenizer, texts), D_Z)


@pytest.fixture
def setting_of(llms, texts, questions, interface):
    def make(name="llama", source="prompt", codec="fp16", seed=0, pool=questions, encoder=None):
        untrained = CodebookEncoder.from_codebook(llms["llama"].tokenizer, interface.codebook)
        adapter = Adapter.from_closed_form(*interface.adapters[name])
        torch.manual_seed(len(name))
        soft = {condition: torch.randn(SOFT, llms[name].width) for condition in TUNED}
        return Setting(
            llms[name], PromptBuilder(llms[name].tokenizer, source, "zero_shot"),
            Sender(encoder or untrained, source, codec), adapter, codec, D_Z, texts, pool, seed, soft,
            (Sender(untrained, source, codec), adapter),
        )  # fmt: skip

    return make


@pytest.fixture
def selecting(llms, interface, encoder_folder):
    """An encoder of type hf with random heads."""
    torch.manual_seed(0)
    tokenizer = llms["llama"].tokenizer
    encoder = SelectingEncoder(tokenizer, *interface.codebook.shape, load_backbone(encoder_folder), "select")
    with torch.no_grad():
        encoder.codebook.weight.copy_(interface.codebook)
        encoder.score.weight.normal_()
    return encoder


def slots(setting, name, questions, m=M):
    return CONDITIONS[name].build(setting, questions, m)


def text_of(setting, slot):
    """The token text of a slot that holds real embeddings."""
    return setting.llm.tokenizer.decode(torch.cdist(slot.embeds, setting.llm.embedding_table()).argmin(dim=1).tolist())


@pytest.mark.parametrize("name", [name for name, condition in CONDITIONS.items() if condition.by_llm])
@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_every_condition_gives_each_question_a_slot_of_the_llms_width(setting_of, questions, name, llm):
    source = CONDITIONS[name].sources[0]
    setting = setting_of(llm, source)
    for q, slot in zip(questions[:5], slots(setting, name, questions[:5]), strict=True):
        assert slot.embeds.shape[1] == setting.llm.width and torch.isfinite(slot.embeds).all()
        whole = len(setting.prompts.ids(setting.prompts.content_text(q.context, q.question)))
        budget = {"text": whole, "pca_rank": whole, "no_context": 0, "text_tuned": whole}.get(name, M)
        if name == "token_budget_context":  # M tokens of context, labels and question on top
            budget += len(setting.prompts.ids("Context:")) + len(setting.prompts.ids(f"\nQuestion: {q.question}"))
        base, soft = name.removesuffix("_tuned"), SOFT if name.endswith("_tuned") else 0
        if base in ("oracle_text", "selected_text"):
            budget = 2 * M  # M tokens of the wire's tokenizer, which the LLM may cut otherwise
        short = base in ("latentwire", "untrained", "oracle_text", "oracle_wire", "selected_text")
        assert len(slot.embeds) == budget + soft or (short and soft < len(slot.embeds) <= budget + soft)


def test_text_is_the_whole_content_and_its_bytes_are_counted(setting_of, questions):
    setting = setting_of()
    slot = slots(setting, "text", questions[:1])[0]
    expected = setting.prompts.content_text(questions[0].context, questions[0].question)
    assert text_of(setting, slot) == expected and slot.sent == len(expected.encode())


def test_the_budget_spends_on_the_question_first(setting_of, questions):
    setting = setting_of()
    q = min(questions, key=lambda q: len(q.question))
    text = text_of(setting, slots(setting, "token_budget", [q], 48)[0])
    assert text.startswith(f"Question: {q.question}\nContext:")


def test_the_context_budget_adds_the_question_on_top(setting_of, questions):
    setting = setting_of()
    text = text_of(setting, slots(setting, "token_budget_context", questions[:1])[0])
    assert text.endswith(f"\nQuestion: {questions[0].question}")
    cut = text.removeprefix("Context:").removesuffix(f"\nQuestion: {questions[0].question}")
    assert f" {questions[0].context}".startswith(cut) and cut.strip()


def test_with_the_question_as_text_the_budgets_are_of_the_context_alone(setting_of, questions):
    setting = setting_of(source="context")
    budget, same, selected = (
        text_of(setting, slots(setting, name, questions[:1])[0])
        for name in ("token_budget", "token_budget_context", "token_select")
    )
    assert budget == same and f" {questions[0].context}".startswith(budget)
    assert selected.strip()[:20] in questions[0].context and "Question" not in budget + selected


def test_selection_puts_the_most_relevant_sentence_first(setting_of, questions):
    setting = setting_of()
    target = "The copper kettle belonged to Osric."
    q = dataclasses.replace(
        questions[0], context=f"Rain fell. Nobody came. {target} It snowed.", question="Whose kettle was it?"
    )
    assert f"Context: {target}" in text_of(setting, slots(setting, "token_select", [q], 64)[0])


def test_pca_with_all_directions_is_the_token_budget(setting_of, questions):
    setting = setting_of()
    setting.d_z = setting.llm.width
    for a, b in zip(slots(setting, "pca", questions[:3]), slots(setting, "token_budget", questions[:3]), strict=True):
        torch.testing.assert_close(a.embeds, b.embeds, atol=5e-3, rtol=5e-3)  # fp16 on the wire


def test_pca_keeps_only_the_principal_part(setting_of, questions):
    setting = setting_of()
    a, b = slots(setting, "pca", questions[:1])[0].embeds, slots(setting, "token_budget", questions[:1])[0].embeds
    assert (a - b).abs().max() > 0.05
    kept = setting.pca.explained_variance(D_Z)
    assert 0 < kept < 1 and explained_variance(CONDITIONS["pca"], setting, M) == kept
    assert explained_variance(CONDITIONS["pca_rank"], setting, M) == setting.pca.explained_variance(M) < kept
    assert explained_variance(CONDITIONS["latentwire"], setting, M) is None


def test_pooling_averages_contiguous_windows(setting_of, questions):
    setting = setting_of()
    setting.d_z = setting.llm.width
    whole = slots(setting, "text", questions[:1])[0].embeds
    pooled = slots(setting, "pca_pool", questions[:1])[0].embeds
    expected = torch.stack([part.mean(dim=0) for part in whole.tensor_split(M)])
    torch.testing.assert_close(pooled, expected, atol=5e-3, rtol=5e-3)


def test_the_latents_are_those_of_the_decoded_bytes_and_the_same_for_both_llms(setting_of, questions):
    first, second = setting_of("llama", codec="int4"), setting_of("qwen", codec="int4")
    packed = first.sender.send(questions[:3], M)
    assert packed == second.sender.send(questions[:3], M)
    for data, slot in zip(packed, slots(first, "latentwire", questions[:3]), strict=True):
        assert slot.sent == len(data)
        torch.testing.assert_close(slot.embeds, first.adapter(torch.from_numpy(wire.unpack(data)[0])))


def test_a_damaged_wire_gives_an_error_and_no_slot(setting_of, questions):
    setting = setting_of()
    data = bytearray(setting.sender.send(questions[:1], M)[0])
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        setting.received_slot(bytes(data), setting.adapter)


def test_smaller_codecs_send_fewer_bytes_and_lose_little(setting_of, questions):
    sizes, errors = [], []
    exact = slots(setting_of(), "latentwire", questions[:1])[0].embeds
    for codec in ("fp16", "int8", "int4"):
        slot = slots(setting_of(codec=codec), "latentwire", questions[:1])[0]
        sizes.append(slot.sent)
        errors.append((slot.embeds - exact).square().mean().item())
    assert sizes[0] > sizes[1] > sizes[2] and errors[0] == 0 < errors[1] < errors[2]
    assert errors[2] < 0.05 * exact.square().mean().item()


def test_shuffled_z_comes_from_another_article_and_stays_the_same(setting_of, questions):
    setting, again, other = setting_of(), setting_of(), setting_of(seed=1)
    partners = [setting.partner(q) for q in questions[:20]]
    assert all(p.title != q.title for p, q in zip(partners, questions, strict=False))
    assert partners == [again.partner(q) for q in questions[:20]] != [other.partner(q) for q in questions[:20]]
    for slot, p in zip(slots(setting, "shuffled_z", questions[:3]), partners, strict=False):
        assert torch.equal(slot.embeds, slots(setting, "latentwire", [p])[0].embeds)


def test_shuffled_z_needs_a_second_article(setting_of, questions):
    setting = setting_of(pool=[q for q in questions if q.title == questions[0].title])
    with pytest.raises(ValueError, match=r"shuffled_z.*samples"):
        setting.partner(questions[0])


@pytest.mark.parametrize("source", ["prompt", "context"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_oracle_sends_the_same_selection_as_text_and_as_latents(setting_of, selecting, questions, source, trained):
    setting = setting_of(source=source, encoder=selecting if trained else None)
    z, text = setting.sender.encoder.perfect(questions[0], source, M)
    assert text_of(setting, slots(setting, "oracle_text", questions[:1])[0]) == text
    (sent,) = slots(setting, "oracle_wire", questions[:1])
    torch.testing.assert_close(sent.embeds, setting.adapter(z.half().float()))


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_the_selected_text_is_the_encoders_choice_read_as_text(setting_of, selecting, questions, llm):
    setting = setting_of(llm, encoder=selecting)
    for q, slot in zip(questions[:3], slots(setting, "selected_text", questions[:3]), strict=True):
        chosen = selecting.tokenizer.decode(selecting.select(q, "prompt", M))
        assert text_of(setting, slot) == chosen and slot.sent == len(chosen.encode())
    sent = slots(setting, "latentwire", questions[:3])
    assert [len(slot.embeds) for slot in sent] == [M] * 3


def test_the_encoder_alone_answers_with_text_and_asks_no_llm(setting_of, selecting, questions, monkeypatch):
    setting = setting_of(encoder=selecting)
    monkeypatch.setattr(setting.llm, "embed", lambda *a: pytest.fail("an LLM was asked"))
    assert not CONDITIONS["encoder_only"].by_llm
    answers = slots(setting, "encoder_only", questions[:5])
    assert answers == [selecting.read(q) for q in questions[:5]]
    assert all(answer in q.context for answer, q in zip(answers, questions, strict=False))


def test_what_only_a_trained_encoder_knows_is_refused_for_another(setting_of, questions):
    with pytest.raises(ValueError, match=r"encoder_only.*hf"):
        slots(setting_of(), "encoder_only", questions[:1])


@pytest.mark.parametrize("llm", ["llama", "qwen"])
@pytest.mark.parametrize("base", ["text", "token_budget", "selected_text"])
def test_a_tuned_rival_is_its_soft_prompt_and_then_its_text(setting_of, questions, llm, base):
    setting = setting_of(llm)
    soft = setting.soft_prompts[f"{base}_tuned"]
    pairs = zip(slots(setting, f"{base}_tuned", questions[:3]), slots(setting, base, questions[:3]), strict=True)
    for tuned, plain in pairs:
        assert torch.equal(tuned.embeds, torch.cat([soft, plain.embeds]))
        assert tuned.sent == plain.sent, "the receiver has the soft prompt already"


def test_untrained_is_the_wire_of_stage_0_and_not_the_trained_one(setting_of, selecting, questions):
    trained = setting_of(encoder=selecting)
    before = slots(setting_of(), "latentwire", questions[:3])
    for slot, expected, other in zip(
        slots(trained, "untrained", questions[:3]), before, slots(trained, "latentwire", questions[:3]), strict=True
    ):
        assert torch.equal(slot.embeds, expected.embeds) and slot.sent == expected.sent
        assert slot.embeds.shape != other.embeds.shape or not torch.equal(slot.embeds, other.embeds)


def test_conditions_are_named_with_an_own_m_if_wanted_and_without_doubles():
    chosen = parse_conditions("text, token_budget,token_budget@64,token_budget@32", "prompt", 32)
    assert [(c.name, m) for c, m in chosen] == [("text", 32), ("token_budget", 32), ("token_budget", 64)]


def test_the_default_is_all_that_fit_the_source_but_the_oracles():
    for source in ("prompt", "context"):
        names = [c.name for c, _ in parse_conditions("", source, 32)]
        assert {"text", "token_budget", "pca", "latentwire", "no_context", "shuffled_z"} <= set(names)
        assert not any(name.startswith("oracle") or name.endswith("_tuned") for name in names)
        assert not {"selected_text", "encoder_only", "untrained"} & set(names)


@pytest.mark.parametrize(
    ("text", "source", "match"),
    [
        ("text,magic", "prompt", "'magic'.*token_budget"),
        ("token_budget@0", "prompt", "'token_budget@0'.*at least 1"),
        ("token_budget@x", "prompt", "'token_budget@x'"),
        ("encoder_only", "context", "'encoder_only'.*prompt"),
    ],
)
def test_a_wrong_condition_is_named_with_the_remedy(text, source, match):
    with pytest.raises(ValueError, match=match):
        parse_conditions(text, source, 32)
