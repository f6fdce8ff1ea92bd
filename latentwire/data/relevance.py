"""Which part of a context a question is about, without any training: TF-IDF over its passages."""

import re
from collections.abc import Sequence

import numpy as np

STRIDE = 2  # step between candidate stretches, in tokens
_SMOOTHING = np.bartlett(19)[1:-1] / np.bartlett(19).sum()  # an answer stands near the question's words, not on them
_WORD = re.compile(r"\w+|[^\w\s]")
# Closing signs before white space; tried once per run of them, so that a long run takes no longer than its length.
_END = re.compile(r"(?<![.!?])([.!?]++)[\"'\u201d\u2019)\]]*+(?=\s)")


def sentences(context: str) -> list[str]:
    """Split a text into sentences at closing punctuation; no character but outer white space is lost."""
    return [context[begin:end] for begin, end in sentence_spans(context)]


def sentence_spans(context: str) -> list[tuple[int, int]]:
    """The characters [begin, end) of each sentence, without outer white space."""
    text = context.strip()
    at = len(context) - len(context.lstrip())
    ends = [found.end() for found in _END.finditer(text) if found.end(1) > 1] + [len(text)]
    pairs = [(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if begin < end]
    return [
        (at + end - len(text[begin:end].lstrip()), at + begin + len(text[begin:end].rstrip())) for begin, end in pairs
    ]


def in_whole_words(text: str, spans: Sequence[tuple[int, int]], gap: str = " ... ") -> str:
    """The words of a text that spans [begin, end) touch, as text: neighbours stand as they did, others behind a gap."""
    pieces: list[list[int]] = []
    before = False  # whether the word before was touched
    for begin, end in (found.span() for found in _WORD.finditer(text)):
        touched = any(a < end and begin < b for a, b in spans)
        if touched and before:
            pieces[-1][1] = end
        elif touched:
            pieces.append([begin, end])
        before = touched
    return gap.join(text[begin:end] for begin, end in pieces)


def relevance(question: str, passages: list[str]) -> np.ndarray:
    """Cosine similarity [len(passages)] of the question to each passage, in TF-IDF of word stems."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    vectorizer = TfidfVectorizer(analyzer=_stems, sublinear_tf=True)
    if not any(_stems(passage) for passage in passages):
        return np.zeros(len(passages))
    return (vectorizer.fit_transform(passages) @ vectorizer.transform([question]).T).toarray()[:, 0]


def relevant_stretch(question: str, context: str, offsets: list[tuple[int, int]], length: int) -> slice:
    """The run of `length` tokens of the context (all, if it is shorter) that best fits the question.

    offsets: the tokens' character spans in `context`. Scores of neighbouring stretches are averaged, since overlap of
    words says where the answer is only roughly; among equals the middle one wins.
    """
    last = max(0, len(offsets) - length)
    starts = [*range(0, last, STRIDE), last]
    passages = [context[offsets[s][0] : offsets[min(s + length, len(offsets)) - 1][1]] for s in starts]
    reach = len(_SMOOTHING) // 2
    scores = np.convolve(np.pad(relevance(question, passages), reach, mode="edge"), _SMOOTHING, mode="valid")
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    start = starts[best[len(best) // 2]]
    return slice(start, start + length)


def _stems(text: str) -> list[str]:
    """Lower-case words without stop words, cut to five letters so that inflected forms meet."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return [word[:5] for word in re.findall(r"\w+", text.lower()) if word not in ENGLISH_STOP_WORDS]
