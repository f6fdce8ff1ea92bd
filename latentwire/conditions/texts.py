"""Text in the slot: the whole of it, nothing of it, and what fits M tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latentwire.conditions.base import Reader, Shared, Slot, condition, text_slot
from latentwire.data.content import question_in_tail
from latentwire.data.question import Question
from latentwire.data.relevance import relevance, sentences


@condition("text", "#4f7cac", "whole", groups=("baselines", "quick"))
def whole_text(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The whole content as text, as the plain LLM reads it."""
    return [text_slot(reader, content_ids(reader, q)) for q in questions]


@condition("token_budget", "#66a182", "places", uses=("m",), groups=("baselines", "quick"), also=(2,))
def token_budget(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The first M tokens of question and context, in that order, so that the question survives."""
    return [text_slot(reader, question_first_ids(reader, q)[:m]) for q in questions]


@condition("token_budget_context", "#8f6bb0", "places", uses=("m",), default_in=("prompt",), groups=("baselines",))
def token_budget_context(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The first M tokens of the context, and the whole question on top (where it is text anyway: token_budget)."""
    if question_in_tail(reader.prompts.source):
        return token_budget(reader, questions, m, shared)
    ids = reader.prompts.plain
    return [
        text_slot(reader, ids("Context:") + ids(f" {q.context}")[:m] + ids(f"\nQuestion: {q.question}"))
        for q in questions
    ]


@condition("token_select", "#d08c2f", "places", uses=("m",), groups=("baselines",))
def token_select(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """token_budget with the context's sentences in another order: the one that fits the question best comes first."""
    slots = []
    for q in questions:
        parts = sentences(q.context)
        order = np.argsort(-relevance(q.question, parts), kind="stable")
        chosen = " ".join(parts[i] for i in order)
        slots.append(text_slot(reader, question_first_ids(reader, replace(q, context=chosen))[:m]))
    return slots


@condition("no_context", "#9aa5b1", "nothing", groups=("baselines", "quick"))
def no_context(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """An empty slot: the question alone if the tail holds it, else nothing."""
    return [text_slot(reader, []) for _ in questions]


@condition("question_only", "#7a8794", "nothing", sources=("prompt",), default_in=(), groups=("baselines",))
def question_only(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The question without its context: what the LLM knows by heart. Elsewhere no_context is this."""
    return [text_slot(reader, reader.prompts.plain(f"Question: {q.question}")) for q in questions]


def content_ids(reader: Reader, question: Question) -> list[int]:
    """Token ids of everything that a wire stands for."""
    return reader.prompts.plain(reader.prompts.content_text(question.context, question.question))


def question_first_ids(reader: Reader, question: Question) -> list[int]:
    """The same with the question first, so that a cut keeps it."""
    return reader.prompts.plain(reader.prompts.question_first_text(question.context, question.question))
