"""Every condition fills the same slot under the same budget, and latents really travel as bytes."""

import dataclasses
import re
from typing import NamedTuple

import pytest
import torch

from latentwire.conditions.base import (
    CONDITIONS,
    Reader,
    Sender,
    Shared,
    parse_conditions,
    require_positions,
)
from latentwire.conditions.pca import fitted
from latentwire.conditions.texts import content_ids
from latentwire.conditions.tuned import TUNED
from latentwire.data.content import SOURCES
from latentwire.data.relevance import in_whole_words
from latentwire.llms.prompts import PromptBuilder
from latentwire.models import wire
from latentwire.models.backbones import load_backbone
from latentwire.models.closed_form import closed_form
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.selecting import SelectingEncoder

M, D_Z, SOFT = 16, 24, 5
ABLE = {"chooses_tokens", "reads_answers", "spans", "two_articles"}  # what encoder hf and SQuAD have


class At(NamedTuple):
    """One reader, and what it shares with others."""

    reader: Reader
    shared: Shared


@pytest.fixture(scope="module")
def closed(llms, texts):
    return closed_form(llms, texts, D_Z)[:2]


@pytest.fixture
def at(llms, texts, questions, closed):
    def make(name="llama", source="prompt", codec="fp16", seed=0, pool=questions, encoder=None, d_z=D_Z):
        untrained, adapters = closed
        torch.manual_seed(len(name))
        soft = {condition.name: {name: torch.randn(SOFT, llms[name].width)} for condition in TUNED}
        prompts = PromptBuilder(llms[name].tokenizer, source, "zero_shot")
        sender, before = (Sender(one, source, codec) for one in (encoder or untrained, untrained))
        shared = Shared(pool, seed, sender, codec, d_z, texts, soft, (before, adapters))
        return At(Reader(llms[name], prompts, adapters[name]), shared)

    return make


@pytest.fixture
def selecting(llms, closed, encoder_folder):
    """An encoder of type hf with random heads."""
    torch.manual_seed(0)
    codebook = closed[0].codebook.weight
    encoder = SelectingEncoder(llms["llama"].tokenizer, D_Z, len(codebook), load_backbone(encoder_folder), "select")
    with torch.no_grad():
        encoder.codebook.weight.copy_(codebook)
        encoder.score.weight.normal_()
    return encoder


def slots(there, name, questions, m=M):
    return CONDITIONS[name].slots(there.reader, questions, m, there.shared)


def partners(there, questions):
    """The questions whose Z shuffled_z sends in place of theirs."""
    asked, sender = [], there.shared.sender
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, "send", lambda chosen, m: asked.extend(chosen) or Sender.send(sender, chosen, m))
        slots(there, "shuffled_z", questions)
    return asked


def text_of(there, slot):
    """The token text of a slot that holds real embeddings."""
    llm = there.reader.llm
    return llm.tokenizer.decode(torch.cdist(slot.embeds, llm.embedding_table()).argmin(dim=1).tolist())


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, source) for name, c in CONDITIONS.items() if c.by_llm for source in SOURCES if source in c.sources],
)
@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_every_condition_gives_each_question_a_slot_of_the_llms_width(at, selecting, questions, name, llm, source):
    there = at(llm, source, encoder=selecting if "reads_answers" in CONDITIONS[name].needs else None)
    for q, slot in zip(questions[:5], slots(there, name, questions[:5]), strict=True):
        assert slot.embeds.shape[1] == there.reader.llm.width and torch.isfinite(slot.embeds).all()
        whole = len(there.reader.prompts.plain(there.reader.prompts.content_text(q.context, q.question)))
        budget = {"text": whole, "pca_rank": whole, "no_context": 0, "text_tuned": whole}.get(name, M)
        if name == "question_only":
            budget = len(there.reader.prompts.plain(f"Question: {q.question}"))
        if name == "token_budget_context" and source == "prompt":  # M tokens of context, labels and question on top
            budget += len(there.reader.prompts.plain("Context:")) + len(
                there.reader.prompts.plain(f"\nQuestion: {q.question}")
            )
        base, soft = name.removesuffix("_tuned"), SOFT if name.endswith("_tuned") else 0
        if base in ("oracle_text", "selected_text"):
            budget = 2 * M  # M tokens of the wire's tokenizer, which the LLM may cut otherwise
        budget = whole if name == "sentence" else budget
        short = base in (
            "latentwire", "untrained", "oracle_text", "oracle_wire", "selected_text", "selected_words", "sentence",
        )  # fmt: skip
        assert len(slot.embeds) == budget + soft or (short and soft < len(slot.embeds) <= budget + soft)


def test_text_is_the_whole_content_and_its_bytes_are_counted(at, questions):
    there = at()
    slot = slots(there, "text", questions[:1])[0]
    expected = there.reader.prompts.content_text(questions[0].context, questions[0].question)
    assert text_of(there, slot) == expected and slot.sent == len(expected.encode())


def test_the_budget_spends_on_the_question_first(at, questions):
    there = at()
    q = min(questions, key=lambda q: len(q.question))
    text = text_of(there, slots(there, "token_budget", [q], 48)[0])
    assert text.startswith(f"Question: {q.question}\nContext:")


def test_the_context_budget_adds_the_question_on_top(at, questions):
    there = at()
    text = text_of(there, slots(there, "token_budget_context", questions[:1])[0])
    assert text.endswith(f"\nQuestion: {questions[0].question}")
    cut = text.removeprefix("Context:").removesuffix(f"\nQuestion: {questions[0].question}")
    assert f" {questions[0].context}".startswith(cut) and cut.strip()


@pytest.mark.parametrize("source", ["context", "aware"])
def test_with_the_question_as_text_the_budgets_are_of_the_context_alone(at, questions, source):
    there = at(source=source)
    budget, same, selected = (
        text_of(there, slots(there, name, questions[:1])[0])
        for name in ("token_budget", "token_budget_context", "token_select")
    )
    assert budget == same and f" {questions[0].context}".startswith(budget)
    assert selected.strip()[:20] in questions[0].context and "Question" not in budget + selected


def test_selection_puts_the_most_relevant_sentence_first(at, questions):
    there = at()
    target = "The copper kettle belonged to Osric."
    q = dataclasses.replace(
        questions[0], context=f"Rain fell. Nobody came. {target} It snowed.", question="Whose kettle was it?"
    )
    assert f"Context: {target}" in text_of(there, slots(there, "token_select", [q], 64)[0])


def test_pca_with_all_directions_is_the_token_budget(at, questions):
    there = at(d_z=48)
    assert there.reader.llm.width == 48
    for a, b in zip(slots(there, "pca", questions[:3]), slots(there, "token_budget", questions[:3]), strict=True):
        torch.testing.assert_close(a.embeds, b.embeds, atol=5e-3, rtol=5e-3)  # fp16 on the wire


def test_pca_keeps_only_the_principal_part(at, questions):
    there = at()
    a, b = slots(there, "pca", questions[:1])[0].embeds, slots(there, "token_budget", questions[:1])[0].embeds
    assert (a - b).abs().max() > 0.05
    found = fitted(*there)
    kept = found.explained_variance(D_Z)
    assert 0 < kept < 1 and CONDITIONS["pca"].explained(there.reader, M, there.shared) == kept
    assert CONDITIONS["pca_rank"].explained(there.reader, M, there.shared) == found.explained_variance(M) < kept
    assert CONDITIONS["latentwire"].explained is None


def test_pca_is_fitted_on_the_tokens_of_train_text(at):
    there = at()
    found, llm = fitted(*there), there.reader.llm
    ids = [i for text in there.shared.train_texts for i in llm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    read = llm.embedding_table()[ids]
    torch.testing.assert_close(found.mean, read.mean(dim=0), atol=1e-3, rtol=1e-3)
    lost = (read - found.restore(found.project(read, D_Z))).square().sum() / (read - read.mean(dim=0)).square().sum()
    assert float(1 - lost) == pytest.approx(found.explained_variance(D_Z), abs=1e-3)


def test_what_pca_sends_has_as_many_directions_as_it_says(at, questions):
    there = at()
    found, whole = fitted(*there), slots(there, "text", questions[:1])[0].embeds
    pooled = torch.stack([part.mean(dim=0) for part in whole.tensor_split(M)])
    for name, embeds, directions in (("pca_rank", whole, M), ("pca_pool", pooled, D_Z)):
        (slot,) = slots(there, name, questions[:1])
        expected = found.restore(found.project(embeds, directions))
        torch.testing.assert_close(slot.embeds, expected, atol=5e-3, rtol=5e-3)
        assert slot.sent == 18 + 2 * len(embeds) * directions


def test_pooling_averages_contiguous_windows(at, questions):
    there = at(d_z=48)
    assert there.reader.llm.width == 48
    whole = slots(there, "text", questions[:1])[0].embeds
    pooled = slots(there, "pca_pool", questions[:1])[0].embeds
    expected = torch.stack([part.mean(dim=0) for part in whole.tensor_split(M)])
    torch.testing.assert_close(pooled, expected, atol=5e-3, rtol=5e-3)


def test_the_latents_are_those_of_the_decoded_bytes_and_the_same_for_both_llms(at, questions):
    first, second = at("llama", codec="int4"), at("qwen", codec="int4")
    packed = first.shared.sender.send(questions[:3], M)
    assert packed == second.shared.sender.send(questions[:3], M)
    for data, slot in zip(packed, slots(first, "latentwire", questions[:3]), strict=True):
        assert slot.sent == len(data)
        torch.testing.assert_close(slot.embeds, first.reader.adapter(torch.from_numpy(wire.unpack(data)[0])))


def test_a_damaged_wire_gives_an_error_and_no_slot(at, questions):
    there = at()
    data = bytearray(there.shared.sender.send(questions[:1], M)[0])
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        there.shared.sender.slot(bytes(data), there.reader.adapter)


def test_smaller_codecs_send_fewer_bytes_and_lose_little(at, questions):
    sizes, errors = [], []
    exact = slots(at(), "latentwire", questions[:1])[0].embeds
    for codec in ("fp16", "int8", "int4"):
        slot = slots(at(codec=codec), "latentwire", questions[:1])[0]
        sizes.append(slot.sent)
        errors.append((slot.embeds - exact).square().mean().item())
    assert sizes[0] > sizes[1] > sizes[2] and errors[0] == 0 < errors[1] < errors[2]
    assert errors[2] < 0.05 * exact.square().mean().item()


def test_shuffled_z_comes_from_another_article_and_stays_the_same(at, questions):
    there, again, other = at(), at(), at(seed=1)
    found = partners(there, questions[:20])
    assert all(p.title != q.title for p, q in zip(found, questions[:20], strict=True))
    assert found == partners(again, questions[:20]) != partners(other, questions[:20])
    for slot, p in zip(slots(there, "shuffled_z", questions[:3]), found, strict=False):
        assert torch.equal(slot.embeds, slots(there, "latentwire", [p])[0].embeds)


def test_shuffled_z_needs_a_second_article():
    with pytest.raises(ValueError, match="'shuffled_z': needs questions on two articles or more"):
        parse_conditions("shuffled_z", "prompt", M, ABLE - {"two_articles"})
    assert "shuffled_z" not in {c.name for c, _ in parse_conditions("", "prompt", M, ABLE - {"two_articles"})}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("trained", [False, True])
def test_the_oracle_sends_the_same_selection_as_text_and_as_latents(at, selecting, questions, source, trained):
    there = at(source=source, encoder=selecting if trained else None)
    z, text = there.shared.sender.encoder.perfect([questions[0]], source, M)[0]
    assert text_of(there, slots(there, "oracle_text", questions[:1])[0]) == text
    (sent,) = slots(there, "oracle_wire", questions[:1])
    torch.testing.assert_close(sent.embeds, there.reader.adapter(z.half().float()))


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_the_selected_text_is_the_encoders_choice_read_as_text(at, selecting, questions, llm):
    there = at(llm, encoder=selecting)
    for q, slot in zip(questions[:3], slots(there, "selected_text", questions[:3]), strict=True):
        chosen = selecting.tokenizer.decode(selecting.select([q], "prompt", M)[0])
        assert text_of(there, slot) == chosen and slot.sent == len(chosen.encode())
    sent = slots(there, "latentwire", questions[:3])
    assert [len(slot.embeds) for slot in sent] == [M] * 3


def test_the_encoder_alone_answers_with_text_and_asks_no_llm(at, selecting, questions, monkeypatch):
    there = at(encoder=selecting)
    monkeypatch.setattr(there.reader.llm, "embed", lambda *a: pytest.fail("an LLM was asked"))
    assert not CONDITIONS["encoder_only"].by_llm
    answers = slots(there, "encoder_only", questions[:5])
    assert answers == selecting.read(questions[:5])
    assert all(answer in q.context for answer, q in zip(answers, questions, strict=False))


def test_what_only_a_trained_encoder_knows_is_refused_for_another():
    able = {what for what in ABLE if getattr(ClosedFormEncoder, what, True)}
    assert able == ABLE - {"reads_answers"}
    with pytest.raises(ValueError, match="'encoder_only': needs an encoder that reads answers itself; leave it out"):
        parse_conditions("encoder_only", "prompt", M, able)
    with pytest.raises(
        ValueError, match="'oracle_text': needs an encoder that chooses tokens and answers that are spans"
    ):
        parse_conditions("oracle_text", "prompt", M, ())


def test_a_group_stands_for_its_conditions_and_leaves_out_what_is_not_served():
    def names(text, able=ABLE, source="prompt"):
        return [(c.name, m) for c, m in parse_conditions(text, source, M, able)]

    learned = [
        "pca_selected", "latentwire", "untrained", "shuffled_z", "shuffled_context_z", "selected_text", "encoder_only",
        "selected_words", "sentence",
    ]  # fmt: skip
    chosen, read, asked = (
        {"pca_selected", "selected_text", "selected_words"}, {"encoder_only", "sentence"},
        {"shuffled_context_z", "encoder_only", "sentence"},
    )  # fmt: skip
    assert names("learned") == [(name, M) for name in learned]
    assert names("learned@8") == [(name, 8) for name in learned]
    assert names("learned", ABLE - {"reads_answers"}) == [(name, M) for name in learned if name not in read]
    assert names("learned", {"two_articles"}) == [(name, M) for name in learned if name not in chosen | read]
    assert names("learned", ()) == [("latentwire", M), ("untrained", M)], "one article has no other one's Z"
    assert names("learned", source="context") == [(name, M) for name in learned if name not in asked]
    assert names("learned", source="aware") == names("learned")
    assert names("oracles", {"chooses_tokens"}) == [], "answers that are no spans have no oracle"
    baselines = names("baselines")
    assert ("token_budget", M) in baselines and ("token_budget", 2 * M) in baselines, "what costs as much as two LLMs'"
    assert not {"latentwire", "oracle_text", "text_tuned"} & {name for name, _ in baselines}
    assert names("quick,text,token_budget@8") == [*names("quick"), ("token_budget", 8)], "each once"
    tuned = [condition.name for condition in TUNED if condition.groups]
    assert names("tuned") == [(name, M) for name in tuned]
    assert names("tuned", ()) == [(name, M) for name in tuned if name != "selected_text_tuned"]


def test_the_question_alone_has_no_context(at, questions):
    there = at()
    for q, slot in zip(questions[:3], slots(there, "question_only", questions[:3]), strict=True):
        assert text_of(there, slot) == f"Question: {q.question}" and slot.sent == len(
            f"Question: {q.question}".encode()
        )


@pytest.mark.parametrize("source", ["prompt", "aware"])
def test_the_sentence_holds_the_encoders_own_answer(at, selecting, questions, source, monkeypatch):
    there = at(source=source, encoder=selecting)
    context = "It rained. The kettle was Osric's, said Ada. It snowed."
    q = dataclasses.replace(questions[0], context=context, question="Whose kettle?")
    for answer, expected in (
        ("Osric", "The kettle was Osric's, said Ada."),
        ("rained. The kettle", "It rained. The kettle was Osric's, said Ada."),
        (" It", "It snowed."),
    ):
        begin = context.index(answer)
        monkeypatch.setattr(selecting, "read_at", lambda asked, at=begin, answer=answer: [(at, at + len(answer))])
        text = text_of(there, slots(there, "sentence", [q])[0])
        assert text == (f"Context: {expected}\nQuestion: {q.question}" if source == "prompt" else f" {expected}")
    monkeypatch.setattr(selecting, "read_at", lambda asked: [(10, 11)])  # the space between two sentences
    assert "The kettle was Osric's" in text_of(there, slots(there, "sentence", [q])[0])


def test_a_sentence_that_an_llm_cannot_read_is_refused(at, selecting, questions, monkeypatch):
    there = at(encoder=selecting)
    monkeypatch.setattr(there.reader.llm, "positions", 40)
    with pytest.raises(ValueError, match=f"question {questions[0].id}: its prompt takes"):
        slots(there, "sentence", questions[:1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_selected_words_are_whole_and_fit_m_of_the_llms_tokens(at, selecting, questions, llm, source):
    there, m = at(llm, source, encoder=selecting), 80 if source == "prompt" else 40
    some = [q for q in questions[:30] if len(q.question) < 50]
    for q, slot in zip(some, slots(there, "selected_words", some, m), strict=True):
        assert len(slot.embeds) <= m
        text = text_of(there, slot)
        if source == "prompt":
            assert text.startswith("Context: ") and text.endswith(f"\nQuestion: {q.question}")
            text = text.removeprefix("Context:").removesuffix(f"\nQuestion: {q.question}")
        assert all(piece in q.context for piece in text.removeprefix(" ").split(" ... "))
        assert set(re.findall(r"\w+", text)) <= set(re.findall(r"\w+", q.context)) and text, "whole words"


def test_selected_words_leave_out_what_the_encoder_wants_least(at, selecting, questions):
    there = at(source="aware", encoder=selecting)
    fewer, more = (text_of(there, slots(there, "selected_words", questions[:1], m)[0]) for m in (12, 48))
    assert len(fewer) < len(more)
    whole = len(there.reader.prompts.plain(f" {questions[0].context}"))
    everything = text_of(there, slots(there, "selected_words", questions[:1], whole)[0])
    assert everything == f" {questions[0].context}", "where all is chosen there is no gap"


def test_selected_words_are_of_as_many_places_as_fit(at, selecting, questions):
    there, m = at(source="aware", encoder=selecting), 24
    for q in questions[:10]:
        (chosen,) = selecting.choosing([q], "aware")

        def of(places, q=q, chosen=chosen):
            words = in_whole_words(q.context, chosen(places))
            return content_ids(there.reader, dataclasses.replace(q, context=words))

        sent = text_of(there, slots(there, "selected_words", [q], m)[0])
        places = max(n for n in range(1, m + 1) if there.reader.llm.tokenizer.decode(of(n)) == sent)
        assert places == m or len(of(places + 1)) > m


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_selected_words_are_of_the_most_places_also_where_fewer_take_more(at, selecting, questions, llm, monkeypatch):
    there, context = at(llm, "aware", encoder=selecting), "the of in and to is it"
    order = [context.index(word) for word in ("the", "to", "in", "of", "and", "it")]  # gaps close with the 4th and 5th
    monkeypatch.setattr(
        selecting, "choosing", lambda *_: [lambda places: [(begin, begin + 1) for begin in sorted(order[:places])]]
    )
    (slot,) = slots(there, "selected_words", [dataclasses.replace(questions[0], context=context)], 6)
    assert text_of(there, slot) == " the of in and to"
    taken = [there.reader.prompts.plain(text) for text in (" the ... to", " the ... in ... to", " the of in ... to")]
    assert len(taken[0]) <= 6 < min(len(taken[1]), len(taken[2])), "2 places fit, 3 and 4 do not"


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_pca_of_the_selection_takes_a_place_for_each_selected_token(at, questions, llm):
    there = at(llm, "aware", d_z=64)
    assert there.reader.llm.width <= 64, "all directions: nothing is lost but by the wire's half precision"
    encoder, table = there.shared.sender.encoder, there.reader.llm.embedding_table()
    vocabulary = there.reader.llm.tokenizer.get_vocab()
    for q, slot in zip(questions[:3], slots(there, "pca_selected", questions[:3]), strict=True):
        tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.select([q], "aware", M)[0])
        assert len(slot.embeds) == len(tokens) == M
        known = [i for i, token in enumerate(tokens) if token in vocabulary]
        assert known
        own = table[[vocabulary[tokens[i]] for i in known]]
        torch.testing.assert_close(slot.embeds[known], own, atol=2e-2, rtol=2e-2)
    narrow = at(llm, "aware", d_z=4)
    (slot,) = slots(narrow, "pca_selected", [q])
    assert (slot.embeds[known] - own).abs().max() > 0.05, "the same tokens in four directions"
    assert slots(narrow, "pca_selected", questions[:1])[0].sent < slots(there, "pca_selected", questions[:1])[0].sent


@pytest.mark.parametrize("source", ["prompt", "aware"])
def test_a_shuffled_contexts_wire_keeps_the_question(at, questions, source):
    there = at(source=source)
    asked, sender = [], there.shared.sender
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, "send", lambda chosen, m: asked.extend(chosen) or Sender.send(sender, chosen, m))
        found = slots(there, "shuffled_context_z", questions[:5], 64)
    others = partners(there, questions[:5])
    assert [(q.question, q.context) for q in asked] == [
        (q.question, other.context) for q, other in zip(questions[:5], others, strict=True)
    ]
    for own, moved in zip(slots(there, "latentwire", questions[:5], 64), found, strict=True):
        assert own.embeds.shape != moved.embeds.shape or not torch.equal(own.embeds, moved.embeds)
    again = slots(there, "latentwire", questions[:5])
    assert torch.equal(again[0].embeds, slots(at(source=source), "latentwire", questions[:1])[0].embeds), "kept apart"


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_a_prompt_beyond_an_llms_positions_is_refused_and_the_question_named(at, questions, llm, monkeypatch):
    reader = at(llm).reader
    prompts, q = reader.prompts, max(questions, key=lambda q: len(q.context))
    text = prompts.plain(prompts.content_text(q.context, q.question))
    needed = len(prompts.head) + len(text) + len(prompts.tail(q.question)) + 8
    monkeypatch.setattr(reader.llm, "positions", needed)
    require_positions(reader, [q], M, whole=True, more=8)
    monkeypatch.setattr(reader.llm, "positions", needed - 1)
    with pytest.raises(ValueError, match=rf"question {q.id}: .* {needed} positions, and {llm} .* reads {needed - 1}; "):
        require_positions(reader, [questions[0], q], M, whole=True, more=8)
    require_positions(reader, [q], M, whole=False, more=8)
    with pytest.raises(ValueError, match=questions[0].id):
        require_positions(reader, [questions[0], q], needed, whole=False, more=8)
    monkeypatch.setattr(reader.llm, "positions", None)
    require_positions(reader, [q], needed, whole=True, more=8)


@pytest.mark.parametrize("llm", ["llama", "qwen"])
@pytest.mark.parametrize("base", ["text", "token_budget", "selected_text", "selected_words"])
def test_a_tuned_rival_is_its_soft_prompt_and_then_its_text(at, questions, llm, base):
    there = at(llm)
    soft = there.shared.soft_prompts[f"{base}_tuned"][llm]
    pairs = zip(slots(there, f"{base}_tuned", questions[:3]), slots(there, base, questions[:3]), strict=True)
    for tuned, plain in pairs:
        assert torch.equal(tuned.embeds, torch.cat([soft, plain.embeds]))
        assert tuned.sent == plain.sent, "the receiver has the soft prompt already"


def test_untrained_is_the_wire_of_the_closed_form_and_not_the_trained_one(at, selecting, questions):
    trained = at(encoder=selecting)
    before = slots(at(), "latentwire", questions[:3])
    for slot, expected, other in zip(
        slots(trained, "untrained", questions[:3]), before, slots(trained, "latentwire", questions[:3]), strict=True
    ):
        assert torch.equal(slot.embeds, expected.embeds) and slot.sent == expected.sent
        assert slot.embeds.shape != other.embeds.shape or not torch.equal(slot.embeds, other.embeds)


def test_conditions_are_named_with_an_own_m_if_wanted_and_without_doubles():
    chosen = parse_conditions("text, token_budget,token_budget@64,token_budget@32", "prompt", 32, ABLE)
    assert [(c.name, m) for c, m in chosen] == [("text", 32), ("token_budget", 32), ("token_budget", 64)]
    names = [c.name for c, _ in parse_conditions("quick,quick@64,text@8", "prompt", 32, ABLE)]
    assert names.count("text") == names.count("no_context") == 1, "M plays no part in them"


def test_the_default_is_all_that_fit_the_source_but_the_oracles():
    for source in SOURCES:
        names = [c.name for c, _ in parse_conditions("", source, 32, ABLE)]
        assert {"text", "token_budget", "pca", "latentwire", "no_context", "shuffled_z"} <= set(names)
        assert not any(name.startswith("oracle") or name.endswith("_tuned") for name in names)
        others = {"selected_text", "encoder_only", "untrained", "sentence", "question_only", "shuffled_context_z"}
        assert not others & set(names)


@pytest.mark.parametrize(
    ("text", "source", "match"),
    [
        ("text,magic", "prompt", "'magic'.*token_budget.*groups.*learned"),
        ("oracle_text_tuned", "prompt", "'oracle_text_tuned'.*selected_text_tuned"),
        ("token_budget@0", "prompt", "'token_budget@0'.*at least 1"),
        ("token_budget@x", "prompt", "'token_budget@x'"),
        ("encoder_only", "context", "'encoder_only'.*prompt or aware"),
        ("question_only", "aware", "'question_only': needs source prompt"),
    ],
)
def test_a_wrong_condition_is_named_with_the_remedy(text, source, match):
    with pytest.raises(ValueError, match=match):
        parse_conditions(text, source, 32, ABLE)
