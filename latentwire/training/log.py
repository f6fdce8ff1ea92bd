"""metrics.jsonl, the record of a training run: written line by line, continued without gaps, drawn at the end.

A line of a step: {"step", "epoch", "loss", ...}; a line of a validation: {"step", "validation": {...}}.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from latentwire.reporting.charts import curve_keys, training_curves


class Metrics:
    """Appends to metrics.jsonl; whatever was written after step `kept` is dropped first, to be computed again. -1 drops
    all, also the validation before the first step."""

    def __init__(self, path: Path, kept: int):
        self.path = path
        lines = [line for line in read_metrics(path) if line["step"] <= kept] if path.is_file() else []
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, line: Mapping) -> None:
        """One line, flushed."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """All on disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that a kill cut off is left out. ValueError naming a damaged one."""
    text = path.read_text(encoding="utf-8")
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number} is damaged ({error}); restore it, or remove the run folder"
                ) from error
    return lines


def draw_curves(folder: Path) -> list[Path]:
    """first_token_accuracy.png and loss.png from metrics.jsonl; the paths that were drawn."""
    lines = read_metrics(folder / "metrics.jsonl")
    drawn = []
    for name in ("first_token_accuracy", "loss"):
        if curve_keys(lines, name):
            drawn.append(folder / f"{name}.png")
            training_curves(lines, name).savefig(drawn[-1], dpi=130)
    return drawn
