"""What input embeddings look like, and ways to change them: the tools of the diagnostics.

Shapes: P positions, d LLM width, V vocabulary. All float32 on the CPU.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK = 256  # rows that meet the whole vocabulary at once
_FACTORS = (0.5, 1.0, 1.5)
_NOISE = (0.25, 1.0)


@dataclass(frozen=True)
class Moments:
    """mean, std: per dimension [d]; rms: root mean square of all entries, a scalar."""

    mean: Tensor
    std: Tensor
    rms: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Of rows [P, d]."""
        return cls(rows.mean(dim=0), rows.std(dim=0, correction=0), rms(rows))


def rms(values: Tensor, dim: int | None = None) -> Tensor:
    """Root mean square over one dimension, or over everything."""
    return values.square().mean(dim=dim).sqrt()


def spectrum(rows: Tensor) -> Tensor:
    """Shares [d] of the variance along the principal directions of rows [P, d], largest first."""
    centred = (rows - rows.mean(dim=0)).double()
    variances = torch.linalg.svdvals(centred).square()
    return (variances / variances.sum()).float()


def effective_rank(shares: Tensor) -> float:
    """Exponential of the entropy of the shares: how many directions are in use (Roy & Vetterli 2007)."""
    return float(torch.special.entr(shares).sum().exp())


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine between different rows of [P, d]; near 1 when all latents say the same. 0 for a single row."""
    unit = normalize(rows, dim=1)
    n = len(unit)
    return float((unit.sum(dim=0).square().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def nearest(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [P, d], the index [P] of the largest cosine in table [V, d], and that cosine [P]."""
    directions = normalize(table, dim=1).T
    found = [(normalize(some, dim=1) @ directions).max(dim=1) for some in rows.split(_CHUNK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


@dataclass(frozen=True)
class Surroundings:
    """What an intervention may know beside the slot it changes. own: moments of all slots of its kind; vocabulary:
    moments of the LLM's embeddings; table: those embeddings [V, d]."""

    own: Moments
    vocabulary: Moments
    table: Tensor


Intervention = Callable[[Tensor, Surroundings], Tensor]  # one slot [P, d] to a changed one


def _none(rows: Tensor, around: Surroundings) -> Tensor:
    return rows


def _rms_token(factor: float) -> Intervention:
    def scale(rows: Tensor, around: Surroundings) -> Tensor:
        return normalize(rows, dim=1) * rows.shape[1] ** 0.5 * around.vocabulary.rms * factor

    return scale


def _rms_example(factor: float) -> Intervention:
    return lambda rows, around: rows / rms(rows) * around.vocabulary.rms * factor


def _batch_moments(rows: Tensor, around: Surroundings) -> Tensor:
    return _standardised(rows, around.own) * around.vocabulary.std + around.vocabulary.mean


def _whitening(rows: Tensor, around: Surroundings) -> Tensor:
    return _standardised(rows, around.own) * around.vocabulary.rms


def _noise(factor: float) -> Intervention:
    def add(rows: Tensor, around: Surroundings) -> Tensor:
        own = torch.Generator().manual_seed(zlib.crc32(rows.numpy().tobytes()))  # for each slot another
        drawn = torch.randn(rows.shape, generator=own)
        return rows + drawn * rms(rows) * factor

    return add


def _nearest_token(rows: Tensor, around: Surroundings) -> Tensor:
    return around.table[nearest(rows, around.table)[0]]


def _standardised(rows: Tensor, own: Moments) -> Tensor:
    return (rows - own.mean) / own.std.clamp(min=1e-12)


# By name: RMS to the vocabulary's (times a factor) token by token or slot by slot; each dimension's mean and variance
# to the vocabulary's; each dimension to mean 0 and one variance; noise as a share of the slot's RMS; the nearest token.
INTERVENTIONS: dict[str, Intervention] = {
    "none": _none,
    **{f"rms_token x{f}": _rms_token(f) for f in _FACTORS},
    **{f"rms_example x{f}": _rms_example(f) for f in _FACTORS},
    "batch_moments": _batch_moments,
    "whitening": _whitening,
    **{f"noise x{f}": _noise(f) for f in _NOISE},
    "nearest_token": _nearest_token,
}
