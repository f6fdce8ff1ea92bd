"""What every run shares: its folder, its record, its seeds, and how errors reach the user."""

import json
import os
import platform
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub import constants

SCHEMA = 1
OUTPUTS = (
    "manifest.json",
    "predictions.jsonl",
    "results.json",
    "table.md",
    "summary.md",
    "hierarchy.png",
    "report.html",
)  # cleared by a fresh start
# A folder where one of these has content holds a run; stage codebook writes nothing but its checkpoint.
BEGUN = ("predictions.jsonl", "results.json", "metrics.jsonl", "checkpoint_best/config.json", "sweep_summary.json")


class RunFolder:
    """A folder that belongs to one configuration and, while it is open, to one process.

    An existing folder of the same configuration is continued. Raises ValueError if it holds another configuration (the
    differing keys are named) or is in use by a live process; `fresh` starts over instead of continuing, and `restart`
    tells the user how to.
    `origin` tells the commits that the run was begun and continued with, and the machine that it was begun on.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict,
        fresh: bool = False,
        restart: str = "with --fresh_eval (FRESH_EVAL=1 for the scripts)",
    ):
        self.path, self._restart = Path(path), restart
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{self.path} is in use by a running process; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise PermissionError(
                f"cannot write the run folder {self.path} ({error.strerror}); choose another one"
            ) from error
        try:
            self._claim(config, fresh)
        except ValueError:
            self.close()
            raise

    def _claim(self, config: dict, fresh: bool) -> None:
        record = self.path / "config.json"
        config = json.loads(json.dumps(config))  # as it will be read back
        found = read_json(record) if record.is_file() else None
        if found is not None and "config" not in found:
            raise ValueError(
                f"{self.path} is not a run folder (its config.json is of something else); choose another one"
            )
        begun = any((self.path / name).is_file() and (self.path / name).stat().st_size for name in BEGUN)
        if found and begun and not fresh:  # a start that failed at once binds nobody
            before = found["config"]
            differing = sorted(k for k in config.keys() | before.keys() if config.get(k) != before.get(k))
            if differing:
                changes = "; ".join(f"{k}: {before.get(k)!r} there, {config.get(k)!r} now" for k in differing)
                raise ValueError(
                    f"{self.path} holds a run of another configuration ({changes}); "
                    f"choose another folder, or start over {self._restart}"
                )
            if (now := str(git_sha())) not in str(found.get("git")).split(", then "):
                found["git"] = f"{found.get('git')}, then {now}"
                write_json(record, found)
            self.origin = {key: found.get(key) for key in ("git", "machine")}
            return
        if found:
            for name in OUTPUTS:
                (self.path / name).unlink(missing_ok=True)
        self.origin = {"git": git_sha(), "machine": machine()}
        write_json(record, {"schema": SCHEMA, "config": config} | self.origin)

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(path: Path) -> dict:
    """A JSON file's content; ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it or restore it") from error


def read_lines(path: Path) -> list[dict]:
    """The finished lines of a predictions.jsonl; none without the file, which is left as it is.

    Raises ValueError naming the line when one is damaged.
    """
    lines = []
    written = path.read_bytes() if path.is_file() else b""
    for number, text in enumerate(written.split(b"\n")[:-1], start=1):  # a last line without its end was cut off
        try:
            lines.append(json.loads(text))
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path}:{number} is damaged ({error}); evaluate again with --fresh_eval") from error
    return lines


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def git_sha() -> str | None:
    """Commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def machine() -> dict:
    """Processor or accelerators and library versions: what timings and last digits depend on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def reason(error: Exception) -> str:
    """The first line of what a library says, or at least the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """ "float32" on a CPU, else "bfloat16"."""
    return "float32" if device == "cpu" else "bfloat16"


@cache
def hub_answers() -> bool:
    """Whether the model hub can be reached; asked once, because the hub's own client retries for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except OSError:
        return False
    return True


def cli(main: Callable[[], None]) -> None:
    """Run a program; a user's mistake ends it with one line and status 2. LATENTWIRE_TRACEBACK=1 shows where."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(_fail(f"out of memory ({reason(error)}); lower BATCH_SIZE (--batch_size); what was finished is kept"))
    except (ValueError, OSError) as error:
        if os.environ.get("LATENTWIRE_TRACEBACK"):
            raise
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; what was finished is kept, run the same command to continue", status=130))


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
