"""Intervals respect paragraphs, pairing and seeds, and verdicts follow from them."""

import numpy as np
import pytest

from latentwire.evaluation.scores import (
    difference_ci,
    difference_draws,
    difference_verdict,
    equivalence_verdict,
    few_seeds,
    interval,
    mean_ci,
    ratio_ci,
    ratio_verdict,
    show_interval,
    shown_ci,
    side_verdict,
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


def test_one_seed_each_gives_the_interval_by_paragraph():
    a, b, groups = scores(120), scores(240)[120:], paragraphs(40, 3)
    draws = difference_draws([a], [b], groups, same_seeds=False)
    assert interval(draws, 0.95) == pytest.approx(difference_ci(a, b, groups), abs=1e-12)


def test_three_seeds_that_differ_by_a_constant_have_the_interval_of_students_test():
    """Questions that all differ alike add nothing: what varies is the mean of three seeds, -0.3, 0 and 0.3."""
    b = scores(60)
    a = np.stack([b - 0.3, b, b + 0.3])
    one = interval(difference_draws(a, [b], paragraphs(20, 3), same_seeds=False), 0.95)
    assert one == pytest.approx([-4.303 * 0.3 / 3**0.5, 4.303 * 0.3 / 3**0.5], rel=0.01), "2 degrees of freedom"
    both = interval(difference_draws(a, a[::-1], paragraphs(20, 3), same_seeds=False), 0.95)
    assert both == pytest.approx([-2.776 * 0.3 * (2 / 3) ** 0.5, 2.776 * 0.3 * (2 / 3) ** 0.5], rel=0.01), "4 of them"
    pairs = interval(difference_draws(a, a[::-1], paragraphs(20, 3), same_seeds=True), 0.95)
    assert pairs == pytest.approx([2 * bound for bound in one], rel=0.01), "-0.6, 0 and 0.6"


@pytest.mark.parametrize(("same", "seeds"), [(True, (3, 3)), (False, (3, 3)), (False, (3, 1))])
@pytest.mark.parametrize("of_questions", [0.0, 1.0])
def test_an_interval_covers_what_it_says(monkeypatch, same, seeds, of_questions):
    """Systems that do not differ, whose seeds do, on questions that do or do not."""
    monkeypatch.setattr("latentwire.evaluation.scores.DRAWS", 1000)
    rng, groups, covered = np.random.default_rng(3), paragraphs(50), 0
    for _ in range(200):
        own = [rng.normal(0, 1, (size if size > 1 else 1, 1)) * (size > 1) for size in seeds]
        a, b = (of_seeds + np.zeros(50) for of_seeds in own)
        low, high = interval(difference_draws(a + rng.normal(0, of_questions * 50**0.5, 50), b, groups, same), 0.95)
        covered += low <= 0 <= high
    assert covered >= 0.92 * 200


@pytest.mark.parametrize(("number", "each"), [(100, 1), (300, 1), (60, 5)])
def test_equivalence_is_shown_by_chance_in_no_more_cases_than_it_says(monkeypatch, number, each):
    """Hardly any answer changes, and those that do are lost, whole paragraphs of them, as many as the margin says: 5%
    may pass."""
    monkeypatch.setattr("latentwire.evaluation.scores.DRAWS", 1000)
    rng, groups, margin, shown, n = np.random.default_rng(4), paragraphs(number, each), 0.02, 0, number * each
    for _ in range(200):
        lost = -(rng.random((1, number)) < margin).astype(float).repeat(each, axis=1)
        shown += "within" in equivalence_verdict(
            interval(difference_draws(lost, np.zeros((1, n)), groups, same_seeds=True, unseen=True), 0.9), margin
        )
    assert shown <= 0.09 * 200
    ties = difference_draws(np.zeros((1, n)), np.zeros((1, n)), groups, same_seeds=True, unseen=True)
    low, high = interval(ties, 0.9)
    assert low < 0 < high, "that all tie does not say that nothing differs"


def test_seeds_that_spread_widen_the_interval():
    groups, b = paragraphs(60), scores(60)
    a = np.random.default_rng(1).random(60)
    alike, apart = (
        interval(difference_draws([a - spread, a, a + spread], [b], groups, same_seeds=False), 0.95)
        for spread in (0.0, 0.4)
    )
    assert alike == pytest.approx(difference_ci(a, b, groups), abs=1e-12)
    assert width(apart) > 1.5 * width(alike)


def test_identical_systems_differ_by_zero():
    a = np.stack([scores(30), scores(60)[30:], scores(90)[60:]])
    assert not difference_draws(a, a, paragraphs(10, 3), same_seeds=True).any()
    assert not difference_draws(a[:1], a[:1], paragraphs(10, 3), same_seeds=False).any()


def test_the_same_weights_read_in_two_ways_are_drawn_together():
    b = np.stack([scores(30), scores(30) + 5, scores(30) - 7])
    draws = difference_draws(b + 0.1, b, paragraphs(10, 3), same_seeds=True)
    assert draws == pytest.approx(0.1)
    assert difference_draws(b + 0.1, b, paragraphs(10, 3), same_seeds=False).std() > 1


def test_the_lower_level_is_the_narrower_interval_and_one_group_has_none():
    draws = difference_draws([scores(80)], [scores(160)[80:]], paragraphs(80), same_seeds=False)
    outer, inner = interval(draws, 0.95), interval(draws, 0.9)
    assert outer[0] < inner[0] < inner[1] < outer[1]
    assert difference_draws([scores(5)], [scores(5)], ["p"] * 5, same_seeds=False) is None
    assert interval(None, 0.95) is None


def test_lengths_that_disagree_are_refused():
    with pytest.raises(ValueError):
        mean_ci([1.0, 0.0], ["p", "q", "r"])
    with pytest.raises(ValueError):
        difference_draws([[1.0, 0.0]], [[1.0, 0.0, 1.0]], ["p", "q"], same_seeds=False)
    with pytest.raises(ValueError):
        difference_ci([1.0, 0.0], [1.0, 0.0, 1.0], ["p", "q"])


def test_intervals_repeat_with_the_seed_and_move_with_another():
    a, b, groups = scores(40), scores(80)[40:], paragraphs(40)
    for ci in (lambda seed: mean_ci(a, groups, seed), lambda seed: difference_ci(a, b, groups, seed),
               lambda seed: ratio_ci(a, b, groups, seed)):  # fmt: skip
        assert ci(3) == ci(3)
        assert ci(3) != ci(4)


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


@pytest.mark.parametrize(
    ("score", "ci", "shown"),
    [
        (0.0, [0.0, 0.0], [0.0, 0.03]),
        (1e-6, [0.0, 0.0], [0.0, 0.0]),
        (0.5, [0.25, 0.75], [0.25, 0.75]),
        (0.0, None, None),
    ],
)
def test_zeros_alone_are_shown_by_the_rule_of_three(score, ci, shown):
    assert shown_ci(score, ci, 100) == (pytest.approx(shown) if shown else shown)


def test_the_rule_of_three_ends_at_one():
    assert shown_ci(0.0, [0.0, 0.0], 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("ci", "verdict"),
    [
        ([0.01, 0.2], "higher"),
        ([0.0, 0.2], "not decided"),
        ([-0.2, 0.0], "not decided"),
        ([-0.2, -0.01], "lower"),
        (None, "not decided"),
    ],
)
def test_side_verdict(ci, verdict):
    assert side_verdict(ci) == verdict


@pytest.mark.parametrize(
    ("ci90", "verdict"),
    [
        ([-0.01, 0.01], "equivalent within 0.01"),
        ([-0.0101, 0.0], "not shown"),
        ([0.0, 0.0101], "not shown"),
        ([0.002, 0.009], "equivalent within 0.01"),
        ([-0.3, -0.2], "not shown"),
        (None, "not shown"),
    ],
)
def test_equivalence_is_shown_where_the_whole_interval_is_within_the_margin(ci90, verdict):
    assert equivalence_verdict(ci90, 0.01) == verdict


def test_few_seeds_are_counted():
    assert few_seeds(1, "not decided") == "one seed, not decided" and few_seeds(2, "x") == "2 seeds, x"
