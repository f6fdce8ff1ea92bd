"""metrics.jsonl, the log of a training: written line by line, continued without gaps.

A line of a step: {"step", "epoch", "loss", ..., "grad_norms": {component: length}, "llms": {LLM: {"ce", ...}}}; of a
validation: {"step", "validation": {"score", ..., "llms": {LLM: {"f1", ...}}}}.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from latentwire.utils.files import read_lines, write_text


class TrainingLog:
    """Appends to metrics.jsonl; whatever was written after step `kept` is dropped first, to be computed again. -1 drops
    all, also the validation before the first step. judged: whether the validation of step `kept` stays."""

    def __init__(self, path: Path, kept: int, judged: bool = True):
        self.path = path
        lines = [line for line in read_lines(path) if line["step"] <= kept - ("validation" in line and not judged)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, line: Mapping) -> None:
        """One line, flushed."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """All on disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def flat(line: Mapping) -> dict[str, float]:
    """The figures of a line by one name each: "loss", "ce llama", "grad_norm score". Older logs have names such as
    "ce_llama" already, which stay as they are."""
    found = {key: value for key, value in line.items() if not isinstance(value, Mapping)}
    found |= {f"grad_norm {component}": value for component, value in line.get("grad_norms", {}).items()}
    for llm, figures in line.get("llms", {}).items():
        found |= {f"{key} {llm}": value for key, value in figures.items()}
    return found
