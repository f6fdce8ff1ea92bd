"""What a page is about: finds evaluations, trainings and diagnostics in run folders, and reads them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentwire.utils.files import read_json, read_lines

_SUBFOLDERS = ("*", "stages/*", "checkpoint_best/*")  # the last one: where eval.py writes without --save_dir
_RESULTS = (
    "dataset", "split", "n", "seed", "source", "codec", "dtype", "checkpoint", "git", "machine", "results",
    "comparisons",
)  # fmt: skip
_ROW = (
    "condition", "llm", "llm_id", "m", "f1", "f1_ci95", "em", "first_token_acc", "bits_per_answer_byte",
    "llm_positions", "wire_bytes", "explained_variance",
)  # fmt: skip
_PAIR = ("a", "b", "llm", "m", "metric", "diff", "ci95")
_LINE = ("id", "condition", "m", "llm", "prediction", "references", "f1")


@dataclass(frozen=True)
class Part:
    """One folder with something to show. label: its path from the runs' common parent; record: config.json; best:
    checkpoint_best's config.json; log: metrics.jsonl. What is not there is None or empty."""

    label: str
    folder: Path
    record: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    results: dict | None = None
    predictions: list[dict] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    diagnostics: dict | None = None

    @property
    def config(self) -> dict:
        """The settings of the run."""
        return self.record.get("config", {})


def gather(runs: Sequence[Path]) -> list[Part]:
    """All parts of the runs, each once: of a run itself first, then of its subfolders.

    Raises FileNotFoundError for a run that holds none, ValueError for a damaged file.
    """
    root = os.path.commonpath([run.resolve().parent for run in runs])
    parts: dict[Path, Part] = {}
    for run in runs:
        folders = [run, *(path for pattern in _SUBFOLDERS for path in sorted(run.glob(pattern)) if path.is_dir())]
        found = [folder.resolve() for folder in folders if _is_part(folder)]
        if not found:
            raise FileNotFoundError(
                f"{run} holds no results.json, metrics.jsonl or diagnostics.json, nor do its subfolders, stages/* and "
                "checkpoint_best/*; name the folder of an evaluation, a training or diagnostics that has ended"
            )
        for folder in found:
            if folder not in parts:
                parts[folder] = _read(folder, os.path.relpath(folder, root))
    return list(parts.values())


def _is_part(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("metrics.jsonl", "diagnostics.json")):
        return True
    path = folder / "results.json"
    found = read_json(path) if path.is_file() else {"schema": None}
    return "schema" not in found or "comparisons" in found  # other programs write a results.json, too


def _read(folder: Path, label: str) -> Part:
    results = _record(folder / "results.json", _RESULTS)
    for name, keys in (("results", _ROW), ("comparisons", _PAIR)) if results else ():
        for row in results[name]:
            _require(row, keys, folder / "results.json")
    log = folder / "metrics.jsonl"
    lines = read_lines(log)
    for line in lines:
        _require(line, ("step",), log)
    return Part(
        label=label,
        folder=folder,
        record=_record(folder / "config.json") or {},
        best=_record(folder / "checkpoint_best" / "config.json") or {},
        results=results,
        # Diagnostics leave predictions, too, but of interventions.
        predictions=_predictions(folder / "predictions.jsonl") if results else [],
        log=lines,
        diagnostics=_record(folder / "diagnostics.json"),
    )


def _record(path: Path, keys: Sequence[str] = ()) -> dict | None:
    """A JSON object, None without the file; ValueError if it is none or lacks one of the keys."""
    if not path.is_file():
        return None
    found = read_json(path)
    _require(found, keys, path)
    return found


def _predictions(path: Path) -> list[dict]:
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        _require(line, _LINE, Path(f"{path}:{number}"))
    return lines


def _require(found: object, keys: Sequence[str], path: Path) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}; restore it or run again")
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}; restore it or run again")
