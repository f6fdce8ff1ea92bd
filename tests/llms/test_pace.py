"""Seconds from operations: at a stored rate, corrected by the last run of the same kind of work."""

import dataclasses
import json

import pytest

from latentwire.data.question import Question
from latentwire.llms.arithmetic import Prompt, Shape
from latentwire.llms.pace import ANSWERING, RATES, TRAINING, Work, answer_operations, text_tokens

SMALL = Shape(layers=2, width=4, inner=8, key_width=2, vocabulary=10)
TRAINED = Work(TRAINING, "cpu", "float32", ("a", "b"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pace.json"


def test_the_stored_rate_is_of_a_gpu_or_of_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    rate = RATES[TRAINING]["float32"]
    assert TRAINED.seconds(8 * rate) == TRAINED.stored(8 * rate) == pytest.approx(2.0)
    assert Work(TRAINING, "cuda:1", "bfloat16", ()).seconds(RATES[TRAINING]["cuda"]) == pytest.approx(1.0)


def test_what_a_run_took_corrects_the_next_estimate_of_the_same_work_alone(cache):
    before = TRAINED.seconds(1e12)
    TRAINED.note(2e12, took=6 * before)  # twice the work in six times the time
    assert TRAINED.seconds(1e12) == pytest.approx(3 * before)
    others = [Work(TRAINING, "cpu", "float32", ("a",)), Work(ANSWERING, "cpu", "float32", ("a", "b"))]
    others.append(dataclasses.replace(TRAINED, together=True))
    assert all(other.seconds(1e12) == other.stored(1e12) for other in others)
    others[0].note(1e12, took=5.0)
    TRAINED.note(1e12, took=0.5 * before)
    assert TRAINED.seconds(1e12) == pytest.approx(0.5 * before), "the last one counts"
    assert others[0].seconds(1e12) == pytest.approx(5.0) and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', '{"x": {"stored": 1}}', '{"x": {"stored": 0, "took": 1}}'])
def test_a_damaged_file_is_told_in_one_line_and_the_next_run_repairs_it(cache, capsys, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert TRAINED.seconds(1e12) == TRAINED.stored(1e12)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: damaged") and str(cache) in line
    TRAINED.note(1e12, took=7.0)
    capsys.readouterr()
    assert TRAINED.seconds(1e12) == pytest.approx(7.0) and not capsys.readouterr().err


def test_a_run_goes_on_where_its_time_cannot_be_kept(cache, capsys):
    cache.parent.write_text("a file where the folder should be")
    TRAINED.note(1e12, took=7.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: the next estimate will not know" in line


def test_an_answer_costs_what_its_llm_reads():
    whole, places, nothing = (answer_operations(SMALL, cost, 3, 50.0, 2) for cost in ("whole", "places", "nothing"))
    prefill, after = SMALL.forward(3 + Prompt().tail, Prompt().head, 1), Prompt().head + 3 + Prompt().tail
    assert places == prefill + 2 * SMALL.forward(1, after, 1)
    assert whole > places > nothing > 0


def test_tokens_are_told_from_characters():
    questions = [
        Question("1", "t", "p", "x" * 400, "y" * 30, ("x",), (0,)),
        Question("2", "t", "p", "x", "", ("x",), (0,)),
    ]
    assert text_tokens(questions) == pytest.approx((430 + 1) / 2 / 4.3)
