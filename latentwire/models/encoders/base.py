"""What all encoders share. Adding one: a class in a file of this folder, registered in one line.

    @encoder("mine")
    class Mine(Encoder): ...

Shapes: B batch, T wire tokens of a text, M latents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from latentwire.data.content import Content
from latentwire.data.question import Question
from latentwire.models.components import Component, component
from latentwire.utils.cli import Settings
from latentwire.utils.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 64  # questions whose states lie in memory together


@dataclass
class Tokens:
    """A batch of contents in wire tokens. ids: [B, T]; mask: [B, T] bool, False on padding; context: [B, T] bool, True
    on what belongs to the context; spans: per text [T_i, 2] characters."""

    contents: list[Content]
    ids: Tensor
    mask: Tensor
    context: Tensor
    spans: list[np.ndarray]

    def of(self, rows: Sequence[int]) -> "Tokens":
        """Those of these rows, which may stand there several times."""
        contents, spans = ([each[row] for row in rows] for each in (self.contents, self.spans))
        return Tokens(contents, *(each[rows] for each in (self.ids, self.mask, self.context)), spans)


@dataclass
class Encoded:
    """z: [B, M, d_z]; used: [B, M] bool, False on places that a short text leaves empty.

    Where tokens are chosen: their scores [B, T], the span logits (start, end) [B, T, 2], and the places [B, M, T]; and
    windows [B, M, T] bool, where each place has tokens of its own to choose from.
    """

    z: Tensor
    used: Tensor
    tokens: Tokens | None = None
    scores: Tensor | None = None
    span: Tensor | None = None
    places: Tensor | None = None
    windows: Tensor | None = None

    def of(self, rows: Sequence[int]) -> "Encoded":
        """Those of these rows, which may stand there several times."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return Encoded(
            **{
                name: part.of(rows) if isinstance(part, Tokens) else part if part is None else part[rows]
                for name, part in found.items()
            }
        )


class Encoder(nn.Module):
    """Text to Z. A subclass has `forward` and whatever of the rest differs from what stands here.

    Settings: what the class is built from, as flags; chooses_tokens: whether its latents lead back to wire tokens
    (`select`, `chosen_spans`, `choosing`, `perfect`); reads_answers: whether it has an answer of its own (`read`);
    learns_spans: whether answer spans teach it which tokens matter; begins_from: the kinds of encoder that `begin`
    takes.
    """

    name: str
    chooses_tokens = False
    reads_answers = False
    learns_spans = False
    begins_from: tuple[str, ...] = ("codebook",)
    Settings: type[Settings] = Settings

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", d_z: int):
        """tokenizer: the wire's."""
        super().__init__()
        self.tokenizer, self.d_z = tokenizer, d_z

    @classmethod
    def begin(cls, before: "Encoder", settings: Settings, m: int) -> "Encoder":
        """A new one to train. before: the closed form's encoder (tokenizer, codebook), or another of `begins_from`;
        settings: of this class."""
        return cls(before.tokenizer, before.d_z)

    def shape(self) -> dict:
        """What a checkpoint's config keeps beside the weights, as JSON: the further arguments of `of_shape`."""
        return {}

    @classmethod
    def of_shape(cls, tokenizer: "PreTrainedTokenizerBase", d_z: int, folder: Path, **shape: object) -> "Encoder":
        """An encoder that the weights of a checkpoint in `folder` fit."""
        return cls(tokenizer, d_z, **shape)

    def save_parts(self, folder: Path) -> None:
        """Write what is needed to rebuild it beside weights and `shape`."""

    def components(self) -> list[Component]:
        """Every trainable parameter, by the part that stages name."""
        return [component("encoder", self)]

    def forward(self, questions: Sequence[Question], source: str, m: int) -> Encoded:
        """Z of a batch; source: one of SOURCES; m: M."""
        raise NotImplementedError

    def encode(self, questions: Sequence[Question], source: str, m: int | Sequence[int]) -> list[Tensor]:
        """Z of each question: float32 [M, d_z], fewer rows where the text has fewer tokens. m: M, or that of each.

        A question's Z never depends on the batch that it came in: not a bit of it.
        """
        sizes = [m] * len(questions) if isinstance(m, int) else m
        return [one.z[0, one.used[0]].float() for one in self._one_by_one(questions, source, sizes)]

    def select(self, questions: Sequence[Question], source: str, m: int) -> list[list[int]]:
        """For each question the wire token ids that lead its places, in the order they are sent; only where
        `chooses_tokens`."""
        raise NotImplementedError

    def chosen_spans(self, questions: Sequence[Question], source: str, m: int) -> list[list[tuple[int, int]]]:
        """For each question the context's characters [begin, end) behind each place that one of its tokens leads, in
        reading order; only where `chooses_tokens`."""
        return [chosen(m) for chosen in self.choosing(questions, source)]

    def choosing(self, questions: Sequence[Question], source: str) -> list[Callable[[int], list[tuple[int, int]]]]:
        """For each question what gives its `chosen_spans` for an M: the text is read once for all of them, and what was
        read stays in memory; only where `chooses_tokens`."""
        raise NotImplementedError

    def read(self, questions: Sequence[Question]) -> list[str]:
        """The encoder's own answers; only where `reads_answers`."""
        places = self.read_at(questions)
        return [q.context[begin:end].strip() for q, (begin, end) in zip(questions, places, strict=True)]

    def read_at(self, questions: Sequence[Question]) -> list[tuple[int, int]]:
        """The context's characters [begin, end) of each of the encoder's own answers; only where `reads_answers`."""
        raise NotImplementedError

    def perfect(self, questions: Sequence[Question], source: str, m: int) -> list[tuple[Tensor, str]]:
        """What would be sent if each first reference answer were known: float32 [P, d_z], P at most m, and the text
        that it stands for. Only where `chooses_tokens`, and for answers that are spans."""
        raise NotImplementedError

    def fits(self, question: Question, source: str) -> bool:
        """Whether the encoder reads a text at once; longer ones are read in parts."""
        return True

    def ready(self, questions: Sequence[Question], source: str) -> list[dict]:
        """What `forward` need not compute again for each question, as its arguments: what many get at once."""
        return [{} for _ in questions]

    def encoded(
        self, questions: Sequence[Question], source: str, m: int, ready: Sequence[dict] = (), **how: bool
    ) -> list[Encoded]:
        """`forward` without dropout, one question at a time. ready: what `ready` gave for them, where it was asked."""
        return [*self._one_by_one(questions, source, [m] * len(questions), ready, **how)]

    def _one_by_one(
        self, questions: Sequence[Question], source: str, sizes: Sequence[int], ready: Sequence[dict] = (), **how: bool
    ) -> Iterator[Encoded]:
        """The same with an M for each; a caller need not keep what comes, which is larger than Z."""
        with self.still():
            for some in (slice(at, at + _AT_ONCE) for at in range(0, len(questions), _AT_ONCE)):
                mine = ready[some] or self.ready(questions[some], source)
                for q, m, one in zip(questions[some], sizes[some], mine, strict=True):
                    yield self([q], source, m, **one, **how)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Without dropout and gradients."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)


ENCODERS: Registry[type[Encoder]] = Registry("encoder_type")
encoder = ENCODERS.register


def answer_edges(tokens: Tokens, questions: Sequence[Question]) -> list[tuple[int, int]]:
    """First and last wire token of each question's first answer, which must be a span of its context."""
    edges = []
    for question, text, spans in zip(questions, tokens.contents, tokens.spans, strict=True):
        begin = text.context_at + question.starts[0]
        edges.append(overlapping(spans, begin, begin + len(question.answers[0])))
    return edges


def between(first: Tensor, last: Tensor, length: int) -> Tensor:
    """Which of `length` tokens stand between two of them, these included: bool [B, length]; first, last: [B]."""
    place = torch.arange(length, device=first.device)
    return (place >= first[:, None]) & (place <= last[:, None])


def overlapping(spans: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last token (spans [T, 2]) that share a character with [begin, end)."""
    inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > begin))
    assert len(inside), f"no token covers the characters {begin} to {end}"
    return int(inside[0]), int(inside[-1])
