"""M places for the best tokens, in reading order, and gradients to every score."""

import pytest
import torch

from latentwire.models.pooling import POOLINGS, pool, token_weights

M, LENGTHS = 5, (20, 9, 5, 3)


def batch(spread=2.0):
    """Random scores [4, 20], and a mask in which two texts are longer than M, one is as long, one is shorter."""
    torch.manual_seed(0)
    scores = torch.randn(len(LENGTHS), max(LENGTHS)) * spread
    return scores, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("spread", [0.0, 2.0, 300.0])
@pytest.mark.parametrize("m", [1, M, 40])
def test_the_weights_lie_between_0_and_1_and_add_up_to_the_places(spread, m):
    scores, mask = batch(spread)
    weights = token_weights(scores, mask, m)
    assert (weights >= 0).all() and (weights <= 1).all() and not weights[~mask].any()
    wanted = torch.tensor([float(min(m, length)) for length in LENGTHS])
    torch.testing.assert_close(weights.sum(dim=1), wanted, atol=1e-3, rtol=0)


def test_a_higher_score_weighs_more_and_a_common_shift_changes_nothing():
    scores, mask = batch()
    weights = token_weights(scores, mask, M)
    assert weights[0, scores[0].argsort()].diff().gt(0).all()
    torch.testing.assert_close(token_weights(scores + 70, mask, M), weights, atol=1e-3, rtol=0)


def test_select_passes_the_best_tokens_through_in_reading_order():
    scores, mask = batch()
    places, used = pool(scores, mask, M, "select")
    assert places.shape == (4, M, 20) and used.sum(dim=1).tolist() == [5, 5, 5, 3]
    for row, length in enumerate(LENGTHS):
        best = sorted(scores[row, :length].argsort(descending=True)[:M].tolist())
        expected = torch.zeros(M, 20)
        expected[range(len(best)), best] = 1
        assert torch.equal(places[row], expected)
    assert torch.equal(pool(scores.requires_grad_(), mask, M, "select")[0], places), "a gradient changes no value"


def test_among_equals_the_earlier_token_is_chosen_whatever_the_padding():
    for length in (7, 33, 300, 3000):
        scores, mask = torch.full((2, length), -2.0), torch.ones(2, length, dtype=torch.bool)
        scores[:, 1:7] = 1.0
        mask[:, 7:] = False
        places, _ = pool(scores, mask, M, "select")
        assert places.argmax(dim=2).tolist() == [[1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_never_chosen_however_high_its_score(pooling):
    scores, mask = batch()
    changed = scores.masked_fill(~mask, 1e4)
    places, used = pool(changed, mask, M, pooling)
    assert not places.transpose(1, 2)[~mask].any()
    torch.testing.assert_close(places, pool(scores, mask, M, pooling)[0], atol=1e-3, rtol=0)
    assert used[:, 0].all() and used.sum(dim=1).tolist() == [5, 5, 5, 3]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_of_fewer_tokens_than_places_is_passed_through_whole(pooling):
    scores, mask = batch()
    places, used = pool(scores, mask, 40, pooling)
    assert used.sum(dim=1).tolist() == list(LENGTHS)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(places[row, :length, :length], torch.eye(length), atol=1e-3, rtol=0)
        assert places[row, length:].abs().max() < 1e-3, "unused places hold nothing"


@pytest.mark.parametrize("pooling", ["select", "cif"])
def test_the_gradient_reaches_the_scores_of_the_other_tokens_too(pooling):
    scores, mask = batch()
    scores.requires_grad_()
    places, _ = pool(scores, mask, M, pooling)
    (places[0] @ torch.randn(20, 3)).square().sum().backward()
    assert (scores.grad[0] != 0).all() and torch.isfinite(scores.grad).all()
    assert not scores.grad[1:].any()
    assert scores.grad[0].sum().abs() < 1e-3 * scores.grad[0].abs().sum(), "raising all scores alike changes nothing"


def test_the_gradient_of_a_weight_is_that_of_the_constraint():
    scores, mask = batch()
    scores = scores[:1].double().requires_grad_()
    torch.autograd.gradcheck(lambda s: token_weights(s, mask[:1], M), scores, eps=1e-5, atol=1e-5)


def test_select_raises_the_score_of_a_token_that_the_loss_wants_more_of():
    scores, mask = batch()
    best = int(scores[0].argmax())
    scores.requires_grad_()
    places, _ = pool(scores, mask, M, "select")
    (-places[0, :, best].sum()).backward()
    assert scores.grad[0, best] < 0 and (scores.grad[0].ge(0) | (torch.arange(20) == best)).all()


def test_perturbed_chooses_as_select_and_tells_apart_the_tokens_that_it_left():
    scores, mask = batch(spread=0.5)
    torch.testing.assert_close(pool(scores, mask, M, "perturbed")[0], pool(scores, mask, M, "select")[0])
    left = scores[0].argsort(descending=True)[M : M + 8]
    worth = torch.zeros(20)
    worth[left] = torch.tensor([1.0, -1.0] * 4)  # what the loss would lose or win by each
    signs = {}
    for pooling in ("select", "perturbed"):
        given = scores.clone().requires_grad_()
        places, _ = pool(given, mask, M, pooling)
        (places[0] @ worth).sum().backward()
        signs[pooling] = given.grad[0, left].sign()
        assert not given.grad[1:].any()
    assert torch.equal(signs["perturbed"], worth[left])
    assert not signs["select"].any(), "what was not chosen is worth nothing to it here"


def test_the_columns_of_cif_add_up_to_the_weights_and_its_rows_to_1():
    scores, mask = batch()
    places, used = pool(scores, mask, M, "cif")
    torch.testing.assert_close(places.sum(dim=1), token_weights(scores, mask, M), atol=1e-3, rtol=0)
    torch.testing.assert_close(places.sum(dim=2), used.float(), atol=1e-3, rtol=0)
    assert (places >= 0).all()
    firsts = [(places[0, j] > 1e-4).nonzero()[0].item() for j in range(M)]
    assert firsts == sorted(firsts), "places follow the reading order"


def test_cif_of_very_sharp_scores_is_select():
    scores, mask = batch(spread=1000.0)
    sharp, soft = (pool(scores, mask, M, pooling)[0] for pooling in ("select", "cif"))
    torch.testing.assert_close(soft, sharp, atol=1e-3, rtol=0)
    assert (pool(*batch(), M, "cif")[0] - pool(*batch(), M, "select")[0]).abs().max() > 0.1
