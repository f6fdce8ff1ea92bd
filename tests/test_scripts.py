"""The launchers, run as a user runs them, with small random models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "baselines/text_baseline.sh": "runs/baselines/text",
    "baselines/token_budget_baseline.sh": "runs/baselines/token_budget/M32",
    "baselines/pca_baseline.sh": "runs/baselines/pca/M32",
    "interface_report.sh": "runs/interface",
}
SCRIPTS = sorted(p for p in ROOT.glob("scripts/**/*.sh"))


@pytest.fixture
def launch(llm_folders, tmp_path):
    """Run a script with settings of the environment; results go to tmp_path / "out"."""

    def start(script, **settings):
        environment = {k: v for k, v in os.environ.items() if k not in ("SQUAD_DIR", "MODELS_DIR")} | llm_folders
        environment |= {"PYTHON": sys.executable, "OUTPUT_DIR": str(tmp_path / "out"), "DATASET": "sample"}
        environment |= {"SAMPLES": "4", "D_Z": "24", "MAX_NEW_TOKENS": "3"} | settings
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / script)], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    return start


def test_a_baseline_writes_results_table_chart_and_log_and_prints_its_settings(launch, tmp_path):
    done = launch("baselines/pca_baseline.sh", LATENT_LEN="8")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert [(row["condition"], row["m"]) for row in results["results"][:3]] == [
        ("pca", 8), ("pca_pool", 8), ("pca_rank", 8),
    ]  # fmt: skip
    assert all(0 < row["explained_variance"] < 1 for row in results["results"])
    assert "| qwen | pca_pool | 8 |" in (out / "table.md").read_text()
    assert (out / "hierarchy.png").read_bytes().startswith(b"\x89PNG")
    assert "LATENT_LEN      8" in done.stdout
    assert any("F1" in log.read_text() for log in out.glob("20*.log"))


@pytest.mark.parametrize(
    ("script", "settings", "says"),
    [
        ("baselines/token_budget_baseline.sh", {"LATENT_LEN": "0"}, "latent_len=0"),
        ("baselines/text_baseline.sh", {"SAMPLES": "-3"}, "samples=-3"),
        ("baselines/text_baseline.sh", {"SAMPLES": "many"}, "'many'"),
        ("baselines/text_baseline.sh", {"DATASET": "no/such/data"}, "'no/such/data'"),
        ("baselines/text_baseline.sh", {"DATASET": "squad", "SQUAD_DIR": "/no/such/folder"}, "SQUAD_DIR=/no/such"),
        ("baselines/text_baseline.sh", {"LLAMA_ID": "/no/such/model"}, "/no/such/model"),
        ("baselines/pca_baseline.sh", {"OUTPUT_DIR": "/proc/nothing"}, "OUTPUT_DIR=/proc/nothing"),
        ("interface_report.sh", {"D_Z": "100000"}, "d_z=100000"),
    ],
)
def test_a_wrong_value_ends_a_script_with_one_clear_line(launch, script, settings, says):
    done = launch(script, **settings)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert len(said) == 1 and says in said[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("failing", ["eval", "report"])
def test_a_crash_in_the_middle_of_a_pipe_fails_the_script(launch, tmp_path, script, failing):
    crash = tmp_path / "python-that-crashes"
    crash.write_text(f'#!/bin/sh\necho half an answer\ncase "$*" in *{failing}.py*) exit 9 ;; esac\n')
    crash.chmod(0o755)
    done = launch(script, PYTHON=str(crash))
    assert done.returncode == 9 and "half an answer" in done.stdout


@pytest.mark.parametrize(("script", "folder"), LAUNCHERS.items())
def test_the_results_go_where_the_documents_say(launch, tmp_path, script, folder):
    says = tmp_path / "python-that-says-where"
    says.write_text('#!/bin/sh\necho "$@" >> "$WHERE"\nexit 9\n')
    says.chmod(0o755)
    copy = shutil.copytree(ROOT / "scripts", tmp_path / "copy of the repository" / "scripts").parent
    launch(copy / "scripts" / script, PYTHON=str(says), OUTPUT_DIR="", LATENT_LEN="32", WHERE=str(tmp_path / "where"))
    assert f"--save_dir {folder}" in (tmp_path / "where").read_text()
    assert list((copy / folder).glob("20*.log"))


def test_only_one_starts_over(launch):
    done = launch("baselines/text_baseline.sh", FRESH_EVAL="no")
    assert done.returncode == 2 and "FRESH_EVAL=no" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_is_strict_and_parses(script):
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_ci_runs_the_readmes_test_command_and_nothing_else():
    lines = [x for x in (ROOT / ".ci/run").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "set -euo pipefail" and len(lines) == 2 and "scripts/test.sh" in lines[1]
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text()
