"""A question, and choices among many of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
SPLITS = ("dev", "train", "held_out")

Scorer = Callable[[str, Sequence[str]], dict[str, float]]  # prediction, references -> "f1", "em", fractions of 1


@dataclass(frozen=True)
class Question:
    """One question on one paragraph. Where answers are spans, `starts[i]` is the character offset of `answers[i]` in
    `context`."""

    id: str
    title: str  # of the article: splits and shuffles keep articles apart
    paragraph: str  # identifies the paragraph: intervals are drawn by it
    context: str
    question: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one split. name: of the data that they really come from; score: of an answer to them; spans: whether
    their answers stand in their contexts."""

    name: str
    questions: list[Question]
    score: Scorer
    spans: bool


def subset(questions: list[Question], n: int | None, seed: int, together: bool = False) -> list[Question]:
    """A seeded choice of n questions, or all if n is None or there are fewer; a smaller choice is a prefix of a larger.

    together: all questions on a text before those on the next, so that few texts serve many questions. Raises
    ValueError for n below 1.
    """
    if n is not None and n < 1:
        raise ValueError(f"samples must be at least 1, got {n}")
    chosen = sorted(questions, key=lambda q: q.id)
    random.Random(seed).shuffle(chosen)
    return (grouped(chosen, lambda q: q.context) if together else chosen)[:n]


def named(questions: Sequence[Question], ids: Sequence[str], source: str) -> list[Question]:
    """The questions of these ids, in their order. ValueError where `source` lacks one, or one is named twice."""
    by_id = {q.id: q for q in questions}
    lacking = [id_ for id_ in ids if id_ not in by_id]
    if lacking or not ids:
        raise ValueError(f"ids: {len(lacking)} of {len(ids)} questions are not in {source}, the first {lacking[:1]}")
    if len(set(ids)) < len(ids):
        raise ValueError("ids: a question is named twice")
    return [by_id[id_] for id_ in ids]


def grouped(items: Sequence[T], key: Callable[[T], str]) -> list[T]:
    """Items of the same key behind each other, in the order of each key's first."""
    first: dict[str, int] = {}
    for place, item in enumerate(items):
        first.setdefault(key(item), place)
    return sorted(items, key=lambda item: first[key(item)])


def split_by_article(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and those of one article in 30 (at least one) to validate on.

    No context of the latter is trained on, whichever article repeats it. The choice is always the same, so that no
    stage and no seed of a training sees what another one is judged by. Raises ValueError if all questions are on one
    article.
    """
    titles = sorted({q.title for q in questions})
    if len(titles) < 2:
        raise ValueError("dataset: training needs questions on two articles or more, to hold one out for validation")
    random.Random(0).shuffle(titles)
    held = set(titles[: max(1, len(titles) // 30)])
    judged = [q for q in questions if q.title in held]
    contexts = {q.context for q in judged}
    return [q for q in questions if q.title not in held and q.context not in contexts], judged
