"""A run's folder, and what makes two runs the same one."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from latentwire.utils.cli import SCHEMA
from latentwire.utils.files import read_json, write_json
from latentwire.utils.machine import git_sha, machine

OUTPUTS = (
    "heads.json",
    "asked.json",
    "answers.jsonl",
    "manifest.json",
    "predictions.jsonl",
    "predictions.jsonl.gz",
    "results.json",
    "table.md",
    "summary.md",
    "headline.md",
    "hierarchy.png",
    "report.html",
)  # cleared by a fresh start
# A folder where one of these has content holds a run; stage codebook writes nothing but its checkpoint.
BEGUN = (
    "answers.jsonl",
    "predictions.jsonl",
    "predictions.jsonl.gz",
    "results.json",
    "metrics.jsonl",
    "checkpoint_best/config.json",
    "sweep_summary.json",
)


def digest(*things: object) -> str:
    """16 hexadecimal digits that differ where the things' `repr` differs."""
    return hashlib.sha256(repr(things[0] if len(things) == 1 else list(things)).encode()).hexdigest()[:16]


def identity(config: object, leave_out: tuple[str, ...], **facts: object) -> dict:
    """What makes two runs the same one: the settings without `leave_out`, and the facts that they lead to."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in leave_out}
    return settings | facts


class RunFolder:
    """A folder that belongs to one identity and, while it is open, to one process.

    An existing folder of the same identity is continued. Raises ValueError if it holds another one (the differing keys
    are named) or is in use by a live process (it is named); `fresh` starts over instead of continuing, and `restart`
    tells the user how to. `may_differ` names what is noted at the start, but makes no other run. `origin` tells the
    commits that the run was begun and continued with, and the machine that it was begun on, as `device` (the
    identity's, unless it is given) sees it.
    """

    def __init__(
        self,
        path: str | Path,
        identity: dict,
        fresh: bool = False,
        restart: str = "by removing it (rm -r)",
        may_differ: tuple[str, ...] = (),
        device: str = "",
    ):
        self.device = device or identity.get("device", "")
        self.path, self._restart, self._may_differ = Path(path), restart, may_differ
        self._locked = self.path / ".lock"  # its text names the process that holds it
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = self._locked.read_bytes() if self._locked.is_file() else b""
            self._lock = FileLock(self._locked, timeout=0)
            self._lock.acquire()
            self._locked.write_text(_this_process(), encoding="utf-8")
        except Timeout as error:
            holder = f" ({there.decode(errors='replace')})" if there else ""
            raise ValueError(
                f"{self.path} is in use by a running process{holder}; wait for it, end it, or choose another folder"
            ) from error
        except OSError as error:
            raise PermissionError(
                f"cannot write the run folder {self.path} ({error.strerror}); choose another one"
            ) from error
        try:
            self._claim(identity, fresh)
        except ValueError:
            self.close()
            raise

    def _claim(self, identity: dict, fresh: bool) -> None:
        record = self.path / "config.json"
        identity = json.loads(json.dumps(identity))  # as it will be read back
        found = read_json(record) if record.is_file() else None
        if found is not None and "config" not in found:
            raise ValueError(
                f"{self.path} is not a run folder (its config.json is of something else); choose another one"
            )
        begun = any((self.path / name).is_file() and (self.path / name).stat().st_size for name in BEGUN)
        if begun and found is None and not fresh:
            raise ValueError(
                f"{self.path} holds a run, but no config.json that says of what; restore it, choose another folder, or "
                f"start over {self._restart}"
            )
        if found and begun and not fresh:  # a start that failed at once binds nobody
            self._require_same(found["config"], identity)
            if (now := str(git_sha())) not in str(found.get("git")).split(", then "):
                found["git"] = f"{found.get('git')}, then {now}"
                write_json(record, found)
            self.origin = {key: found.get(key) for key in ("git", "machine")}
            return
        if found or begun:
            for name in OUTPUTS:
                (self.path / name).unlink(missing_ok=True)
        self.origin = {"git": git_sha(), "machine": machine(self.device)}
        write_json(record, {"schema": SCHEMA, "config": identity} | self.origin)

    def _require_same(self, before: dict, now: dict) -> None:
        compared = (now.keys() | before.keys()) - set(self._may_differ)
        differing = sorted(k for k in compared if not _same(before.get(k), now.get(k)))
        if differing:
            changes = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in differing)
            raise ValueError(
                f"{self.path} holds a run of another configuration ({changes}); "
                f"choose another folder, or start over {self._restart}"
            )

    def close(self) -> None:
        """Let other processes use the folder."""
        with contextlib.suppress(OSError):  # of a folder that was removed meanwhile, or that is read-only by now
            os.truncate(self._locked, 0)
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _same(before: object, now: object) -> bool:
    """Whether a setting is what it was. What an older version's record lacks was off, in settings of a part as well."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_same(before.get(key), now.get(key)) for key in before.keys() | now.keys())
    return before == now or (before is None and not now)


def _this_process() -> str:
    """What names this process to people."""
    return f"process {os.getpid()} on {platform.node()}: {' '.join(shlex.join(sys.orig_argv).split())}"
