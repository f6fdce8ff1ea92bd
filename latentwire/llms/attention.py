"""How a model attends; and attention behind a head that all rows share: its keys and values are copied to no row. What
only some rows share, a text of several questions, is read once, too.

PyTorch's fused attention takes one set of keys per row. Behind the same head of H positions, all rows' queries can be
multiplied with its keys in one matrix product, which is faster on a CPU, above all backwards: the head needs no
gradient. A learned preamble that all rows share is a second piece of what they begin with, apart from the head, since
it needs one. The softmax is over the keys of all pieces and the row's own together, so the result is the same up to
rounding (Juravsky et al. 2024, "Hydragen", splits it the same way).
Shapes: B rows, N query heads, G groups of them (one per head of the keys), Q queries, K keys of a row, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

NAME = "latentwire_shared_head"
_BLOCK = 128  # queries at a time: their scores take memory, and see no later keys
_BRANCHES = 128  # positions behind a shared slot that are read in one row, or as many as the slot has
_WORTH = 0.08  # of all positions: where 18% are saved a step takes 19% less, where 6% no less (LOG.md, entry 53)
Pieces = Sequence[tuple[Tensor, Tensor]]  # keys and values [1, G, H_i, D], one behind the other
Head = Sequence[Pieces]  # of each layer


@dataclass
class Opening:
    """What all rows begin with, read once: embeds [H, d], and their keys and values, one row, never to be changed; the
    first of them may be in `cache.head`."""

    embeds: Tensor
    cache: "DynamicCache"

    @property
    def head(self) -> Head:
        """The keys and values."""
        before = self.cache.head or [()] * len(self.cache.layers)
        layers = zip(before, self.cache.layers, strict=True)
        return [[*pieces, (layer.keys, layer.values)] for pieces, layer in layers]


def without_cudnn() -> None:
    """Keep PyTorch's attention, in this whole process, from cuDNN's, which comes first on an H100 or H200. Gradients
    are NaN there behind a mask, where there are 64 keys more than a multiple of 128 and scores are as low as Qwen2.5's
    (github.com/pytorch/pytorch/issues/196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)


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


def rope_limit(model: "PreTrainedModel") -> int | None:
    """Positions beyond which rotary angles of all positions change: a head's keys hold the angles of a short prompt."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def require_rope(who: str, limit: int | None, longest: int) -> None:
    """ValueError for a prompt of so many positions that all rotary angles would be others. limit: see `rope_limit`."""
    if limit and longest > limit:
        raise ValueError(
            f"{who} reads {limit} positions before its rotary angles change, and a prompt takes {longest}; choose "
            "another model, a shorter wording (zero_shot) or shorter contexts"
        )


def share_heads(model: "PreTrainedModel") -> bool:
    """Let the model attend this way, and tell whether it can: on a CPU, where it attends through transformers'
    interface by PyTorch's fused attention."""
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


def alike(slots: Sequence[Tensor], deltas: Sequence[Tensor | None] = ()) -> list[int]:
    """For each slot the first that is the same, its delta included: the same object, or, where neither learns, the same
    numbers. What rows share is read once."""
    found: list[int] = []
    pairs = [*zip(slots, deltas or [None] * len(slots), strict=True)]
    for number, pair in enumerate(pairs):
        earlier = (n for n in dict.fromkeys(found) if all(map(_same, pairs[n], pair)))
        found.append(next(earlier, number))
    return found


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.requires_grad or other.requires_grad:
        return False
    return torch.equal(one, other)


def worth_a_pass(constant: int, slots: Sequence[Tensor], rests: Sequence[Tensor]) -> bool:
    """Whether the first positions of slots [P_i, d], which are the same in all of them, are better read in a pass of
    their own: where that saves a good share of all positions. It takes about as long as they take in two slots."""
    lengths = {id(slot): len(slot) for slot in slots}
    return constant * (len(lengths) - 2) > _WORTH * (sum(lengths.values()) + sum(map(len, rests)))


def without_first(
    constant: int, slots: Sequence[Tensor], deltas: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Slots [P_i, d] and deltas [layers, 2, P_i, k] from position `constant` on: before it all slots are the same, and
    deltas are zero. What was one object still is."""
    slots, deltas = list(slots), list(deltas)
    if not constant:
        return slots, deltas
    assert all(torch.equal(slot[:constant], slots[0][:constant]) for slot in slots)
    assert all(delta is None or not delta[:, :, :constant].any() for delta in deltas)
    rest = {id(slot): slot[constant:] for slot in slots}
    rest |= {id(delta): delta if delta is None else delta[:, :, constant:] for delta in deltas}
    return [rest[id(slot)] for slot in slots], [rest[id(delta)] for delta in deltas]


def left_pad(rows: Sequence[Tensor], head: int) -> tuple[Tensor, Tensor]:
    """rows of [L_i, d] to embeds [B, L, d] and mask [B, head + L]: head visible, then padding, then the row."""
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.ones(len(rows), head + embeds.shape[1], dtype=torch.long, device=embeds.device)
    for line, row in zip(mask, rows, strict=True):
        line[head : head + embeds.shape[1] - len(row)] = 0
    return embeds, mask


def behind_each_other(
    slots: Sequence[Tensor], rests: Sequence[Tensor], first: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], dict[int, int]]:
    """Rows of a slot [P_i, d] and a rest, one behind the other; first: see `alike`. Gives the parts in their order, the
    positions of each row [L_i], and, by its row, where each slot begins that stands there."""
    parts, rows, begins, length = [], [], {}, 0
    for number, (slot, rest) in enumerate(zip(slots, rests, strict=True)):
        if first[number] == number:
            begins[number], length = length, length + len(slot)
            parts.append(slot)
        begin = begins[first[number]]
        rows.append(torch.cat([torch.arange(begin, begin + len(slot)), torch.arange(length, length + len(rest))]))
        parts.append(rest)
        length += len(rest)
    return parts, rows, begins


def branching(
    rows: Sequence[Tensor], slots: Sequence[Tensor], first: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows that begin with the same slot as one, up to a length: positions of each such tree [L_i], and the branch that
    each belongs to [L_i], 0 for the slot. Attention reads the slot once for all branches (as in tree attention of
    SpecInfer, arXiv:2305.09781).

    rows, slots, first: as `behind_each_other` gives and takes them.
    """
    trees: list[list[Tensor]] = []
    open_at: dict[int, int] = {}  # by slot: its tree that still takes branches
    for row, slot, leader in zip(rows, slots, first, strict=True):
        stem, branch = row.split([len(slot), len(row) - len(slot)])
        tree = trees[open_at[leader]] if leader in open_at else None
        if tree is None or sum(map(len, tree[1:])) + len(branch) > max(len(slot), _BRANCHES):
            open_at[leader] = len(trees)
            trees.append(tree := [stem])
        tree.append(branch)
    numbers = [torch.arange(len(tree)).repeat_interleave(torch.tensor([*map(len, tree)])) for tree in trees]
    return [torch.cat(tree) for tree in trees], numbers


@dataclass
class Packed:
    """Rows of positions behind each other in one row, without padding; attention pads them for itself. Rows may begin
    with the same positions, which stand there once.

    places: [B * L] where each place of a left-padded batch [B, L] stands in that row, anywhere on padding; real: [B, L]
    bool, False on padding; inside: [positions], where each position stands in the padded batch, first; again: [places]
    of the padded batch whose position stands further in front, too; own: [B * L] bool, what is real and not again.
    """

    places: Tensor
    real: Tensor
    inside: Tensor
    again: Tensor
    own: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], device: torch.device) -> "Packed":
        """rows: the positions of each, [L_i]."""
        places, real = (
            pad_sequence(each, batch_first=True, padding_side="left").flatten()
            for each in (rows, [torch.ones_like(row, dtype=torch.bool) for row in rows])
        )
        at = real.nonzero()[:, 0]
        most = int(places.max()) + 1
        inside = torch.full((most,), len(places)).scatter_reduce(0, places[at], at, "amin")
        own = real & (inside[places] == torch.arange(len(places)))
        found = (places, real.view(len(rows), -1), inside, (real & ~own).nonzero()[:, 0], own)
        return cls(*(each.to(device) for each in found))

    def padded(self, states: Tensor) -> Tensor:
        """[1, N, positions, D] to [B, N, L, D]."""
        moved = _Moved.apply(states[0].transpose(0, 1), self.places, self.inside, None, self.again)
        return moved.view(*self.real.shape, *moved.shape[1:]).transpose(1, 2)

    def packed(self, states: Tensor) -> Tensor:
        """[B, L, N, D] to [1, positions, N, D]."""
        return _Moved.apply(states.flatten(0, 1), self.inside, self.places, self.own[:, None, None], None)[None]

    def seen(self, branches: Sequence[Tensor]) -> Tensor:
        """Which keys a query may see, [B, 1, L, L] bool: those before it, of its own branch or of none; branches: see
        `branching`."""
        branch = pad_sequence(branches, batch_first=True, padding_side="left").to(self.real.device)  # [B, L]
        apart = (branch[:, None] != branch[:, :, None]) & (branch[:, None] > 0)
        return (self.real[:, None] & ~apart).tril()[:, None]


class _Moved(torch.autograd.Function):
    """x[index]. The gradient is gathered, too, which is faster than adding it up; only what is taken again is added.

    inverse: index of the way back; own: what of the way back is no padding and not taken twice, if there is any; again:
    places of the result that take what was taken before, if there are any.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor, own: Tensor | None, again: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index, inverse, own, again)
        return x[index]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, inverse, own, again = ctx.saved_tensors
        back = grad[inverse]
        if own is not None:
            back = back * own
        if again is not None and len(again):
            back.index_add_(0, index[again], grad[again])
        return back, None, None, None, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    head: Head | None = None,
    packed: Packed | None = None,
    scaling: float | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """The attention of one layer (module), as transformers asks for it: [B, Q, N, D], and no weights.

    query: [B, N, Q, D], which are the last of the K positions; key, value: [B, G, K, D]; attention_mask: [B, 1, 1, K]
    bool, False on padding, or [B, 1, K, K] bool, what a query may see; or transformers' where there is no head. packed:
    how rows stand behind each other, if B is 1 for that reason; the mask is of the padded batch.
    """
    if head is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    if packed:
        query, key, value = map(packed.padded, (query, key, value))
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    before = key.shape[2] - query.shape[2]  # keys that all queries may see
    found = []
    for start in range(0, query.shape[2], _BLOCK):
        some = query[:, :, start : start + _BLOCK]
        seen = before + start + some.shape[2]
        mask = _own_mask(attention_mask, before + start, seen, query.dtype)
        found.append(_joint(some, key[:, :, :seen], value[:, :, :seen], mask, head[module.layer_idx]))
    out = torch.cat(found, dim=2).transpose(1, 2)
    return (packed.packed(out) if packed else out.contiguous()), None


def _own_mask(may: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a row's own keys up to `end`, [B, 1, Q, end]: 0 where a query may look, else the
    least number. may: see `attend`; the queries are those of the positions from `first`."""
    if may.shape[2] > 1:
        may = may[:, :, first:end, :end]
    else:
        may = may[..., :end]
        if end - first > 1:  # a single query, as in generating, sees all
            may = may & torch.ones(end - first, end, dtype=torch.bool, device=may.device).tril(first)
    return torch.zeros_like(may, dtype=dtype).masked_fill_(~may, torch.finfo(dtype).min)


def _joint(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shared: Pieces) -> Tensor:
    """softmax(query [shared keys, own keys]) [shared values; own values]: [B, N, Q, D]."""
    (rows, heads, queries, width), groups, own = query.shape, key.shape[1], key.shape[2]
    query = query.reshape(rows, groups, -1, width)  # [B, G, N/G * Q, D]

    def together(x: Tensor, same: Tensor) -> Tensor:
        """x [B, G, N/G * Q, a] times what all rows share [G, a, b]."""
        product = x.transpose(0, 1).reshape(groups, -1, x.shape[-1]) @ same
        return product.view(groups, rows, -1, same.shape[-1]).transpose(0, 1)

    scores = (query @ key.mT).view(rows, groups, -1, queries, own) + mask[:, :, None]
    pieces = [*(together(query, keys[0].mT) for keys, _ in shared), scores.reshape(rows, groups, -1, own)]
    *weights, for_own = torch.cat(pieces, dim=-1).softmax(-1).split([piece.shape[-1] for piece in pieces], dim=-1)
    found = for_own @ value
    for weight, (_, values) in zip(weights, shared, strict=True):
        found = together(weight, values[0]) + found
    return found.reshape(rows, heads, queries, -1)
