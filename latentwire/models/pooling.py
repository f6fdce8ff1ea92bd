"""Which tokens get the M places: pooling that keeps the reading order.

Shapes: B batch, T tokens of a text, M latents.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_BISECTIONS = 40
_DRAWS = 64  # of the noise on scores, whose scale is 1: they are logarithms of probabilities


def pool(scores: Tensor, mask: Tensor, m: int, pooling: str) -> tuple[Tensor, Tensor]:
    """Assignment [B, M, T] of tokens to places, and which places are used [B, M] bool.

    scores: [B, T], any real numbers; mask: [B, T] bool, False on padding. A text of fewer than M tokens fills as many
    places as it has tokens. Gradients reach the scores of all tokens through the constraint that the weights add up to
    M: what raises one token's weight lowers the others'.
    """
    places = mask.sum(dim=1).clamp(max=m)  # [B]
    used = torch.arange(m, device=mask.device) < places[:, None]
    return POOLINGS[pooling](scores, mask, m), used


def token_weights(scores: Tensor, mask: Tensor, m: int) -> Tensor:
    """sigmoid(score - threshold) [B, T], with each row's threshold such that its weights add up to min(M, T)."""
    wanted = mask.sum(dim=1).clamp(max=m).to(scores.dtype)
    padded = scores.masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        low = scores.masked_fill(~mask, torch.inf).amin(dim=1) - 20
        high = padded.amax(dim=1) + 20
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = torch.sigmoid(padded - middle[:, None]).sum(dim=1) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        weights = torch.sigmoid(padded - middle[:, None])
        slope = (weights * (1 - weights)).sum(dim=1).clamp(min=1e-6)
    # One Newton step changes no value but carries the gradient of the constraint.
    drift = torch.sigmoid(padded - middle[:, None]).sum(dim=1) - wanted
    return torch.sigmoid(padded - (middle + drift / slope)[:, None])


def _select(scores: Tensor, mask: Tensor, m: int) -> Tensor:
    """The M best tokens, each passed through whole; the gradient is that of scaling a token by its weight.

    A straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): a token's score rises where the loss would rise
    without it. All tokens that were not chosen get the same sign. Without a gradient no weight is computed.
    """
    places = _assigned(_best(scores, mask, m), m, scores.shape[1])
    if not scores.requires_grad:
        return places
    weights = token_weights(scores, mask, m)
    return places * (1 + (weights - weights.detach()))[:, None]


class _Perturbed(torch.autograd.Function):
    """The M best tokens, as `_select` passes them; the gradient is that of the mean choice under normal noise on the
    scores (Berthet et al. 2020, arXiv:2002.08676), estimated from _DRAWS draws: a token that was not chosen gets the
    gradient of what it would have changed in the places that it would have taken."""

    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor, m: int) -> Tensor:
        ctx.save_for_backward(scores, mask)
        ctx.m = m
        return _assigned(_best(scores, mask, m), m, scores.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores, mask = ctx.saved_tensors
        padded = pad(gradient, (0, 1))  # what leads to no token changes nothing

        def loss(order: Tensor) -> Tensor:
            return padded[:, : order.shape[1]].gather(2, order[..., None]).sum(dim=(1, 2))  # [B]

        found, chosen = torch.zeros_like(scores), loss(_best(scores, mask, ctx.m))
        for _ in range(_DRAWS):
            noise = torch.randn_like(scores)
            found += (loss(_best(scores + noise, mask, ctx.m)) - chosen)[:, None] * noise
        return found / _DRAWS, None, None


def _best(scores: Tensor, mask: Tensor, m: int) -> Tensor:
    """The M best tokens of each text in reading order [B, min(M, T)]; T where there are no more."""
    # Equal scores (question and labels have them) are taken in reading order, however much padding the batch has.
    best = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = best[:, : min(m, scores.shape[1])].sort(dim=1).values
    # Padding that was taken for lack of tokens is sorted behind them, and its places are unused.
    return torch.where(mask.gather(1, order), order, scores.shape[1]).sort(dim=1).values


def _assigned(order: Tensor, m: int, tokens: int) -> Tensor:
    """Chosen tokens as places [B, M, T] of ones and zeros."""
    hard = torch.zeros(len(order), m, tokens + 1, device=order.device)
    hard[:, : order.shape[1]].scatter_(2, order[..., None], 1.0)
    return hard[..., :-1]


def _integrate(scores: Tensor, mask: Tensor, m: int) -> Tensor:
    """Continuous integrate-and-fire (Dong and Xu 2020, arXiv:1905.11235): place j takes the tokens whose cumulative
    weight lies between j and j + 1. Weight 1 passes a token through, small weights blend neighbours."""
    weights = token_weights(scores, mask, m)
    end = weights.cumsum(dim=1)[:, None]  # [B, 1, T]
    start = end - weights[:, None]
    place = torch.arange(m, device=weights.device, dtype=weights.dtype)[None, :, None]
    return (torch.minimum(end, place + 1) - torch.maximum(start, place)).clamp(min=0)


POOLINGS = {"select": _select, "perturbed": _Perturbed.apply, "cif": _integrate}
