"""The loop: which questions a step asks, what it minimises, how fast it learns, and what it writes down."""

import dataclasses
import gc
import math
import os
import signal
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import PER_EPOCH, STEPS
from training.run_tools import LLMS, lines_of, read, ready_trainer, same, steps_in, trained_on

from latentwire.evaluation.answering import answer
from latentwire.models.components import component
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.weights import read_config
from latentwire.training import jobs
from latentwire.training.losses import answer_sums
from latentwire.training.running import train
from latentwire.training.stages import STAGES, Stage
from latentwire.training.trainer import Batches, Trainer, rate_share, steps_of
from latentwire.utils.stopping import Terminated

pytestmark = pytest.mark.usefixtures("surroundings")
OF_A_STEP = {"step", "epoch", "loss", "span", "lr", "examples_per_s", "memory_mb", "grad_norms", "llms"}
OF_AN_LLM = {"ce", "first_ce", "first_token_acc", "first_informative_acc", "kd", "prefix_rms"}
COMPONENTS = {"codebook", "backbone", "score", "span", "residual", "adapter llama", "adapter qwen"}


def test_every_step_and_every_epoch_has_its_line(joint):
    lines = lines_of(joint)
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in steps] == [1] * PER_EPOCH + [2] * PER_EPOCH
    assert [line["step"] for line in lines if "validation" in line] == [0, PER_EPOCH, STEPS]
    for line in steps:
        assert line.keys() == OF_A_STEP and line["llms"].keys() == set(LLMS)
        assert line["grad_norms"].keys() == COMPONENTS and min(line["grad_norms"].values()) >= 0
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float | int))
        assert line["examples_per_s"] > 0 and line["memory_mb"] > 1
        for name in LLMS:
            figures = line["llms"][name]
            assert figures.keys() == OF_AN_LLM and all(map(math.isfinite, figures.values()))
            assert 0 <= figures["first_token_acc"] <= 1 and line["grad_norms"][f"adapter {name}"] > 0
            assert 0.1 < figures["prefix_rms"] < 10, "a prefix is about as long as a token's embedding"
        parts = sum(f["ce"] + 0.25 * f["first_ce"] + 0.75 * f["kd"] for f in line["llms"].values())
        assert line["loss"] == pytest.approx(parts + line["span"], rel=1e-4)
    for held in (line["validation"] for line in lines if "validation" in line):
        assert held.keys() == {"llms", "ce", "score"} and held["llms"].keys() == set(LLMS)
        known = {"f1", "first_token_acc", "first_informative_acc", "ce"}
        assert all(figures.keys() == known for figures in held["llms"].values())
        f1, ce = (sum(held["llms"][name][key] for name in LLMS) / len(LLMS) for key in ("f1", "ce"))
        assert held["ce"] == pytest.approx(ce) and held["score"] == pytest.approx(f1 - 1e-4 * ce)


def test_the_first_informative_label_counts_where_it_stands(joint_config, tmp_path, monkeypatch):
    seen = []

    def noted(scored, places=()):
        seen.append(list(places))
        return answer_sums(scored, places)

    monkeypatch.setattr("latentwire.training.trainer.answer_sums", noted)
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    trainer._loss(0)
    labels = trainer.job.readers[0].prompts.labels
    assert seen[0] == [labels(q.answers[0], 3).informative for q in trainer.batches[0]]


def test_the_first_step_learns_already_and_the_rate_falls_to_nothing():
    for rising, total in ((0, 5), (1, 20), (5, 100), (1, 1)):
        shares = [rate_share(step, rising, total) for step in range(total)]
        assert 0 < shares[0] <= 1 and min(shares) > 0, "no step is wasted"
        assert shares[:rising] == sorted(set(shares[:rising])) and shares[rising:] == sorted(shares[rising:])[::-1]
        assert total == rising or rate_share(rising, rising, total) == 1
        assert total == rising or rate_share(total, rising, total) == pytest.approx(0, abs=1e-12)


def test_the_learning_rates_follow_the_schedule(joint):
    shares = [rate_share(step, 1, STEPS) for step in range(STEPS)]  # warm-up: 0.05 of the steps, which is the first
    assert [line["lr"] for line in steps_in(joint)] == pytest.approx([5e-4 * share for share in shares])
    assert shares[0] == 0.5 and shares[-1] < 0.1


def test_the_first_step_changes_weights(joint_config, tmp_path):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    before = {name: value.clone() for name, value in trainer.job.model.named_parameters()}
    line = trainer.take_step()
    assert line["step"] == 1 and line["lr"] > 0
    moved = {name for name, value in trainer.job.model.named_parameters() if not torch.equal(value, before[name])}
    assert {"encoder.codebook.weight", "encoder.score.weight", "adapters.qwen.linear.weight"} <= moved


def test_each_component_learns_at_its_own_rate(joint_config, tmp_path):
    rates = {"lr": 1e-3, "encoder_lr": 2e-3, "codebook_lr": 3e-3}
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0, warmup=0.0, **rates))
    found = {c.name: g for c, g in zip(trainer.components, trainer.optimizer.param_groups, strict=True)}
    assert {name: group["lr"] for name, group in found.items()} == dict.fromkeys(found, 1e-3) | {
        "backbone": 2e-3, "codebook": 3e-3,
    }  # fmt: skip
    assert {name for name, group in found.items() if group["weight_decay"]} == {"backbone"}


def test_held_out_articles_are_never_trained_on_and_choose_the_checkpoint(joint_config, tmp_path, monkeypatch):
    config = joint_config(tmp_path / "r", kd_weight=0.0)
    trainer = ready_trainer(config)
    questions, held = trained_on(config)
    titles = {q.title for q in held}
    assert list(trainer.job.questions) == questions and len(held) == 5, "the sample's article has no more"
    for step in range(STEPS):
        assert not titles & {q.title for q in Batches(config, trainer.job.questions, 1)[step]}
    asked = []
    monkeypatch.setattr(jobs, "answer", lambda *given: asked.extend(given[5]) or answer(*given))
    trainer.job.validate()
    assert {q.id for q in asked} == {q.id for q in held}, "a checkpoint is chosen by what was not trained on"


def test_a_validation_reads_no_more_questions_at_once_than_a_step(joint_config, tmp_path, monkeypatch):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0, micro_batch=2))
    sizes = []
    monkeypatch.setattr(jobs, "answer", lambda *given: sizes.append(len(given[5])) or answer(*given))
    for trainer.job.config.micro_batch, most in ((2, 2), (None, 5)):
        sizes.clear()
        trainer.job.validate()
        assert max(sizes) == most and sum(sizes) == 5 * len(LLMS)


def test_a_validation_of_what_is_sent_reads_no_more_questions_at_once_than_a_step(short, scores, tmp_path, monkeypatch):
    config = short(tmp_path / "r", stage="scores", init=str(scores / "checkpoint_best"), micro_batch=2)
    trainer, encoded, sizes = ready_trainer(config), SelectingEncoder.encoded, []

    def noted(self, questions, source, m, *more):
        sizes.extend([len(questions)] if m == config.latent_len else [])
        return encoded(self, questions, source, m, *more)

    monkeypatch.setattr(SelectingEncoder, "encoded", noted)
    trainer.job.validate()
    assert sizes == [2, 2, 1]


def test_a_step_takes_no_longer_gradient_than_is_allowed(joint_config, tmp_path, monkeypatch):
    trainer, lengths = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0, clip=0.01)), []
    step = trainer.optimizer.step

    def measured(*given):
        gradients = [p.grad.norm() for p in trainer.job.model.parameters() if p.grad is not None]
        lengths.append(torch.stack(gradients).norm().item())
        return step(*given)

    monkeypatch.setattr(trainer.optimizer, "step", measured)
    before = trainer.take_step()["grad_norms"]
    assert lengths[0] == pytest.approx(0.01, rel=1e-3) and max(before.values()) > 0.02


@pytest.fixture
def other_precision():
    """Accelerate keeps the precision of a process: a training with another one begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_training_in_bfloat16_keeps_weights_in_float32(joint, joint_config, tmp_path):
    train(joint_config(tmp_path / "r", dtype="bfloat16", kd_weight=0.0, epochs=1))
    first, same_first = (steps_in(folder)[0]["llms"]["qwen"]["ce"] for folder in (tmp_path / "r", joint))
    assert first == pytest.approx(same_first, rel=0.05) and first != same_first
    weights = read(tmp_path / "r" / "checkpoint_last" / "encoder.pt")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_asks_each_question_at_most_once_in_an_order_of_its_own(short, tmp_path, processes):
    settings = short(tmp_path, samples=45, epochs=3, stage="text_tuned")
    questions, _ = trained_on(settings)
    each, total = steps_of(settings, len(questions), processes)
    assert (each, total) == (45 // (8 * processes), 3 * each)
    epochs = [
        [q.id for step in range(e * each, (e + 1) * each) for q in Batches(settings, questions, processes)[step]]
        for e in range(3)
    ]
    for ids in epochs:
        assert len(ids) == len(set(ids)) == each * 8 * processes
    assert epochs[0] != epochs[1] != epochs[2] and set(epochs[0]) != set(epochs[1])
    again = [q.id for step in range(each) for q in Batches(settings, questions, processes)[step]]
    assert again == epochs[0]
    other = dataclasses.replace(settings, seed=1)
    assert [q.id for step in range(each) for q in Batches(other, questions, processes)[step]] != epochs[0]


def test_fewer_questions_than_a_batch_are_still_a_step(short, tmp_path):
    settings = short(tmp_path, samples=5, stage="text_tuned")
    questions, _ = trained_on(settings)
    assert steps_of(settings, 5, 1) == (1, 1) and len(Batches(settings, questions, 1)[0]) == 5


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_two_processes_mean_the_loss_and_gradient_of_one(joint_config, tmp_path, kd_weight):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=kd_weight))
    trainer.model.eval()  # no dropout, which differs between processes
    weight = trainer.job.model.encoder.codebook.weight

    def loss_and_gradient(rank, processes):
        trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        trainer.job.config.batch_size = 8 // processes
        loss, parts, ids = trainer._loss(1)
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient, parts, ids

    whole = loss_and_gradient(0, 1)
    halves = [loss_and_gradient(rank, 2) for rank in range(2)]
    assert halves[0][3] == halves[1][3] == whole[3] and len(whole[3]) == 8
    assert halves[0][0] != halves[1][0]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, whole[1], rtol=1e-3, atol=1e-5)
    assert (("qwen", "kd") in whole[2]) == bool(kd_weight)
    assert ("", "span") in whole[2] and ("llama", "ce") in whole[2]
    for key in whole[2].keys() - {(name, "prefix_rms") for name in LLMS}:  # root mean squares do not add up
        total = halves[0][2][key] + halves[1][2][key]
        torch.testing.assert_close(total, whole[2][key], rtol=1e-4, atol=1e-5)


def test_a_step_that_is_read_in_parts_has_the_gradients_of_the_whole(joint_config, tmp_path):
    found = []
    for size in (None, 3):
        trainer = ready_trainer(joint_config(tmp_path / str(size), kd_weight=0.5, micro_batch=size))
        trainer.model.eval()  # no dropout, which differs
        parts, ids = trainer._backward(1)
        gradients = {name: p.grad for name, p in trainer.job.model.named_parameters() if p.grad is not None}
        found.append((ids, {key: value for key, value in parts.items() if key[1] != "prefix_rms"}, gradients))
    (ids, parts, gradients), (same_ids, same_parts, same_gradients) = found
    assert ids == same_ids and parts.keys() == same_parts.keys() and gradients.keys() == same_gradients.keys()
    for key, value in (parts | gradients).items():
        torch.testing.assert_close((same_parts | same_gradients)[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n", "size", "parts"), [(31, 8, 2), (16, 3, 3), (3, 1, 1), (5, None, 1)])
def test_two_processes_take_as_many_parts_of_any_step_and_leave_no_question_out(joint_config, tmp_path, n, size, parts):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    trainer.batches, trainer.job.config.micro_batch = [trainer.job.questions[:n]], size
    read, model = {}, trainer.model
    for rank in range(2):
        synchronised = []
        trainer.accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"), backward=lambda loss: loss.backward(),
            no_sync=lambda _, told=synchronised: nullcontext(told.append("no")),
        )  # fmt: skip
        read[rank] = []
        trainer.model = lambda some, seen=read[rank]: (seen.append([q.id for q in some]), model(some))[1]
        _, ids = trainer._backward(0)
        assert len(read[rank]) == parts == len(synchronised) + 1 and all(read[rank])
    assert [i for rank in read for part in read[rank] for i in part] == ids and len(set(ids)) == len(ids) > 2


def test_a_finished_training_leaves_the_memory_at_once(joint_config, tmp_path):
    """The next stage loads LLMs of its own: two sets of large ones fit no GPU."""
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    left = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("weight", "there"), [(0.0, False), (2.0, True)])
def test_the_spans_count_as_much_as_is_asked_for(joint_config, tmp_path, weight, there):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0, span_weight=weight))
    trainer.model.eval()
    loss, parts, _ = trainer._loss(0)
    answers = sum(parts[name, "ce"] + 0.25 * parts[name, "first_ce"] for name in LLMS)
    assert (("", "span") in parts) == there
    torch.testing.assert_close(loss, answers + weight * parts.get(("", "span"), 0.0))


def test_timing_the_steps_changes_nothing(joint_config, tmp_path):
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    before = {name: tensor.clone() for name, tensor in trainer.job.model.state_dict().items()}
    assert trainer.seconds_per_step() > 0
    assert same(before, dict(trainer.job.model.state_dict())) and trainer.step == 0
    assert all(p.grad is None for p in trainer.job.model.parameters())


@pytest.mark.parametrize(("stage", "learns"), [("joint", True), ("adapters", False)])
def test_steps_are_timed_in_the_mode_that_they_run_in(request, short, tmp_path, monkeypatch, stage, learns):
    """A backbone that is loaded to be trained comes without dropout, one of a checkpoint with it."""
    init = {"joint": "codebook", "adapters": "scores"}[stage]
    init = request.getfixturevalue(init) / ("" if init == "codebook" else "checkpoint_best")
    backward, modes = Trainer._backward, []

    def noted(self, step):
        modes.append(self.job.model.encoder.backbone.model.training)
        return backward(self, step)

    monkeypatch.setattr(Trainer, "_backward", noted)
    trainer = ready_trainer(short(tmp_path / "r", stage=stage, init=str(init)))
    trainer.take_step()
    assert modes == [learns] * 3, "two that were timed, and the first"


def test_what_is_frozen_drops_nothing_out(short, codebook, tmp_path):
    trainer = ready_trainer(short(tmp_path / "r", stage="adapters", init=str(codebook)))
    trainer.take_step()
    encoder = trainer.job.model.encoder
    assert not any(module.training for module in encoder.backbone.modules()), "it works as it will in use"
    assert encoder.residual.training and trainer.job.model.adapters["qwen"].training


def test_a_parameter_that_no_component_holds_is_named_and_nothing_is_trained(joint_config, tmp_path, monkeypatch):
    parts = SelectingEncoder.components

    def forgetful(self):
        found = [part for part in parts(self) if part.kind not in ("span", "score")]
        return [*found, component("span", self.span, self.outside)]

    monkeypatch.setattr(SelectingEncoder, "components", forgetful)
    with pytest.raises(ValueError, match=r"LatentWire: the parameters encoder.score.weight, encoder.score.bias belong"):
        train(joint_config(tmp_path / "r", kd_weight=0.0))
    assert not list((tmp_path / "r").glob("checkpoint*")) and not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_stage_that_finds_nothing_to_train_says_what_there_is(short, codebook, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "mine", Stage("mine", trains=("residual",), losses=("answers",)))
    settings = {"stage": "mine", "encoder_type": "queries", "init": str(codebook)}
    with pytest.raises(ValueError, match=r"stage='mine': trains \('residual',\), .* backbone, resampler, adapter"):
        train(short(tmp_path / "r", **settings))


def test_the_figures_of_each_line_go_to_the_tracker_too(short, scores, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: sent.append((step, values)))
    settings = {"init": str(scores / "checkpoint_best"), "samples": 8, "val_samples": 1}
    train(short(tmp_path / "r", stage="adapters", **settings))
    assert [step for step, _ in sent] == [line["step"] for line in lines_of(tmp_path / "r")] == [0, 1, 1]
    held, step, _ = (values for _, values in sent)
    assert held.keys() >= {"validation score", "validation f1 llama", "validation ce qwen"}
    assert step.keys() >= {"loss", "lr", "ce llama", "first_token_acc qwen", "grad_norm codebook"}
    assert all(isinstance(value, float | int) for _, values in sent for value in values.values())


def test_between_two_stages_a_signal_does_what_it_did_before(joint_config, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = ready_trainer(joint_config(tmp_path / "r", kd_weight=0.0))
    trainer.total = 0
    trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_the_last_step_begins_no_next_stage(short, scores, tmp_path, monkeypatch, capsys):
    loss = Trainer._loss

    def told(self, step, *part):
        if (self.folder / "metrics.jsonl").is_file():  # not while the steps are timed
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, step, *part)

    settings = {"stage": "adapters", "init": str(scores / "checkpoint_best"), "samples": 8, "val_samples": 1}
    with monkeypatch.context() as patch, pytest.raises(Terminated) as end:
        patch.setattr(Trainer, "_loss", told)
        train(short(tmp_path / "r", **settings))
    assert end.value.code == 143 and read_config(tmp_path / "r" / "checkpoint_last")["step"] == 1
    assert ["validation" in line for line in lines_of(tmp_path / "r")] == [True, False]
    train(short(tmp_path / "r", **settings))
    assert "finished already" not in capsys.readouterr().out, "its last step is still to be validated"
    assert ["validation" in line for line in lines_of(tmp_path / "r")] == [True, False, True]
    train(short(tmp_path / "r", **settings))
    assert "finished already" in capsys.readouterr().out
