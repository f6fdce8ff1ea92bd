"""Many texts through a bidirectional encoder at once, each with bits that do not depend on the others; or in training.

Padding changes a text's last bits: its sums run over other lengths. On a CPU texts stand behind each other in one row,
each word piece with its own position; linear layers work piece by piece, and attention is computed per text, in the
shapes that it has alone. In training last bits do not matter: attention is computed for a padded batch, by plain
products, whose gradient takes a fifth of the time of PyTorch's fused attention on a CPU. (Packing without padding is
usual for speed: Krell et al. 2021, arXiv:2107.02027.) A GPU chooses other sums for each shape, and one text leaves it
idle: there texts are padded to few lengths, in batches of one size.
Shapes: B texts, L word pieces of all texts together, h heads, w width of a state.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from latentwire.llms.attention import Packed

_NAME, _TRAINING = "latentwire_packed", "latentwire_packed_training"
_LENGTHS, _ROWS, _POSITIONS = 64, 16, 8192  # on a GPU: multiples of length; texts and positions of a batch at most
_PROBE = 1024  # word pieces at most that show whether a model can be packed: longer than local windows of attention


@torch.no_grad()
def packing_error(model: PreTrainedModel, window: int, first_position: int) -> float:
    """The greatest difference between states of packed texts and those that they get alone, found by trying it;
    infinite where the model cannot be packed. window: longest text."""
    if not model._supports_attention_backend or "position_ids" not in inspect.signature(model.forward).parameters:
        return math.inf
    trains = model.training
    model.eval()  # in which nothing is random
    longest = min(window, _PROBE)
    ids = torch.arange(longest, device=model.device) % model.config.vocab_size
    texts = [{"input_ids": ids}, {"input_ids": ids[: longest // 2]}]
    packed = packed_states(model, texts, first_position)
    alone = [model(input_ids=text["input_ids"][None]).last_hidden_state[0] for text in texts]
    model.train(trains)
    return max((one - other).abs().max().item() for one, other in zip(packed, alone, strict=True))


def packed_states(model: PreTrainedModel, texts: Sequence[dict[str, Tensor]], first_position: int) -> list[Tensor]:
    """Last states [L_i, w] of each text; texts: the model's inputs without padding, each [L_i].

    first_position: position of a text's first word piece. In evaluation mode texts get the bits that they get alone.
    """
    lengths = [len(text["input_ids"]) for text in texts]
    inputs = {key: torch.cat([text[key] for text in texts])[None] for key in texts[0]}
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])[None] + first_position
    rows = torch.arange(sum(lengths)).split(lengths)
    how = {"packed": Packed.of(rows, model.device)} if model.training else {"text_lengths": lengths}
    before = model.config._attn_implementation
    model.set_attn_implementation(_TRAINING if model.training else _NAME)
    try:
        hidden = model(**inputs, position_ids=positions, **how).last_hidden_state[0]
    finally:
        model.set_attn_implementation(before)
    return list(hidden.split(lengths))


class FewShapes:
    """Reads windows of word pieces in batches of few shapes, so that a window's bits depend on its own length alone.

    Each is padded to the next multiple of _LENGTHS. A batch holds windows of one padded length, always as many of them,
    and none with padding beside one without: attention without a mask is another kernel.
    window: the longest; read: gives the last states [B, L, w] of a padded batch; kind: of the device, for torch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, read: Callable[[Mapping], Tensor], kind: str):
        self._tokenizer, self._window, self._read, self._kind = tokenizer, window, read, kind
        self._alike: dict[tuple, bool] = {}

    def __call__(self, windows: Sequence[dict]) -> list[Tensor]:
        """Last states [L_i, w] of each window, given as what the tokenizer gives without padding."""
        sizes = [len(one["input_ids"]) for one in windows]
        lengths = [min(max(1, -(-size // _LENGTHS)) * _LENGTHS, self._window) for size in sizes]
        shapes = [(length, size == length) for size, length in zip(sizes, lengths, strict=True)]
        found = [torch.empty(0)] * len(windows)
        for shape in set(shapes):
            rows = [row for row, other in enumerate(shapes) if other == shape]
            at_once = self._rows(*shape)
            for some in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
                filled = some + some[:1] * (at_once - len(some))
                states = self._padded([windows[row] for row in filled], shape[0])
                for row, one in zip(some, states, strict=False):
                    found[row] = one[: sizes[row]]
        return found

    def _rows(self, length: int, full: bool) -> int:
        """How many windows of a length, full or with padding, are read at once: one, unless all rows of such a batch
        get the same bits, which is found by trying it."""
        most = max(1, min(_ROWS, _POSITIONS // length))
        autocast = torch.get_autocast_dtype(self._kind) if torch.is_autocast_enabled(self._kind) else None
        key = length, full, autocast
        if most > 1 and key not in self._alike:
            ids = [place % len(self._tokenizer) for place in range(length if full else length - 1)]
            first, *others = self._padded([{"input_ids": ids}] * most, length)
            self._alike[key] = all(torch.equal(first, other) for other in others)
        return most if self._alike.get(key) else 1

    def _padded(self, windows: Sequence[dict], length: int) -> Tensor:
        return self._read(self._tokenizer.pad(windows, padding="max_length", max_length=length, return_tensors="pt"))


def _attend_within(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, text_lengths: list[int],
    **how: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, h, L, w / h] of each text to itself."""
    assert mask is None
    parts = zip(*(states.split(text_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **how)[0] for part in parts], dim=1), None


def _attend_padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed: Packed, scaling: float,
    dropout: float = 0.0, **how: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same for training: texts are padded for their attention alone."""
    assert mask is None and not dropout
    with torch.autocast(query.device.type, enabled=False):  # which would take the softmax to float32 and back
        query, key, value = map(packed.padded, (query, key, value))  # [B, h, L_max, w / h]
        hidden = torch.zeros_like(packed.real, dtype=query.dtype).masked_fill_(~packed.real, -torch.inf)
        weights = ((query * scaling) @ key.mT + hidden[:, None, None]).softmax(-1)
        return packed.packed((weights @ value).transpose(1, 2)), None


for _name, _attend in ((_NAME, _attend_within), (_TRAINING, _attend_padded)):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, lambda *args, **how: None)
