"""Which part of a context a question is about."""

import random
import re
import time

import pytest

from latentwire.data.relevance import in_whole_words, relevance, relevant_stretch, sentences


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
        ("Wait... What?! Yes.", ["Wait...", "What?!", "Yes."]),
        ("... and then. So.", ["...", "and then.", "So."]),
        (" .", ["."]),
        ("Two\nlines.\nThree.", ["Two\nlines.", "Three."]),
        ("", []),
    ],
)
def test_sentences_end_at_closing_punctuation(text, expected):
    assert sentences(text) == expected


def test_no_word_is_lost_between_sentences(questions):
    assert all(" ".join(sentences(q.context)).split() == q.context.split() for q in questions)


def test_a_long_run_of_signs_takes_no_longer_than_its_length():
    started = time.perf_counter()
    for text in ("." * 50_000 + "x", '?"' * 50_000 + "x", ("." + ")" * 500) * 100):
        assert sentences(text) == [text]
    assert time.perf_counter() - started < 2


def test_sentences_are_those_of_the_plain_expression_which_is_slow_for_long_runs():
    plain = re.compile(r".+?(?:[.!?]+[\"'\u201d\u2019)\]]*(?=\s)|$)", re.DOTALL)
    draw = random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choices('ab .!?")\n', k=draw.randint(0, 14)))
        assert sentences(text) == [found.strip() for found in plain.findall(text.strip())], repr(text)


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("The mill was built in 1794.", [(22, 24)], "1794"),
        ("The mill was built in 1794.", [(3, 8), (21, 26)], "mill ... 1794"),
        ("The mill, built in 1794.", [(4, 5), (8, 9), (10, 11)], "mill, built"),
        ("The mill.\nIt burnt.", [(4, 6), (8, 12)], "mill.\nIt"),
        ("The mill", [(3, 4)], ""),
        ("The mill", [], ""),
    ],
)
def test_what_is_touched_is_shown_in_whole_words_with_gaps_between(text, spans, expected):
    assert in_whole_words(text, spans) == expected


def test_the_characters_of_sentences_are_theirs_whatever_stands_around(questions):
    for context in ("  Rain fell.  Nobody came.\n", "", "   ", *[q.context for q in questions[:20]]):
        assert not any(sentence != sentence.strip() or not sentence for sentence in sentences(context))
