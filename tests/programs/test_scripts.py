"""The launchers, run as a user runs them, with small random models."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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

    def start(script, *arguments, **settings):
        environment = {k: v for k, v in os.environ.items() if k not in ("SQUAD_DIR", "MODELS_DIR")} | llm_folders
        environment |= {"PYTHON": sys.executable, "OUTPUT_DIR": str(tmp_path / "out"), "DATASET": "sample"}
        environment |= {"SAMPLES": "4", "D_Z": "24", "MAX_NEW_TOKENS": "3"} | settings
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
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


@pytest.fixture
def recorded(launch, tmp_path):
    """Run a script with a Python that does nothing but fail at FAILING; returns what ended, and the calls it made."""
    python = tmp_path / "python-that-notes"
    python.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\ncase "$*" in *"${FAILING:-nothing}"*) exit 9 ;; esac\n')
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def start(script, *arguments, **settings):
        calls.write_text("")
        done = launch(script, *arguments, PYTHON=str(python), CALLS=str(calls), **settings)
        return done, calls.read_text().splitlines()

    return start


@pytest.fixture
def guessed(recorded, tmp_path):
    """As `recorded`, with programs that guess a time when asked for one and leave what the whole suite looks at."""
    python = tmp_path / "python-that-notes"
    python.write_text(
        python.read_text()
        + """
case "$*" in *--estimate*) echo "estimate: 7 minutes for 1 steps"; exit ;; esac
folder=$(expr "$*" : '.*eval.py .*--save_dir \\([^ ]*\\)') || exit 0
mkdir -p "$folder"
printf "before\\n\\`\\`\\`text\\nPASS llama 1.\\nFAIL qwen 3.\\n\\`\\`\\`\\n" > "$folder/table.md"
"""
    )
    return functools.partial(recorded, TMPDIR="/tmp")


def flag(call, name):
    return call.split(f"--{name} ")[1].split()[0]


@pytest.fixture
def copy(tmp_path):
    """A copy of the scripts, whose default folders a test may fill."""
    return shutil.copytree(ROOT / "scripts", tmp_path / "copy of the repository" / "scripts").parent


TRAINING = {
    "experiments/train_latentwire.sh": ["--stage codebook", "--stage scores", "--stage adapters", "--stage joint"],
    "baselines/tuned_baselines.sh": [
        "--stage text_tuned", "--stage token_budget_tuned", "latentwire/eval.py", "latentwire/report.py",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("script", "steps"), TRAINING.items())
def test_a_training_fails_with_its_first_failing_step_and_begins_no_later_one(recorded, script, steps):
    for number, step in enumerate(steps):
        done, calls = recorded(script, FAILING=step)
        assert done.returncode == 9 and len(calls) == number + 1
        assert all(part in call for part, call in zip(steps, calls, strict=False))


def test_the_stages_follow_one_another_where_the_documents_say(recorded, copy):
    done, calls = recorded(
        copy / "scripts/experiments/train_latentwire.sh", OUTPUT_DIR="", EPOCHS="4", SCORES_EPOCHS="5",
        SAMPLES="300", SCORES_SAMPLES="900",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stages = "runs/experiments/latentwire/stages"
    assert [flag(call, "save_dir") for call in calls] == [
        f"{stages}/codebook", f"{stages}/scores", f"{stages}/adapters", "runs/experiments/latentwire",
    ]  # fmt: skip
    inits = [flag(call, "init") for call in calls[1:]]
    assert inits == [f"{stages}/{stage}/checkpoint_best" for stage in ("codebook", "scores", "adapters")]
    assert [flag(call, "epochs") for call in calls[1:]] == ["5", "1", "3"]
    assert [flag(call, "samples") for call in calls] == ["300", "900", "300", "300"]
    assert all("--resume" in call for call in calls), "what a kill left is continued"
    assert list((copy / "runs/experiments/latentwire").glob("20*.log"))


def test_free_queries_go_from_the_codebook_to_joint(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", ENCODER_TYPE="byte", EPOCHS="4")
    assert done.returncode == 0 and [flag(call, "stage") for call in calls] == ["codebook", "joint"]
    assert flag(calls[1], "init").endswith("stages/codebook/checkpoint_best") and flag(calls[1], "epochs") == "4"


def test_a_single_epoch_is_the_joint_stages(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", EPOCHS="1")
    assert done.returncode == 0 and [flag(call, "stage") for call in calls] == ["codebook", "scores", "joint"]
    assert flag(calls[2], "init").endswith("stages/scores/checkpoint_best") and flag(calls[2], "epochs") == "1"


def test_a_named_checkpoint_takes_the_place_of_the_first_stages(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", INIT="some/scores", EPOCHS="1")
    assert done.returncode == 0 and [flag(call, "stage") for call in calls] == ["joint"]
    assert flag(calls[0], "init") == "some/scores"


def test_without_span_supervision_there_is_no_stage_for_it(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", SPAN_WEIGHT="0", EPOCHS="2", INTERFACE="random")
    assert done.returncode == 0 and [flag(call, "stage") for call in calls] == ["codebook", "adapters", "joint"]
    assert {flag(call, "interface") for call in calls} == {"random"}


def test_ablations_change_one_thing_a_row_and_are_paired_with_three_seeds(recorded, copy):
    script = copy / "scripts/experiments/ablations.sh"
    done, calls = recorded(script, OUTPUT_DIR="", ROWS="byte kd no_span M8", SAMPLES="5", LLMS="llama")
    assert done.returncode == 0, done.stdout + done.stderr
    joint = {flag(call, "save_dir"): call for call in calls if "--stage joint" in call}
    folder = "runs/ablations"
    assert list(joint) == [f"{folder}/{name}" for name in ("base", "seed1", "seed2", "byte", "kd", "no_span", "M8")]
    seeds = [flag(joint[f"{folder}/{name}"], "seed") for name in ("base", "seed1", "seed2", "byte")]
    assert seeds == ["0", "1", "2", "0"]
    changed = {
        ("byte", "encoder_type"): "byte", ("kd", "kd_weight"): "0.5", ("no_span", "span_weight"): "0",
        ("M8", "latent_len"): "8",
    }  # fmt: skip
    for (name, option), value in changed.items():
        assert flag(joint[f"{folder}/{name}"], option) == value != flag(joint[f"{folder}/base"], option)
    assert flag(joint[f"{folder}/M8"], "init") == flag(joint[f"{folder}/base"], "init")
    evaluations = [call for call in calls if "eval.py" in call]
    assert all("--split held_out" in call for call in evaluations) and len(evaluations) == 7
    first = ",".join(f"{folder}/{name}/eval" for name in ("base", "seed1", "seed2"))
    others = " ".join(f"{folder}/{name}/eval" for name in ("byte", "kd", "no_span", "M8"))
    assert calls[-1].endswith(f"compare.py {first} {others} --save_dir {folder}")
    for step in ("--stage joint", "eval.py", "compare.py"):
        done, calls = recorded(script, FAILING=step, ROWS="byte")
        assert done.returncode == 9 and step in calls[-1]
    _, calls = recorded(script, ROWS="byte", SOURCE="context")
    assert {flag(call, "source") for call in calls[:-1]} == {"context"}  # trained on and judged by the same
    done, calls = recorded(script, ROWS="bytes")
    assert done.returncode == 2 and "bytes is not known" in done.stderr and not calls


def test_the_benchmark_takes_its_settings_and_fails_with_its_program(recorded, copy):
    script = copy / "scripts/benchmark.sh"
    done, (call,) = recorded(script, OUTPUT_DIR="", PARTS="mfu", RANDOM_WEIGHTS="1")
    assert done.returncode == 0 and flag(call, "parts") == "mfu" and "--random_weights" in call
    assert flag(call, "save_dir") == "runs/benchmark"
    done, calls = recorded(script, FAILING="benchmark.py")
    assert done.returncode == 9 and len(calls) == 1
    done, calls = recorded(script, RANDOM_WEIGHTS="yes")
    assert done.returncode == 2 and "RANDOM_WEIGHTS=yes" in done.stderr and not calls


def test_the_diagnostics_train_a_quick_checkpoint_unless_one_is_named(recorded, copy):
    script = copy / "scripts/run_embedding_diagnostics.sh"
    done, calls = recorded(script, OUTPUT_DIR="", TRAIN_SAMPLES="9", EVAL_SAMPLES="7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [flag(call, "stage") for call in calls[:3]] == ["codebook", "scores", "joint"]
    assert {flag(call, "samples") for call in calls[:3]} == {"9"} and flag(calls[3], "samples") == "7"
    assert "latentwire/diagnostics.py" in calls[3]
    assert flag(calls[3], "ckpt") == "runs/embed_diagnostics/quick/checkpoint_best"
    assert flag(calls[3], "save_dir") == "runs/embed_diagnostics"
    done, calls = recorded(script, OUTPUT_DIR="", CKPT="some/checkpoint")
    assert done.returncode == 0 and len(calls) == 1 and flag(calls[0], "ckpt") == "some/checkpoint"
    for number, step in enumerate(("--stage scores", "diagnostics.py")):
        done, calls = recorded(script, FAILING=step)
        assert done.returncode == 9 and step in calls[-1] and len(calls) == (2, 4)[number]


def test_the_rivals_are_trained_and_evaluated_where_the_documents_say(recorded, copy):
    done, calls = recorded(copy / "scripts/baselines/tuned_baselines.sh", OUTPUT_DIR="", EVAL_SAMPLES="7", SAMPLES="5")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = "runs/baselines/tuned/M32"
    assert [flag(call, "save_dir") for call in calls[:3]] == [
        f"{folder}/text_tuned", f"{folder}/token_budget_tuned", f"{folder}/eval",
    ]  # fmt: skip
    assert flag(calls[2], "tuned") == folder and flag(calls[2], "conditions") == "token_budget_tuned,text_tuned"
    assert [flag(call, "samples") for call in calls[:3]] == ["5", "5", "7"]
    assert calls[3].endswith(f"report.py {folder}/eval")
    _, calls = recorded(copy / "scripts/baselines/tuned_baselines.sh", OUTPUT_DIR="", CKPT="checkpoints/latentwire_m32")
    assert flag(calls[2], "stage") == "selected_text_tuned"
    assert flag(calls[2], "init") == flag(calls[3], "ckpt") == "checkpoints/latentwire_m32"
    assert flag(calls[3], "conditions") == "latentwire,selected_text_tuned,token_budget_tuned,text_tuned"


def test_a_training_starts_one_process_a_gpu_and_refuses_an_unknown_resume(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", NPROC="3", RESUME="0")
    assert done.returncode == 0
    assert all("-m torch.distributed.run --standalone --nproc_per_node=3" in call for call in calls)
    assert not any("--resume" in call for call in calls)
    several = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500"
    _, calls = recorded("experiments/train_latentwire.sh", NPROC="8", RENDEZVOUS=several)
    assert calls and all(f"run {several} --nproc_per_node=8 " in call for call in calls)
    done, calls = recorded("experiments/train_latentwire.sh", RESUME="yes")
    assert done.returncode == 2 and "RESUME=yes" in done.stderr and not calls


def test_the_quickstart_evaluates_the_shipped_checkpoint_and_squad_only_where_it_is(recorded, copy, tmp_path):
    script = copy / "scripts/quickstart.sh"
    done, calls = recorded(script, OUTPUT_DIR="", DATASET="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [flag(call, "save_dir") for call in calls if "eval.py" in call] == ["runs/quickstart/sample"]
    done, calls = recorded(script, OUTPUT_DIR="", DATASET="", SQUAD_DIR="/some/folder")
    evaluations = [call for call in calls if "eval.py" in call]
    assert [flag(call, "dataset") for call in evaluations] == ["sample", "squad"]
    assert {flag(call, "ckpt") for call in evaluations} == {"checkpoints/latentwire_m32"}
    own = copy / "runs/experiments/latentwire/checkpoint_best"
    own.mkdir(parents=True)
    (own / "config.json").touch()
    done, calls = recorded(script, OUTPUT_DIR="")
    (evaluation,) = (call for call in calls if "eval.py" in call)
    assert flag(evaluation, "ckpt") == str(own.relative_to(copy))
    assert flag(evaluation, "save_dir") == "runs/quickstart_trained/sample"
    done, calls = recorded(script, CKPT="")
    assert "--ckpt  --tuned" in " ".join(calls)
    for number, step in enumerate(("eval.py", "report.py")):
        done, calls = recorded(script, FAILING=step)
        assert done.returncode == 9 and len(calls) == number + 1


def test_a_training_from_end_to_end_is_not_repeated(launch, tmp_path, encoder_folder):
    settings = {
        "SAMPLES": "8", "BATCH_SIZE": "4", "VAL_SAMPLES": "2", "EPOCHS": "2", "SCORES_EPOCHS": "1", "LATENT_LEN": "16",
        "NPROC": "1", "ENCODER_ID": encoder_folder, "LATENTWIRE_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    done = launch("experiments/train_latentwire.sh", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    made = json.loads((out / "checkpoint_best" / "config.json").read_text())
    assert made["stage"] == "joint" and made["frozen_sha256"].keys() == {"llama", "qwen"}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "validation" not in line] == [1, 2]
    assert "drew" in done.stdout and (out / "first_token_accuracy.png").is_file()
    # Started again: joint for real; the stages before it, which take as long to import all, are told to resume too.
    again = tmp_path / "python-for-joint"
    again.write_text(f'#!/bin/sh\ncase "$*" in *"--stage joint"*) exec {sys.executable} "$@" ;; esac\n')
    again.chmod(0o755)
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    done = launch("experiments/train_latentwire.sh", PYTHON=str(again), **settings)
    assert done.returncode == 0 and f"{out} is finished already" in done.stdout, done.stdout + done.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*.pt")}


SUITE = [
    "--stage codebook --save_dir /tmp", "--stage token_budget_tuned --save_dir /tmp",
    "--stage text_tuned --save_dir /tmp", "--stage scores --save_dir /tmp", "--stage joint --save_dir /tmp",
    "eval.py --ckpt /tmp",
    "eval.py --ckpt  --tuned  --reuse  ", "report.py runs/all/baselines",
    "--stage token_budget_tuned --save_dir runs", "--stage text_tuned --save_dir runs",
    "--stage codebook --save_dir runs", "--stage scores --save_dir runs", "--stage adapters --save_dir runs",
    "--stage joint --save_dir runs",
    "eval.py --ckpt runs/all/latentwire/checkpoint_best --tuned runs/all/tuned --reuse runs/all/baselines ",
    "report.py runs/all/eval\n",
    "report.py runs/all/eval runs/all/latentwire runs/all/tuned --html runs/all/report.html",
]  # fmt: skip


def test_the_whole_suite_plans_first_and_ends_with_the_critical_tests(guessed, copy):
    done, calls = guessed(copy / "scripts/run_all.sh", OUTPUT_DIR="", EVAL_SAMPLES="7", EPOCHS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(calls) == len(SUITE) and all(part in f"{call}\n" for part, call in zip(SUITE, calls, strict=True))
    said = done.stdout
    assert (
        said.index("plan, in runs/all")
        < said.index("35 min  altogether")
        < said.index("OUTPUT_DIR      runs/all/baselines")
    )
    assert said.endswith("the critical tests:\nPASS llama 1.\nFAIL qwen 3.\n")
    evaluations = [call for call in calls if "eval.py" in call and "--estimate" not in call]
    compared = [set(flag(call, "conditions").split(",")) for call in evaluations]
    assert compared[0] < compared[1], "the baselines are compared with, and their answers are there already"
    assert {"latentwire", "shuffled_z", "encoder_only", "text_tuned"} <= compared[1] - compared[0]
    assert {flag(call, "samples") for call in evaluations} == {"7"}
    assert all("--resume" in call for call in calls if "--stage" in call and "--estimate" not in call)


@pytest.mark.parametrize("number", range(len(SUITE)))
def test_the_whole_suite_fails_with_any_step_and_begins_no_later_one(guessed, copy, number):
    step = SUITE[number].rstrip("\n")
    done, calls = guessed(copy / "scripts/run_all.sh", OUTPUT_DIR="", FAILING=step, EPOCHS="2")
    assert done.returncode != 0 and "critical" not in done.stdout
    assert len(calls) == number + 1 and step in calls[-1]


def test_a_dry_run_of_the_whole_suite_leaves_nothing(guessed, copy):
    done, calls = guessed(copy / "scripts/run_all.sh", "--dry-run", OUTPUT_DIR="", TRAINED_RIVALS="0")
    assert done.returncode == 0 and "21 min  altogether" in done.stdout, done.stdout + done.stderr
    assert len(calls) == 4 and not any("tuned --save_dir" in call for call in calls)
    assert not (copy / "runs").exists()


@pytest.mark.parametrize(("arguments", "settings"), [(["--dryrun"], {}), ([], {"TRAINED_RIVALS": "no"})])
def test_the_whole_suite_refuses_what_it_does_not_know(guessed, copy, arguments, settings):
    done, calls = guessed(copy / "scripts/run_all.sh", *arguments, OUTPUT_DIR="", **settings)
    assert done.returncode == 2 and not calls
    assert (arguments or ["TRAINED_RIVALS=no"])[0] in done.stderr


def test_the_whole_suite_from_end_to_end(launch, tmp_path, encoder_folder):
    settings = {
        "SAMPLES": "8", "BATCH_SIZE": "4", "VAL_SAMPLES": "2", "EPOCHS": "1", "SCORES_EPOCHS": "1", "LATENT_LEN": "16",
        "NPROC": "1", "ENCODER_ID": encoder_folder, "LATENTWIRE_CACHE": str(tmp_path / "cache"), "EVAL_SAMPLES": "6",
        "TRAINED_RIVALS": "0",
    }  # fmt: skip
    done = launch("run_all.sh", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "eval" / "results.json").read_text())
    taken = {row["condition"]: bool(row["taken_from"]) for row in results["results"]}
    assert taken["text"] and taken["pca"] and not taken["latentwire"] and not taken["encoder_only"]
    assert len(done.stdout.split("the critical tests:\n")[1].splitlines()) == 6
    assert "latentwire" in (out / "report.html").read_text()


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
