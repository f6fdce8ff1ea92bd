"""One stage or all of them: what runs, in which order, how long it will take, and what is refused before it begins."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from training.run_tools import LLMS, Stopped, files, lines_of, ready_trainer, steps_in, trained_on

from latentwire.data.registry import DATASETS
from latentwire.data.squad import SAMPLE_DIR, load
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import CodecSettings, EvalSettings
from latentwire.models.weights import read_config
from latentwire.train import main
from latentwire.training import memory
from latentwire.training.running import _require_fits, stages_of, train
from latentwire.training.settings import TRACKERS, TrainSettings
from latentwire.training.trainer import Trainer
from latentwire.utils.cli import parse

pytestmark = pytest.mark.usefixtures("surroundings")
ALL = {"stage": "all", "epochs": 2, "scores_epochs": 1, "scores_samples": 8, "samples": 16, "val_samples": 2}


def plan(config):
    """[(stage, init, folder, epochs, samples)] of `--stage all`, paths beside the output folder."""
    out = Path(config.save_dir)

    def beside(path):
        return Path(path).relative_to(out).as_posix() if path and Path(path).is_relative_to(out) else path

    return [(s.stage, beside(s.init), beside(s.save_dir), s.epochs, s.samples) for s in stages_of(config)]


@pytest.fixture(scope="module")
def whole(short, run_of, tmp_path_factory):
    """The run folder of all stages."""
    return run_of(short(tmp_path_factory.mktemp("all") / "r", **ALL))


def test_all_stages_run_in_order_each_from_the_one_before(whole):
    folders = {"codebook": "stages/codebook", "scores": "stages/scores", "adapters": "stages/adapters", "joint": "."}
    made = {name: read_config(whole / folder / "checkpoint_best") for name, folder in folders.items()}
    assert {name: found["stage"] for name, found in made.items()} == {name: name for name in folders}
    before = ["", *(str(whole / folder / "checkpoint_best") for folder in folders.values())]
    assert [found["settings"]["init"] for found in made.values()] == before[:-1]
    assert {name: found["samples"] for name, found in made.items()} == {
        "codebook": 16, "scores": 8, "adapters": 16, "joint": 16,
    }  # fmt: skip
    steps = {name: len(steps_in(whole / folder)) for name, folder in folders.items() if name != "codebook"}
    assert steps == {"scores": 1, "adapters": 2, "joint": 2}, "of two passes through the LLMs the first trains adapters"
    assert made["joint"]["interface"] == made["codebook"]["interface"]


def test_all_stages_are_those_that_one_would_start_by_hand(whole, short, tmp_path):
    codebook = str(whole / "stages" / "codebook" / "checkpoint_best")
    train(short(tmp_path / "r", stage="scores", init=codebook, samples=8, val_samples=2))
    by_hand, found = tmp_path / "r" / "checkpoint_last", whole / "stages" / "scores" / "checkpoint_last"
    assert (by_hand / "encoder.safetensors").read_bytes() == (found / "encoder.safetensors").read_bytes()


def test_a_second_start_says_so_and_changes_no_byte(whole, short, capsys, monkeypatch):
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    before = files(whole)
    train(short(whole, **ALL))
    said = capsys.readouterr().out
    assert files(whole) == before
    assert f"{whole / 'stages' / 'codebook' / 'checkpoint_best'} is there already" in said
    for folder in ("stages/scores", "stages/adapters", "."):
        assert f"{whole / folder} is finished already" in said


def test_all_stages_go_on_where_one_was_stopped(whole, short, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Trainer, "run", lambda self: ran.append(self.stage.name) or _stop())
    folder = shutil.copytree(whole, tmp_path / "r")
    for name in ("checkpoint_last", "checkpoint_best", "metrics.jsonl"):  # killed while stage joint was about to begin
        path = folder / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    relocate(folder, whole)
    with pytest.raises(Stopped):
        train(short(folder, **ALL))
    assert ran == ["joint"]


def _stop():
    raise Stopped


def relocate(folder, origin):
    """Let a copied run say that it was begun here."""
    for record in (*folder.glob("stages/*/config.json"), folder / "config.json"):
        record.write_text(record.read_text().replace(str(origin), str(folder)))


def test_the_stages_have_their_passes_and_their_questions(short, tmp_path):
    stages = plan(short(tmp_path, stage="all", epochs=3, samples=40, scores_epochs=5, scores_samples=70))
    assert stages == [
        ("codebook", "", "stages/codebook", 1, 40),
        ("scores", "stages/codebook/checkpoint_best", "stages/scores", 5, 70),
        ("adapters", "stages/scores/checkpoint_best", "stages/adapters", 1, 40),
        ("joint", "stages/adapters/checkpoint_best", ".", 2, 40),
    ]
    assert [s[-1] for s in plan(short(tmp_path, stage="all", samples=40))] == [40, 40, 40], "scores: as the others"
    assert [s[-1] for s in plan(short(tmp_path, stage="all", samples=None, scores_samples=9, epochs=2))] == [
        None, 9, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 1}, [("codebook", 1), ("scores", 3), ("joint", 1)]),
        ({"span_weight": 0.0}, [("codebook", 1), ("adapters", 1), ("joint", 2)]),
        ({"encoder_type": "byte"}, [("codebook", 1), ("joint", 3)]),
        ({"encoder_type": "codebook"}, [("codebook", 1), ("adapters", 1), ("joint", 2)]),
        ({"init": "mine"}, [("adapters", 1), ("joint", 2)]),
        ({"init": "mine", "epochs": 1}, [("joint", 1)]),
    ],
)
def test_a_stage_that_has_nothing_to_do_is_left_out(short, tmp_path, changes, expected):
    stages = plan(short(tmp_path, **({"stage": "all", "epochs": 3} | changes)))
    assert [(name, epochs) for name, _, _, epochs, _ in stages] == expected
    assert stages[0][1] == changes.get("init", "")
    for (before, *_), (_, init, *_) in pairwise(stages):
        assert init == f"stages/{before}/checkpoint_best"


def test_data_without_spans_have_no_stage_scores(short, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "sample", dataclasses.replace(DATASETS["sample"], spans=False))
    assert [name for name, *_ in plan(short(tmp_path, stage="all", epochs=2))] == ["codebook", "adapters", "joint"]
    with pytest.raises(ValueError, match=r"dataset='sample': its answers are no spans .*stage scores learns; .*joint"):
        train(short(tmp_path / "r", stage="scores", init="x"))
    assert not (tmp_path / "r").exists()


def test_without_a_number_all_questions_are_trained_on(short, scores, tmp_path):
    config = short(tmp_path / "r", init=str(scores / "checkpoint_best"), samples=None)
    everything, _ = trained_on(config)
    assert len(everything) > 200 and list(ready_trainer(config).job.questions) == everything
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["samples"] == len(everything)


def test_more_questions_than_exist_mean_all(short, scores, tmp_path):
    config = short(tmp_path / "r", init=str(scores / "checkpoint_best"), samples=10**6)
    assert list(ready_trainer(config).job.questions) == trained_on(dataclasses.replace(config, samples=None))[0]


def test_an_estimate_trains_nothing_and_leaves_nothing(short, scores, tmp_path, capsys):
    there = files(scores)
    found = train(short(tmp_path / "a", init=str(scores / "checkpoint_best"), estimate=True))
    said = capsys.readouterr().out
    assert "estimate: 0 minutes for 3 steps" in said and "held out:" not in said
    assert not list(tmp_path.iterdir()) and files(scores) == there
    assert found.keys() == {"joint"} and found["joint"]["steps"] == 3 and found["joint"]["seconds"] > 0
    assert found["joint"]["teacher_seconds"] == 0


def test_an_estimate_counts_the_validations_that_a_run_writes(joint_config, joint, tmp_path, capsys):
    train(joint_config(tmp_path / "a", estimate=True))
    written = ["validation" in line for line in lines_of(joint)]
    assert f"and {sum(written)} validations on 5 questions" in capsys.readouterr().out


def test_the_time_of_a_teacher_is_part_of_an_estimate(short, scores, tmp_path):
    config = short(tmp_path / "a", init=str(scores / "checkpoint_best"), estimate=True, kd_weight=0.5)
    assert train(config)["joint"]["teacher_seconds"] > 0


def test_an_estimate_of_all_stages_tells_each_and_leaves_nothing(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the codebook is kept meanwhile
    found = train(short(tmp_path / "a", **ALL, estimate=True))
    assert {name: figures["steps"] for name, figures in found.items()} == {"scores": 1, "adapters": 2, "joint": 2}
    assert all(figures["seconds"] > 0 for figures in found.values())
    assert capsys.readouterr().out.count("estimate: 0 minutes for") == 3
    assert not list(tmp_path.iterdir())


def test_an_estimate_of_what_is_begun_counts_all_of_it(whole, short):
    before = files(whole)
    assert train(short(whole, **ALL, estimate=True))["joint"]["steps"] == 2
    assert files(whole) == before


@pytest.mark.parametrize("stage", ["joint", "all"])
def test_an_estimate_for_programs_is_one_json_object(
    short, encoder_folder, scores, tmp_path, capsys, monkeypatch, stage
):
    flags = [
        f"--stage={stage}", "--estimate", "--json", "--dataset=sample", "--samples=16", "--val_samples=2",
        "--batch_size=8", "--d_z=24", "--latent_len=16", "--k=3", "--max_new_tokens=3", "--device=cpu", "--epochs=1",
        "--scores_epochs=2", f"--encoder_id={encoder_folder}", f"--save_dir={tmp_path / 'r'}",
    ]  # fmt: skip
    flags += [f"--init={scores / 'checkpoint_best'}"] if stage == "joint" else []
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    main()
    said = capsys.readouterr()
    found = json.loads(said.out)
    steps = {"joint": 2} | ({"scores": 4} if stage == "all" else {})
    assert {name: figures["steps"] for name, figures in found["stages"].items()} == steps
    for key in ("steps", "seconds", "teacher_seconds"):
        assert found[key] == pytest.approx(sum(figures[key] for figures in found["stages"].values()))
    assert "estimate: 0 minutes for 2 steps" in said.err and "memory: about" in said.err
    assert not (tmp_path / "r").exists()


def test_a_long_training_says_how_long_and_stops_on_a_cpu_unless_asked_for_by_hand(
    short, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("latentwire.utils.cli.LONGEST_S", 0)
    settings = {"stage": "token_budget_tuned", "llms": "qwen"}
    ready_trainer(short(tmp_path / "a", **settings))
    assert "estimate: 0 minutes for 3 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"questions would take .* hours on this CPU.*SAMPLES"):
        train(short(tmp_path / "b", **settings, samples=None))
    train(short(tmp_path / "b", **settings, samples=None, estimate=True))


def test_a_stage_needs_the_one_before(joint_config, short, codebook, tmp_path, llm_folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint in /no/such"):
        train(joint_config(tmp_path / "a", init="/no/such"))
    with pytest.raises(ValueError, match=r"d_z=16: .* has d_z=24"):
        train(joint_config(tmp_path / "b", d_z=16))
    cut = shutil.copytree(codebook, tmp_path / "cut")
    (cut / "encoder.safetensors").write_bytes((cut / "encoder.safetensors").read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"encoder.safetensors is cut or damaged"):
        train(short(tmp_path / "c", stage="scores", init=str(cut)))
    monkeypatch.setenv("QWEN_ID", llm_folders["LLAMA_ID"])
    with pytest.raises(ValueError, match=r"was made for qwen=.*QWEN_ID"):
        train(joint_config(tmp_path / "d"))
    for name in "abcd":
        assert not list((tmp_path / name).glob("checkpoint_*")), "a refused run leaves no checkpoint"


def test_the_encoder_of_the_stage_before_is_the_one_that_is_trained(joint_config, adapters, tmp_path):
    own = dataclasses.replace(joint_config(tmp_path).encoder, pooling="cif")
    with pytest.raises(ValueError, match=r"pooling='cif': .* has 'select'; set that"):
        train(joint_config(tmp_path / "a", encoder=own))
    with pytest.raises(ValueError, match=r"encoder_type='queries': .* has 'hf'; set that"):
        train(joint_config(tmp_path / "b", encoder_type="queries", encoder=None))


@pytest.mark.parametrize("stage", ["joint", "all"])
@pytest.mark.parametrize("package", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_error_that_names_its_package(
    short, codebook, tmp_path, monkeypatch, stage, package
):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else known(name, *a))
    remedy = rf"tracker='{package}': needs the package {package}: pip install -e \"\.\[{package}\]\""
    with pytest.raises(ValueError, match=remedy):
        train(short(tmp_path / "r", stage=stage, init=str(codebook), tracker=package))
    assert not (tmp_path / "r").exists()


def test_one_process_alone_may_have_all_gpus(short, codebook, tmp_path, monkeypatch):
    monkeypatch.setenv("DEVICE_MAP", "auto")
    config = short(tmp_path / "r", init=str(codebook))
    with pytest.raises(ValueError, match=r"DEVICE_MAP='auto'.*NPROC=1"):
        _require_fits(config, load("sample", "train"), SimpleNamespace(num_processes=2))


def test_memory_that_would_not_do_is_ignored_where_that_is_asked_for(short, codebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10**6)
    config = short(tmp_path / "r", init=str(codebook))
    with pytest.raises(ValueError, match=r"memory: .*--ignore_memory starts it all the same"):
        train(config)
    assert not list((tmp_path / "r").glob("checkpoint*"))
    ready_trainer(dataclasses.replace(config, ignore_memory=True))
    assert "memory: about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stage": "both"}, "stage='both'.*joint"),
        ({"init": ""}, "init='': stage joint starts from a checkpoint"),
        ({"stage": "scores", "init": ""}, "init='': stage scores starts"),
        ({"stage": "codebook", "estimate": True}, "estimate=True: stage codebook has no steps"),
        ({"samples": 0}, "samples=0"),
        ({"scores_samples": 0}, "scores_samples=0"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"scores_epochs": 0}, "scores_epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"k": 0}, "k=0"),
        ({"kd_weight": -0.5}, "kd_weight=-0.5: must not be negative"),
        ({"span_weight": -1.0}, "span_weight=-1.0"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"warmup": 5.0}, "warmup=5.0: it is a share"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"encoder_type": "lstm", "encoder": None}, "encoder_type='lstm'.*queries"),
        ({"codes": "loud"}, "codes='loud'.*random"),
        ({"tracker": "paper"}, "tracker='paper'.*tensorboard"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"source": "book"}, "source='book'"),
        ({"llms": ","}, "llms=','"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(short, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        short(tmp_path, **({"init": "x"} | change))


def test_a_process_has_its_own_gpu_and_a_user_names_none_but_the_first(short, tmp_path):
    config = short(tmp_path / "r", stage="codebook")
    assert dataclasses.replace(config, device="cuda:3").device == "cuda:3", "as the fourth of several processes has"
    with pytest.raises(ValueError, match=r"device='cuda:1'.*CUDA_VISIBLE_DEVICES"):
        train(dataclasses.replace(config, device="cuda:1"))


def test_the_settings_of_an_encoder_are_checked_and_are_flags():
    with pytest.raises(ValueError, match="pooling='mean'"):
        type(TrainSettings(init="x").encoder)(pooling="mean")
    read = parse(TrainSettings, ["--stage=all", "--pooling=cif", "--encoder_id=mine"])
    assert (read.encoder.pooling, read.encoder.encoder_id) == ("cif", "mine")
    with pytest.raises(ValueError, match="pooling='cif': encoder_type queries has no such setting"):
        parse(TrainSettings, ["--stage=all", "--encoder_type=queries", "--pooling=cif"])


def test_an_unknown_kind_of_adapter_is_named_with_the_known_ones(short, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_type='lora'.*residual_mlp"):
        train(short(tmp_path / "r", stage="codebook", adapter_type="lora"))
    assert not (tmp_path / "r" / "checkpoint_best").exists()


def test_another_kind_of_adapter_than_the_checkpoint_has_is_refused(joint_config, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_type='preamble': .* has residual_mlp; .*chosen at stage codebook"):
        train(joint_config(tmp_path / "r", adapter_type="preamble"))


def test_a_file_of_questions_is_not_trained_on(short, tmp_path):
    with pytest.raises(ValueError, match=r"dataset='.*dev.json': a file is read as dev; to train, name a folder"):
        short(tmp_path, stage="codebook", dataset=str(SAMPLE_DIR / "dev.json"))
    with pytest.raises(ValueError, match="to train, name a folder"):
        CodecSettings(dataset=str(SAMPLE_DIR / "dev.json"))


def test_the_program_draws_the_curves_of_every_stage(whole, short, tmp_path, monkeypatch, capsys):
    config = short(shutil.copytree(whole, tmp_path / "r"), **ALL)
    monkeypatch.setattr("latentwire.train.parse", lambda settings: config)
    monkeypatch.setattr("latentwire.training.running.train", lambda config: {})
    main()
    drawn = {line.removeprefix("drew ") for line in capsys.readouterr().out.splitlines()}
    names = ("loss.png", "first_token_accuracy.png")
    expected = {tmp_path / "r" / folder / name for folder in (".", "stages/adapters") for name in names}
    assert drawn == set(map(str, expected | {tmp_path / "r" / "stages" / "scores" / "loss.png"}))


def test_fewer_questions_than_processes_are_refused_before_anything_is_trained(short, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 9)
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=r"samples=8: fewer than NPROC=9; raise SAMPLES \(--samples\) or lower NPROC"):
        train(short(tmp_path / "r", stage="codebook", samples=8))


def test_a_trained_checkpoint_is_evaluated_and_a_cut_one_is_not(joint, tmp_path):
    ckpt = shutil.copytree(joint / "checkpoint_best", tmp_path / "ckpt")
    settings = {"dataset": "sample", "samples": 5, "batch_size": 4, "max_new_tokens": 3, "device": "cpu"}
    settings |= {"ckpt": str(ckpt), "conditions": "latentwire,selected_text,encoder_only,shuffled_z"}
    results = evaluate(EvalSettings(**settings, save_dir=str(tmp_path / "a")))
    rows = {(row["condition"], row["llm"]): row for row in results["results"]}
    for condition in ("latentwire", "selected_text", "shuffled_z"):
        assert {(condition, name) for name in LLMS} <= rows.keys()
    assert "encoder_only" in {condition for condition, _ in rows}
    assert rows["latentwire", "qwen"]["llm_positions"] == rows["shuffled_z", "qwen"]["llm_positions"] == 16
    assert results["train_seed"] == 0 and results["checkpoint"] == str(ckpt)
    for name in ("encoder.safetensors", "adapter_qwen.safetensors"):
        data = (ckpt / name).read_bytes()
        (ckpt / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
            evaluate(EvalSettings(**settings, save_dir=str(tmp_path / name)))
        (ckpt / name).write_bytes(data)
