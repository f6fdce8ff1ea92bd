"""What a deep adapter adds to the keys and values of a frozen model's layers.

Shapes: P positions of a slot, k width of a position's keys, d model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def key_width(who: str, layers: Sequence[nn.Module]) -> int:
    """Width of a position's keys in each layer; values have the same.

    Raises ValueError with `who` for a model whose layers do not have `k_proj` and `v_proj` of one width.
    """
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    parts = [getattr(one, name, None) for one in attention for name in ("k_proj", "v_proj")]
    widths = {getattr(part, "out_features", None) for part in parts}
    if len(widths) != 1 or None in widths:
        raise ValueError(
            f"{who}: its layers have no k_proj and v_proj of one width, so nothing can be added to its keys and "
            "values; choose another adapter_type"
        )
    return widths.pop()


@contextmanager
def adding(
    layers: Sequence[nn.Module],
    width: int,
    deltas: Sequence[Tensor | None],
    begins: Sequence[tuple[int, int]],
    embeds: Tensor,
) -> Iterator[None]:
    """Inside, each row's delta [layers, 2, P, k] is added to what k_proj and v_proj give at its first P positions.

    begins: where in embeds [rows, length, d] each row begins. Keys are changed before their rotary angles. What is read
    in less length, as tokens behind the cache are, is left as it is; ValueError for more.
    """
    rows, length, _ = embeds.shape
    found: list[list[tuple[int, Tensor]]] = [[] for _ in range(rows)]
    for (number, begin), delta in zip(begins, deltas, strict=True):
        if delta is not None:
            found[number].append((begin, delta.to(embeds.device, embeds.dtype)))
    nothing = torch.zeros(len(layers), 2, length, width, device=embeds.device, dtype=embeds.dtype)
    whole = torch.stack([_line(row, nothing) for row in found], dim=2)
    each = whole.flatten(0, 1).unbind()  # one gradient for all layers, not one of this size per layer
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(partial(_plus, each[2 * n + which]))
        for n, layer in enumerate(layers)
        for which, name in enumerate(("k_proj", "v_proj"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _line(found: Sequence[tuple[int, Tensor]], nothing: Tensor) -> Tensor:
    """Deltas where they begin in a row, and nothing between: [layers, 2, length, k]."""
    parts, at = [], 0
    for begin, delta in sorted(found, key=lambda pair: pair[0]):
        parts += [nothing[:, :, at:begin], delta]
        at = begin + delta.shape[2]
    return torch.cat([*parts, nothing[:, :, at:]], dim=2)


def _plus(delta: Tensor, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    found, first = output.shape[1], delta.shape[1]
    if found > first:
        raise ValueError(f"{found} positions are read where the adapter adds to {first}: it needs the cache; use one")
    return output + delta.to(output.device) if found == first else output
