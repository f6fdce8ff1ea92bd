"""What a wire stands for: which text the encoder reads, by source.

prompt    the context and the question; the LLM finds nothing else
context   the context alone; the question is text, behind the slot
"""

from dataclasses import dataclass

SOURCES = ("prompt", "context")


@dataclass(frozen=True)
class Content:
    """What a wire stands for, and at which character the context and (if it is part of it) the question begin."""

    text: str
    context_at: int
    question_at: int | None


def content(source: str, context: str, question: str) -> Content:
    """The slot's full text for one source."""
    if source == "context":
        return Content(f" {context}", 1, None)
    before = f"Context: {context}\nQuestion: "
    return Content(before + question, len("Context: "), len(before))
