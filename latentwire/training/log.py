"""metrics.jsonl, the log of a training: written line by line, continued without gaps.

A line of a step: {"step", "epoch", "loss", ..., "grad_norms": {component: length}, "llms": {LLM: {"ce", ...}}}; of a
validation: {"step", "validation": {"score", ..., "llms": {LLM: {"f1", ...}}}}.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from latentwire.utils.files import UNREADABLE


class TrainingLog:
    """Appends to metrics.jsonl; whatever was written after step `kept` is dropped first, to be computed again. -1 drops
    all, also the validation before the first step."""

    def __init__(self, path: Path, kept: int):
        self.path = path
        lines = [line for line in read_log(path) if line["step"] <= kept] if path.is_file() else []
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


def read_log(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that a kill cut off is left out. ValueError naming a damaged one."""
    text = path.read_text(encoding="utf-8")
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                lines.append(json.loads(line))
            except UNREADABLE as error:
                raise ValueError(
                    f"{path}:{number} is damaged ({error}); restore it, or remove the run folder"
                ) from error
    return lines


def flat(line: Mapping) -> dict[str, float]:
    """The figures of a line by one name each: "loss", "ce llama", "grad_norm score". Older logs have names such as
    "ce_llama" already, which stay as they are."""
    found = {key: value for key, value in line.items() if not isinstance(value, Mapping)}
    found |= {f"grad_norm {component}": value for component, value in line.get("grad_norms", {}).items()}
    for llm, figures in line.get("llms", {}).items():
        found |= {f"{key} {llm}": value for key, value in figures.items()}
    return found
