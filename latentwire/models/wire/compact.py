"""Codecs `compact` and `coarse`: a latent as the token whose code lies nearest, and the residual on a few directions.

    z ~ code(token) + mean + step * sum over j < r of value_j direction_j

One step serves all directions: that loses least for the bits (reverse water-filling, Cover and Thomas, section 10.3).
`compact` codecs differ in r, `coarse` ones in the step, which is a multiple of the tables' own.

Tokens and values are coded by what is likely in wires of train questions (a range coder: Martin 1979; library
constriction), so sender and reader need the same tables. They are fitted once and lie beside the checkpoint:

    FOLDER/codec/tables.safetensors

Payload: tables' id u16 | words u32 of the coder. The id refuses a wire that was made with other tables; in the short
layout the checksum does.
Shapes: V wire vocabulary, P latents, R directions kept, r of them used; a step is `coarse` steps of the tables.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path

import constriction
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentwire.models.weights import TABLES, read_config, read_weights, weights_file
from latentwire.utils.cli import reason

DIRECTIONS = 8  # that are kept; a codec may use fewer
LEVELS = 15  # a value is -15 to 15 steps
_ID = 2  # bytes
_SMOOTHING = 0.5  # share of tokens' probability that comes from plain train text: wires of a fit hold few of all tokens
_LIKELIEST = 0.5  # no token's share is larger: each takes a bit or more, so a short payload cannot claim many latents
_NAMES = ("shares", "mean", "directions", "step", "levels")
_Category = constriction.stream.model.Categorical
_REMEDY = "fit it: python latentwire/fit_codec.py --ckpt"


@dataclass(frozen=True)
class Compact:
    """codes: float32 [V, d_z]; shares: float32 [V], how likely each token is; mean: float32 [d_z] of residuals;
    directions: float32 [R, d_z], orthonormal, of most variance first; step: float32 []; levels: float32 [R, 31], how
    likely each value is."""

    codes: Tensor = field(repr=False)
    shares: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    step: Tensor
    levels: Tensor = field(repr=False)

    @classmethod
    def fit(cls, codes: Tensor, latents: Tensor, counts: Tensor) -> "Compact":
        """codes: [V, d_z]; latents: [P, d_z] of many texts; counts: [V], tokens of plain train text."""
        ids = nearest(latents, codes)
        residuals = (latents - codes[ids]).double()
        mean = residuals.mean(dim=0)
        centred = residuals - mean
        _, directions = torch.linalg.eigh(centred.T @ centred)
        directions = directions.flip(1)[:, :DIRECTIONS].T
        values = centred @ directions.T  # [P, R]
        step = values.abs().max().clamp(min=1e-6) / LEVELS
        sent = (values / step).round().long() + LEVELS
        seen = torch.stack([torch.bincount(column, minlength=2 * LEVELS + 1) for column in sent.T]).double() + 0.5
        found = torch.bincount(ids, minlength=len(codes)).double()
        plain = counts.double() + 1  # a token that no text of the fit has can still be sent
        shares = (1 - _SMOOTHING) * found / found.sum() + _SMOOTHING * plain / plain.sum()
        tables = (shares.clamp(max=_LIKELIEST), mean, directions, step, seen / seen.sum(dim=1, keepdim=True))
        return cls(codes, *(table.float() for table in tables))

    def save(self, folder: Path) -> None:
        """Write the tables beside a checkpoint. Raises OSError if they cannot be written; the ones before stay."""
        tables = self._tables()
        path = folder / TABLES
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(tables, part, {"sha256": _sha256(tables)})
            part.replace(path)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write {path} ({reason(error)}); make room, and fit it again") from error

    @classmethod
    def load(cls, folder: Path, codes: Tensor) -> "Compact":
        """The tables of a checkpoint. Raises FileNotFoundError where there are none, ValueError where they are damaged
        or of other codes."""
        path = folder / TABLES
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: compact codecs need tables; {_REMEDY} {folder}")
        try:
            with safe_open(path, "pt") as file:
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                promised = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is cut or damaged ({reason(error)}); {_REMEDY} {folder}") from error
        fits = tables.keys() == set(_NAMES) and promised == _sha256(tables)
        if not fits or (len(tables["shares"]), len(tables["mean"])) != tuple(codes.shape):
            raise ValueError(f"{path} is damaged, or of another checkpoint; {_REMEDY} {folder}")
        return cls(codes, *(tables[name] for name in _NAMES))

    def pack(self, z: np.ndarray, r: int, coarse: int = 1) -> bytes:
        """Words of the coder, for latents [P, d_z]."""
        latents, most = torch.from_numpy(np.ascontiguousarray(z, np.float32)), _most(coarse)
        ids = nearest(latents, self.codes, self._half_squares)
        values = (latents - self.codes[ids] - self.mean) @ self.directions[:r].T / (self.step * coarse)  # [P, r]
        sent = values.round().clamp(-most, most).int() + most
        return self._coded(ids.int().numpy(), [column.contiguous().numpy() for column in sent.T], coarse)

    def unpack(self, payload: bytes, count: int, r: int, coarse: int = 1) -> np.ndarray:
        """The reverse: float32 [count, d_z]. Raises ValueError for bytes that no sender packs."""
        words, rest = divmod(len(payload), 4)
        if rest or count > 32 * words:
            raise ValueError(f"wire length does not fit its header: {len(payload)} bytes cannot hold {count} latents")
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
        try:
            ids = decoder.decode(self._of_tokens, count)
            values = [decoder.decode(model, count) for model in self._of_values(coarse)[:r]]
        except AssertionError as error:  # so constriction tells of bytes that code nothing
            raise ValueError("the wire holds bytes that no sender packs; it was forged") from error
        if self._coded(ids, values, coarse) != payload:
            raise ValueError("the wire holds other than its latents, which no sender packs; it was forged")
        sent = torch.from_numpy(np.stack(values, axis=1)).float() - _most(coarse) if values else torch.zeros(count, 0)
        residual = self.step * coarse * sent @ self.directions[:r]
        return (self.codes[torch.from_numpy(ids).long()] + self.mean + residual).numpy()

    def _coded(self, ids: np.ndarray, values: Sequence[np.ndarray], coarse: int) -> bytes:
        """Words of tokens int32 [P] and, for each direction used, its values int32 [P] from 0 on."""
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(ids, self._of_tokens)
        for column, model in zip(values, self._of_values(coarse), strict=False):
            coder.encode(column, model)
        return coder.get_compressed().astype("<u4").tobytes()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of these tables and codes."""
        return bytes.fromhex(_sha256(self._tables() | {"codes": self.codes.half()}))  # exports are half precision

    @property
    def id(self) -> bytes:
        """What names them in a payload."""
        return self.digest[:_ID]

    @cached_property
    def _half_squares(self) -> Tensor:
        return half_squares(self.codes)

    @cached_property
    def _of_tokens(self) -> _Category:
        return _Category(self.shares.numpy(), perfect=False)

    def _of_values(self, coarse: int) -> list[_Category]:
        if coarse not in self._models:
            steps, most = torch.arange(-LEVELS, LEVELS + 1), _most(coarse)
            level = (steps / coarse).round().long().clamp(-most, most) + most  # [31]
            shares = torch.zeros(len(self.levels), 2 * most + 1).index_add_(1, level, self.levels)
            self._models[coarse] = [_Category(row.numpy(), perfect=False) for row in shares]
        return self._models[coarse]

    @cached_property
    def _models(self) -> dict[int, list[_Category]]:
        """By coarseness."""
        return {}

    def _tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in _NAMES}


def tables_of(folder: Path) -> Compact:
    """The tables of a checkpoint, with its codebook; read once, until they are fitted anew. Raises as `Compact.load`
    and `codebook_of` do."""
    path = folder / TABLES
    return _tables_of(folder, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=8)
def _tables_of(folder: Path, _fitted: int) -> Compact:
    return Compact.load(folder, codebook_of(folder))


@cache
def codebook_of(folder: Path) -> Tensor:
    """Codes [V, d_z] of a checkpoint; no encoder is built for it. ValueError where it has none."""
    weights = read_weights(weights_file(folder, "encoder"))
    if "codebook.weight" not in weights:
        kind = read_config(folder)["encoder"]["type"]
        raise ValueError(f"the encoder {kind!r} of {folder} has free queries, which stand for no words")
    return weights["codebook.weight"].float()


def _most(coarse: int) -> int:
    """The largest value of a coarse step."""
    return round(LEVELS / coarse)


def half_squares(codes: Tensor) -> Tensor:
    """|code|^2 / 2 of each code [V, d_z]: [V]."""
    return torch.linalg.vector_norm(codes, dim=1).square() / 2


def nearest(latents: Tensor, codes: Tensor, halves: Tensor | None = None) -> Tensor:
    """Token [P] whose code [V, d_z] lies nearest to each latent [P, d_z]: the least of |code|^2 / 2 - latent · code,
    which takes a third of the time of all distances. halves: `half_squares(codes)`, where that is known."""
    halves = half_squares(codes) if halves is None else halves
    found = [torch.addmm(halves, some, codes.T, alpha=-1).argmin(dim=1) for some in latents.split(512)]
    return torch.cat(found or [torch.zeros(0, dtype=torch.long)])


def _sha256(tables: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {table.dtype} {list(table.shape)}".encode() + table.contiguous().numpy().tobytes())
    return digest.hexdigest()
