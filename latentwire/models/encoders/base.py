"""The encoder: text to Z, M latents of width d_z.

    codebook   stage 0, untrained: M tokens chosen by TF-IDF, each sent as its code
    hf         a pretrained encoder scores the tokens; the M places are filled in reading order with code + residual
    queries    a pretrained encoder, and M free queries that look at its states
    byte       a transformer over bytes from scratch, and the same queries

Shapes: B batch, T wire tokens of a text, M latents, w width of the backbone's states, V wire vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from latentwire.data.relevance import relevant_stretch
from latentwire.data.squad import Question
from latentwire.llms.prompts import Content, content
from latentwire.models.backbones import ByteBackbone, PretrainedBackbone, States
from latentwire.models.encoders.queries import Resampler
from latentwire.models.pooling import pool

_QUESTION_SHARE = 0.75  # of the M latents at most: a long question must leave room for the context
_LONGEST_SPAN = 30  # wire tokens of an answer that the encoder reads out by itself
_REACH = 8  # wire tokens around a likely answer that help to understand it
_LEAST = 1e-6  # so that the logarithm of no token's relevance is infinite
_KEPT = 1.0  # score of question and labels at the start: above every token of the context, whose relevance is below 1


@dataclass
class Tokens:
    """A batch of contents in wire tokens. ids: [B, T]; mask: [B, T] bool, False on padding; context: [B, T] bool, True
    on what belongs to the context; spans: per text [T_i, 2] characters."""

    contents: list[Content]
    ids: Tensor
    mask: Tensor
    context: Tensor
    spans: list[np.ndarray]


@dataclass
class Encoded:
    """z: [B, M, d_z]; used: [B, M] bool, False on places that a short text leaves empty.

    Where tokens are chosen: their scores [B, T], the span logits (start, end) [B, T, 2], and the places [B, M, T].
    """

    z: Tensor
    used: Tensor
    tokens: Tokens | None = None
    scores: Tensor | None = None
    span: Tensor | None = None
    places: Tensor | None = None


class Encoder(nn.Module):
    """What all encoders share; `tokenizer` is the wire's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, d_z: int):
        super().__init__()
        self.tokenizer, self.d_z = tokenizer, d_z

    def encode(self, questions: Sequence[Question], source: str, m: int) -> list[Tensor]:
        """Z of each question: float32 [M, d_z], fewer rows where the text has fewer tokens.

        One by one, so that a question's Z never depends on the batch it came in.
        """
        return [one.z[0, one.used[0]].float() for one in self.encoded(questions, source, m)]

    def select(self, question: Question, source: str, m: int) -> list[int]:
        """Wire token ids that are sent; ValueError where latents stand for no tokens."""
        raise ValueError("conditions: free queries choose no tokens and read no span; this needs an encoder of type hf")

    def read(self, question: Question) -> str:
        """The encoder's own answer; ValueError where it has none."""
        raise ValueError("conditions: this encoder reads no answer span; encoder_only needs an encoder of type hf")

    def perfect(self, question: Question, source: str, m: int) -> tuple[Tensor, str]:
        """What would be sent if the first reference answer were known: float32 [P, d_z], P at most m, and the text that
        it stands for. ValueError where latents stand for no tokens."""
        raise ValueError("conditions: free queries choose no tokens; the oracles need type hf, or no --ckpt")

    @torch.no_grad()
    def encoded(self, questions: Sequence[Question], source: str, m: int, **how: bool) -> list[Encoded]:
        """`forward` without dropout, one question at a time."""
        training = self.training
        self.eval()
        encoded = [self([question], source, m, **how) for question in questions]
        self.train(training)
        return encoded


class CodebookEncoder(Encoder):
    """Stage 0, untrained: M tokens are selected and each is sent as its code from the codebook [V, d_z].

    With source "prompt" the question closes the wire, as it does the full text, and the stretch of context that fits
    it best fills the room before it; with source "context", where the question is unknown, the beginning is sent.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, d_z: int):
        super().__init__(tokenizer, d_z)
        self.codebook = nn.Embedding(vocabulary, d_z)

    @classmethod
    def from_codebook(cls, tokenizer: PreTrainedTokenizerBase, codebook: Tensor) -> "CodebookEncoder":
        encoder = cls(tokenizer, *codebook.shape)
        encoder.load_state_dict({"codebook.weight": codebook})
        return encoder

    def forward(self, questions: Sequence[Question], source: str, m: int) -> Encoded:
        device = self.codebook.weight.device
        rows = [torch.tensor(self.select(q, source, m), device=device) for q in questions]
        used = torch.arange(m, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
        ids = torch.zeros(len(rows), m, dtype=torch.long, device=device)
        ids[used] = torch.cat(rows)
        return Encoded(self.codebook(ids), used)

    def select(self, question: Question, source: str, m: int) -> list[int]:
        """Wire token ids, at most m, in the order they are sent."""
        if source == "context":
            return self._ids(f" {question.context}")[:m]
        encoded = self.tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
        return self._beside_question(
            question, encoded["input_ids"], m,
            lambda room: relevant_stretch(question.question, question.context, encoded["offset_mapping"], room),
        )  # fmt: skip

    @torch.no_grad()
    def perfect(self, question: Question, source: str, m: int) -> tuple[Tensor, str]:
        """The tokens around the answer, as many as there is room for."""
        encoded = self.tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], np.array(encoded["offset_mapping"])
        first, last = overlapping(spans, question.starts[0], question.starts[0] + len(question.answers[0]))

        def around(room: int) -> slice:
            start = max(0, min((first + last + 1 - room) // 2, len(spans) - room))
            return slice(start, min(start + room, len(spans)))

        if source == "prompt":
            chosen = self._beside_question(question, ids, m, around)
            return self._codes(chosen), self.tokenizer.decode(chosen)
        window = around(m)
        text = question.context[spans[window][0, 0] : spans[window][-1, 1]]
        return self._codes(ids[window]), f" {text.strip()}"

    def _beside_question(
        self, question: Question, ids: list[int], m: int, stretch: Callable[[int], slice]
    ) -> list[int]:
        """The stretch of the context's ids that the room beside the question allows, and the question after it."""
        asked = self._ids(f"\nQuestion: {question.question}")[: max(1, int(m * _QUESTION_SHARE))]
        label = self._ids("Context:")[: m - len(asked)]
        room = m - len(asked) - len(label)
        return label + (ids[stretch(room)] if room else []) + asked

    def _codes(self, ids: list[int]) -> Tensor:
        return self.codebook(torch.tensor(ids, device=self.codebook.weight.device)).float()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class SelectingEncoder(CodebookEncoder):
    """A pretrained encoder reads question and context and scores each wire token; the best M are sent, in reading
    order, each as its code + a contextual residual that starts at zero.

    A token of the context is relevant as far as it stands near a likely answer: the probabilities of the answer's first
    and last token, spread over their neighbours. Its score is the logarithm of that, plus a learned correction that
    starts at zero.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        d_z: int,
        backbone: PretrainedBackbone,
        pooling: str,
    ):
        super().__init__(tokenizer, vocabulary, d_z)
        self.backbone, self.pooling = backbone, pooling
        self.outside = nn.Parameter(torch.zeros(backbone.width))  # the state of a label, which has no word piece
        self.score = nn.Linear(backbone.width, 1)
        self.span = nn.Linear(backbone.width, 2)
        self.residual = nn.Linear(backbone.width, d_z)
        for zero in (self.score, self.residual):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, questions: Sequence[Question], source: str, m: int, known: bool = False) -> Encoded:
        """known: the first reference answer's place is given instead of found (see `perfect`)."""
        tokens = self.tokenize(questions, source)
        hidden = self._align(self.backbone(questions, source), tokens)  # [B, T, w]
        span = self.span(hidden).float().masked_fill(~tokens.context[..., None], -torch.inf)
        if known:
            places = torch.tensor(answer_edges(tokens, questions), device=span.device)[:, None]  # [B, 1, 2]
            span = torch.full_like(span, -torch.inf).scatter_(1, places, 0.0)
        scores = self.score(hidden).float()[..., 0] + self._relevance(span, tokens, m)
        places, used = pool(scores, tokens.mask, m, self.pooling)
        z = places @ (self.codebook(tokens.ids) + self.residual(hidden).float())
        return Encoded(z, used, tokens, scores, span, places)

    def select(self, question: Question, source: str, m: int) -> list[int]:
        """Wire token ids that lead their places, in the order they are sent."""
        return _leading(*self.encoded([question], source, m))

    def perfect(self, question: Question, source: str, m: int) -> tuple[Tensor, str]:
        """The trained latents of a selection that knows where the answer stands."""
        (encoded,) = self.encoded([question], source, m, known=True)
        text = self.tokenizer.decode(_leading(encoded))
        return encoded.z[0, encoded.used[0]].float(), text if source == "prompt" else f" {text.strip()}"

    def read(self, question: Question) -> str:
        """The encoder's own answer: the best span of at most _LONGEST_SPAN tokens of the context."""
        (encoded,) = self.encoded([question], "prompt", 1)
        start, end = encoded.span[0].unbind(dim=1)  # [T]
        pairs = start[:, None] + end[None, :]  # -inf outside the context
        allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(_LONGEST_SPAN - 1)
        pairs = pairs.masked_fill(~allowed, -torch.inf)
        first, last = divmod(int(pairs.argmax()), len(end))
        (text,), (spans,) = encoded.tokens.contents, encoded.tokens.spans
        stop = text.context_at + len(question.context)
        return text.text[max(spans[first, 0], text.context_at) : min(spans[last, 1], stop)].strip()

    def _relevance(self, span: Tensor, tokens: Tokens, m: int) -> Tensor:
        """Starting scores [B, T] from span logits [B, T, 2]. What a long question has beyond its share comes last."""
        likely = span.softmax(dim=1).mean(dim=2)  # [B, T], adds up to 1
        kernel = torch.bartlett_window(2 * _REACH + 3, periodic=False, device=span.device)[1:-1]
        near = conv1d(likely[:, None], kernel[None, None], padding=_REACH)[:, 0]
        others = tokens.mask & ~tokens.context
        within = others.cumsum(dim=1) <= max(1, int(m * _QUESTION_SHARE))
        kept = torch.where(within, _KEPT, math.log(_LEAST))
        return torch.where(tokens.context, (near + _LEAST).log(), kept)

    def tokenize(self, questions: Sequence[Question], source: str) -> Tokens:
        """The contents in wire tokens, with the characters that each stands for."""
        contents = [content(source, q.context, q.question) for q in questions]
        encoded = self.tokenizer([c.text for c in contents], add_special_tokens=False, return_offsets_mapping=True)
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


class ResamplingEncoder(Encoder):
    """M free queries look at the states of a backbone. M is fixed by the training."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        d_z: int,
        backbone: PretrainedBackbone | ByteBackbone,
        m: int,
        scale: Tensor | None = None,
    ):
        super().__init__(tokenizer, d_z)
        self.backbone = backbone
        self.resampler = Resampler(backbone.width, m, d_z, scale)

    def forward(self, questions: Sequence[Question], source: str, m: int) -> Encoded:
        trained = len(self.resampler.queries)
        if m != trained:
            raise ValueError(f"latent_len={m}: these queries were trained for M={trained}; use that")
        states = self.backbone(questions, source)
        z = self.resampler(states.hidden, states.mask)
        return Encoded(z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))


def answer_edges(tokens: Tokens, questions: Sequence[Question]) -> list[tuple[int, int]]:
    """First and last wire token of each question's first answer."""
    edges = []
    for question, text, spans in zip(questions, tokens.contents, tokens.spans, strict=True):
        begin = text.context_at + question.starts[0]
        edges.append(overlapping(spans, begin, begin + len(question.answers[0])))
    return edges


def overlapping(spans: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last token (spans [T, 2]) that share a character with [begin, end)."""
    inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > begin))
    assert len(inside), f"no token covers the characters {begin} to {end}"
    return int(inside[0]), int(inside[-1])


def _leading(encoded: Encoded) -> list[int]:
    """Wire token ids that lead the places of a single text."""
    return encoded.tokens.ids[0, encoded.places[0, encoded.used[0]].argmax(dim=1)].tolist()
