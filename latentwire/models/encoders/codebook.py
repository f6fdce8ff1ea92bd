"""codebook: the encoder of the closed form, before any training.

Shapes: B batch, M latents, V wire vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.data.relevance import relevant_stretch
from latentwire.llms.prompts import AS_TEXT
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoded, Encoder, encoder, overlapping
from latentwire.utils.cli import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_SHARE = 0.75  # of the M latents at most: a long question must leave room for the context


@encoder("codebook")
class ClosedFormEncoder(Encoder):
    """M tokens are selected by TF-IDF, and each is sent as its code from the codebook [V, d_z]; nothing is trained.

    With source "prompt" the question closes the wire, as it does the full text, and the stretch of context that fits
    it best fills the room before it; with source "aware" such a stretch is all of the wire; with source "context",
    where the question is unknown, the beginning is sent.
    """

    chooses_tokens = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", d_z: int, vocabulary: int):
        super().__init__(tokenizer, d_z)
        self.codebook = nn.Embedding(vocabulary, d_z)

    @classmethod
    def from_codebook(cls, tokenizer: "PreTrainedTokenizerBase", codebook: Tensor) -> "ClosedFormEncoder":
        """codebook: float32 [V, d_z]."""
        made = cls(tokenizer, codebook.shape[1], len(codebook))
        made.load_state_dict({"codebook.weight": codebook})
        return made

    @classmethod
    def begin(cls, before: Encoder, settings: Settings, m: int) -> Encoder:
        """The closed form's encoder itself: its selection is fixed, its codebook can be trained."""
        return before

    def shape(self) -> dict:
        return {"vocabulary": self.codebook.num_embeddings}

    def components(self) -> list[Component]:
        return [component("codebook", self.codebook, rate="codebook_lr")]

    def forward(self, questions: Sequence[Question], source: str, m: int) -> Encoded:
        device = self.codebook.weight.device
        rows = [torch.tensor(ids, device=device) for ids in self.select(questions, source, m)]
        used = torch.arange(m, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
        ids = torch.zeros(len(rows), m, dtype=torch.long, device=device)
        ids[used] = torch.cat(rows)
        return Encoded(self.codebook(ids), used)

    def select(self, questions: Sequence[Question], source: str, m: int) -> list[list[int]]:
        """For each question the wire token ids, at most m, in the order they are sent."""
        chosen = (self._chosen(q, source, m) for q in questions)
        return [label + of_context + asked for label, of_context, _, asked in chosen]

    def choosing(self, questions: Sequence[Question], source: str) -> list[Callable[[int], list[tuple[int, int]]]]:
        return [lambda m, q=q: self._chosen(q, source, m)[2] for q in questions]

    @torch.no_grad()
    def perfect(self, questions: Sequence[Question], source: str, m: int) -> list[tuple[Tensor, str]]:
        """The tokens around each answer, as many as there is room for."""
        return [self._perfect(q, source, m) for q in questions]

    def _perfect(self, question: Question, source: str, m: int) -> tuple[Tensor, str]:
        encoded = self.tokenizer(question.context, **AS_TEXT, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], np.array(encoded["offset_mapping"])
        first, last = overlapping(spans, question.starts[0], question.starts[0] + len(question.answers[0]))

        def around(room: int) -> slice:
            start = max(0, min((first + last + 1 - room) // 2, len(spans) - room))
            return slice(start, min(start + room, len(spans)))

        if not question_in_tail(source):
            label, asked, room = self._around_context(question, m)
            chosen = label + (ids[around(room)] if room else []) + asked
            return self._codes(chosen), self.tokenizer.decode(chosen)
        window = around(m)
        text = question.context[spans[window][0, 0] : spans[window][-1, 1]]
        return self._codes(ids[window]), f" {text.strip()}"

    def _chosen(
        self, question: Question, source: str, m: int
    ) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:
        """Wire token ids of label, context and question, at most m together, and the characters of the context's."""
        label, asked, room = ([], [], m) if question_in_tail(source) else self._around_context(question, m)
        text, at = (f" {question.context}", 1) if question_in_tail(source) else (question.context, 0)
        encoded = self.tokenizer(text, **AS_TEXT, return_offsets_mapping=True)
        spans, stretch = encoded["offset_mapping"], slice(room)
        if encoder_reads_question(source) and room:
            stretch = relevant_stretch(question.question, text, spans, room)
        characters = [(max(begin - at, 0), end - at) for begin, end in spans[stretch]]
        return label, encoded["input_ids"][stretch], characters, asked

    def _around_context(self, question: Question, m: int) -> tuple[list[int], list[int], int]:
        """Ids of label and question, where they are part of the wire, and the room that they leave to the context."""
        asked = self._ids(f"\nQuestion: {question.question}")[: max(1, int(m * QUESTION_SHARE))]
        label = self._ids("Context:")[: m - len(asked)]
        return label, asked, m - len(asked) - len(label)

    def _codes(self, ids: list[int]) -> Tensor:
        return self.codebook(torch.tensor(ids, device=self.codebook.weight.device)).float()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, **AS_TEXT)["input_ids"]
