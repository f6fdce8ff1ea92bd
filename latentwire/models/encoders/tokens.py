"""What encoders on wire tokens share: a pretrained backbone reads, and each latent stands on one of the tokens.

Shapes: B batch, T wire tokens of a text, M latents, w width of the backbone's states, V wire vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.data.content import content, question_in_tail
from latentwire.data.question import Question
from latentwire.llms.prompts import AS_TEXT
from latentwire.models.backbones import BackboneSettings, OnPretrained, PretrainedBackbone, States, load_backbone
from latentwire.models.components import Component
from latentwire.models.encoders.base import Encoded, Encoder, Tokens
from latentwire.models.encoders.codebook import ClosedFormEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHOOSING = ("backbone.", "outside", "score.", "span.")  # parameters that decide which tokens are sent


class TokenEncoder(OnPretrained, ClosedFormEncoder):
    """A backbone's states by wire token, beside the codebook. A subclass has `forward`, which says what leads each
    place (`Encoded.places`), and `arguments`: what `__init__` takes beside the backbone, which settings give and a
    checkpoint keeps."""

    arguments: tuple[str, ...] = ()
    Settings = BackboneSettings

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", d_z: int, vocabulary: int, backbone: PretrainedBackbone):
        super().__init__(tokenizer, d_z, vocabulary)
        self.backbone = backbone
        self.outside = nn.Parameter(torch.zeros(backbone.width))  # the state of a label, which has no word piece

    @classmethod
    def begin(cls, before: Encoder, settings: BackboneSettings, m: int) -> Encoder:
        """With the closed form's codebook and a pretrained backbone; or, from another of these encoders, with its
        backbone, its arguments and all weights that both have."""
        begun = isinstance(before, TokenEncoder)
        backbone = before.backbone if begun else load_backbone(settings.encoder_id, settings.lora)
        made = cls._of(before, backbone, settings)
        own = made.state_dict()
        made.load_state_dict(own | {name: kept for name, kept in before.state_dict().items() if name in own})
        return made

    def with_codes_of(self, before: ClosedFormEncoder, settings: BackboneSettings) -> "TokenEncoder":
        """A new one that chooses tokens as this one does, with the closed form's codebook."""
        made = self._of(before, self.backbone, settings)
        kept = {name: kept for name, kept in self.state_dict().items() if name.startswith(_CHOOSING)}
        made.load_state_dict(made.state_dict() | before.state_dict() | kept)
        return made

    @classmethod
    def _of(cls, before: ClosedFormEncoder, backbone: PretrainedBackbone, settings: BackboneSettings) -> "TokenEncoder":
        size, own = before.codebook.num_embeddings, cls._arguments(before, settings)
        return cls(before.tokenizer, before.d_z, size, backbone, **own)

    @classmethod
    def _arguments(cls, before: ClosedFormEncoder, settings: BackboneSettings) -> dict:
        """Those of the encoder that it begins from, where that one has them."""
        return {name: getattr(before if hasattr(before, name) else settings, name) for name in cls.arguments}

    def shape(self) -> dict:
        return super().shape() | {name: getattr(self, name) for name in self.arguments}

    def components(self) -> list[Component]:
        return [*super().components(), self.backbone_component()]

    def select(self, questions: Sequence[Question], source: str, m: int) -> list[list[int]]:
        """For each question the wire token ids that lead its places, in the order they are sent."""
        return [_leading(encoded) for encoded in self.encoded(questions, source, m)]

    def chosen_spans(self, questions: Sequence[Question], source: str, m: int) -> list[list[tuple[int, int]]]:
        return [_spans(*pair) for pair in zip(questions, self.encoded(questions, source, m), strict=True)]

    def choosing(self, questions: Sequence[Question], source: str) -> list[Callable[[int], list[tuple[int, int]]]]:
        with self.still():
            ready = self.ready(questions, source)
        pairs = zip(questions, ready, strict=True)
        return [lambda m, q=q, one=one: _spans(q, *self.encoded([q], source, m, [one])) for q, one in pairs]

    def perfect(self, questions: Sequence[Question], source: str, m: int) -> list[tuple[Tensor, str]]:
        """The trained latents of a selection that knows where each answer stands."""
        found = self.encoded(questions, source, m, known=True)
        texts = [self.tokenizer.decode(_leading(encoded)) for encoded in found]
        texts = [f" {text.strip()}" for text in texts] if question_in_tail(source) else texts
        return [(one.z[0, one.used[0]].float(), text) for one, text in zip(found, texts, strict=True)]

    def tokenize(self, questions: Sequence[Question], source: str) -> Tokens:
        """The contents in wire tokens, with the characters that each stands for."""
        contents = [content(source, q.context, q.question) for q in questions]
        encoded = self.tokenizer([c.text for c in contents], **AS_TEXT, return_offsets_mapping=True)
        device = self.codebook.weight.device
        rows = [torch.tensor(ids, device=device) for ids in encoded["input_ids"]]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        spans = [np.array(pairs) for pairs in encoded["offset_mapping"]]
        context = np.zeros(ids.shape, dtype=bool)
        for row, (text, pairs, question) in enumerate(zip(contents, spans, questions, strict=True)):
            end = text.context_at + len(question.context)
            context[row, : len(pairs)] = (pairs[:, 1] > text.context_at) & (pairs[:, 0] < end)
        return Tokens(contents, ids, mask, torch.as_tensor(context, device=device), spans)

    def _align(self, states: States, tokens: Tokens) -> Tensor:
        """The backbone's states [B, T, w] by wire token: the mean of the first and last piece that it overlaps."""
        shape = (2, *tokens.ids.shape)
        piece, outside = np.zeros(shape, dtype=np.int64), np.ones(shape[1:], dtype=bool)
        for row, (pieces, spans) in enumerate(zip(states.spans, tokens.spans, strict=True)):
            first = np.searchsorted(pieces[:, 1], spans[:, 0], side="right")
            last = np.searchsorted(pieces[:, 0], spans[:, 1], side="left") - 1
            outside[row, : len(spans)] = last < first
            piece[:, row, : len(spans)] = np.where(last < first, 0, (first, last))
        device = states.hidden.device
        index = torch.as_tensor(piece, device=device)[..., None].expand(-1, -1, -1, states.hidden.shape[2])
        hidden = (states.hidden.gather(1, index[0]) + states.hidden.gather(1, index[1])) / 2
        return torch.where(torch.as_tensor(outside, device=device)[..., None], self.outside.to(hidden.dtype), hidden)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The same map, zero at the start."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _leading(encoded: Encoded) -> list[int]:
    """Wire token ids that lead the places of a single text."""
    return encoded.tokens.ids[0, encoded.places[0, encoded.used[0]].argmax(dim=1)].tolist()


def _spans(question: Question, encoded: Encoded) -> list[tuple[int, int]]:
    """`chosen_spans` of a single text."""
    leading = encoded.places[0, encoded.used[0]].argmax(dim=1).unique()
    leading = leading[encoded.tokens.context[0, leading]].tolist()
    at, most = encoded.tokens.contents[0].context_at, len(question.context)
    return [(max(a - at, 0), min(b - at, most)) for a, b in encoded.tokens.spans[0][leading].tolist()]
