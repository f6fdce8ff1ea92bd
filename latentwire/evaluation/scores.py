"""How certain a score is, and what follows from it.

Intervals are 95% percentile bootstraps over *paragraphs*, because questions on one paragraph are not independent.
Between trained systems they are over training seeds, too.
"""

import warnings
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
_BATCH = 1000  # draws at once
MIN_SEEDS = 3  # trainings of one thing, from which a difference is decided: two say too little of others
RATIO_KEPT = 0.9  # critical test 3: LatentWire must keep at least this share of the text's F1


def mean_ci(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> list[float] | None:
    """95% interval of the mean of `values`, drawn by group (paragraph); None when there is only one group."""
    sums, counts = _per_group(groups, values, np.ones(len(values)))
    return _interval((sums, counts), seed)


def difference_ci(a: Sequence[float], b: Sequence[float], groups: Sequence[str], seed: int = 0) -> list[float] | None:
    """95% interval of mean(a) - mean(b), paired by question and drawn by group; None with only one group."""
    sums, counts = _per_group(groups, np.subtract(a, b), np.ones(len(a)))
    return _interval((sums, counts), seed)


def ratio_ci(a: Sequence[float], b: Sequence[float], groups: Sequence[str], seed: int = 0) -> list[float] | None:
    """95% interval of mean(a) / mean(b), paired by question and drawn by group; None where it is undefined."""
    return _interval(_per_group(groups, a, b), seed)


def difference_draws(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    groups: Sequence[str],
    same_seeds: bool,
    counts: Sequence[float] | None = None,
    unseen: bool = False,
) -> np.ndarray | None:
    """[DRAWS] differences mean(a) - mean(b), drawn over training seeds and over groups; None with only one group.

    a [S_a, n], b [S_b, n]: scores of the same n questions, a row per training seed. counts: [n], how much each score is
    of, such as an answer's tokens, so that the means are per token; default: 1. same_seeds: the rows of a and b belong
    together, so what varies is the difference within each. One row is not drawn. unseen: four groups of mean size more
    are drawn from, two wholly lost and two wholly won. Without them scores that all tie would differ by [0, 0], however
    few they are, and equivalence would be shown by too few groups (the idea is that of A. Agresti and B. Caffo, "Simple
    and effective confidence intervals for proportions", The American Statistician 54, 2000).

    Every seed answers every question: two crossed effects, drawn one by one and added. Groups are drawn with
    replacement, the same ones for all rows. Seeds are too few for that: of three, hardly more than their range would
    come out. What other trainings would change is drawn from Student's distribution, as wide as the seeds differ; of
    two independent sides with the degrees of freedom of B. L. Welch, "The generalization of Student's problem when
    several different population variances are involved", Biometrika 34, 1947. The 95% interval then covers 94% to 98%
    (simulated: three or five normal seeds, from questions alone to seeds alone).
    """
    sums = [np.stack(_per_group(groups, *rows)) for rows in (a, b)]
    (counts,) = _per_group(groups, np.ones(len(groups)) if counts is None else counts)
    if len(counts) < 2:
        return None
    by_group, by_seed = np.random.default_rng(0), np.random.default_rng([0, 1])
    means = [each.sum(axis=1) / counts.sum() for each in sums]  # by seed
    shift = _seed_shift(by_seed, [means[0] - means[1]] if same_seeds else means)
    difference = sums[0].mean(axis=0) - sums[1].mean(axis=0)
    if unseen:
        size = counts.mean()
        difference, counts = np.append(difference, [-size, -size, size, size]), np.append(counts, [size] * 4)
    found = []
    for _ in range(DRAWS // _BATCH):
        drawn = by_group.integers(len(counts), size=(_BATCH, len(counts)))
        found.append(difference[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(found) + shift


def interval(draws: np.ndarray | None, level: float) -> list[float] | None:
    """The percentile interval of this level (0.95 for 95%) of the draws; None without draws."""
    if draws is None:
        return None
    return [float(bound) for bound in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])]


def shown_ci(score: float, ci: Sequence[float] | None, n: int) -> Sequence[float] | None:
    """The interval that tables and charts show of a mean over n paragraphs: [0, 3/n] where all scores are zero, else
    the recorded one.

    A bootstrap of zeros knows nothing but zeros and says [0, 0]; by the rule of three, what never happened in n
    independent cases happens in less than 3/n of them (J. A. Hanley and A. Lippman-Hand, "If nothing goes wrong, is
    everything all right?", JAMA 249, 1983). Records keep what the bootstrap says.
    """
    return [0.0, min(1.0, 3 / n)] if ci and score == 0 else ci


def show_interval(ci: Sequence[float] | None) -> str:
    """An interval as tables and logs write it."""
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "(no interval)"


def difference_verdict(ci: list[float] | None) -> str:
    """PASS when the whole interval lies above 0, FAIL when it lies below, else "not decided"."""
    return _verdict(ci, 0.0)


def ratio_verdict(ci: list[float] | None) -> str:
    """PASS when the lower bound is at least RATIO_KEPT, FAIL when the upper bound is below it, else "not decided"."""
    return _verdict(ci, RATIO_KEPT, inclusive=True)


def side_verdict(ci: Sequence[float] | None) -> str:
    """Whether the whole interval of a difference lies above 0 (higher) or below it (lower); else "not decided"."""
    return {"PASS": "higher", "FAIL": "lower"}.get(difference_verdict(ci), "not decided")


def equivalence_verdict(ci90: Sequence[float] | None, margin: float) -> str:
    """Whether the whole 90% interval of a difference lies in [-margin, margin] (equivalent); else "not shown".

    These are two one-sided tests at 5% (D. J. Schuirmann, "A comparison of the two one-sided tests procedure and the
    power approach", Journal of Pharmacokinetics and Biopharmaceutics 15, 1987).
    """
    within = ci90 is not None and -margin <= ci90[0] and ci90[1] <= margin
    return f"equivalent within {margin:g}" if within else "not shown"


def few_seeds(seeds: int, verdict: str) -> str:
    """A verdict that fewer than MIN_SEEDS trainings do not bear: "one seed, not decided"."""
    return f"{'one seed' if seeds == 1 else f'{seeds} seeds'}, {verdict}"


def _verdict(ci: list[float] | None, bar: float, inclusive: bool = False) -> str:
    if ci is None:
        return "not decided"
    if ci[0] > bar or (inclusive and ci[0] == bar):
        return "PASS"
    return "FAIL" if ci[1] < bar else "not decided"


def _seed_shift(rng: np.random.Generator, sides: Sequence[np.ndarray]) -> np.ndarray:
    """[DRAWS]: how far a difference may be from that over all trainings; sides: the means of each one's seeds."""
    parts = [(means.var(ddof=1) / len(means), len(means) - 1) for means in sides if len(means) > 1]
    variance = sum(own for own, _ in parts)
    if not variance:
        return np.zeros(DRAWS)
    from scipy.stats import t  # slow to import

    freedom = variance**2 / sum(own**2 / free for own, free in parts)
    return t.ppf((rng.permutation(DRAWS) + 0.5) / DRAWS, freedom) * np.sqrt(variance)  # exact, and the same both ways


def _per_group(groups: Sequence[str], *columns: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Sums of each column over the questions of each group, in order of first appearance."""
    index = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    rows = [index[g] for g in groups]
    return tuple(np.bincount(rows, weights=np.asarray(c, float), minlength=len(index)) for c in columns)


def _interval(columns: tuple[np.ndarray, ...], seed: int) -> list[float] | None:
    numerator, denominator = columns
    if len(numerator) < 2 or denominator.sum() == 0:
        return None

    from scipy.stats import DegenerateDataWarning, bootstrap  # slow to import

    def ratio_of_sums(n: np.ndarray, d: np.ndarray, axis: int = -1) -> np.ndarray:
        return n.sum(axis=axis) / d.sum(axis=axis)

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a draw of only zero denominators: nan, handled below
        result = bootstrap(
            columns, ratio_of_sums, paired=True, vectorized=True, n_resamples=DRAWS, batch=_BATCH,
            method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = result.confidence_interval
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None
