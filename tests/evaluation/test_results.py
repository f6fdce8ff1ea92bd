"""Rows of results.json say what their prediction lines say."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
from conftest import make_sentencepiece

from latentwire.conditions.base import Reader
from latentwire.data.question import Question
from latentwire.evaluation.answering import said_line
from latentwire.evaluation.results import compare, row_key, summarise
from latentwire.evaluation.scores import difference_ci, mean_ci, ratio_ci
from latentwire.llms.prompts import PromptBuilder

BY_HAND = {
    "f1": [1.0, 0.0, 0.5, 0.0], "em": [1.0, 0.0, 0.0, 0.0], "prediction": ["a", "", "b", "c"],
    "first_token_correct": [True, False, False, False], "first_informative_correct": [True, True, False, False],
    "answer_nll": [1.0, 2.0, 3.0, 6.0], "answer_tokens": [1, 1, 2, 4], "answer_bytes": [2, 3, 5, 10],
    "llm_positions": [8, 8, 8, 4], "constant_positions": [16] * 4, "wire_bytes": [10, 10, 10, 11],
    "text_bytes": [100, 100, 200, 200], "seconds": [0.5, 0.5, 0.5, 0.5],
}  # fmt: skip
_TEXT = "Seven mills stand there."
ASKED = [Question(f"q{i}", "Mills", f"p{i // 2}", _TEXT, "What?", ("Seven mills",)) for i in range(4)]


def test_a_row_is_what_its_lines_say():
    lines = {q.id: {key: values[i] for key, values in BY_HAND.items()} for i, q in enumerate(ASKED)}
    row = summarise(lines, ASKED, 0)
    assert (row["n"], row["paragraphs"]) == (4, 2)
    assert (row["f1"], row["em"], row["first_token_acc"], row["first_informative_acc"]) == (0.375, 0.25, 0.25, 0.5)
    assert row["nll_per_token"] == 12 / 8 and row["empty_answers"] == 0.25
    assert row["bits_per_answer_byte"] == pytest.approx(12 / math.log(2) / 20)
    assert (row["llm_positions"], row["constant_positions"], row["wire_bytes"], row["text_bytes"]) == (7, 16, 10, 150)
    assert (row["seconds"], row["examples_per_s"]) == (2.0, 2.0)
    by = [q.paragraph for q in ASKED]
    assert row["f1_ci95"] == mean_ci(BY_HAND["f1"], by, 0) != mean_ci(BY_HAND["f1"], [q.id for q in ASKED], 0)
    assert row["em_ci95"] == mean_ci(BY_HAND["em"], by, 0) != row["f1_ci95"]


def test_intervals_of_differences_and_ratios_are_by_paragraph():
    f1s, by = {"latentwire": [1.0, 0.0, 1.0, 0.0], "text": [1.0, 1.0, 0.0, 1.0]}, ["p", "p", "q", "q"]
    rows = [{"condition": name, "m": m, "llm": "a", "f1": sum(f1s[name]) / 4, "wire_bytes": 1, "llm_positions": 1}
            for name, m in (("latentwire", 32), ("text", None))]  # fmt: skip
    pair, third = compare(rows, {row_key(row): f1s[row["condition"]] for row in rows}, by, 0)
    assert pair["ci95"] == difference_ci(*f1s.values(), by, 0) != difference_ci(*f1s.values(), list("abcd"), 0)
    assert third["ci95"] == ratio_ci(*f1s.values(), by, 0)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_any_reference_may_begin_the_answer(llms, name):
    reader = Reader(llms[name], PromptBuilder(llms[name].tokenizer, "prompt", "zero_shot"))
    asked = dataclasses.replace(ASKED[0], answers=("seven mills", "the river"))
    ids = reader.prompts.answer_ids
    right, wrong = (said_line(reader, asked, ids(said), 1.5) for said in ("the river", "blue"))
    assert right["first_token_correct"] and right["first_informative_correct"]
    assert not wrong["first_token_correct"] and not wrong["first_informative_correct"]
    assert right["prediction"] == "the river"
    assert (right["answer_nll"], right["answer_tokens"]) == (1.5, len(ids("seven mills")))


def test_a_lone_space_is_a_right_first_token_and_tells_nothing(texts):
    tokenizer = make_sentencepiece(600, texts)
    reader = SimpleNamespace(
        prompts=PromptBuilder(tokenizer, "prompt", "plain"), llm=SimpleNamespace(text=tokenizer.decode)
    )
    space, five, word = map(tokenizer.convert_tokens_to_ids, ("\u2581", "5", "\u2581the"))
    asked = dataclasses.replace(ASKED[0], answers=("5",))
    told = [said_line(reader, asked, said, 1.0) for said in ([space, five], [space, word], [space])]
    assert [line["first_token_correct"] for line in told] == [True] * 3
    assert [line["first_informative_correct"] for line in told] == [True, False, False]


@pytest.mark.parametrize(("pca", "pool", "better"), [(0.3, 0.1, "pca"), (0.1, 0.3, "pca_pool")])
def test_the_second_critical_test_takes_the_better_pca(pca, pool, better):
    f1s = {"latentwire": 0.4, "pca": pca, "pca_pool": pool}
    rows = [{"condition": name, "llm": "a", "llm_id": "a", "m": 32, "f1": f1, "wire_bytes": 1, "llm_positions": 1,
             "constant_positions": 0} for name, f1 in f1s.items()]  # fmt: skip
    found = compare(rows, {row_key(row): [row["f1"]] * 4 for row in rows}, ["p", "p", "q", "q"], 0)
    (second,) = [c for c in found if c.get("critical") == 2]
    assert second["b"] == better and second["diff"] == pytest.approx(0.1)
