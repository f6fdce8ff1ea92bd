"""The sweep: its grid, its trials on Ray with stand-ins for the programs, its ranking, and that no kill changes it."""

import csv
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from latentwire.data.question import Question, split_by_article
from latentwire.data.squad import load
from latentwire.evaluation.scores import mean_ci
from latentwire.studies.grid import _programs, _resolved, _resources, sweep
from latentwire.studies.programs import Program, run_kept
from latentwire.studies.ranking import Ranking, _best
from latentwire.studies.settings import SweepSettings
from latentwire.utils.cli import parse
from latentwire.utils.runs import RunFolder

ROOT = Path(__file__).parents[2]
LLMS = ("llama", "qwen")
NAMES = [f"M{m}_dz24_ftce{weight}_K4" for m in (16, 32) for weight in ("0.5", "1.0")]
FLAGS = {
    "latent_lens": "16,32", "d_zs": "24", "ftce_weights": "0.5,1.0", "ks": "4", "samples": "9", "eval_samples": "5",
    "dataset": "sample",
}  # fmt: skip
# Stands for Python: notes the call; trains and evaluates in no time, fails in FAILING and hangs in SLOW. Other programs
# are what they are, started by WARM.
STUB = """#!{python} -IS
import json, os, pathlib, random, sys, time

argv = sys.argv[1:]
call = " ".join(argv)
if "latentwire/train.py" not in call and "latentwire/eval.py" not in call:
    os.execv(os.environ["WARM"], [os.environ["WARM"], *argv])
names = "OUTPUT_DIR LATENT_LEN D_Z K FIRST_TOKEN_CE_WEIGHT LR SAMPLES EPOCHS CKPT SEED DATASET".split()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(call + " | " + " ".join(f"{{name}}={{os.environ.get(name)}}" for name in names) + "\\n")
flags = dict(zip(argv, argv[1:]))
if "--estimate" in argv:
    if os.environ["LATENT_LEN"] == os.environ.get("FAILING"):
        sys.exit("error: no luck today")
    stages = {{name: {{"teacher_seconds": s}} for name, s in (("scores", 0), ("adapters", 600), ("joint", 600))}}
    print("words", file=sys.stderr)
    print(json.dumps({{"seconds": 3600 * int(os.environ["EPOCHS"]), "teacher_seconds": 1200, "stages": stages}}))
    sys.exit()
folder = pathlib.Path(flags.get("--save_dir") or os.environ["OUTPUT_DIR"])
name = folder.parent.name if "eval.py" in call else folder.name
if name == os.environ.get("FAILING"):
    print("error: no luck today")
    print("Traceback of somebody else")
    sys.exit(3)
if name == os.environ.get("SLOW"):
    pathlib.Path(os.environ["CALLS"] + ".pid").write_text(str(os.getpid()))
    time.sleep(600)
folder.mkdir(parents=True, exist_ok=True)
if "eval.py" in call:
    rows, lines = [], []
    for condition in flags["--conditions"].split(","):
        condition, _, m = condition.partition("@")
        m = int(name[1:3]) if condition == "latentwire" else int(m) if m else None
        for llm in os.environ["LLMS"].split(","):
            label = {{"condition": condition, "m": m, "llm": llm}}
            draw = random.Random(f"{{name}} {{label}}").random
            found = [label | {{"id": id, "f1": draw()}} for id in json.loads(os.environ["STUB_IDS"])]
            lines += [json.dumps(line) + "\\n" for line in found]
            rows.append(label | {{
                "d_z": 24, "f1": sum(line["f1"] for line in found) / len(found), "f1_ci95": [0.1, 0.9],
                "first_token_acc": draw(), "bits_per_answer_byte": draw(), "empty_answers": 0.0,
            }})
    (folder / "predictions.jsonl").write_text("".join(lines))
    (folder / "results.json").write_text(json.dumps({{"results": rows}}))
"""


@pytest.fixture(scope="module")
def environment(warm, tmp_path_factory):
    """Of programs that use the stand-in; calls it noted are in CALLS."""
    folder = tmp_path_factory.mktemp("stub")
    stub = folder / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    left_out = ("SQUAD_DIR", "MODELS_DIR", "RAY_ADDRESS", "OUTPUT_DIR")
    ids = [q.id for q in split_by_article(load("sample", "train").questions)[1]]
    return {k: v for k, v in os.environ.items() if k not in left_out} | warm | {
        "PYTHON": str(stub), "PYTHONPATH": str(ROOT), "CALLS": str(folder / "calls"), "STUB_IDS": json.dumps(ids),
        "WARM": warm["PYTHON"],
    }  # fmt: skip


@pytest.fixture
def stub(environment, tmp_path, monkeypatch):
    """Let sweeps of this process use the stand-in; returns the file of its calls."""
    for name in ("PYTHON", "PYTHONPATH", "STUB_IDS", "WARM"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("SQUAD_DIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


def config(folder, *flags, **changes):
    """Settings as FLAGS has them."""
    given = [f"--{k}={v}" for k, v in (FLAGS | {"save_dir": str(folder)} | changes).items()]
    return parse(SweepSettings, [*given, *flags])


def command(folder):
    return [sys.executable, "latentwire/sweep.py", *(f"--{k}={v}" for k, v in (FLAGS | {"save_dir": folder}).items())]


def launch(environment, folder, *flags, **settings):
    """The launcher with the lists of FLAGS, as a user runs it."""
    lists = {"LATENT_LENS": "16,32", "D_ZS": "24", "FTCE_WEIGHTS": "0.5,1.0", "KS": "4", "SAMPLES": "9"}
    lists |= {"EVAL_SAMPLES": "5", "DATASET": "sample", "OUTPUT_DIR": str(folder), "LR": "3e-4"}
    return subprocess.run(
        ["bash", str(ROOT / "scripts/experiments/sweep_hyperparams.sh"), *flags],
        env=environment | lists | settings, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def failed(environment, tmp_path_factory):
    """A sweep in which one of four configurations failed: how it ended, its folder, and the calls that it made."""
    folder = tmp_path_factory.mktemp("sweep") / "failed"
    calls = folder.parent / "calls"
    done = launch(environment | {"CALLS": str(calls)}, folder, FAILING=NAMES[1])
    return done, folder, calls.read_text().splitlines()


@pytest.fixture
def complete(failed, tmp_path):
    """A copy of that sweep in which the failed configuration was evaluated after all."""
    folder = shutil.copytree(failed[1], tmp_path / "complete")
    shutil.copytree(folder / NAMES[0] / "eval", folder / NAMES[1] / "eval")
    return folder


def summary_of(folder):
    return json.loads((folder / "sweep_summary.json").read_text())


def table_of(folder):
    with open(folder / "sweep_results.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def flag(call, name):
    return call.split(f"--{name} ")[1].split()[0]


def variable(call, name):
    return call.split(f" {name}=")[1].split()[0]


def test_the_default_grid_has_the_24_configurations_of_the_contract():
    names = [configuration.name for configuration in SweepSettings().grid]
    assert len(set(names)) == 24 and names[0] == "M32_dz256_ftce0.5_K4" and names[-1] == "M64_dz512_ftce1.0_K8"
    assert SweepSettings().samples is None and SweepSettings().epochs == 1
    assert SweepSettings().save_dir == "runs/sweeps/hyperparam"
    assert SweepSettings(latent_lens="8 16", ks="2").grid[-1].name == "M16_dz512_ftce1.0_K2"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latent_lens": "32,x"}, "latent_lens='32,x': list whole numbers of at least 1"),
        ({"latent_lens": ""}, "latent_lens=''"),
        ({"d_zs": "0"}, "d_zs='0'"),
        ({"d_zs": "256,256"}, "d_zs='256,256': .*each once"),
        ({"ks": "4.5"}, "ks='4.5'"),
        ({"ftce_weights": "-1"}, "ftce_weights='-1': list numbers of at least 0"),
        ({"ftce_weights": "1,nan"}, "ftce_weights='1,nan'"),
        ({"samples": 0}, "samples=0"),
        ({"concurrent": -1}, "concurrent=-1"),
        ({"gpus_per_trial": -1}, "gpus_per_trial=-1"),
        ({"llms": ","}, "llms=','"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(change, match):
    with pytest.raises(ValueError, match=match):
        SweepSettings(**change)


def test_a_wrong_list_ends_the_script_with_one_line(environment, tmp_path):
    done = launch(environment, tmp_path / "out", LATENT_LENS="16,many")
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and len(said) == 1 and "latent_lens='16,many'" in said[0]


def test_the_launcher_hands_on_its_settings(environment, tmp_path):
    calls = tmp_path / "calls"
    settings = {"CALLS": str(calls), "GPUS_PER_TRIAL": "2", "SAMPLES": "7", "EPOCHS": "2", "SEED": "3", "NPROC": "9"}
    done = launch(environment, tmp_path / "out", "--dry-run", "--time", **settings)
    assert done.returncode == 0, done.stderr
    first, second = calls.read_text().splitlines()
    assert "--nproc_per_node=2" in first and [variable(call, "LATENT_LEN") for call in (first, second)] == ["16", "32"]
    for name, value in {"SAMPLES": "7", "EPOCHS": "2", "SEED": "3", "DATASET": "sample", "LR": "3e-4"}.items():
        assert variable(first, name) == value
    assert re.search("LATENT_LENS +16,32", done.stdout) and list((tmp_path / "out").glob("20*.log"))


def test_a_dry_run_names_all_and_says_how_long_and_trains_nothing(stub, tmp_path, capsys):
    settings = config(
        tmp_path / "out", "--dry-run", "--time", latent_lens="32,48,64", d_zs="256,512", ks="4,8", epochs="2"
    )
    assert sweep(settings) == 0
    said = capsys.readouterr().out
    assert all(configuration.name in said.splitlines() for configuration in settings.grid)
    assert len(settings.grid) == 24 and not (tmp_path / "out").exists()
    # 24 configurations of two hours, and ten minutes of the teacher for each K.
    assert "about 48.3 hours for 24 configurations of which 0 are finished" in said
    calls = stub.read_text().splitlines()
    assert all("--stage all --estimate --json" in call for call in calls)
    assert [variable(call, "LATENT_LEN") for call in calls] == ["32", "48", "64"]
    assert {(variable(call, "D_Z"), variable(call, "K"), variable(call, "EPOCHS")) for call in calls} == {
        ("256", "8", "2")
    }


def test_a_dry_run_for_programs_prints_one_object(stub, tmp_path, capsys):
    (tmp_path / "out" / NAMES[0] / "eval").mkdir(parents=True)
    (tmp_path / "out" / NAMES[0] / "eval" / "results.json").write_text("{}")
    assert sweep(config(tmp_path / "out", "--dry-run", "--time", "--json")) == 0
    out, err = capsys.readouterr()
    seconds = 3 * 3600 + 600
    assert json.loads(out) == {"configurations": NAMES, "finished": NAMES[:1], "seconds": seconds}
    assert f"{NAMES[0]}  finished" in err and "about 3.2 hours" in err


def test_what_a_sweep_neither_names_nor_varies_is_inherited(stub, tmp_path, monkeypatch):
    inherited = {"LR": "3e-4", "ENCODER_TYPE": "byte", "POOLING": "cif", "BATCH_SIZE": "5", "SQUAD_DIR": "/squad"}
    others = {"LATENT_LEN": "99", "SAMPLES": "1", "CKPT": "other", "REUSE": "other", "CODEC": "int4", "RESUME": "0"}
    for name, value in (inherited | others).items():
        monkeypatch.setenv(name, value)
    settings = _resolved(config(tmp_path, device="cpu"))
    training, evaluation = _programs(settings, settings.grid[1], tmp_path / "x")
    expected = {"LATENT_LEN": "16", "D_Z": "24", "FIRST_TOKEN_CE_WEIGHT": "1.0", "K": "4", "SAMPLES": "9"}
    expected |= {"EPOCHS": "1", "DEVICE": "cpu", "DATASET": "sample", "RESUME": "", "OUTPUT_DIR": str(tmp_path / "x")}
    expected |= {"LATENT_LENS": ""}  # of a training: M drawn among them
    assert (inherited | expected).items() <= training.environment.items()
    own = {"BATCH_SIZE": "5", "CKPT": "", "REUSE": "", "CODEC": "", "LATENT_LEN": "", "DEVICE": "cpu", "SEED": "0"}
    assert own.items() <= evaluation.environment.items()


def test_a_size_that_nobody_chose_is_refused_where_it_takes_too_long(stub, tmp_path):
    settings = dataclasses.replace(config(tmp_path / "out", "--time", gpus_per_trial=0), samples=None)
    # Four configurations, each of an hour, and the teacher's 10 minutes.
    with pytest.raises(ValueError, match=r"samples: 4 configurations of 10000 questions would take about 4\.2 hours"):
        sweep(settings)
    assert all("--estimate" in call for call in stub.read_text().splitlines())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_that_cannot_time_says_why(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING", "32")
    with pytest.raises(ValueError, match="the timing of M=32 ended with status 1: no luck today"):
        sweep(config(tmp_path / "out", "--dry-run", "--time"))


def test_a_dry_run_starts_no_program_unless_time_is_asked_for(stub, tmp_path, capsys):
    assert sweep(config(tmp_path / "out", "--dry-run", "--json")) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["configurations"] == NAMES and found["seconds"] > 0 and "cost model" in said.err
    assert not stub.exists() and not (tmp_path / "out").exists()


def test_a_failing_configuration_is_recorded_and_the_others_go_on(failed):
    done, folder, _ = failed
    assert done.returncode == 1, done.stdout + done.stderr
    summary, table = summary_of(folder), table_of(folder)
    bad = NAMES[1]
    assert {entry["name"] for entry in summary["ranked"]} == set(NAMES) - {bad}
    reason = "train_latentwire.sh ended with status 3: no luck today"
    assert summary["failed"] == [{"name": bad, "error": reason}]
    assert table.keys() == set(NAMES) and table[bad]["error"] == reason
    settings = ("name", "latent_len", "d_z", "first_token_ce_weight", "k", "error")
    assert [table[bad][key] for key in settings[:-1]] == [bad, "16", "24", "1.0", "4"]
    assert not any(value for key, value in table[bad].items() if key not in settings), "no figure that looks like one"
    assert bad not in summary["best"].values()
    assert "Traceback of somebody else" in (folder / bad / "error.txt").read_text()
    assert f"failed: {bad}: {reason}; see {folder / bad / 'trial.log'}" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "/4 M" in line]
    assert [line[:4] for line in lines] == ["1/4 ", "2/4 ", "3/4 ", "4/4 "] and f"2/4 {bad}  failed: {reason}" in lines
    assert all("F1 llama 0." in line and "qwen 0." in line for line in lines if bad not in line)
    said = done.stdout.split("4 configurations, ")[1].splitlines()[1:] + done.stderr.splitlines()
    rest = [line for line in said if not line.startswith(("wrote ", "failed: "))]
    assert rest == ["baselines ...", *lines], "Ray says nothing"
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_trial_runs_the_ordinary_programs_with_its_settings(failed):
    _, folder, calls = failed
    name = NAMES[2]
    training, evaluation = [call for call in calls if f"/{name}" in call]
    assert "train.py --stage all |" in training and variable(training, "OUTPUT_DIR") == str(folder / name)
    assert "torch.distributed.run --standalone --nproc_per_node=1 " in training
    expected = {"LATENT_LEN": "32", "D_Z": "24", "FIRST_TOKEN_CE_WEIGHT": "0.5", "K": "4", "LR": "3e-4", "SAMPLES": "9"}
    for key, value in (expected | {"EPOCHS": "1"}).items():
        assert variable(training, key) == value
    assert flag(evaluation, "ckpt") == str(folder / name / "checkpoint_best")
    assert flag(evaluation, "samples") == "5" and flag(evaluation, "conditions") == "latentwire"
    assert flag(evaluation, "split") == "held_out"
    assert "== train_latentwire.sh" in (folder / name / "trial.log").read_text()


def test_what_is_shared_is_computed_once_and_stands_in_the_summary(failed):
    shared = [call for call in failed[2] if "token_budget" in call]
    assert len(shared) == 1 and flag(shared[0], "split") == "held_out" and "--ckpt" not in shared[0]
    assert flag(shared[0], "conditions") == "text,token_budget@16,token_budget@32,pca@16,pca@32"
    rows = [(row["condition"], row["m"], row["llm"]) for row in summary_of(failed[1])["baselines"]]
    places = [("pca", 16), ("pca", 32), ("text", None), ("token_budget", 16), ("token_budget", 32)]
    assert rows == [(*place, llm) for place in places for llm in LLMS]


def test_a_finished_sweep_starts_nothing(environment, complete, tmp_path):
    calls = tmp_path / "calls"
    started = list((complete / "ray").iterdir())
    done = launch(environment | {"CALLS": str(calls)}, complete)
    assert done.returncode == 0 and "4 of them finished" in done.stdout, done.stdout + done.stderr
    assert not calls.exists() and list((complete / "ray").iterdir()) == started
    assert len(summary_of(complete)["ranked"]) == 4 and not summary_of(complete)["failed"]


def test_longer_lists_extend_a_sweep_and_other_settings_are_refused(complete, stub, capsys):
    longer = config(complete, "--dry-run", ks="4,8")
    assert sweep(longer) == 0
    said = capsys.readouterr().out.splitlines()
    assert [name for name in NAMES if f"{name}  finished" in said] == NAMES and "M16_dz24_ftce0.5_K8" in said
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(.*eval_samples: 5 there, 4 now"):
        sweep(config(complete, eval_samples=4))
    settings = json.loads((complete / "config.json").read_text())["config"]
    with RunFolder(complete, settings), pytest.raises(ValueError, match="in use by a running process"):
        sweep(config(complete))


def ended(pid, seconds=20):
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def stopped_in(environment, folder, name, number):
    """Start a sweep, send it a signal while `name` is trained, and wait for the training to be gone as well."""
    noted = Path(environment["CALLS"] + ".pid")
    noted.unlink(missing_ok=True)
    process = subprocess.Popen(
        command(folder), cwd=ROOT, env=environment | {"SLOW": name}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what runs in the background
    )  # fmt: skip
    until = time.monotonic() + 300  # Ray's workers are slow beside other tests
    while not (noted.is_file() and noted.read_text()):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert ended(int(noted.read_text())), "the training went on without the sweep"
    return process.returncode, said


@pytest.fixture
def unreaped():
    """While a test runs, nobody asks for an orphan's status: so it is in containers whose first process does not."""
    before, subreaper = set(psutil.Process().children()), 36  # PR_SET_CHILD_SUBREAPER
    prctl = ctypes.CDLL(None).prctl
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(subreaper, 0, 0, 0, 0)
    for orphan in set(psutil.Process().children()) - before:
        orphan.kill()
        os.waitpid(orphan.pid, 0)


def test_a_stopped_sweep_continues_to_the_same_bytes(environment, failed, tmp_path, unreaped):
    first, bad, later, _ = NAMES
    calls, folder = tmp_path / "calls", tmp_path / "sweep"
    environment = environment | {"CALLS": str(calls)}
    status, said = stopped_in(environment | {"FAILING": first}, folder, bad, signal.SIGINT)
    assert status == 130 and said.splitlines()[-1].startswith("error: interrupted; what was finished is kept")
    assert "Traceback" not in said and [entry["name"] for entry in summary_of(folder)["failed"]] == [first]
    environment |= {"FAILING": bad}
    status, _ = stopped_in(environment, folder, later, signal.SIGKILL)
    summary = summary_of(folder)
    assert status == -signal.SIGKILL and [entry["name"] for entry in summary["failed"]] == [bad]
    assert [entry["name"] for entry in summary["ranked"]] == [first], "what failed was tried once more"
    done = subprocess.run(command(folder), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "1 of them finished" in done.stdout, done.stdout + done.stderr
    for name in ("sweep_summary.json", "sweep_results.csv"):
        assert (folder / name).read_bytes() == (failed[1] / name).read_bytes()
    evaluated = [flag(call, "save_dir") for call in calls.read_text().splitlines() if "eval.py" in call]
    assert len(evaluated) == len(set(evaluated)) == 4, "three configurations and the baselines, each once"


def test_without_ray_it_says_what_to_install(stub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "ray\[tune\]"'):
        sweep(config(tmp_path / "out"))
    assert not stub.exists() and not list((tmp_path / "out").glob("sweep*"))


def test_a_programs_error_is_its_own_last_word(tmp_path):
    log = tmp_path / "logs" / "log"
    assert run_kept(Program("first", ["bash", "-c", "echo error: of an earlier attempt"], {}), log) is None
    error = run_kept(Program("second", ["bash", "-c", "echo 12%; echo bad $VALUE; exit 4"], {"VALUE": "value"}), log)
    assert error.splitlines() == ["second ended with status 4: bad value", "", "12%", "bad value"]
    assert run_kept(Program("third", ["bash", "-c", "kill -9 $$"], {}), log).startswith(
        "third ended with status -9: it said nothing"
    )
    assert log.read_text().splitlines() == ["error: of an earlier attempt", "12%", "bad value"]


def test_a_kept_program_ends_with_who_started_its_worker_though_the_worker_hangs(tmp_path):
    noted, log = tmp_path / "pid", tmp_path / "log"
    many = f"for _ in {{1..60}}; do sleep 600 & echo $!; done > {noted}.new; mv {noted}.new {noted}; wait"
    program = Program("sleepers", ["bash", "-c", many])  # the program ends first, and they must be killed all the same
    code = "from pathlib import Path; from latentwire.studies.programs import *; "
    code += f"run_kept({program!r}, Path({str(log)!r}))"
    starter = subprocess.Popen(["sleep", "600"])
    around = os.environ | {"PYTHONPATH": str(ROOT), "LATENTWIRE_LAUNCHER": str(starter.pid)}
    worker = subprocess.Popen([sys.executable, "-c", code], env=around)
    try:
        until = time.monotonic() + 60
        while not (noted.is_file() and noted.read_text()):
            assert worker.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        pids = [*map(int, noted.read_text().split())]
        worker.send_signal(signal.SIGSTOP)
        assert len(pids) == 60 and not ended(pids[0], 0.5), "it ends with nobody but them"
        starter.kill()
        starter.wait()
        assert all(ended(pid) for pid in pids)
    finally:
        for process in (starter, worker):
            process.kill()
            process.wait()


def test_a_trial_gets_its_gpus_and_their_share_of_the_processors():
    machines = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}]
    assert _resources(machines, 1, 0) == {"cpu": 4, "gpu": 1}
    assert _resources(machines, 4, 0) == {"cpu": 16, "gpu": 4}
    assert _resources([{"CPU": 6.0}], 0, 1) == {"cpu": 6, "gpu": 0}
    assert _resources([{"CPU": 6.0}], 0, 2) == {"cpu": 3, "gpu": 0}
    assert _resources([{"CPU": 6.0}, {"CPU": 6.0}], 0, 2) == {"cpu": 6, "gpu": 0}
    assert _resources([{"CPU": 2.0}], 0, 5) == {"cpu": 1, "gpu": 0}
    with pytest.raises(ValueError, match="gpus_per_trial=8: no machine has so many, the largest has 4"):
        _resources(machines, 8, 0)


@pytest.fixture
def ranking(tmp_path):
    """Four configurations with known F1s on six questions of three paragraphs; the third failed, the fourth is open."""
    questions = [Question(f"q{i}", "title", f"p{i % 3}", "text", "what?", ("text",), (0,)) for i in range(6)]
    grid = SweepSettings(latent_lens="8,16", d_zs="4", ftce_weights="0.5,1.0", ks="2").grid
    scores = {grid[0]: ([0, 0, 1, 0, 0, 1], [0, 0.5, 1, 0, 0, 0]), grid[1]: ([1, 1, 1, 0, 0, 1], [0, 0.5, 1, 0, 0, 1])}
    for configuration, by_llm in scores.items():
        folder = tmp_path / configuration.name / "eval"
        folder.mkdir(parents=True)
        labels = [{"condition": "latentwire", "m": 8, "llm": llm} for llm in LLMS]
        rows = [
            label | {"f1": float(np.mean(f1)), "f1_ci95": [0.0, 1.0], "first_token_acc": 0.5, "empty_answers": 0.0,
                     "bits_per_answer_byte": 2.0 - configuration.first_token_ce_weight}
            for label, f1 in zip(labels, by_llm, strict=True)
        ]  # fmt: skip
        other = {"condition": "no_context", "m": None, "llm": "qwen", "f1": 1.0}
        (folder / "results.json").write_text(json.dumps({"results": [*rows, other]}))
        lines = [
            label | {"id": f"q{i}", "f1": value}
            for label, f1 in zip(labels, by_llm, strict=True)
            for i, value in enumerate(f1)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    (tmp_path / grid[2].name).mkdir()
    (tmp_path / grid[2].name / "error.txt").write_text("it broke\nand how\n")
    return Ranking(tmp_path, grid, questions, tmp_path / "baselines", 0), grid, scores


def test_the_ranking_follows_the_predictions(ranking):
    ranking, grid, scores = ranking
    summary = ranking.write()
    assert json.loads((ranking.folder / "sweep_summary.json").read_text()) == summary
    assert [entry["name"] for entry in summary["ranked"]] == [grid[1].name, grid[0].name]
    for entry, configuration in zip(summary["ranked"], (grid[1], grid[0]), strict=True):
        means = np.mean(scores[configuration], axis=0)
        assert entry["f1"] == pytest.approx(means.mean())
        assert entry["f1_ci95"] == mean_ci(means, ["p0", "p1", "p2"] * 2, 0)
        assert entry["f1_ci95"][0] < entry["f1"] < entry["f1_ci95"][1]
        assert entry["llms"].keys() == set(LLMS) and entry["llms"]["llama"]["f1"] == np.mean(scores[configuration][0])
    # Their first-token accuracies are the same; the bits are fewer at the larger weight.
    assert summary["best"] == dict.fromkeys(("f1", "first_token_acc", "bits_per_answer_byte"), grid[1].name)
    assert summary["failed"] == [{"name": grid[2].name, "error": "it broke"}] and summary["baselines"] == []
    assert summary["n"] == 6 and summary["split"] == "held_out"
    assert [configuration.is_finished(ranking.folder) for configuration in grid] == [True, True, False, False]


@pytest.mark.parametrize(("metric", "best"), [("first_token_acc", "b"), ("f1", "b"), ("bits_per_answer_byte", "a")])
def test_more_is_better_but_of_bits(metric, best):
    ranked = [{"name": name, "llms": {"x": {metric: value}}} for name, value in (("a", 0.1), ("b", 0.9))]
    assert _best(ranked, metric) == best


def test_the_table_has_a_row_for_all_that_ended(ranking):
    ranking, grid, _ = ranking
    summary = ranking.write()
    table = table_of(ranking.folder)
    assert list(table) == [grid[1].name, grid[0].name, grid[2].name], "the open one is left out"
    best = summary["ranked"][0]
    assert float(table[best["name"]]["f1"]) == best["f1"] and float(table[best["name"]]["f1_low"]) == best["f1_ci95"][0]
    assert float(table[best["name"]]["qwen_f1"]) == best["llms"]["qwen"]["f1"]
    assert table[grid[2].name]["f1"] == "" and table[grid[2].name]["error"] == "it broke"


def test_a_sweep_of_failures_only_has_no_best(ranking):
    ranking, grid, _ = ranking
    only = Ranking(ranking.folder, grid[2:], [], ranking.baselines, 0)
    summary = only.write()
    assert summary["ranked"] == [] and set(summary["best"].values()) == {None} and len(summary["failed"]) == 1
    assert only.draw(summary).is_file()
