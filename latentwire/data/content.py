"""What a wire stands for, and what the encoder reads of it, by source.

           the encoder reads      the wire stands for     the question is
prompt     context and question   context and question    in the wire
context    the context            the context             text, behind the slot
aware      context and question   the context             text, behind the slot
"""

from dataclasses import dataclass

SOURCES = ("prompt", "context", "aware")  # a wire's header holds the place in this row: new ones go to its end


def encoder_reads_question(source: str) -> bool:
    """Whether encoding needs the question: a wire then serves one question."""
    return source != "context"


def question_in_tail(source: str) -> bool:
    """Whether the LLM reads the question as text behind the slot, so that M counts places of the context alone."""
    return source != "prompt"


@dataclass(frozen=True)
class Content:
    """A text, and at which character of it the context and (if it is part of it) the question begin."""

    text: str
    context_at: int
    question_at: int | None


def content(source: str, context: str, question: str) -> Content:
    """The slot's full text for one source: what its wire stands for."""
    if question_in_tail(source):
        return Content(f" {context}", 1, None)
    before = f"Context: {context}\nQuestion: "
    return Content(before + question, len("Context: "), len(before))


def reading(source: str, context: str, question: str) -> Content:
    """What the encoder reads for one source. It begins with the slot's text, so that a character has one place."""
    slot = content(source, context, question)
    if slot.question_at is not None or not encoder_reads_question(source):
        return slot
    before = f"{slot.text}\nQuestion: "
    return Content(before + question, slot.context_at, len(before))
