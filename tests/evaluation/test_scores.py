"""Intervals respect paragraphs, pairing and seeds, and verdicts follow from them."""

import numpy as np
import pytest

from latentwire.evaluation.scores import (
    difference_ci,
    difference_verdict,
    mean_ci,
    ratio_ci,
    ratio_verdict,
    show_interval,
)


def width(ci: list[float]) -> float:
    return ci[1] - ci[0]


def scores(n: int) -> np.ndarray:
    return np.random.default_rng(7).random(n)


def paragraphs(n: int, questions_each: int = 1) -> list[str]:
    return [f"p{i // questions_each}" for i in range(n * questions_each)]


def test_mean_interval_is_that_of_the_normal_approximation_for_many_paragraphs():
    values = scores(400)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = mean_ci(values, paragraphs(400))
    assert low < values.mean() < high
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)


def test_mean_interval_weighs_questions_and_not_paragraphs():
    values = [1.0] * 90 + [0.0] * 10
    groups = [f"long{i // 9}" for i in range(90)] + [f"short{i}" for i in range(10)]
    low, high = mean_ci(values, groups)
    assert low < 0.9 < high
    assert low > 0.5


def test_mean_interval_narrows_with_more_paragraphs():
    values = scores(320)
    widths = [width(mean_ci(values[:n], paragraphs(n))) for n in (20, 80, 320)]
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_correlated_questions_widen_the_interval():
    values = np.repeat([0.0, 1.0], 50)
    alone = width(mean_ci(values, paragraphs(100)))
    together = width(mean_ci(values, paragraphs(20, 5)))
    assert together / alone == pytest.approx(np.sqrt(5), rel=0.15)


def test_groups_are_recognised_when_their_questions_are_not_adjacent():
    values = np.repeat(scores(30), 4)
    groups = paragraphs(30, 4)
    shuffled = np.random.default_rng(0).permutation(len(values))
    apart = mean_ci(values[shuffled], [groups[i] for i in shuffled])
    assert width(apart) == pytest.approx(width(mean_ci(values, groups)), rel=0.1)


def test_constant_values_give_a_point():
    assert mean_ci([0.25] * 12, paragraphs(4, 3)) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("shift", [0.125, -0.3])
def test_difference_interval_is_paired(shift):
    b = scores(60)
    assert difference_ci(b + shift, b, paragraphs(20, 3)) == pytest.approx([shift, shift], abs=1e-12)


def test_difference_interval_contains_the_difference_and_turns_with_its_sides():
    a, b = scores(80), scores(160)[80:]
    ci = difference_ci(a, b, paragraphs(80))
    assert ci[0] < a.mean() - b.mean() < ci[1]
    assert difference_ci(b, a, paragraphs(80)) == pytest.approx([-ci[1], -ci[0]], abs=1e-12)


def test_ratio_interval_is_paired():
    b = scores(60)
    assert ratio_ci(0.9 * b, b, paragraphs(20, 3)) == pytest.approx([0.9, 0.9])


def test_ratio_interval_is_of_means_and_takes_zero_scores():
    b = np.tile([0.0, 1.0, 1.0, 4.0], 25)
    a = np.tile([1.0, 1.0, 0.0, 1.0], 25)
    low, high = ratio_ci(a, b, paragraphs(100))
    assert low < 0.5 < high
    assert high - low < 0.4


def test_a_single_paragraph_has_no_interval():
    one = ["p"] * 5
    assert mean_ci(scores(5), one) is None
    assert difference_ci(scores(5), np.zeros(5), one) is None
    assert ratio_ci(scores(5), np.ones(5), one) is None


def test_no_questions_have_no_interval():
    assert mean_ci([], []) is None


def test_ratio_to_all_zero_has_no_interval():
    assert ratio_ci(scores(6), np.zeros(6), paragraphs(6)) is None


def test_ratio_whose_draws_often_divide_by_zero_has_no_interval():
    assert ratio_ci([1.0, 1.0], [0.0, 1.0], ["p", "q"]) is None


def test_lengths_that_disagree_are_refused():
    with pytest.raises(ValueError):
        mean_ci([1.0, 0.0], ["p", "q", "r"])
    with pytest.raises(ValueError):
        difference_ci([1.0, 0.0], [1.0, 0.0, 1.0], ["p", "q"])


def test_intervals_repeat_with_the_seed_and_move_with_another():
    a, b, groups = scores(40), scores(80)[40:], paragraphs(40)
    for interval in (lambda seed: mean_ci(a, groups, seed), lambda seed: difference_ci(a, b, groups, seed),
                     lambda seed: ratio_ci(a, b, groups, seed)):  # fmt: skip
        assert interval(3) == interval(3)
        assert interval(3) != interval(4)


def test_intervals_are_plain_floats_for_json():
    assert {type(bound) for bound in mean_ci(scores(5), paragraphs(5))} == {float}


@pytest.mark.parametrize(
    ("ci", "verdict"),
    [
        ([0.01, 0.2], "PASS"),
        ([1e-12, 0.2], "PASS"),
        ([0.0, 0.2], "not decided"),
        ([-0.1, 0.1], "not decided"),
        ([-0.2, 0.0], "not decided"),
        ([-0.2, -0.01], "FAIL"),
        ([0.0, 0.0], "not decided"),
        (None, "not decided"),
    ],
)
def test_difference_verdict(ci, verdict):
    assert difference_verdict(ci) == verdict


@pytest.mark.parametrize(
    ("ci", "verdict"),
    [
        ([0.95, 1.2], "PASS"),
        ([0.9, 1.1], "PASS"),
        ([0.9, 0.9], "PASS"),
        ([0.8999, 1.1], "not decided"),
        ([0.5, 0.9], "not decided"),
        ([0.5, 0.8999], "FAIL"),
        (None, "not decided"),
    ],
)
def test_ratio_verdict(ci, verdict):
    assert ratio_verdict(ci) == verdict


def test_an_interval_is_shown_with_three_digits_or_said_to_be_missing():
    assert show_interval([0.12345, 1]) == "[0.123, 1.000]" and show_interval([-0.5, 0]) == "[-0.500, 0.000]"
    assert show_interval(None) == "(no interval)"
