"""How certain a score is, and what follows from it.

Intervals are 95% percentile bootstraps over *paragraphs*, because questions on one paragraph are not independent.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

DRAWS = 10_000
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


def show_interval(ci: Sequence[float] | None) -> str:
    """An interval as tables and logs write it."""
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "(no interval)"


def difference_verdict(ci: list[float] | None) -> str:
    """PASS when the whole interval lies above 0, FAIL when it lies below, else "not decided"."""
    return _verdict(ci, 0.0)


def ratio_verdict(ci: list[float] | None) -> str:
    """PASS when the lower bound is at least RATIO_KEPT, FAIL when the upper bound is below it, else "not decided"."""
    return _verdict(ci, RATIO_KEPT, inclusive=True)


def _verdict(ci: list[float] | None, bar: float, inclusive: bool = False) -> str:
    if ci is None:
        return "not decided"
    if ci[0] > bar or (inclusive and ci[0] == bar):
        return "PASS"
    return "FAIL" if ci[1] < bar else "not decided"


def _per_group(groups: Sequence[str], *columns: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Sums of each column over the questions of each group, in order of first appearance."""
    index = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    rows = [index[g] for g in groups]
    return tuple(np.bincount(rows, weights=np.asarray(c, float), minlength=len(index)) for c in columns)


def _interval(columns: tuple[np.ndarray, ...], seed: int) -> list[float] | None:
    numerator, denominator = columns
    if len(numerator) < 2 or denominator.sum() == 0:
        return None

    def ratio_of_sums(n: np.ndarray, d: np.ndarray, axis: int = -1) -> np.ndarray:
        return n.sum(axis=axis) / d.sum(axis=axis)

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a draw of only zero denominators: nan, handled below
        result = bootstrap(
            columns, ratio_of_sums, paired=True, vectorized=True, n_resamples=DRAWS, batch=1000,
            method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = result.confidence_interval
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None
