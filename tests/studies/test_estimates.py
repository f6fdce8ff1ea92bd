"""Estimates without running anything: the same steps and answers as programs count, and times that follow the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentwire.evaluation.evaluate import evaluate
from latentwire.llms.loading import shape_of
from latentwire.llms.pace import ANSWERING, Work
from latentwire.studies.programs import Program, program, torchrun
from latentwire.studies.scale.estimates import predicted
from latentwire.training.running import train, work_of
from latentwire.training.settings import TrainSettings
from latentwire.utils.cli import parse
from latentwire.utils.machine import on_this_machine

pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = Path(__file__).parents[2]
SHORT = ["--dataset", "sample", "--samples", "8", "--batch_size", "4", "--device", "cpu", "--max_new_tokens", "2"]
LEARNED = ["--val_samples", "2", "--latent_len", "16", "--d_z", "24", "--epochs", "2"]


def training(*flags, processes=1, **environment):
    wanted = Program("x", torchrun(processes, "--standalone", *SHORT, *LEARNED, *flags), environment)
    return predicted(wanted, processes)


def evaluation(*flags):
    return predicted(Program("x", program("eval", *SHORT, *flags)))


def test_all_stages_of_a_training_have_their_steps(encoder_folder):
    found = training("--stage", "all", "--kd_weight", "0.5")
    assert {name: stage["steps"] for name, stage in found["stages"].items()} == {
        "scores": 6, "adapters": 2, "joint": 2,
    }  # fmt: skip
    assert found["steps"] == 10 and found["seconds"] == sum(stage["seconds"] for stage in found["stages"].values())
    assert found["stages"]["scores"]["teacher_seconds"] == 0 < found["stages"]["joint"]["teacher_seconds"]
    assert training("--stage", "all", "--kd_weight", "0")["teacher_seconds"] == 0
    spread = training("--stage", "all", processes=2)
    assert spread["stages"]["joint"]["steps"] == 1, "two processes share a step"


def test_a_rival_before_the_whole_text_takes_longer_than_one_before_few_tokens():
    whole, few = (training("--stage", name)["seconds"] for name in ("text_tuned", "token_budget_tuned"))
    assert whole > 2 * few > 0


def test_a_program_of_another_environment_is_estimated_in_that_one(monkeypatch):
    monkeypatch.setenv("EPOCHS", "7")
    longer = training("--stage", "text_tuned", "--epochs", "4")["steps"]
    assert longer == 2 * training("--stage", "text_tuned")["steps"]
    wanted = torchrun(1, "--standalone", *SHORT, "--stage", "text_tuned")
    assert predicted(Program("x", wanted, {"EPOCHS": "3"}))["steps"] == 6


def test_an_evaluation_has_its_answers_and_more_places_take_longer(tmp_path):
    found = evaluation("--conditions", "text,token_budget,no_context")
    assert found["answers"] == 2 * 3 * 8 and found["seconds"] > 0
    times = [evaluation("--conditions", f"token_budget@{m}")["seconds"] for m in (8, 64)]
    assert times[1] > times[0]
    assert evaluation("--conditions", "baselines,learned,text_tuned", "--tuned", str(tmp_path / "later"))["answers"]


def test_wrong_settings_are_told():
    with pytest.raises(ValueError, match="'nosuch': unknown"):
        evaluation("--conditions", "nosuch")
    with pytest.raises(FileNotFoundError, match=r"nosuch\.json"):
        evaluation("--conditions", "text", "--dataset", "nosuch.json")


def test_the_first_steps_of_a_run_correct_the_next_estimate(short, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    flags = [*SHORT, *LEARNED, "--stage", "text_tuned"]
    config = on_this_machine(parse(TrainSettings, [*flags, "--estimate", "--json", "--save_dir", str(tmp_path / "r")]))
    before, work = training("--stage", "text_tuned")["seconds"], work_of(config)
    assert work.seconds(1e9) == work.stored(1e9)
    measured = train(config)["text_tuned"]["seconds"]
    assert work.seconds(1e9) != work.stored(1e9)
    found = training("--stage", "text_tuned")["seconds"]
    assert found != before and found == pytest.approx(measured, rel=0.05), "its texts' mean length is about that of all"


def test_the_first_batches_of_an_evaluation_correct_the_next_estimate(tmp_path, monkeypatch):
    from evaluation.evaluations import config

    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    settings = config(tmp_path / "r", conditions="token_budget", estimate=True)
    evaluate(settings)
    for llm_id in settings.llm_ids.values():
        work = Work(ANSWERING, "cpu", settings.dtype or "float32", (llm_id,))
        assert work.seconds(1e9) != work.stored(1e9)


def test_shapes_are_read_from_a_configuration(llm_folders):
    small = shape_of("llama", os.environ["LLAMA_ID"])
    assert (small.layers, small.width) == (2, 48) and small.vocabulary >= 700
    assert shape_of("x", "offline:smollm2-135m-instruct").layers == 30, "nothing is fetched"


@pytest.mark.parametrize("name", ["sweep", "suite"])
def test_a_dry_run_imports_nothing_slow_and_says_what_the_real_files_say(name, tmp_path):
    """The programs' files are glanced at: were they to compute with a stand-in, they would say something else."""
    run = f"""
import runpy, sys
sys.argv[1:] = ["--dry_run", "--json", "--save_dir", {str(tmp_path / name)!r}]
try:
    runpy.run_path("latentwire/{name}.py", run_name="__main__")
finally:
    print(sorted(sys.modules.keys() & {{"torch", "transformers", "scipy", "sklearn", "matplotlib", "datasets"}}))
"""
    places = {"PYTHONPATH": str(ROOT), "LATENTWIRE_CACHE": str(tmp_path), "DATASET": "sample", "OMP_NUM_THREADS": "2"}
    light, real = (
        subprocess.run([sys.executable, "-c", before + run], cwd=ROOT, capture_output=True, text=True, env=places)
        for before in ("", "import torch")
    )
    *said, slow = light.stdout.splitlines()
    assert not light.returncode and slow == "[]", light.stderr
    assert said and said == real.stdout.splitlines()[:-1], real.stderr
