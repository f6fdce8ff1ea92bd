"""What all readers of one evaluation share is computed once."""

from dataclasses import replace

import pytest

from latentwire.conditions import pca
from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared
from latentwire.data.content import SOURCES, encoder_reads_question
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.closed_form import closed_form

M, D_Z = 16, 24


@pytest.fixture(scope="module")
def closed(llms, texts):
    return closed_form(llms, texts, D_Z)[:2]


@pytest.fixture
def readers(llms, closed):
    return [
        Reader(llm, PromptBuilder(llm.tokenizer, "prompt", "zero_shot"), closed[1][name]) for name, llm in llms.items()
    ]


@pytest.fixture
def shared(closed, texts, questions):
    return Shared(questions, sender=Sender(closed[0], "prompt", "fp16"), d_z=D_Z, train_texts=texts)


def test_pca_is_fitted_once_per_llm_whatever_asks_for_it(readers, shared, questions, monkeypatch):
    asked, fit = [], pca.Pca.__init__
    monkeypatch.setattr(
        pca.Pca, "__init__", lambda self, llm, texts: (asked.append((llm.name, texts)), fit(self, llm, texts))[0]
    )
    linear = [condition for condition in CONDITIONS.values() if condition.explained]
    assert {"pca", "pca_pool", "pca_rank"} <= {condition.name for condition in linear}
    for m in (M, 5):
        for condition in linear:
            for reader in readers:
                condition.slots(reader, questions[:2], m, shared)
                assert 0 < condition.explained(reader, m, shared) < 1
    assert asked == [(reader.llm.name, shared.train_texts) for reader in readers]
    other = Shared(questions, d_z=D_Z, train_texts=shared.train_texts)
    CONDITIONS["pca"].slots(readers[0], questions[:1], M, other)
    assert len(asked) == 3, "another evaluation fits its own"


def test_a_condition_that_reads_no_pca_fits_none(readers, shared, questions, monkeypatch):
    monkeypatch.setattr(pca.Pca, "__init__", lambda *a: pytest.fail("fitted"))
    for name in ("text", "token_budget", "latentwire", "no_context"):
        CONDITIONS[name].slots(readers[0], questions[:1], M, shared)
    assert shared.kept == {}


def test_a_question_is_encoded_once_for_all_llms_and_conditions(readers, shared, questions, monkeypatch):
    encoder, encoded = shared.sender.encoder, []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder,
        "encode",
        lambda asked, source, m: (encoded.extend((q.id, m) for q in asked), encode(asked, source, m))[1],
    )
    for m in (M, 5):
        for name in ("latentwire", "shuffled_z", "latentwire"):
            for reader in readers:
                CONDITIONS[name].slots(reader, questions[:4], m, shared)
    assert len(encoded) == len(set(encoded))
    assert {(q.id, m) for q in questions[:4] for m in (M, 5)} <= set(encoded)


@pytest.mark.parametrize("source", SOURCES)
def test_questions_on_a_text_share_its_wire_where_the_encoder_does_not_read_them(
    shared, questions, source, monkeypatch
):
    first = questions[0]
    other = replace(first, id="other", question="How many?")
    assert other.question != first.question
    sender, encoded = Sender(shared.sender.encoder, source, "fp16"), []
    encode = sender.encoder.encode
    monkeypatch.setattr(
        sender.encoder, "encode", lambda asked, *how: (encoded.append(len(asked)), encode(asked, *how))[1]
    )
    together = sender.send([first, other], M)
    assert together == sender.send([first], M) + sender.send([other], M), "nothing is computed again"
    assert sum(encoded) == 1 + encoder_reads_question(source)
