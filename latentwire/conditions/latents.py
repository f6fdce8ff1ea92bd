"""The wire in the slot, its controls, and what its encoder chose or read."""

import random
from collections.abc import Sequence
from dataclasses import replace

from latentwire.conditions.base import Reader, Shared, Slot, condition, text_slot
from latentwire.data.content import SOURCES, encoder_reads_question
from latentwire.data.question import Question

ASKED = tuple(filter(encoder_reads_question, SOURCES))  # sources whose encoder reads the question


@condition("latentwire", "#d1495b", "places", uses=("m", "d_z", "wire"), groups=("learned", "quick"))
def latents(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """Z through the adapter, after the wire."""
    return [shared.sender.slot(packed, reader.adapter) for packed in shared.sender.send(questions, m)]


@condition("untrained", "#e08a98", "places", uses=("m", "d_z", "untrained"), default_in=(), groups=("learned", "quick"))
def untrained(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The wire before any training (closed form): LatentWire minus this is what training added."""
    sender, adapters = shared.untrained
    return [sender.slot(packed, adapters[reader.llm.name]) for packed in sender.send(questions, m)]


@condition("shuffled_z", "#b8a9c9", "places", uses=("m", "d_z", "wire"), needs=("two_articles",), groups=("learned",))
def shuffled_z(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """Z of a question on another article: must fall to no_context, or Z is not what carries the answer."""
    return latents(reader, [_partner(q, shared) for q in questions], m, shared)


@condition(
    "shuffled_context_z", "#8e79a8", "places", uses=("m", "d_z", "wire"), needs=("two_articles",), sources=ASKED,
    default_in=(), groups=("learned",),
)  # fmt: skip
def shuffled_context_z(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """Z of another article's context with this question: what is answered without the context that was asked about."""
    pairs = [(q, _partner(q, shared)) for q in questions]
    moved = [replace(q, context=other.context) for q, other in pairs]
    return latents(reader, moved, m, shared)


@condition(
    "selected_text", "#b0913b", "places", uses=("m", "wire"), needs=("chooses_tokens",), default_in=(),
    groups=("learned",),
)  # fmt: skip
def selected_text(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The encoder's own M tokens as plain text: LatentWire minus this is what latents and training on them add."""
    encoder = shared.sender.encoder
    chosen = map(encoder.tokenizer.decode, encoder.select(questions, reader.prompts.source, m))
    return [text_slot(reader, reader.prompts.plain(text)) for text in chosen]


@condition(
    "encoder_only", "#6f7fd0", "nothing", uses=("wire",), needs=("reads_answers",), sources=ASKED, default_in=(),
    groups=("learned",), by_llm=False,
)  # fmt: skip
def encoder_only(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[str]:
    """The encoder's own best span, no LLM: what it read already, before any LLM did."""
    return shared.sender.encoder.read(questions)


def _partner(question: Question, shared: Shared) -> Question:
    """A question on another article, always the same one for the same seed."""
    others = [q for q in shared.questions if q.title != question.title]
    return random.Random(f"{shared.seed} {question.id}").choice(others)
