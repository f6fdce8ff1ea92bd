"""Several processes on one CPU (torchrun, gloo): the figures of one process, and no hanging when one of them dies."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from latentwire.training.log import flat

ROOT = Path(__file__).parents[2]
# As train.py, but rank 1 ends in step 2 in the way that its first argument names.
DRIVER = """
import os, sys

from latentwire.train import main
from latentwire.training.trainer import Trainer
from latentwire.utils.cli import run

way, loss = sys.argv.pop(1), Trainer._loss


def dying(self, step, *part):
    if step == 2 and os.environ["RANK"] == "1" and self.step == 2:
        if way == "killed":
            os._exit(9)
        raise ValueError("a damaged question")
    return loss(self, step, *part)


Trainer._loss = dying
run(main)
"""


@pytest.fixture(scope="module")
def surroundings(llm_folders, encoder_folder, warm, tmp_path_factory):
    """(environment, flags of a short joint stage from a codebook, with an encoder that drops nothing out)."""
    folder = tmp_path_factory.mktemp("processes")
    encoder = folder / "encoder"
    shutil.copytree(encoder_folder, encoder)
    shape = json.loads((encoder / "config.json").read_text())
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(shape))
    environment = os.environ | llm_folders | warm | {
        "LATENTWIRE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("SQUAD_DIR", None)
    flags = [
        "--dataset", "sample", "--device", "cpu", "--d_z", "24", "--latent_len", "16", "--k", "3", "--encoder_id",
        str(encoder), "--samples", "24", "--val_samples", "4", "--max_new_tokens", "2", "--epochs", "1",
    ]  # fmt: skip
    command = [warm["PYTHON"], "latentwire/train.py", "--stage", "codebook", "--save_dir", str(folder / "codebook")]
    subprocess.run([*command, *flags], cwd=ROOT, env=environment, check=True, capture_output=True)
    joint = ["--stage", "joint", "--init", str(folder / "codebook" / "checkpoint_best"), "--kd_weight", "0", *flags]
    return environment, joint


def run(surroundings, folder, processes, program, *more):
    """torchrun on one machine, ended after two minutes."""
    environment, flags = surroundings
    launcher = [environment["PYTHON"], "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *program, *flags, "--save_dir", str(folder), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def run_on_two_machines(surroundings, folder, *more):
    """Two torchruns of one process each that find each other through a port, as on two machines with one disk."""
    environment, flags = surroundings
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    launcher = [environment["PYTHON"], "-m", "torch.distributed.run", *meeting, "latentwire/train.py"]
    command = [*launcher, *flags, "--save_dir", str(folder), *more]
    machines = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for _ in "12"]
    try:
        return [(machine.communicate(timeout=120)[1], machine.returncode) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()


def steps(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_all_stages_run_in_one_launch_and_each_learns_from_all_processes(surroundings, tmp_path):
    environment, joint = surroundings
    flags = joint[joint.index("--kd_weight") :]  # without stage and init: those of all stages follow from each other
    done = run((environment, flags), tmp_path / "r", 2, ["latentwire/train.py"], "--stage", "all", "--batch_size", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    stages = {name: tmp_path / "r" / "stages" / name for name in ("codebook", "scores")} | {"joint": tmp_path / "r"}
    assert all((folder / "checkpoint_best" / "config.json").is_file() for folder in stages.values())
    assert [len(steps(stages[name])) for name in ("scores", "joint")] == [3 * 3, 3], "24 questions, 8 per step"
    assert "process group" not in done.stderr


def test_two_processes_train_as_one_with_the_same_global_batch(surroundings, tmp_path):
    for processes, batch in ((1, 8), (2, 4)):
        done = run(
            surroundings, tmp_path / str(processes), processes, ["latentwire/train.py"], "--batch_size", str(batch)
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for said, status in run_on_two_machines(surroundings, tmp_path / "machines", "--batch_size", "4"):
        assert status == 0, said[-2000:]
    alone = steps(tmp_path / "1")
    assert len(alone) == 3
    weights = {
        name: {
            part: torch.load(tmp_path / name / "checkpoint_last" / f"{part}.pt", weights_only=True)
            for part in ("adapter_llama", "encoder")
        }
        for name in ("1", "2", "machines")
    }
    for name in ("2", "machines"):
        for one, both in zip(alone, steps(tmp_path / name), strict=True):
            one, both = flat(one), flat(both)
            for key in ("loss", "ce llama", "ce qwen", "span", "grad_norm codebook", "grad_norm adapter qwen"):
                assert both[key] == pytest.approx(one[key], rel=2e-3), key
        for part, found in weights["1"].items():
            for key, value in found.items():
                torch.testing.assert_close(weights[name][part][key], value, rtol=1e-3, atol=1e-4, msg=f"{part} {key}")


@pytest.mark.parametrize(("way", "says"), [("killed", "exitcode"), ("raises", "error: a damaged question")])
def test_when_a_worker_dies_the_others_stop_and_what_was_saved_stays(surroundings, tmp_path, way, says):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    more = ("--batch_size", "4", "--save_minutes", "0")
    done = run(surroundings, tmp_path / "r", 2, [str(driver), way], *more)
    assert done.returncode != 0
    assert says in done.stderr
    assert len(steps(tmp_path / "r")) == 2
    again = run(surroundings, tmp_path / "r", 2, ["latentwire/train.py"], *more)
    assert again.returncode == 0, again.stderr[-2000:]
    assert [line["step"] for line in steps(tmp_path / "r")] == [1, 2, 3]


def test_two_processes_estimate_all_stages(surroundings, tmp_path):
    more = ("--stage", "all", "--init", "", "--epochs", "2", "--scores_epochs", "1", "--batch_size", "4")
    done = run(surroundings, tmp_path / "r", 2, ["latentwire/train.py"], *more, "--estimate", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {name: one["steps"] for name, one in found["stages"].items()} == {"scores": 3, "adapters": 3, "joint": 3}
    assert done.stderr.count("memory: about") == 3, "said once, not by each process"
    assert not (tmp_path / "r").exists()
