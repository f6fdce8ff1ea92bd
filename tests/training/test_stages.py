"""What each stage of training changes, and what it leaves as it is to the last bit."""

import dataclasses
import os
import shutil

import pytest
import torch
from conftest import PER_EPOCH, STEPS
from training.run_tools import (
    LLMS,
    Stopped,
    changed,
    lines_of,
    read,
    ready_trainer,
    same,
    steps_in,
    stop_in_step,
    timeless,
)

from latentwire.conditions.base import CONDITIONS
from latentwire.data.squad import load
from latentwire.llms.loading import load_llm
from latentwire.models.backbones import load_backbone
from latentwire.models.checkpoint import load_checkpoint, load_encoder
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.queries import QueryEncoder
from latentwire.models.weights import load_soft_prompts, read_config
from latentwire.reporting.charts import draw_curves
from latentwire.training.jobs import _selection_figures
from latentwire.training.running import train
from latentwire.training.stages import ALL, STAGES, Stage, needed, stage
from latentwire.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("surroundings")
TUNED = [name for name, found in STAGES.items() if found.rival]


def test_stage_scores_trains_backbone_and_scores_alone(scores, codebook, encoder_folder):
    before, after = read(codebook / "encoder.pt"), read(scores / "checkpoint_last" / "encoder.pt")
    assert torch.equal(before["codebook.weight"], after["codebook.weight"])
    assert all(not after[f"residual.{name}"].any() for name in ("weight", "bias"))
    pretrained = load_backbone(encoder_folder).state_dict()
    assert any(not torch.equal(tensor, after[f"backbone.{name}"]) for name, tensor in pretrained.items())
    for name in LLMS:
        assert not changed(codebook, scores / "checkpoint_last", f"adapter_{name}")
    line = steps_in(scores)[0]
    assert line["grad_norms"].keys() == {"backbone", "span"} and "span" in line
    assert line["llms"] == {}, "no LLM takes part"
    held = lines_of(scores)[0]["validation"]
    assert held.keys() == {"answer_kept", "answer_touched", "encoder_f1", "score"} and 0 <= held["answer_kept"] <= 1


def test_an_answer_is_kept_where_all_of_its_tokens_are_sent_and_touched_where_one_is(short, scores, tmp_path):
    config = short(tmp_path / "r", stage="scores", init=str(scores / "checkpoint_best"))
    encoder, dev = load_encoder(scores / "checkpoint_best"), load("sample", "dev")
    figures = {}
    for m in (4, 500):
        figures[m] = _selection_figures(encoder, dev, dataclasses.replace(config, latent_len=m))
        spans = encoder.chosen_spans(dev.questions, config.source, m)
        there = [{place for span in one for place in range(*span)} for one in spans]
        wanted = [set(range(q.starts[0], q.starts[0] + len(q.answers[0].rstrip()))) for q in dev.questions]
        sent = [(want <= found, bool(want & found)) for want, found in zip(wanted, there, strict=True)]
        shares = [sum(column) / len(sent) for column in zip(*sent, strict=True)]
        assert [figures[m]["answer_kept"], figures[m]["answer_touched"]] == pytest.approx(shares)
        read = zip(encoder.read(dev.questions), dev.questions, strict=True)
        f1 = sum(dev.score(said, q.answers)["f1"] for said, q in read) / len(dev.questions)
        assert figures[m]["encoder_f1"] == pytest.approx(f1)
        assert figures[m]["score"] == pytest.approx(figures[m]["answer_kept"] + f1)
    assert figures[500]["answer_kept"] == 1 > figures[4]["answer_touched"] > figures[4]["answer_kept"]


def test_anchors_learn_where_answers_stand_and_both_arms_go_on_from_there(short, run_of, encoder_folder, tmp_path):
    """Without a residual, which an arm adds at zero, and the other does without."""
    settings = {dense: ENCODERS["anchors"].Settings(encoder_id=encoder_folder, dense=dense) for dense in (True, False)}
    how = {"source": "context", "encoder_type": "anchors", "adapter_type": "deep", "latent_len": 8}
    made = run_of(short(tmp_path / "codebook", stage="codebook", **how)) / "checkpoint_best"
    how |= {"samples": 40, "lr": 0.1, "encoder_lr": 0.01}
    scores = run_of(short(tmp_path / "s", stage="scores", init=str(made), epochs=4, encoder=settings[False], **how))
    before, after = read(made / "encoder.pt"), read(scores / "checkpoint_last" / "encoder.pt")
    assert torch.equal(before["codebook.weight"], after["codebook.weight"]) and after["score.weight"].any()
    spans = [line["span"] for line in steps_in(scores)]
    assert len(spans) == 20 and sum(spans[-5:]) < 0.8 * sum(spans[:5]), "the same questions in each of four epochs"
    assert steps_in(scores)[0]["grad_norms"].keys() == {"backbone", "salience"}
    for line in (line["validation"] for line in lines_of(scores) if "validation" in line):
        assert line["score"] == line["answer_touched"] >= line["answer_kept"] and "encoder_f1" not in line
    for dense in (True, False):
        joint = short(tmp_path / f"{dense}", init=str(scores / "checkpoint_last"), encoder=settings[dense], **how)
        begun = ready_trainer(joint).job.model.encoder
        found = begun.state_dict()
        assert found.keys() - after.keys() == ({"residual.weight", "residual.bias"} if dense else set())
        assert all(torch.equal(found[name], kept) for name, kept in after.items())
        assert not dense or not begun.residual.weight.any()
    dense = run_of(short(tmp_path / "dense", init=str(scores / "checkpoint_last"), encoder=settings[True], **how))
    with pytest.raises(ValueError, match=r"dense=False: .*has True; set that"):
        train(short(tmp_path / "r", init=str(dense / "checkpoint_best"), encoder=settings[False], **how))
    with pytest.raises(ValueError, match="encoder_type windows has no such stage"):
        train(short(tmp_path / "w", stage="scores", init=str(made), **how | {"encoder_type": "windows"}))


def test_the_codebook_of_a_checkpoint_begins_anew_and_its_selection_stays(joint, short, codebook, tmp_path, capsys):
    again = short(tmp_path / "r", stage="codebook", init=str(joint / "checkpoint_best"), adapter_type="preamble")
    train(again)
    made, begun, before = (
        read(folder / "encoder.pt")
        for folder in (tmp_path / "r" / "checkpoint_best", codebook, joint / "checkpoint_best")
    )
    assert torch.equal(made["codebook.weight"], begun["codebook.weight"])
    assert not made["residual.weight"].any() and before["residual.weight"].any()
    kept = {name for name in before if torch.equal(made[name], before[name])}
    assert kept >= {name for name in before if name.startswith(("backbone.", "score.", "span.", "outside"))}
    assert read_config(tmp_path / "r" / "checkpoint_best")["adapters"] == dict.fromkeys(LLMS, "preamble")
    with pytest.raises(ValueError, match="'codebook' has no choice of tokens to keep"):
        train(short(tmp_path / "other", stage="codebook", init=str(codebook)))


def test_a_checkpoint_names_the_backbone_that_it_has_whatever_the_settings_name(
    short, run_of, codebook, scores, encoder_folder, tmp_path
):
    other = str(shutil.copytree(encoder_folder, tmp_path / "other"))
    named = {"encoder": ENCODERS["hf"].Settings(encoder_id=other)}
    for init, expected in ((codebook, other), (scores / "checkpoint_best", encoder_folder)):
        job = ready_trainer(short(tmp_path / "r", stage="scores", init=str(init), **named)).job
        job.save(tmp_path / "saved", None, {})
        assert read_config(tmp_path / "saved")["encoder_id"] == expected
        shutil.rmtree(tmp_path / "r")
    again = short(tmp_path / "again", stage="codebook", init=str(scores / "checkpoint_best"), **named)
    assert read_config(run_of(again) / "checkpoint_best")["encoder_id"] == encoder_folder


def test_stage_adapters_trains_codebook_residual_and_adapters_alone(adapters, scores):
    before, after = scores / "checkpoint_best", adapters / "checkpoint_last"
    assert changed(before, after, "encoder") == {"codebook.weight", "residual.weight", "residual.bias"}
    for name in LLMS:
        assert changed(before, after, f"adapter_{name}") >= {"linear.weight", "linear.bias", "mlp.2.weight"}
    line = steps_in(adapters)[0]
    assert line["grad_norms"].keys() == {"codebook", "residual", "adapter llama", "adapter qwen"}
    assert all("kd" not in line["llms"][name] for name in LLMS), "no teacher without kd_weight"
    assert "span" not in line, "its loss is that of the answers alone"


def test_stage_joint_trains_everything(joint, adapters):
    before, after = adapters / "checkpoint_best", joint / "checkpoint_last"
    moved = changed(before, after, "encoder")
    for part in ("codebook.weight", "outside", "score.weight", "span.weight", "residual.weight"):
        assert part in moved
    assert len([name for name in moved if name.startswith("backbone.model.encoder")]) > 10
    for name in LLMS:
        assert len(changed(before, after, f"adapter_{name}")) == 6


def test_a_training_that_changed_an_llm_is_an_error(joint_config, tmp_path, monkeypatch):
    def spoil(self):
        self.job.readers[0].llm.model.get_output_embeddings().weight.data += 1

    monkeypatch.setattr(Trainer, "run", spoil)
    with pytest.raises(AssertionError, match=r"frozen weights of \['llama'\] changed"):
        train(joint_config(tmp_path / "r", kd_weight=0.0))


def test_another_seed_begins_with_other_weights_and_questions(short, codebook, tmp_path):
    jobs = [ready_trainer(short(tmp_path / f"r{s}", init=str(codebook), samples=8, seed=s)).job for s in (0, 1)]
    one, other = (job.model.encoder.span.weight for job in jobs)
    assert not torch.equal(one, other)
    assert {q.id for q in jobs[0].questions} != {q.id for q in jobs[1].questions}


def test_the_frozen_llms_stay_as_they_are_and_the_checkpoint_says_which_they_are(joint, codebook, llm_folders):
    hashes = {name: load_llm(name, llm_folders[f"{name.upper()}_ID"], "cpu", "float32").weights_sha256()
              for name in LLMS}  # fmt: skip
    made = read_config(joint / "checkpoint_best")
    assert made["frozen_sha256"] == hashes == read_config(codebook)["frozen_sha256"]
    assert made["stage"] == "joint" and made["interface"] == read_config(codebook)["interface"]
    assert made["settings"]["lr"] == 5e-4 and made["init"].endswith("adapters/checkpoint_best")
    assert made["settings"]["encoder"]["pooling"] == "select" and made["adapters"] == dict.fromkeys(
        LLMS, "residual_mlp"
    )
    best = max(x["validation"]["score"] for x in lines_of(joint) if "validation" in x)
    assert made["validation"]["score"] == best


def test_the_curves_are_drawn(joint, scores):
    drawn = {path.relative_to(joint.parent).as_posix() for folder in (joint, scores) for path in draw_curves(folder)}
    assert drawn == {"joint/loss.png", "joint/first_token_accuracy.png", "scores/loss.png"}
    assert all((joint.parent / path).read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_codebook_of_random_codes_is_another_one(short, codebook, tmp_path):
    train(short(tmp_path / "r", stage="codebook", codes="random"))
    assert changed(codebook, tmp_path / "r" / "checkpoint_best", "encoder") == {"codebook.weight"}
    report = read_config(tmp_path / "r" / "checkpoint_best")["interface"]
    for name in LLMS:
        assert report[name]["explained_variance"] < read_config(codebook)["interface"][name]["explained_variance"]


@pytest.mark.parametrize("kind", ["queries", "byte"])
def test_free_queries_train_jointly_from_the_codebook(short, codebook, tmp_path, kind):
    settings = {"encoder_type": kind, "init": str(codebook), "epochs": 2}
    settings |= {"samples": 1, "batch_size": 1, "val_samples": 1}  # a from-scratch reader of bytes is slow
    train(short(tmp_path / "r", **settings))
    encoder, _, made = load_checkpoint(tmp_path / "r" / "checkpoint_last", read_config(codebook)["llms"])
    assert type(encoder) is ENCODERS[kind] and isinstance(encoder, QueryEncoder)
    assert made["encoder"] == {"type": kind, "m": 16}
    lines = steps_in(tmp_path / "r")
    assert all(line["grad_norms"]["backbone"] > 0 and line["grad_norms"]["resampler"] > 0 for line in lines)
    assert "span" not in lines[0] and lines[1]["loss"] != lines[0]["loss"]


@pytest.mark.parametrize("kind", ["queries", "byte"])
@pytest.mark.parametrize("stage", ["scores", "adapters"])
def test_free_queries_have_no_stages_of_their_own(short, tmp_path, kind, stage):
    with pytest.raises(ValueError, match=f"stage='{stage}': encoder_type {kind} has no such stage .*joint"):
        train(short(tmp_path / "r", stage=stage, encoder_type=kind, init="x"))
    assert not (tmp_path / "r").exists()


def test_an_arm_trains_from_what_hf_has_learned_and_its_mark_with_the_adapters(short, adapters, tmp_path):
    how = {"stage": "adapters", "encoder_type": "ids_marked", "source": "aware"}
    train(short(tmp_path / "r", init=str(adapters / "checkpoint_best"), **how))
    before = load_checkpoint(adapters / "checkpoint_best", llm_ids(adapters))[0]
    found, _, made = load_checkpoint(tmp_path / "r" / "checkpoint_last", llm_ids(adapters))
    assert type(found) is ENCODERS["ids_marked"] and made["source"] == "aware"
    assert found.marker.any() and torch.equal(found.span.weight, before.span.weight)
    assert not torch.equal(found.codebook.weight, before.codebook.weight)
    lines = steps_in(tmp_path / "r")
    assert all(line["grad_norms"]["marker"] > 0 and "residual" not in line["grad_norms"] for line in lines)


def llm_ids(run):
    return read_config(run / "checkpoint_best")["llms"]


def test_of_all_stages_an_encoder_has_those_that_it_can_train():
    def names(kind, spans=True):
        return [found.name for found in needed(ALL, ENCODERS[kind], spans)]

    assert names("hf") == list(ALL) == ["codebook", "scores", "adapters", "joint"]
    assert names("hf", spans=False) == ["codebook", "adapters", "joint"]
    assert names("ids") == names("ids_marked") == names("anchors") == list(ALL)
    assert names("codebook") == ["codebook", "adapters", "joint"], "it learns no spans"
    assert names("queries") == names("byte") == names("windows") == ["codebook", "joint"]


def test_a_stage_minimises_losses_that_there_are_and_has_a_name_of_its_own():
    with pytest.raises(AssertionError, match="loud"):
        stage(Stage("mine", None, losses=("loud",)))
    with pytest.raises(AssertionError, match="stage joint is registered twice"):
        stage(Stage("joint", None, losses=("answers",)))
    assert "mine" not in STAGES and STAGES["joint"].losses == ("answers", "spans")


def test_every_rival_is_a_condition_and_has_its_stage():
    assert [name for name, found in CONDITIONS.items() if "tuned" in found.uses] == TUNED
    assert {name: STAGES[name].rival for name in TUNED} == {name: CONDITIONS[name].base.name for name in TUNED}


@pytest.mark.parametrize("stage", TUNED)
def test_the_rivals_soft_prompts_train_and_a_stopped_run_ends_the_same(short, scores, tmp_path, monkeypatch, stage):
    settings = {"stage": stage, "samples": 16, "batch_size": 4, "val_samples": 2}
    settings |= {"llms": "qwen"} if stage == "text_tuned" else {}
    settings |= {"init": str(scores / "checkpoint_best")} if STAGES[stage].needs_checkpoint else {}
    train(short(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(Stopped):
            train(short(tmp_path / "cut", **settings))
    train(short(tmp_path / "cut", **settings))
    names = short(tmp_path, **settings).llm_names
    ids = {name: os.environ[f"{name.upper()}_ID"] for name in names}
    prompts = {part: load_soft_prompts(tmp_path / part / "checkpoint_last", ids) for part in ("whole", "cut")}
    assert same(prompts["whole"], prompts["cut"]) and prompts["whole"].keys() == set(names)
    assert timeless(lines_of(tmp_path / "whole")) == timeless(lines_of(tmp_path / "cut"))
    for name, prompt in prompts["whole"].items():
        table = load_llm(name, ids[name], "cpu", "float32").embedding_table()
        assert len(prompt) == 16 and torch.cdist(prompt, table.float()).min(dim=1).values.min() > 0
    assert [line["step"] for line in steps_in(tmp_path / "cut")] == [1, 2, 3, 4]
    assert steps_in(tmp_path / "cut")[0]["grad_norms"].keys() == {f"soft_prompt {name}" for name in names}
    assert read_config(tmp_path / "cut" / "checkpoint_best")["stage"] == stage


def test_the_loss_of_a_few_questions_falls(short, scores, tmp_path):
    settings = {"samples": 4, "batch_size": 4, "val_samples": 1, "epochs": 12, "lr": 5e-3}
    train(short(tmp_path / "r", stage="adapters", init=str(scores / "checkpoint_best"), **settings))
    losses = [line["loss"] for line in steps_in(tmp_path / "r")]
    assert losses[-1] < 0.85 * losses[0]


def test_a_stage_has_its_epochs_of_steps(joint, scores):
    assert [line["step"] for line in steps_in(joint)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in steps_in(scores)] == list(range(1, PER_EPOCH + 1))
