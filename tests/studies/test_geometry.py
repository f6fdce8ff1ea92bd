"""Statistics of embeddings, and the interventions: each does what its name says and nothing else."""

import pytest
import torch

from latentwire.studies.geometry import (
    INTERVENTIONS,
    Moments,
    Surroundings,
    effective_rank,
    mean_cosine,
    nearest,
    rms,
    spectrum,
)


@pytest.fixture
def table():
    return torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.005


@pytest.fixture
def rows():
    scale = torch.linspace(0.5, 3, 20)[:, None]
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(2)) * scale + 1


@pytest.fixture
def around(rows, table):
    return Surroundings(Moments.of(rows), Moments.of(table), table)


def test_effective_rank_counts_the_directions_in_use():
    one = torch.outer(torch.randn(50), torch.randn(8))
    assert effective_rank(spectrum(one)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((8,), 1 / 8)) == pytest.approx(8, abs=1e-4)
    shares = spectrum(torch.randn(500, 8))
    assert shares.sum() == pytest.approx(1, abs=1e-5) and bool((shares[:-1] >= shares[1:]).all())


def test_mean_cosine_tells_a_collapse_from_independent_rows():
    assert mean_cosine(torch.ones(5, 4) * torch.arange(1, 6)[:, None]) == pytest.approx(1, abs=1e-5)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0, abs=1e-6)
    rows = torch.randn(6, 9)
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    expected = pairs[~torch.eye(6, dtype=torch.bool)].mean()
    assert mean_cosine(rows) == pytest.approx(float(expected), abs=1e-5)
    assert mean_cosine(rows[:1]) == 0


def test_nearest_finds_rows_of_the_table_whatever_their_length(table):
    ids = torch.tensor([7, 299, 0] * 120)  # more than one chunk
    found, cosines = nearest(table[ids] * 40, table)
    assert torch.equal(found, ids)
    torch.testing.assert_close(cosines, torch.ones(len(ids)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_rms_scaling_keeps_directions_and_sets_the_vocabularys_rms(rows, around, factor):
    target = around.vocabulary.rms * factor
    each = INTERVENTIONS[f"rms_token x{factor}"](rows, around)
    torch.testing.assert_close(rms(each, dim=1), target.expand(len(rows)))
    whole = INTERVENTIONS[f"rms_example x{factor}"](rows, around)
    torch.testing.assert_close(rms(whole), target)
    torch.testing.assert_close(whole / rms(whole), rows / rms(rows))
    assert rms(whole, dim=1).std() > 0.1 * target, "tokens keep their differences"
    for changed in (each, whole):
        cosines = torch.nn.functional.cosine_similarity(changed, rows)
        torch.testing.assert_close(cosines, torch.ones(len(rows)))


def test_moments_are_matched_dimension_by_dimension(rows, around):
    matched = Moments.of(INTERVENTIONS["batch_moments"](rows, around))
    torch.testing.assert_close(matched.mean, around.vocabulary.mean, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(matched.std, around.vocabulary.std, atol=1e-5, rtol=1e-3)
    white = Moments.of(INTERVENTIONS["whitening"](rows, around))
    torch.testing.assert_close(white.mean, torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(white.std, around.vocabulary.rms.expand(12), atol=1e-5, rtol=1e-3)


def test_noise_has_its_share_and_is_the_same_every_time(rows, around):
    for factor in (0.25, 1.0):
        change = INTERVENTIONS[f"noise x{factor}"]
        added = change(rows, around) - rows
        assert float(rms(added) / rms(rows)) == pytest.approx(factor, rel=0.15)
        assert torch.equal(change(rows, around), change(rows, around))
        other = (change(rows + 1, around) - rows - 1) / rms(rows + 1)
        assert not torch.allclose(other, added / rms(rows), atol=0.1), "each slot has a noise of its own"


def test_the_nearest_token_replaces_a_row_and_none_changes_nothing(rows, around, table):
    near = INTERVENTIONS["nearest_token"](table[[3, 8]] + 1e-5, around)
    assert torch.equal(near, table[[3, 8]])
    assert INTERVENTIONS["none"](rows, around) is rows


def test_a_constant_dimension_breaks_nothing(around):
    same = torch.ones(4, 12)
    around = Surroundings(Moments.of(same), around.vocabulary, around.table)
    for change in INTERVENTIONS.values():
        assert torch.isfinite(change(same, around)).all()
