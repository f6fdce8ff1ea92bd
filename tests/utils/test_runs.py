"""A run's folder belongs to one run, and to one process at a time."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from latentwire.utils import runs
from latentwire.utils.runs import OUTPUTS, RunFolder, digest, identity

ROOT = Path(__file__).parents[2]
IDENTITY = {"samples": 3, "llms": ("llama", "qwen"), "rate": 0.5}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has written something."""
    with RunFolder(tmp_path / "run", IDENTITY):
        (tmp_path / "run" / "predictions.jsonl").write_text("{}\n")
    return tmp_path / "run"


def record(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_run_says_what_it_is_by_which_commit_and_on_which_machine(begun, monkeypatch):
    found = record(begun)
    assert found["config"] == IDENTITY | {"llms": ["llama", "qwen"]} and found["schema"] == 1
    assert found["git"] == runs.git_sha() and found["machine"] == runs.machine()
    monkeypatch.setattr(runs, "machine", lambda device: pytest.fail("the first machine counts"))
    with RunFolder(begun, IDENTITY) as run:
        assert run.origin == {"git": found["git"], "machine": found["machine"]}
    assert record(begun) == found and (begun / "predictions.jsonl").read_text() == "{}\n"


def test_a_run_records_the_device_that_it_works_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "machine", lambda device: f"of {device}")
    with RunFolder(tmp_path / "run", IDENTITY | {"device": "cpu"}) as run:
        assert run.origin["machine"] == "of cpu"


def test_a_run_of_another_identity_is_refused_and_what_differs_is_named(begun):
    other = IDENTITY | {"samples": 4, "new": True}
    del other["rate"]
    expected = (
        r"run holds a run of another configuration \(new: None there, True now; rate: 0\.5 there, None now; "
        r"samples: 3 there, 4 now\); choose another folder, or start over with --again"
    )
    with pytest.raises(ValueError, match=expected):
        RunFolder(begun, other, restart="with --again")
    with pytest.raises(ValueError, match=r"start over by removing it \(rm -r\)"):
        RunFolder(begun, other)
    with RunFolder(begun, IDENTITY):
        pass  # the refusal let go of the folder


def test_what_an_older_version_did_not_have_was_off(begun):
    with RunFolder(begun, IDENTITY | {"new": "", "other": 0.0, "third": None}):
        pass
    with pytest.raises(ValueError, match="other: None there, 1 now"):
        RunFolder(begun, IDENTITY | {"new": "", "other": 1})


def test_so_was_what_it_did_not_have_of_a_part(tmp_path):
    with RunFolder(tmp_path / "run", {"encoder": {"id": "x", "rank": 2}}):
        (tmp_path / "run" / "predictions.jsonl").write_text("{}\n")
    with RunFolder(tmp_path / "run", {"encoder": {"id": "x", "rank": 2, "new": 0}}):
        pass
    for changed in ({"id": "x", "rank": 0}, {"id": "x", "rank": 2, "new": 1}, {"rank": 2}):
        with pytest.raises(ValueError, match="another configuration"):
            RunFolder(tmp_path / "run", {"encoder": changed})


@pytest.mark.parametrize("name", runs.BEGUN)
def test_a_start_that_failed_at_once_binds_nobody_and_anything_written_does(tmp_path, name):
    with RunFolder(tmp_path, IDENTITY):
        pass
    with RunFolder(tmp_path, IDENTITY | {"samples": 4}):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with RunFolder(tmp_path, IDENTITY | {"samples": 5}):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError, match="samples: 5 there, 6 now"):
        RunFolder(tmp_path, IDENTITY | {"samples": 6})


def test_a_fresh_start_clears_what_was_written_and_keeps_what_is_not_ours(begun):
    for name in (*OUTPUTS, "notes.txt"):
        (begun / name).write_text("old")
    with RunFolder(begun, IDENTITY | {"samples": 4}, fresh=True):
        assert record(begun)["config"]["samples"] == 4
        assert {path.name for path in begun.iterdir()} == {"config.json", "notes.txt", ".lock"}


def test_a_run_whose_configuration_is_gone_is_not_continued(begun):
    (begun / "config.json").unlink()
    with pytest.raises(ValueError, match=r"run holds a run, but no config\.json .* start over with --again"):
        RunFolder(begun, IDENTITY, restart="with --again")
    with RunFolder(begun, IDENTITY, fresh=True):
        assert not (begun / "predictions.jsonl").exists(), "nor counted as another's"


def test_a_run_continued_at_another_commit_names_both_once(begun, monkeypatch):
    before = record(begun)["git"]
    monkeypatch.setattr(runs, "git_sha", lambda: "abc")
    for _ in range(2):
        with RunFolder(begun, IDENTITY) as run:
            assert run.origin["git"] == record(begun)["git"] == f"{before}, then abc"


def test_a_folder_is_used_by_one_process_at_a_time(begun):
    code = f"from latentwire.utils.runs import RunFolder; RunFolder({str(begun)!r}, {IDENTITY!r}); print('taken')"
    with RunFolder(begun, IDENTITY):
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "ValueError" in other.stderr and "is in use by a running process" in other.stderr
        holder = rf"\(process {os.getpid()} on {re.escape(platform.node())}: .+\)"
        for _ in range(2):  # a refusal leaves the name for the next
            with pytest.raises(ValueError, match=f"run is in use by a running process {holder}; wait for it, end"):
                RunFolder(begun, IDENTITY)
        (begun / ".lock").write_bytes(b"")  # another filelock, or a moment too early
        with pytest.raises(ValueError, match="run is in use by a running process; wait for it, end it, or choose"):
            RunFolder(begun, IDENTITY)
    assert (begun / ".lock").read_bytes() == b"", "nobody holds it"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.stdout == "taken\n", other.stderr
    with RunFolder(begun, IDENTITY):
        pass  # a process that ended holds nothing


def test_a_folder_that_was_removed_under_a_run_is_let_go_of(begun):
    with RunFolder(begun, IDENTITY):
        shutil.rmtree(begun)
    with RunFolder(begun, IDENTITY):
        assert record(begun)["config"]["samples"] == 3


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for fresh in (True, False):
        with pytest.raises(ValueError, match="is not a run folder"):
            RunFolder(tmp_path, IDENTITY, fresh=fresh)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        RunFolder(tmp_path, IDENTITY)
    assert (tmp_path / "config.json").read_text() == "{"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"cannot write the run folder .*file/run"):
        RunFolder(tmp_path / "file" / "run", IDENTITY)


def test_the_identity_of_a_run_are_its_settings_but_those_left_out_and_the_facts_that_they_lead_to():
    @dataclass
    class Part:
        width: int = 3

    @dataclass
    class Config:
        samples: int
        save_dir: str
        part: Part

    config = Config(7, "runs/x", Part())
    found = identity(config, ("save_dir",), questions="abc", samples=5)
    assert found == {"samples": 5, "part": {"width": 3}, "questions": "abc"}


def test_a_digest_differs_where_the_things_do():
    assert digest([1, "a"]) == digest([1, "a"]) == digest(1, "a") and len(digest("x")) == 16
    assert int(digest("x"), 16) >= 0
    assert len({digest("x"), digest("y"), digest("x", "y"), digest(("x",)), digest(1.0), digest(1)}) == 6
