"""Scores of an answer against its references.

F1 and exact match follow the SQuAD v1.1 evaluation (Rajpurkar et al., 2016): answers are compared as bags of words
after lower-casing and removing punctuation, articles and surplus space; the best reference counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from unicodedata import normalize

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Both scores, as a prediction line has them: fractions of 1."""
    return {"f1": f1_score(prediction, references), "em": exact_match(prediction, references)}


def normalize_answer(text: str) -> str:
    """Compose signs (NFC) and lower-case; drop ASCII punctuation, then English articles, then surplus white space."""
    return " ".join(_ARTICLES.sub(" ", normalize("NFC", text).lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised reference, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(r) for r in references))


def f1_score(prediction: str, references: Sequence[str]) -> float:
    """Best token-overlap F1 (0 to 1) of the prediction against any of the references."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(r).split()) for r in references)


def _f1(predicted: list[str], reference: list[str]) -> float:
    overlap = sum((Counter(predicted) & Counter(reference)).values())
    if overlap == 0:
        return 0.0
    precision, recall = overlap / len(predicted), overlap / len(reference)
    return 2 * precision * recall / (precision + recall)
