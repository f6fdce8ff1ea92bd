"""LatentWire as one module: what training changes.

Shapes: P_i positions of a slot, d LLM width, M latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.functional import pad

from latentwire.data.content import encoder_reads_question
from latentwire.data.question import Question
from latentwire.models.adapters import Adapter
from latentwire.models.components import Component
from latentwire.models.encoders.base import Encoded, Encoder


@dataclass
class Slots:
    """embeds: per LLM, one slot [P_i, d] per question; encoded: what the encoder says of them, if there is one; deltas:
    per LLM whose adapter is deep, what is added to each slot's keys and values [layers, 2, P_i, k]; constant: per LLM,
    how many first positions are the same in all slots."""

    embeds: dict[str, list[Tensor]]
    encoded: Encoded | None = None
    deltas: dict[str, list[Tensor]] = field(default_factory=dict)
    constant: dict[str, int] = field(default_factory=dict)


class LatentWire(nn.Module):
    """One encoder pass, and one adapter per LLM on its Z."""

    def __init__(self, encoder: Encoder, adapters: Mapping[str, Adapter], source: str, m: int):
        super().__init__()
        self.encoder, self.source, self.m = encoder, source, m
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, questions: Sequence[Question]) -> Slots:
        """The slots of each LLM, from one Z. Questions whose Z is the same have the same slot, the same object."""
        texts, places = self._texts(questions)
        encoded = self.encoder(texts, self.source, self.m)
        rows, deltas = {}, {}
        for name, adapter in self.adapters.items():
            used = pad(encoded.used, (adapter.constant, 0), value=True)  # [texts, constant + M]
            once = [prefix[mine] for prefix, mine in zip(adapter(encoded.z), used, strict=True)]
            rows[name] = [once[place] for place in places]
            if adapter.deep:
                once = [adapter.deltas(z[mine]) for z, mine in zip(encoded.z, encoded.used, strict=True)]
                deltas[name] = [once[place] for place in places]
        constant = {name: adapter.constant for name, adapter in self.adapters.items()}
        return Slots(rows, encoded if texts is questions else encoded.of(places), deltas, constant)

    def _texts(self, questions: Sequence[Question]) -> tuple[Sequence[Question], Sequence[int]]:
        """What is encoded, and which of it each question has. Where the encoder does not read the question, a text is
        encoded once for all that is asked about it."""
        if encoder_reads_question(self.source):
            return questions, range(len(questions))
        once = {q.context: q for q in questions}
        place = {context: number for number, context in enumerate(once)}
        return [*once.values()], [place[q.context] for q in questions]

    def components(self) -> list[Component]:
        """Those of the encoder, and of each adapter."""
        adapters = [found for name, adapter in self.adapters.items() for found in adapter.components(name)]
        return [*self.encoder.components(), *adapters]
