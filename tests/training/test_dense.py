"""What trains a wire that many ask: one encoding for all questions on a text, an M that falls to what it will be,
questions how a text goes on, and a teacher with a tuned prompt."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from training.run_tools import LLMS, lines_of, ready_trainer, trained_on

from latentwire.data.continuing import continuation
from latentwire.data.question import Question
from latentwire.models.encoders.base import ENCODERS
from latentwire.training import running
from latentwire.training.running import train
from latentwire.training.teacher import score_texts, teach
from latentwire.training.trainer import Batches, steps_of

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def dense(short, run_of, encoder_folder, tmp_path_factory):
    """dense(folder, **changes): settings of stage joint with anchors, source context."""
    how = {"adapter_type": "deep", "source": "context", "encoder_type": "anchors"}
    how["encoder"] = ENCODERS["anchors"].Settings(encoder_id=encoder_folder)
    folder = tmp_path_factory.mktemp("dense")
    codebook = run_of(short(folder / "codebook", stage="codebook", **how)) / "checkpoint_best"
    return lambda folder, **changes: short(folder, **(how | {"init": str(codebook), "latent_len": 8} | changes))


@pytest.fixture(scope="module")
def tuned(short, run_of, tmp_path_factory):
    """A checkpoint of soft prompts before whole texts, of the same source."""
    config = short(tmp_path_factory.mktemp("tuned"), stage="text_tuned", source="context", samples=8)
    return run_of(config) / "checkpoint_best"


def test_a_text_is_encoded_once_for_all_that_is_asked_about_it(dense, tmp_path, monkeypatch):
    model = ready_trainer(dense(tmp_path / "r")).job.model.eval()
    asked, *others = trained_on(dense(tmp_path))[0]
    other = next(q for q in others if q.context != asked.context)
    batch = [asked, other, dataclasses.replace(asked, id="again", question="And why?")]
    assert asked.context != other.context
    seen, forward = [], type(model.encoder).forward

    def noting(self, questions, *rest):
        seen.append([q.context for q in questions])
        return forward(self, questions, *rest)

    monkeypatch.setattr(type(model.encoder), "forward", noting)
    slots = model(batch)
    assert seen == [[asked.context, other.context]]
    assert len(slots.encoded.tokens.contents) == len(slots.encoded.z) == 3
    for name in LLMS:
        alone = [model([q]) for q in batch]
        for row, one in enumerate(alone):
            torch.testing.assert_close(slots.embeds[name][row], one.embeds[name][0])
            torch.testing.assert_close(slots.deltas[name][row], one.deltas[name][0])


@pytest.mark.parametrize("processes", [1, 2])
def test_questions_on_a_text_stand_together_where_it_is_encoded_once(short, tmp_path, processes):
    together = short(tmp_path, samples=96, source="context", stage="text_tuned")
    questions, _ = trained_on(together)
    texts = len({q.context for q in questions})
    assert texts < len(questions) / 2

    def changes(config):
        each, _ = steps_of(config, len(questions), processes)
        batches = Batches(config, questions, processes)
        batches = [batches[step] for step in range(each)]
        ids = [q.id for batch in batches for q in batch]
        assert len(ids) == len(set(ids)) == 96
        return sum(len([*itertools.groupby(batch, lambda q: q.context)]) for batch in batches)

    cuts = 96 // (8 * processes)  # a batch may begin inside a text
    assert changes(together) <= texts + cuts < changes(dataclasses.replace(together, source="prompt"))


def test_m_falls_from_the_first_one_over_half_of_the_steps(dense, tmp_path):
    trainer = ready_trainer(dense(tmp_path / "r", first_latent_len=32, samples=80, epochs=2))
    assert trainer.total == 20 and trainer.job.config.most_latents == 32
    found = [trainer._latents(step) for step in range(20)]
    assert found[0] == 32 and found == sorted(found, reverse=True) and set(found[10:]) == {8} and found[5] == 16
    trainer._loss(5)
    assert trainer.job.model.m == 16
    drawn = ready_trainer(dense(tmp_path / "d", first_latent_len=32, latent_lens="4,8", samples=80, epochs=2))
    found = [drawn._latents(step) for step in range(20)]
    assert found[0] == 32 and set(found[10:]) == {4, 8} and all(4 < m < 32 for m in found[1:10])


@pytest.mark.parametrize("words", [0, 4, 5, 9, 12, 40])
def test_a_continuation_is_what_follows_its_quotation(words):
    text = " ".join(f"{word}," for word in range(words)) or "."
    question = Question("q", "title", "p", f"\n {text}\t", "what?", ("x",), (0,))
    for seed in range(30):
        found = continuation(question, random.Random(seed))
        if words <= 4:
            assert found == question
            continue
        quote = found.question.split('"')[1]
        assert found.id != question.id and found.context == question.context
        assert not found.starts, "nobody looks for it"
        assert f"{quote} {found.answers[0]}" in text and 1 <= len(found.answers[0].split()) <= 8


def test_as_many_continuations_are_asked_for_as_are_wanted(dense, tmp_path):
    some = dense(tmp_path, samples=80, continuation_share=0.25)
    questions, _ = trained_on(some)
    asked = [q for step in range(10) for q in Batches(some, questions, 1)[step]]
    plain = [q for step in range(10) for q in Batches(dense(tmp_path, samples=80), questions, 1)[step]]
    swapped = [q for q, before in zip(asked, plain, strict=True) if q != before]
    assert 10 <= len(swapped) <= 30 and all(q.id.endswith("continued") for q in swapped)
    assert {q.id.removesuffix(" continued") for q in asked} == {q.id for q in plain}


def test_only_where_answers_are_learned_does_a_step_ask_how_texts_go_on(short, tmp_path):
    def asked(stage, share):
        config = short(tmp_path, stage=stage, init="x", source="context", continuation_share=share)
        return Batches(config, trained_on(config)[0], 1)[0]

    assert asked("scores", 1.0) == asked("scores", 0.0) == asked("joint", 0.0), "from spans, which it has none of"
    assert all(q.id.endswith("continued") for q in asked("joint", 1.0))


def test_it_is_trained_with_all_of_it(dense, tuned, tmp_path):
    config = dense(
        tmp_path / "r", kd_weight=0.5, teacher=str(tuned), continuation_share=0.5, first_latent_len=12,
        latent_lens="4,8",
    )  # fmt: skip
    train(config)
    steps = [line for line in lines_of(tmp_path / "r") if "loss" in line]
    assert len(steps) == 3 and all(math.isfinite(line["llms"][name]["kd"]) for line in steps for name in LLMS)


def test_a_tuned_teacher_reads_its_prompt_before_each_text(dense, tuned, tmp_path, questions):
    trainer = ready_trainer(dense(tmp_path / "r", kd_weight=0.5, teacher=str(tuned)))
    reader, q = trainer.job.readers[0], trainer.job.questions[0]
    soft = running._teachers_prompts(trainer.job.config)[reader.llm.name]
    line = trainer.job.teacher[reader.llm.name][q.id]
    behind, plain = (score_texts(reader.llm, reader.prompts, [q], 3, s).logits[0] for s in (soft, None))
    best = behind.float().log_softmax(dim=1).topk(line.ids.shape[1], dim=1)
    torch.testing.assert_close(line.logprobs.float(), best.values[-len(line.ids) :], atol=1e-2, rtol=0)
    assert not torch.allclose(behind, plain)
    folder = tmp_path / "cache"
    for given in (None, soft):
        teach(reader.llm, "w", reader.prompts, [q], 3, soft=given, cache=folder)
    assert len([*(folder / "teacher").iterdir()]) == 2, "each prompt has lines of its own"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": "no/such"}, "teacher='no/such': it needs a kd_weight"),
        ({"source": "aware", "continuation_share": 0.1}, r"continuation_share=0\.1: it needs source context"),
        ({"continuation_share": 1.5}, r"continuation_share=1\.5: it is a share"),
        ({"first_latent_len": 0}, "first_latent_len=0"),
        ({"first_latent_len": 12, "latent_lens": "8,16"}, "first_latent_len=12: M falls from it: at least 16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(dense, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        dense(tmp_path, **changes)


@pytest.mark.parametrize("kind", ["hf", "anchors"])
def test_how_a_text_goes_on_says_nothing_of_where_answers_stand(short, codebook, dense, tmp_path, kind):
    asked = {"samples": 8, "epochs": 1, "continuation_share": 1.0}
    hf = {"init": str(codebook), "source": "context"}
    config = short(tmp_path / "r", **hf, **asked) if kind == "hf" else dense(tmp_path / "r", **asked)
    train(config)
    steps = [line for line in lines_of(tmp_path / "r") if "loss" in line]
    assert steps and all(line["span"] == 0 and line["loss"] > 0 for line in steps)


def test_a_teacher_of_another_kind_is_refused(dense, tuned, codebook, tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher=.*'codebook', 'prompt', .*name a checkpoint of \('text_tuned', 'context'"
    ):
        train(dense(tmp_path / "r", kd_weight=0.5, teacher=str(codebook)))
    with pytest.raises(ValueError, match=r"'text_tuned', 'context', .*name a checkpoint of \('text_tuned', 'aware'"):
        train(dense(tmp_path / "r", kd_weight=0.5, teacher=str(tuned), source="aware"))
