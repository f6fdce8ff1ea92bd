"""How a model attends; and attention behind a head that all rows share: its keys and values are copied to no row.

PyTorch's fused attention takes one set of keys per row. Behind the same head of H positions, all rows' queries can be
multiplied with its keys in one matrix product, which is faster on a CPU, above all backwards: the head needs no
gradient. The softmax is over the head's keys and the row's own together, so the result is the same up to rounding
(Juravsky et al. 2024, "Hydragen", splits it the same way).
Shapes: B rows, N query heads, G groups of them (one per head of the keys), Q queries, K keys of a row, D width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "latentwire_shared_head"
_FEW = 128  # queries; the scores of more are kept nowhere by fused attention
Head = Sequence[tuple[Tensor, Tensor]]  # of each layer: keys and values [1, G, H, D]


def sees_all(who: str, model: "PreTrainedModel") -> bool:
    """Whether every layer sees all earlier positions, so that padding between head and row is nothing.

    Which cache a model asks for says how its layers attend, whatever its configuration calls that; only GPT-Neo's local
    layers keep it to themselves. Raises ValueError with `who` for a model that keeps something else than each layer's
    keys and values (a state of recurrent layers, an index, keys that layers share).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    strange = {type(layer).__name__ for layer in layers if type(layer) not in known}
    if strange:
        raise ValueError(
            f"{who} does not keep keys and values of each position ({', '.join(sorted(strange))}), so a head cannot be "
            "read once and continued; choose a model whose layers all have full or sliding attention"
        )
    local = any(getattr(module, "attention_type", None) == "local" for module in model.modules())
    return not local and not any(layer.is_sliding for layer in layers)


def reads_shared_heads(model: "PreTrainedModel") -> bool:
    """Whether the model can be told to attend this way, which it then is: on a CPU, where it attends through
    transformers' interface by PyTorch's fused attention."""
    config = model.config.get_text_config(decoder=True)
    expands = getattr(config, "kv_lora_rank", None)  # what the cache holds is no keys yet
    if expands or not model._supports_attention_backend:
        return False
    if model.device.type != "cpu" or model.config._attn_implementation not in ("sdpa", NAME):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def own_mask(mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a row's own keys, [B, 1, Q, K]: 0 where a query may look, else the least number.

    mask: [B, K], 0 on padding; the queries are the last of the K positions.
    """
    keys = mask.shape[1]
    seen = mask.bool()[:, None, None]
    if queries > 1:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    head: Head | None = None,
    scaling: float | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """The attention of one layer (module), as transformers asks for it: [B, Q, N, D], and no weights.

    query: [B, N, Q, D]; key, value: [B, G, K, D]; attention_mask: see `own_mask`, or transformers' where there is no
    head.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if head is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    rows, queries = len(query), query.shape[2]
    of_head = head[module.layer_idx]
    if queries > _FEW:
        key, value = (
            torch.cat([shared.expand(rows, -1, -1, -1), own], dim=2)
            for shared, own in zip(of_head, (key, value), strict=True)
        )
        attention_mask = nn.functional.pad(attention_mask, (of_head[0].shape[2], 0))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _joint(query * scaling, key, value, attention_mask, *of_head).transpose(1, 2).contiguous(), None


def _joint(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, head_key: Tensor, head_value: Tensor) -> Tensor:
    """softmax(query [head keys, own keys]) [head values; own values]: [B, N, Q, D]."""
    (rows, heads, queries, width), groups = query.shape, key.shape[1]
    of_head, own = head_key.shape[2], key.shape[2]
    query = query.reshape(rows, groups, -1, width)  # [B, G, N/G * Q, D]

    def together(x: Tensor, shared: Tensor) -> Tensor:
        """x [B, G, N/G * Q, a] times what all rows share [G, a, b]."""
        product = x.transpose(0, 1).reshape(groups, -1, x.shape[-1]) @ shared
        return product.view(groups, rows, -1, shared.shape[-1]).transpose(0, 1)

    scores = (query @ key.mT).view(rows, groups, -1, queries, own) + mask[:, :, None]
    scores = torch.cat([together(query, head_key[0].mT), scores.reshape(rows, groups, -1, own)], dim=-1)
    for_head, for_own = scores.softmax(-1).split([of_head, own], dim=-1)
    found = together(for_head, head_value[0]) + for_own @ value
    return found.reshape(rows, heads, queries, -1)
