"""A text longer than an LLM can read is refused before anything is computed, where it would be read as a whole."""

import dataclasses

import pytest
from training.run_tools import ready_trainer

from latentwire.data.question import split_by_article
from latentwire.data.registry import DATASETS
from latentwire.training.running import train

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(params=["trained on", "held out"])
def long_question(request, monkeypatch):
    """The id of one question of the sample set, whose text no small model can read as a whole."""
    read = DATASETS["sample"].read
    name, questions = read("train")
    q = split_by_article(questions)[request.param == "held out"][0]
    changed = [dataclasses.replace(q, context=q.context + " word" * 3000) if x.id == q.id else x for x in questions]

    def reading(split):
        return (name, changed) if split == "train" else read(split)

    monkeypatch.setitem(DATASETS, "sample", dataclasses.replace(DATASETS["sample"], read=reading))
    return q.id


@pytest.mark.parametrize("change", [{"kd_weight": 0.5}, {"stage": "text_tuned", "init": ""}], ids=["teacher", "rival"])
def test_a_text_beyond_an_llms_positions_is_refused_and_its_question_named(
    short, codebook, tmp_path, monkeypatch, long_question, change
):
    for name in ("job_of", "teach", "Trainer"):
        monkeypatch.setattr(f"latentwire.training.running.{name}", lambda *a: pytest.fail("it began"))
    settings = {"stage": "joint", "init": str(codebook), "samples": None, "val_samples": 99, "ignore_memory": True}
    with pytest.raises(ValueError, match=rf"question {long_question}: .* positions, and llama .* reads 2048; "):
        train(short(tmp_path / "r", **(settings | change)))
    assert not list((tmp_path / "r").glob("checkpoint_*")) and not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_long_text_does_no_harm_where_no_llm_reads_it_as_a_whole(short, codebook, tmp_path, long_question):
    settings = {"stage": "joint", "init": str(codebook), "samples": None, "val_samples": 99}
    trainer = ready_trainer(short(tmp_path / "r", **settings, kd_weight=0.0, ignore_memory=True))
    assert trainer.step == 0 and trainer.total > 5
