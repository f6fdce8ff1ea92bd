"""The untrained selection: which tokens get the M places."""

import dataclasses

import pytest
import torch

from latentwire.encoder import CodebookEncoder
from latentwire.relevance import relevance, relevant_stretch, sentences


@pytest.fixture(scope="module")
def encoder(llms):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return CodebookEncoder(tokenizer, len(tokenizer), 8)


@pytest.mark.parametrize("m", [1, 5, 32, 64])
@pytest.mark.parametrize("source", ["prompt", "context"])
def test_at_most_m_codes_are_sent_and_they_are_the_codebooks(encoder, questions, source, m):
    for q, z in zip(questions[:20], encoder.encode(questions[:20], source, m), strict=True):
        ids = encoder.select(q, source, m)
        assert 1 <= len(ids) <= m and z.shape == (len(ids), 8)
        assert torch.equal(z, encoder.codebook.weight[ids])


def test_a_prompts_wire_holds_the_question_and_a_stretch_of_the_context(encoder, questions):
    q = min(questions, key=lambda q: len(q.question))
    text = encoder.tokenizer.decode(encoder.select(q, "prompt", 64))
    label, stretch = text.removesuffix(f"\nQuestion: {q.question}").split(":", 1)
    assert label == "Context" and len(stretch) > 20 and stretch in q.context


def test_a_long_question_leaves_room_for_the_context(encoder, questions):
    long = dataclasses.replace(questions[0], question="Why " * 200 + "?")
    text = encoder.tokenizer.decode(encoder.select(long, "prompt", 32))
    assert text.index("Context:") < text.index("Question:")
    assert len(text[: text.index("\nQuestion:")]) > len("Context:")


def test_a_contexts_wire_does_not_depend_on_the_question(encoder, questions):
    q = questions[0]
    other = dataclasses.replace(q, question="Something else entirely?")
    assert encoder.select(q, "context", 32) == encoder.select(other, "context", 32)
    assert encoder.select(q, "prompt", 32) != encoder.select(other, "prompt", 32)


@pytest.mark.parametrize("m", [16, 32])
def test_the_oracle_window_holds_the_answer_in_m_tokens(encoder, questions, m):
    for q in questions:
        ids, text = encoder.window(q, m)
        spans = encoder.tokenizer(q.answers[0], add_special_tokens=False)["input_ids"]
        assert len(ids) <= m
        assert text in q.context
        if len(spans) + 1 < m:
            assert q.answers[0] in text


def test_the_chosen_stretch_is_where_the_questions_words_are(llms):
    filler = "Rain fell on the harbour and nobody went out that day. " * 12
    context = f"{filler}The lighthouse keeper Ana Brandt counted ninety ships in 1931. {filler}".strip()
    offsets = llms["llama"].tokenizer(context, return_offsets_mapping=True)["offset_mapping"]
    chosen = relevant_stretch("How many ships did the lighthouse keeper count?", context, offsets, 40)
    spans = offsets[chosen]
    assert "ninety ships" in context[spans[0][0] : spans[-1][1]] and len(spans) == 40


def test_a_short_context_is_chosen_whole(llms):
    offsets = llms["llama"].tokenizer("Two words.", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[relevant_stretch("What?", "Two words.", offsets, 500)] == offsets


def test_without_common_words_nothing_is_relevant():
    assert relevance("the of and", ["...", "and the"]).tolist() == [0, 0]
    assert relevance("ships?", ["The ships sail.", "A horse."]).argmax() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then he left', ['He said "no."', "Then he left"]),
        ("It cost 3.5 units. Fine.", ["It cost 3.5 units.", "Fine."]),
        ("no end", ["no end"]),
    ],
)
def test_sentences_end_at_closing_punctuation(text, expected):
    assert sentences(text) == expected


def test_no_word_is_lost_between_sentences(questions):
    assert all(" ".join(sentences(q.context)).split() == q.context.split() for q in questions)
