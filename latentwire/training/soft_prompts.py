"""A rival that may train as well: a soft prompt before the text of a condition.

Shapes: d LLM width.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from latentwire.conditions.base import CONDITIONS, Reader, Shared
from latentwire.data.question import Question
from latentwire.llms.attention import alike
from latentwire.models.adapters import SOFT_VECTORS
from latentwire.models.components import Component
from latentwire.models.latentwire import Slots


class SoftPrompts(nn.Module):
    """SOFT_VECTORS learned vectors per LLM before the text of a condition (prompt tuning, Lester et al. 2021,
    arXiv:2104.08691). They start as the embeddings of the instruction's first words, and are learned in units of the
    LLM's own scale, as an adapter is: of a power of two, so that the units cost no bit."""

    def __init__(self, readers: Sequence[Reader], condition: str, m: int, shared: Shared):
        super().__init__()
        self.readers = {reader.llm.name: reader for reader in readers}
        self.condition, self.m, self.shared = CONDITIONS[condition], m, shared
        self.scale = {name: 2.0 ** round(math.log2(r.llm.embedding_rms())) for name, r in self.readers.items()}
        starts = {name: r.llm.embed(r.prompts.head[:SOFT_VECTORS]) for name, r in self.readers.items()}
        self.vectors = nn.ParameterDict({n: nn.Parameter(v.float() / self.scale[n]) for n, v in starts.items()})

    def prompts(self) -> dict[str, Tensor]:
        """The vectors [SOFT_VECTORS, d] of each LLM as it reads them, on the CPU."""
        return {name: (vectors.detach() * self.scale[name]).cpu() for name, vectors in self.vectors.items()}

    @torch.no_grad()
    def restore(self, prompts: Mapping[str, Tensor]) -> None:
        """The reverse of `prompts`, bit by bit."""
        for name, vectors in self.vectors.items():
            vectors.copy_(prompts[name] / self.scale[name])

    def forward(self, questions: Sequence[Question]) -> Slots:
        """Soft prompt and text, for each LLM."""
        rows = {}
        for name, reader in self.readers.items():
            soft = (self.vectors[name] * self.scale[name]).to(reader.llm.dtype)
            texts = [slot.embeds for slot in self.condition.slots(reader, questions, self.m, self.shared)]
            first = alike(texts) if reader.llm.shares else range(len(texts))
            once = {number: torch.cat([soft, texts[number]]) for number in set(first)}
            rows[name] = [once[number] for number in first]
        return Slots(rows, constant={name: len(vectors) for name, vectors in self.vectors.items()})

    def components(self) -> list[Component]:
        """One per LLM."""
        return [Component("soft_prompt", [v], name, rate="soft_prompt_lr") for name, v in self.vectors.items()]
