"""Parts of long texts: each fits, none is shorter than it need be, and nothing is lost."""

from itertools import pairwise

import pytest

from latentwire.api.chunks import chunks

TEXT = "One two three. Four five! Six seven eight nine ten? Eleven.\n\nTwelve thirteen. " * 7


def words_fit(most):
    return lambda part: len(part.split()) <= most


@pytest.mark.parametrize("most", [5, 8, 13, 50, 1000])
def test_parts_are_runs_of_whole_sentences_as_long_as_fits(most):
    fits = words_fit(most)
    parts = chunks(TEXT, fits)
    assert " ".join(" ".join(parts).split()) == " ".join(TEXT.split())
    assert all(map(fits, parts))
    for part, following in pairwise(parts):
        assert part[-1] in ".!?"
        first = min((following + " ").index(sign) for sign in ".!?" if sign in following)
        assert not fits(f"{part} {following[: first + 1]}"), "one sentence more would have fitted"


def test_a_text_that_fits_stays_as_it_is():
    assert chunks(f"  {TEXT}", words_fit(10**6)) == [f"  {TEXT}"]


def test_a_sentence_that_does_not_fit_is_cut_between_words_and_a_word_between_signs():
    assert chunks("a b c d e f g. h i.", words_fit(3)) == ["a b c", "d e f", "g.", "h i."]
    assert chunks("abcdefgh ij", lambda part: len(part) <= 3) == ["abc", "def", "gh", "ij"]


def test_few_tries_are_needed():
    tried = []
    chunks("Word word word word. " * 3000, lambda part: tried.append(1) or len(part.split()) <= 300)
    assert len(tried) < 40 * 10


def test_where_nothing_fits_that_is_said():
    with pytest.raises(ValueError, match="shorten the question"):
        chunks("some text", lambda part: False)
