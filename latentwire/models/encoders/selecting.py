"""hf: a pretrained encoder scores the wire tokens; the M places are filled in reading order with code + residual.

Shapes: B batch, T wire tokens of a text, M latents, w width of the backbone's states, V wire vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import combining

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad
from torch.nn.utils.rnn import pad_sequence

from latentwire.data.content import content, encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.llms.prompts import AS_TEXT
from latentwire.models.backbones import (
    BackboneSettings,
    OnPretrained,
    PretrainedBackbone,
    States,
    load_backbone,
)
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoded, Encoder, Tokens, answer_edges, encoder
from latentwire.models.encoders.codebook import QUESTION_SHARE, ClosedFormEncoder
from latentwire.models.pooling import POOLINGS, pool
from latentwire.utils.cli import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_SPAN = 30  # wire tokens of an answer that the encoder reads out by itself
_REACH = 8  # wire tokens around a likely answer that help to understand it
_LEAST = 1e-6  # so that the logarithm of no token's relevance is infinite
_CHOOSING = ("backbone.", "outside", "score.", "span.")  # parameters that decide which tokens are sent
_GAIN = 32.0  # so that a step of a map of low rank moves latents about as far as one of a full map
_KEPT = 1.0  # score of question and labels at the start: above every token of the context, whose relevance is below 1


@dataclass(kw_only=True)
class PoolingSettings(BackboneSettings):
    """Of encoders that choose tokens."""

    pooling: str = option(
        "select", "how the M places are filled: select (whole tokens), perturbed (the same, with another gradient) "
        "or cif (blends)", choices=tuple(POOLINGS),
    )  # fmt: skip


class LowRank(nn.Module):
    """A linear map of rank r, zero at the start (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, width: int, out: int, r: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, r, bias=False), zeroed(nn.Linear(r, out))

    def forward(self, hidden: Tensor) -> Tensor:
        return _GAIN * self.up(self.down(hidden))


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The same map, zero at the start."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@encoder("hf")
class SelectingEncoder(OnPretrained, ClosedFormEncoder):
    """A pretrained encoder reads question and context and scores each wire token; the best M are sent, in reading
    order, each as its code + a contextual residual that starts at zero. With source "aware" only tokens of the context
    can be sent.

    A token of the context is relevant as far as it stands near a likely answer: the probabilities of the answer's first
    and last token, spread over their neighbours. Its score is the logarithm of that, plus a learned correction that
    starts at zero.
    """

    reads_answers = True
    learns_spans = True

    @dataclass(kw_only=True)
    class Settings(PoolingSettings):
        """Of the encoder that adds a residual."""

        residual_rank: int = option(
            0, "directions that the residual has; 0: as many as a latent; 8: codec compact8 sends all of it", least=0
        )

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        vocabulary: int,
        backbone: PretrainedBackbone,
        pooling: str,
        residual_rank: int = 0,
    ):
        super().__init__(tokenizer, d_z, vocabulary)
        self.backbone, self.pooling, self.residual_rank = backbone, pooling, residual_rank
        self.outside = nn.Parameter(torch.zeros(backbone.width))  # the state of a label, which has no word piece
        self.score = zeroed(nn.Linear(backbone.width, 1))
        self.span = nn.Linear(backbone.width, 2)
        self._begin_adding()

    def _begin_adding(self) -> None:
        """Make what is added to the codes."""
        width, rank = self.backbone.width, self.residual_rank
        self.residual = LowRank(width, self.d_z, rank) if rank else zeroed(nn.Linear(width, self.d_z))

    @classmethod
    def begin(cls, before: Encoder, settings: Settings, m: int) -> Encoder:
        """With the closed form's codebook and a pretrained backbone."""
        codebook = before.codebook.weight.detach()
        own = cls._own(settings)
        backbone = load_backbone(settings.encoder_id, settings.lora)
        made = cls(before.tokenizer, before.d_z, len(codebook), backbone, **own)
        with torch.no_grad():
            made.codebook.weight.copy_(codebook)
        return made

    def with_weights_of(self, before: Encoder) -> "SelectingEncoder":
        """This one with what both have, as `before` has it."""
        own = self.state_dict()
        self.load_state_dict(own | {name: kept for name, kept in before.state_dict().items() if name in own})
        return self

    def with_codes_of(self, before: ClosedFormEncoder, settings: Settings) -> "SelectingEncoder":
        """A new one that chooses tokens as this one does, with the closed form's codebook."""
        size = before.codebook.num_embeddings
        made = type(self)(before.tokenizer, before.d_z, size, self.backbone, **self._own(settings))
        kept = {name: kept for name, kept in self.state_dict().items() if name.startswith(_CHOOSING)}
        made.load_state_dict(made.state_dict() | before.state_dict() | kept)
        return made

    @classmethod
    def _own(cls, settings: Settings) -> dict:
        """What the settings say to `__init__`."""
        return {"pooling": settings.pooling, "residual_rank": settings.residual_rank}

    def shape(self) -> dict:
        return super().shape() | {"pooling": self.pooling, "residual_rank": self.residual_rank}

    def components(self) -> list[Component]:
        return [
            *super().components(),
            self.backbone_component(),
            component("score", self.score),
            component("span", self.span, self.outside),
            component("residual", self.residual),
        ]

    def forward(
        self, questions: Sequence[Question], source: str, m: int, states: States | None = None, known: bool = False
    ) -> Encoded:
        """states: the backbone's, where they are there already; known: the first reference answer's place is given
        instead of found (see `perfect`)."""
        tokens = self.tokenize(questions, source)
        hidden = self._align(states or self.backbone(questions, source), tokens)  # [B, T, w]
        span = self.span(hidden).float().masked_fill(~tokens.context[..., None], -torch.inf)
        if known:
            places = torch.tensor(answer_edges(tokens, questions), device=span.device)[:, None]  # [B, 1, 2]
            span = torch.full_like(span, -torch.inf).scatter_(1, places, 0.0)
        scores = self.score(hidden).float()[..., 0] + self._relevance(span, tokens, m)
        places, used = pool(scores, _choosable(tokens, source), m, self.pooling)
        return Encoded(places @ self._each(tokens, hidden, span), used, tokens, scores, span, places)

    def _each(self, tokens: Tokens, hidden: Tensor, span: Tensor) -> Tensor:
        """What each wire token would send [B, T, d_z]. hidden: its states [B, T, w]; span: as in `Encoded`."""
        return self.codebook(tokens.ids) + self.residual(hidden).float()

    def select(self, question: Question, source: str, m: int) -> list[int]:
        """Wire token ids that lead their places, in the order they are sent."""
        return _leading(*self.encoded([question], source, m))

    def chosen_spans(self, question: Question, source: str, m: int) -> list[tuple[int, int]]:
        (encoded,) = self.encoded([question], source, m)
        leading = encoded.places[0, encoded.used[0]].argmax(dim=1).unique()
        leading = leading[encoded.tokens.context[0, leading]].tolist()
        at, most = encoded.tokens.contents[0].context_at, len(question.context)
        return [(max(a - at, 0), min(b - at, most)) for a, b in encoded.tokens.spans[0][leading].tolist()]

    def perfect(self, question: Question, source: str, m: int) -> tuple[Tensor, str]:
        """The trained latents of a selection that knows where the answer stands."""
        (encoded,) = self.encoded([question], source, m, known=True)
        text = self.tokenizer.decode(_leading(encoded))
        return encoded.z[0, encoded.used[0]].float(), f" {text.strip()}" if question_in_tail(source) else text

    def read_at(self, question: Question) -> tuple[int, int]:
        """The best span of at most _LONGEST_SPAN tokens of the context."""
        (encoded,) = self.encoded([question], "prompt", 1)
        first, last = (int(edge) for edge in best_spans(encoded.span)[:2])
        (text,), (spans,) = encoded.tokens.contents, encoded.tokens.spans
        stop = len(question.context)
        begin, end = (min(max(int(edge) - text.context_at, 0), stop) for edge in (spans[first, 0], spans[last, 1]))
        while end < stop and _joins(question.context[end]):  # a tokenizer that composes signs may count the first only
            end += 1
        return begin, end

    def _relevance(self, span: Tensor, tokens: Tokens, m: int) -> Tensor:
        """Starting scores [B, T] from span logits [B, T, 2]. What a long question has beyond its share comes last."""
        likely = span.softmax(dim=1).mean(dim=2)  # [B, T], adds up to 1
        kernel = torch.bartlett_window(2 * _REACH + 3, periodic=False, device=span.device)[1:-1]
        near = conv1d(likely[:, None], kernel[None, None], padding=_REACH)[:, 0]
        others = tokens.mask & ~tokens.context
        within = others.cumsum(dim=1) <= max(1, int(m * QUESTION_SHARE))
        kept = torch.where(within, _KEPT, math.log(_LEAST))
        return torch.where(tokens.context, (near + _LEAST).log(), kept)

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


def best_spans(span: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last token [B] of each text's best span of at most _LONGEST_SPAN tokens, and its logit [B]; -inf where
    there is none. span: as in `Encoded`, -inf outside the context."""
    start, end = span.unbind(dim=2)  # [B, T]
    ends = pad(end, (0, _LONGEST_SPAN - 1), value=-torch.inf).unfold(1, _LONGEST_SPAN, 1)  # [B, T, _LONGEST_SPAN]
    logit, place = (start[..., None] + ends).flatten(1).max(dim=1)
    first = place // _LONGEST_SPAN
    return first, first + place % _LONGEST_SPAN, logit


def _choosable(tokens: Tokens, source: str) -> Tensor:
    """Which tokens can be sent [B, T]. With source "context" a lone space before the context can, too: checkpoints were
    trained so."""
    aware = encoder_reads_question(source) and question_in_tail(source)
    return tokens.mask & tokens.context if aware else tokens.mask


def _joins(sign: str) -> bool:
    """Whether a sign is drawn with the one before it: combining marks, vowels and ends of Hangul syllables."""
    return bool(combining(sign)) or "\u1160" <= sign <= "\u11ff"


def _leading(encoded: Encoded) -> list[int]:
    """Wire token ids that lead the places of a single text."""
    return encoded.tokens.ids[0, encoded.places[0, encoded.used[0]].argmax(dim=1)].tolist()
