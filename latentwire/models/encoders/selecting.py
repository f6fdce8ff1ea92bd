"""ids, ids_marked, hf: a pretrained encoder scores the wire tokens; the M best are sent, in reading order.

They differ in what is added to the code of each: nothing, a mark on the encoder's own answer, a residual. What latents
add is told by what the first two leave out.

Shapes: B batch, T wire tokens of a text, M latents, w width of the backbone's states, V wire vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import combining

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.models.backbones import BackboneSettings, PretrainedBackbone, States
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoded, Tokens, answer_edges, between, encoder
from latentwire.models.encoders.codebook import QUESTION_SHARE
from latentwire.models.encoders.tokens import TokenEncoder, zeroed
from latentwire.models.pooling import POOLINGS, pool
from latentwire.utils.cli import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_SPAN = 30  # wire tokens of an answer that the encoder reads out by itself
_REACH = 8  # wire tokens around a likely answer that help to understand it
_LEAST = 1e-6  # so that the logarithm of no token's relevance is infinite
_GAIN = 32.0  # so that a step of a map of low rank moves latents about as far as one of a full map
_KEPT = 1.0  # score of question and labels at the start: above every token of the context, whose relevance is below 1


@dataclass(kw_only=True)
class PoolingSettings(BackboneSettings):
    """Of encoders that choose tokens."""

    pooling: str = option(
        "select", "how the M places are filled: select (whole tokens), perturbed (the same, with another gradient) "
        "or cif (blends)", choices=tuple(POOLINGS),
    )  # fmt: skip


@encoder("ids")
class IdsEncoder(TokenEncoder):
    """A pretrained encoder reads question and context and scores each wire token; the best M are sent, in reading
    order, each as its code: what token ids can carry. With source "aware" only tokens of the context can be sent.

    A token of the context is relevant as far as it stands near a likely answer: the probabilities of the answer's first
    and last token, spread over their neighbours. Its score is the logarithm of that, plus a learned correction that
    starts at zero. Begins from the codebook, or with the weights of an encoder hf.
    """

    reads_answers = True
    learns_spans = True
    begins_from = ("codebook", "hf")
    arguments = ("pooling",)
    Settings = PoolingSettings

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        vocabulary: int,
        backbone: PretrainedBackbone,
        pooling: str,
    ):
        super().__init__(tokenizer, d_z, vocabulary, backbone)
        self.pooling = pooling
        self.score = zeroed(nn.Linear(backbone.width, 1))
        self.span = nn.Linear(backbone.width, 2)

    def components(self) -> list[Component]:
        return [
            *super().components(),
            component("score", self.score),
            component("span", self.span, self.outside),
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
        return self.codebook(tokens.ids)

    def read_at(self, questions: Sequence[Question]) -> list[tuple[int, int]]:
        """The best span of at most _LONGEST_SPAN tokens of each context."""
        return [_answer_at(*pair) for pair in zip(questions, self.encoded(questions, "prompt", 1), strict=True)]

    def _relevance(self, span: Tensor, tokens: Tokens, m: int) -> Tensor:
        """Starting scores [B, T] from span logits [B, T, 2]. What a long question has beyond its share comes last."""
        # In bfloat16, as trainings compute, scores would tie that the wire tells apart.
        with torch.autocast(span.device.type, enabled=False):
            likely = span.softmax(dim=1).mean(dim=2)  # [B, T], adds up to 1
            kernel = torch.bartlett_window(2 * _REACH + 3, periodic=False, device=span.device)[1:-1]
            near = (conv1d(likely[:, None], kernel[None, None], padding=_REACH)[:, 0] + _LEAST).log()
        others = tokens.mask & ~tokens.context
        within = others.cumsum(dim=1) <= max(1, int(m * QUESTION_SHARE))
        kept = torch.where(within, _KEPT, math.log(_LEAST))
        return torch.where(tokens.context, near, kept)


# A step moves a residual by what hundreds of weights change together; a lone vector needs steps of that size.
MARKER_UNIT = 64.0


@encoder("ids_marked")
class MarkedIdsEncoder(IdsEncoder):
    """Codes, and one learned vector [d_z], zero at the start, on the tokens of the encoder's own best span: ids with a
    highlighter."""

    begins_from = ("codebook", "hf", "ids")

    def __init__(self, *given: object, **more: object):
        """As `IdsEncoder`."""
        super().__init__(*given, **more)
        self.marker = nn.Parameter(torch.zeros(self.d_z))

    def components(self) -> list[Component]:
        return [*super().components(), component("marker", self.marker)]

    def _each(self, tokens: Tokens, hidden: Tensor, span: Tensor) -> Tensor:
        first, last, logit = best_spans(span)
        inside = between(first, last, span.shape[1]) & logit.isfinite()[:, None]  # [B, T]
        return super()._each(tokens, hidden, span) + inside[..., None] * (MARKER_UNIT * self.marker)


@encoder("hf")
class SelectingEncoder(IdsEncoder):
    """Codes, each with a contextual residual that starts at zero: latents."""

    begins_from = ("codebook",)
    arguments = ("pooling", "residual_rank")

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
        super().__init__(tokenizer, d_z, vocabulary, backbone, pooling)
        self.residual_rank = residual_rank
        width, rank = backbone.width, residual_rank
        self.residual = LowRank(width, d_z, rank) if rank else zeroed(nn.Linear(width, d_z))

    def components(self) -> list[Component]:
        return [*super().components(), component("residual", self.residual)]

    def _each(self, tokens: Tokens, hidden: Tensor, span: Tensor) -> Tensor:
        return super()._each(tokens, hidden, span) + self.residual(hidden).float()


class LowRank(nn.Module):
    """A linear map of rank r, zero at the start (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, width: int, out: int, r: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, r, bias=False), zeroed(nn.Linear(r, out))

    def forward(self, hidden: Tensor) -> Tensor:
        return _GAIN * self.up(self.down(hidden))


def best_spans(span: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last token [B] of each text's best span of at most _LONGEST_SPAN tokens, and its logit [B]; -inf where
    there is none. span: as in `Encoded`, -inf outside the context."""
    start, end = span.unbind(dim=2)  # [B, T]
    ends = pad(end, (0, _LONGEST_SPAN - 1), value=-torch.inf).unfold(1, _LONGEST_SPAN, 1)  # [B, T, _LONGEST_SPAN]
    logit, place = (start[..., None] + ends).flatten(1).max(dim=1)
    first = place // _LONGEST_SPAN
    return first, first + place % _LONGEST_SPAN, logit


def _answer_at(question: Question, encoded: Encoded) -> tuple[int, int]:
    """The context's characters [begin, end) of the encoder's own answer to one question."""
    first, last = (int(edge) for edge in best_spans(encoded.span)[:2])
    (text,), (spans,) = encoded.tokens.contents, encoded.tokens.spans
    stop = len(question.context)
    begin, end = (min(max(int(edge) - text.context_at, 0), stop) for edge in (spans[first, 0], spans[last, 1]))
    while end < stop and _joins(question.context[end]):  # a tokenizer that composes signs may count the first only
        end += 1
    return begin, end


def _choosable(tokens: Tokens, source: str) -> Tensor:
    """Which tokens can be sent [B, T]. With source "context" a lone space before the context can, too: checkpoints were
    trained so."""
    aware = encoder_reads_question(source) and question_in_tail(source)
    return tokens.mask & tokens.context if aware else tokens.mask


def _joins(sign: str) -> bool:
    """Whether a sign is drawn with the one before it: combining marks, vowels and ends of Hangul syllables."""
    return bool(combining(sign)) or "\u1160" <= sign <= "\u11ff"
