"""Signs follow from the figures, also at their borders."""

import pytest

from latentwire.reporting.signs import (
    BAD,
    GOOD,
    UNDECIDED,
    judge_log,
    judge_predictions,
    judge_results,
    not_measured,
)

BUDGET, FIRST = "LatentWire against the token budget at the same M", "First-token accuracy"
VARIETY, PREFIX = "Variety of answers", "Prefix RMS against the vocabulary's"
EMPTY, LOSS, SHUFFLED = "Empty answers", "Training loss", "Shuffled Z against no context"


def results(first=0.15, empty=0.0, budget=None, shuffled=None):
    row = {"condition": "latentwire", "llm": "qwen", "m": 32, "first_token_acc": first, "empty_answers": empty}
    pairs = [("latentwire", "token_budget", budget), ("shuffled_z", "no_context", shuffled)]
    others = [row | {"condition": "no_context", "m": None, "first_token_acc": 0.0, "empty_answers": 1.0}]
    return {
        "n": 1000,
        "results": [row, *others],
        "comparisons": [{"a": a, "b": b, "llm": "qwen", "m": 32, "diff": 0.012, "ci95": ci} for a, b, ci in pairs],
    }


def levels(found):
    return {sign.title: sign.level for sign in found}


@pytest.mark.parametrize(
    ("interval", "level"),
    [([0.01, 0.2], GOOD), ([-0.2, -0.01], BAD), ([-0.1, 0.1], UNDECIDED), ([0.0, 0.1], UNDECIDED),
     ([-0.1, 0.0], UNDECIDED), (None, UNDECIDED)],
)  # fmt: skip
def test_the_token_budget_is_judged_by_the_paired_interval(interval, level):
    found = [sign for sign in judge_results(results(budget=interval)) if sign.title == BUDGET]
    assert [sign.level for sign in found] == [level]
    assert found[0].subject == "qwen M=32" and "+0.012" in found[0].measured
    assert bool(found[0].advice) == (level == BAD)
    if interval:
        assert f"[{interval[0]:.3f}, {interval[1]:.3f}]" in found[0].measured


def test_the_critical_test_does_not_repeat_the_comparison():
    made = results(budget=[0.1, 0.2])
    made["comparisons"].append(made["comparisons"][0] | {"critical": 1})
    assert [sign.title for sign in judge_results(made)].count(BUDGET) == 1


@pytest.mark.parametrize(
    ("interval", "level"),
    [([0.001, 0.04], BAD), ([0.001, 0.03], GOOD), ([0.0, 0.0], GOOD), ([-0.1, 0.031], UNDECIDED), (None, UNDECIDED)],
)
def test_shuffled_z_must_be_at_the_floor(interval, level):
    assert levels(judge_results(results(shuffled=interval)))[SHUFFLED] == level


def test_ties_of_few_questions_show_no_floor():
    found = results(shuffled=[0.0, 0.0]) | {"n": 40}
    assert levels(judge_results(found))[SHUFFLED] == UNDECIDED
    found["n"] = 1000
    found["results"][0]["paragraphs"] = 40
    assert levels(judge_results(found))[SHUFFLED] == UNDECIDED, "questions on one text are not independent"


@pytest.mark.parametrize(("share", "level"), [(0.099, BAD), (0.10, UNDECIDED), (0.20, UNDECIDED), (0.201, GOOD)])
def test_first_tokens(share, level):
    found = [sign for sign in judge_results(results(first=share)) if sign.title == FIRST]
    assert [sign.level for sign in found] == [level] and f"{share:.1%}" in found[0].measured


@pytest.mark.parametrize(("share", "level"), [(0.05, GOOD), (0.051, BAD)])
def test_empty_answers_of_latentwire_alone_count(share, level):
    found = [sign for sign in judge_results(results(empty=share)) if sign.title == EMPTY]
    assert [sign.level for sign in found] == [level]


def line(prediction, condition="latentwire", llm="qwen"):
    return {"condition": condition, "m": 32, "llm": llm, "prediction": prediction}


@pytest.mark.parametrize(("same", "level"), [(20, GOOD), (21, BAD)])
def test_one_answer_to_more_than_a_fifth_is_a_collapse(same, level):
    lines = [line("the same")] * same + [line(f"answer {n}") for n in range(100 - same)]
    (sign,) = judge_predictions(lines)
    assert (sign.title, sign.level, sign.subject) == (VARIETY, level, "qwen M=32")
    assert "“the same”" in sign.measured and f"{same} of 100" in sign.measured


def test_collapse_is_judged_for_each_llm_and_for_latentwire_alone():
    lines = [line("a")] * 5 + [line(f"{n}", llm="llama") for n in range(5)] + [line("b", "no_context")] * 9
    assert {sign.subject: sign.level for sign in judge_predictions(lines)} == {"qwen M=32": BAD, "llama M=32": GOOD}


def test_empty_and_single_answers_are_no_collapse():
    assert levels(judge_predictions([line("")] * 9 + [line("x")])) == {VARIETY: GOOD}
    assert levels(judge_predictions([line("once"), line("twice")])) == {VARIETY: GOOD}
    assert judge_predictions([]) == []


def step(number, loss, **more):
    return {"step": number, "loss": loss} | more


def test_the_loss_of_the_first_tenth_is_held_against_that_of_the_last():
    falling = [step(n, 3.0 if n < 2 else 9.0 if n < 18 else 2.0) for n in range(20)]
    (sign,) = judge_log([{"step": 0, "validation": {"score": 1}}, *falling])
    assert sign.level == GOOD and "3.000 in the first 2 of 20 steps, 2.000 in the last 2" in sign.measured
    assert levels(judge_log([step(1, 1.0), step(2, 1.0)])) == {LOSS: BAD}
    assert levels(judge_log([step(1, 1.0)])) == {LOSS: UNDECIDED}
    assert judge_log([]) == []


@pytest.mark.parametrize(("ratio", "level"), [(1 / 3, GOOD), (0.33, BAD), (3.0, GOOD), (3.01, BAD), (100.0, BAD)])
def test_the_prefix_has_the_size_of_embeddings(ratio, level):
    lines = [
        step(n, 1.0, llms={"qwen": {"prefix_rms": 1.0 if n < 18 else ratio}, "llama": {"prefix_rms": 1.0}})
        for n in range(20)
    ]
    found = {sign.subject: sign.level for sign in judge_log(lines) if sign.title == PREFIX}
    assert found == {"qwen": level, "llama": GOOD}


def test_a_log_without_the_prefix_or_of_the_old_form_has_no_such_sign():
    assert levels(judge_log([step(n, 2.0 - n, llms={"qwen": {"ce": 1.0}}) for n in range(2)])) == {LOSS: GOOD}
    assert levels(judge_log([step(n, 2.0 - n, prefix_rms_qwen=100.0) for n in range(2)])) == {LOSS: GOOD}


def test_what_was_not_measured_says_how():
    assert {sign.title for sign in not_measured([])} == {BUDGET, FIRST, VARIETY, PREFIX, EMPTY, LOSS, SHUFFLED}
    left = not_measured(judge_results(results()))
    assert {sign.title for sign in left} == {VARIETY, PREFIX, LOSS}
    assert all(sign.level == UNDECIDED and "To measure it" in sign.advice for sign in left)
