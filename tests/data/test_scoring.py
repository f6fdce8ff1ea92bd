"""Answer scores worked out by hand."""

import unicodedata

import pytest

from latentwire.data.scoring import exact_match, f1_score, normalize_answer, squad_scores
from latentwire.data.squad import load


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("a an the", ""),
        ("theatre and another anthem", "theatre and another anthem"),
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),
        ("A.I.", "ai"),
        ("$1,000.50 (approx.)", "100050 approx"),
        ("'quoted' & \"double\"", "quoted double"),
        ("“curly” 1793–1952", "“curly” 1793–1952"),
        ("Émile ZOLA, Łódź", "émile zola łódź"),
        ("  two \t spaces\n and lines ", "two spaces and lines"),
        ("the\u00a0non-breaking\u00a0space", "nonbreaking space"),
        ("!?.", ""),
        ("", ""),
    ],
)
def test_normalisation_follows_squad(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("cat sat", "cat sat on mat", 2 / 3),  # precision 1, recall 1/2
        ("cat cat", "cat", 2 / 3),  # a repeated word counts once: precision 1/2, recall 1
        ("cat cat", "cat cat dog", 0.8),  # precision 1, recall 2/3
        ("blue green", "green red blue", 0.8),
        ("red green blue", "blue green red", 1.0),
        ("in 1952 the boats", "1952", 0.5),  # precision 1/3, recall 1
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a cat", 0.0),
        ("cat", "the", 0.0),
    ],
)
def test_f1_equals_the_hand_computed_value(prediction, reference, expected):
    assert f1_score(prediction, [reference]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("eiffel", "eiffel tower", 0.0),
        ("tower eiffel", "eiffel tower", 0.0),
        ("Zürich", "zurich", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_exact_match_compares_normalised_answers(prediction, reference, expected):
    assert exact_match(prediction, [reference]) == expected


@pytest.mark.parametrize("references", [["Paris France", "Paris", "London"], ["Paris", "London", "Paris France"]])
def test_the_best_reference_counts_wherever_it_stands(references):
    assert f1_score("paris", references) == 1.0
    assert exact_match("paris", references) == 1.0


def test_f1_is_not_pooled_over_references():
    assert f1_score("paris london", ["paris", "london"]) == pytest.approx(2 / 3)
    assert exact_match("paris london", ["paris", "london"]) == 0.0


def test_both_scores_of_an_answer_are_fractions_of_1_by_their_names():
    assert squad_scores("The Paris.", ["Rome", "paris"]) == {"f1": 1.0, "em": 1.0}
    assert squad_scores("paris london", ["paris", "london"]) == {"f1": pytest.approx(2 / 3), "em": 0.0}


def test_the_same_signs_are_the_same_however_they_are_composed():
    for whole in ("café", "한솔", "Ångström"):
        assert squad_scores(unicodedata.normalize("NFD", whole), [whole]) == {"f1": 1.0, "em": 1.0}
        assert squad_scores(whole, [unicodedata.normalize("NFD", whole)]) == {"f1": 1.0, "em": 1.0}
    assert squad_scores("cafe", ["café"])["em"] == 0.0, "an accent still counts"


def test_no_answer_of_the_sample_set_changes_by_composing():
    """Nor does one of SQuAD v1.1: normalised without and with it, 105,377 references of train and a part of dev are the
    same, looked at by hand."""
    answers = [answer for split in ("train", "dev") for q in load("sample", split).questions for answer in q.answers]
    assert len(answers) > 240 and all(unicodedata.is_normalized("NFC", answer) for answer in answers)
