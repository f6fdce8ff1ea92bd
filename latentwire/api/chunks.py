"""Parts of a text that an encoder can read at once."""

import re
from collections.abc import Callable

from latentwire.data.relevance import sentence_spans

Spans = list[tuple[int, int]]  # characters


def chunks(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Parts of a text that each fit, as long as possible, cut at ends of sentences; a sentence that does not fit is cut
    between words, and a word that does not between signs. Nothing but white space between parts is lost.

    Raises ValueError where not even one sign fits.
    """
    if fits(text):
        return [text]
    return [text[begin:end] for begin, end in _filled(text, sentence_spans(text), fits, _FINER)]


def _filled(text: str, units: Spans, fits: Callable[[str], bool], finer: tuple[Callable[[str], Spans], ...]) -> Spans:
    """Runs of units, each as long as fits."""
    found, at, guess = [], 0, 1
    while at < len(units):
        count = _most(lambda n, at=at: fits(text[units[at][0] : units[at + n - 1][1]]), len(units) - at, guess)
        if count:
            found.append((units[at][0], units[at + count - 1][1]))
            at, guess = at + count, count
            continue
        if not finer:
            raise ValueError("context: not even one sign fits beside the question; shorten the question")
        begin, end = units[at]
        inner = [(begin + b, begin + e) for b, e in finer[0](text[begin:end])]
        found += _filled(text, inner, fits, finer[1:])
        at += 1
    return found


def _most(fits: Callable[[int], bool], limit: int, guess: int) -> int:
    """The largest n up to limit that fits, 0 if not even 1 does; fewer tries the nearer the guess."""
    low, high = 0, min(guess, limit)
    while fits(high):
        if high == limit:
            return limit
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _word_spans(text: str) -> Spans:
    return [found.span() for found in re.finditer(r"\S+", text)]


def _sign_spans(text: str) -> Spans:
    return [(i, i + 1) for i in range(len(text))]


_FINER = (_word_spans, _sign_spans)
