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

    begins: where in embeds [rows, length, d] each row begins. Keys are changed before their rotary angles.
    """
    whole = torch.zeros(len(layers), 2, *embeds.shape[:2], width, device=embeds.device, dtype=embeds.dtype)
    for (number, begin), delta in zip(begins, deltas, strict=True):
        if delta is not None:
            whole[:, :, number, begin : begin + delta.shape[2]] = delta.to(embeds.device, embeds.dtype)
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(partial(_plus, whole[n, which]))
        for n, layer in enumerate(layers)
        for which, name in enumerate(("k_proj", "v_proj"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _plus(delta: Tensor, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    return output + delta
