"""Many texts through a bidirectional encoder at once, each with the bits that it has alone.

Padding changes a text's last bits: its sums run over other lengths. Here texts stand behind each other in one row, each
word piece with its own position; linear layers work piece by piece, and attention is computed per text, in the shapes
that it has alone. (Packing without padding is usual for speed: Krell et al. 2021, arXiv:2107.02027.)
Shapes: L word pieces of all texts together, h heads, w width of a state.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "latentwire_packed"
_PROBE = 1024  # word pieces at most that show whether a model can be packed: longer than local windows of attention


def can_pack(model: PreTrainedModel, window: int, first_position: int) -> bool:
    """Whether packed texts get exactly the states that they get alone, found by trying it; window: longest text."""
    if not model._supports_attention_backend or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    longest = min(window, _PROBE)
    ids = torch.arange(longest, device=model.device) % model.config.vocab_size
    texts = [{"input_ids": ids}, {"input_ids": ids[: longest // 2]}]
    packed = packed_states(model, texts, first_position)
    alone = [model(input_ids=text["input_ids"][None]).last_hidden_state[0] for text in texts]
    return all(torch.equal(one, other) for one, other in zip(packed, alone, strict=True))


def packed_states(model: PreTrainedModel, texts: Sequence[dict[str, Tensor]], first_position: int) -> list[Tensor]:
    """Last states [L_i, w] of each text; texts: the model's inputs without padding, each [L_i].

    first_position: position of a text's first word piece. The model must be in evaluation mode.
    """
    lengths = [len(text["input_ids"]) for text in texts]
    inputs = {key: torch.cat([text[key] for text in texts])[None] for key in texts[0]}
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])[None] + first_position
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        hidden = model(**inputs, position_ids=positions, text_lengths=lengths).last_hidden_state[0]
    finally:
        model.set_attn_implementation(before)
    return list(hidden.split(lengths))


def _attend_within(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, text_lengths: list[int],
    **how: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, h, L, w / h] of each text to itself."""
    assert mask is None
    parts = zip(*(states.split(text_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **how)[0] for part in parts], dim=1), None


AttentionInterface.register(_NAME, _attend_within)
AttentionMaskInterface.register(_NAME, lambda *args, **how: None)
