"""metrics.jsonl, the record of a training run: written line by line, continued without gaps, drawn at the end.

A line of a step: {"step", "epoch", "loss", ...}; a line of a validation: {"step", "validation": {...}}.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_SMOOTH = 20  # steps that one point of a curve averages, at most


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
    steps = [line for line in lines if "validation" not in line]
    validations = [{"step": line["step"]} | line["validation"] for line in lines if "validation" in line]
    wanted = {
        "first_token_accuracy.png": ("first-token accuracy", lambda key: "first_token_acc" in key),
        "loss.png": ("loss", lambda key: key == "loss" or "ce" in key.split("_") or key == "span"),
    }
    drawn = []
    for name, (label, takes) in wanted.items():
        keys = {key for line in [*steps, *validations] for key in line if takes(key)}
        if keys:
            drawn.append(folder / name)
            _draw(steps, validations, sorted(keys), label, drawn[-1])
    return drawn


def _draw(steps: Sequence[Mapping], validations: Sequence[Mapping], keys: list[str], label: str, path: Path) -> None:
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, key in enumerate(keys):
        colour = f"C{number}"
        found = [(line["step"], line[key]) for line in steps if key in line]
        width = max(1, min(_SMOOTH, len(found) // 10))
        blocks = [found[i : i + width] for i in range(0, len(found), width)]
        means = [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in blocks]
        if means:
            panel.plot(*zip(*means, strict=True), color=colour, label=f"train {key}", lw=1.4)
        held = [(line["step"], line[key]) for line in validations if key in line]
        if held:
            panel.plot(*zip(*held, strict=True), color=colour, ls="--", marker="o", ms=4, label=f"held out {key}")
    panel.set_xlabel("step")
    panel.set_ylabel(label)
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
