"""Questions on a text itself: how it goes on. What nobody asks about is learned by them, too."""

import dataclasses
import random
import re

from latentwire.data.question import Question

_QUOTED, _ANSWERED = 4, 8  # words


def continuation(question: Question, rng: random.Random) -> Question:
    """Asks for the words that follow some words of the question's context (restoring the text is an objective of ICAE,
    arXiv:2307.06945, and of xRAG, arXiv:2405.13792). A text that is too short for it keeps its question. Where the
    words stand is not told: they are no answer that anybody looks for."""
    words = [(word.start(), word.end()) for word in re.finditer(r"\S+", question.context)]
    if len(words) <= _QUOTED:
        return question
    first = rng.randrange(len(words) - _QUOTED)
    quoted, answer = words[first : first + _QUOTED], words[first + _QUOTED :][:_ANSWERED]
    quote, text = (question.context[part[0][0] : part[-1][1]] for part in (quoted, answer))
    return dataclasses.replace(
        question, id=f"{question.id} continued", question=f'How does the text go on after "{quote}"?', answers=(text,),
        starts=(),
    )  # fmt: skip
