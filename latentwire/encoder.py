"""The encoder: text to Z, M latents of width d_z, in reading order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latentwire.data import Question
from latentwire.relevance import relevant_stretch

_QUESTION_SHARE = 0.75  # of the M latents at most: a long question must leave room for the context


class CodebookEncoder(nn.Module):
    """Stage 0, untrained: M tokens are selected and each is sent as its code from the codebook [V, d_z].

    With source "prompt" the question closes the wire, as it does the full text, and the stretch of context that fits
    it best fills the room before it; with source "context", where the question is unknown, the beginning is sent.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, d_z: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.codebook = nn.Embedding(vocabulary, d_z)

    @classmethod
    def from_codebook(cls, tokenizer: PreTrainedTokenizerBase, codebook: Tensor) -> "CodebookEncoder":
        encoder = cls(tokenizer, *codebook.shape)
        encoder.load_state_dict({"codebook.weight": codebook})
        return encoder

    @torch.no_grad()
    def encode(self, questions: Sequence[Question], source: str, m: int) -> list[Tensor]:
        """Z of each question: float32 [M, d_z], fewer rows where the text has fewer tokens."""
        return [self.codebook(torch.tensor(self.select(question, source, m))) for question in questions]

    def select(self, question: Question, source: str, m: int) -> list[int]:
        """Wire token ids, at most m, in the order they are sent."""
        if source == "context":
            return self.tokenizer(f" {question.context}", add_special_tokens=False)["input_ids"][:m]
        asked = self._ids(f"\nQuestion: {question.question}")[: max(1, int(m * _QUESTION_SHARE))]
        label = self._ids("Context:")[: m - len(asked)]
        room = m - len(asked) - len(label)
        if room < 1:
            return label + asked
        encoded = self.tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
        chosen = relevant_stretch(question.question, question.context, encoded["offset_mapping"], room)
        return label + encoded["input_ids"][chosen] + asked

    def window(self, question: Question, m: int) -> tuple[list[int], str]:
        """The m wire tokens around the first reference answer, and their text: what a perfect selection would send."""
        encoded = self.tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        first, last = question.starts[0], question.starts[0] + len(question.answers[0])
        inside = [i for i, (start, end) in enumerate(spans) if start < last and end > first]
        start = (inside[0] + inside[-1] + 1 - m) // 2
        start = max(0, min(start, len(spans) - m))
        stop = min(start + m, len(spans))
        return encoded["input_ids"][start:stop], question.context[spans[start][0] : spans[stop - 1][1]]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
