"""Choices among questions: repeatable, nested, and never the same article to train and to judge."""

import dataclasses
import itertools
from dataclasses import replace

import pytest

from latentwire.data.question import Question, split_by_article, subset


def numbered(n: int) -> list[Question]:
    return [Question(f"id{i:03d}", "t", "t/0", "c", "q", ("c",), (0,)) for i in range(n)]


def test_subset_repeats_with_the_seed_whatever_the_order_of_the_questions():
    questions = numbered(40)
    assert subset(questions, 10, seed=1) == subset(questions[::-1], 10, seed=1)
    assert subset(questions, 10, seed=1) != subset(questions, 10, seed=2)


def test_a_smaller_subset_is_a_prefix_of_a_larger():
    questions = numbered(40)
    largest = subset(questions, 40, seed=3)
    assert all(subset(questions, n, seed=3) == largest[:n] for n in range(1, 40))


def test_together_a_texts_questions_are_chosen_before_those_on_the_next():
    questions = [Question(f"q{i}", "t", "p", f"text {i % 7}", "what?", ("x",)) for i in range(50)]
    chosen = subset(questions, None, seed=3, together=True)
    assert sorted(q.id for q in chosen) == sorted(q.id for q in questions)
    texts = [q.context for q in chosen]
    assert [text for text, _ in itertools.groupby(texts)] == list(dict.fromkeys(texts)), "each text once"
    assert next(iter(dict.fromkeys(texts))) == subset(questions, 1, seed=3)[0].context
    assert all(subset(questions, n, seed=3, together=True) == chosen[:n] for n in range(1, 50))


def test_subset_draws_without_repetition_from_everywhere():
    chosen = subset(numbered(40), 20, seed=0)
    assert len(set(chosen)) == 20
    assert chosen != sorted(chosen, key=lambda q: q.id)
    assert max(chosen, key=lambda q: q.id).id > "id030"


@pytest.mark.parametrize("n", [40, 41, 10**9])
def test_a_subset_larger_than_exists_is_all(n):
    assert sorted(subset(numbered(40), n, seed=0), key=lambda q: q.id) == numbered(40)


def test_no_number_of_questions_means_all():
    assert subset(numbered(40), None, seed=0) == subset(numbered(40), 40, seed=0)


def test_subset_leaves_its_questions_in_place():
    questions = numbered(10)
    subset(questions, 10, seed=0)
    assert questions == numbered(10)


@pytest.mark.parametrize("n", [0, -1])
def test_an_empty_subset_is_refused_with_its_number(n):
    with pytest.raises(ValueError, match=f"at least 1, got {n}"):
        subset(numbered(3), n, seed=0)


def test_an_article_is_trained_on_or_validated_on_but_never_both(questions):
    trained, held = split_by_article(questions)
    assert sorted([*trained, *held], key=lambda q: q.id) == sorted(questions, key=lambda q: q.id)
    assert held and trained and not {q.title for q in trained} & {q.title for q in held}
    assert trained == [q for q in questions if q in set(trained)], "the order stays"


def test_the_held_out_articles_are_always_the_same(questions):
    held = {q.title for q in split_by_article(questions)[1]}
    assert held == {q.title for q in split_by_article(questions[::-1])[1]}


@pytest.mark.parametrize(("articles", "expected"), [(2, 1), (59, 1), (60, 2), (90, 3)])
def test_one_article_in_30_is_held_out_and_at_least_one(articles, expected):
    questions = [dataclasses.replace(numbered(1)[0], id=f"q{i}", title=f"t{i % articles}") for i in range(2 * articles)]
    held = split_by_article(questions)[1]
    assert len({q.title for q in held}) == expected and len(held) == 2 * expected


def test_one_article_cannot_be_split(questions):
    one = [q for q in questions if q.title == questions[0].title]
    with pytest.raises(ValueError, match=r"dataset.*two articles"):
        split_by_article(one)


def test_no_context_of_the_held_out_questions_is_trained_on():
    """Articles may share a paragraph."""
    made = [
        Question(f"{t}{n}", f"title {t}", "p", f"context {t} {n}", "?", ("a",), (0,)) for t in range(8) for n in (0, 1)
    ]
    shared = [replace(q, id=f"again {q.id}", title="title of another") for q in made]
    train, held = split_by_article([*made, *shared])
    assert held and train
    assert not {q.context for q in train} & {q.context for q in held}
    assert not {q.title for q in train} & {q.title for q in held}
