"""What a sweep found: its configurations ranked, with intervals, beside the baselines.

The folder of a finished configuration holds eval/results.json, that of a failed one error.txt, whose first line says
why. Nothing here depends on when or in which order they were run.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latentwire.data.question import Question
from latentwire.evaluation.predictions import Predictions
from latentwire.evaluation.scores import mean_ci, show_interval
from latentwire.reporting import charts
from latentwire.studies.programs import ERROR
from latentwire.studies.settings import Configuration
from latentwire.utils.cli import SCHEMA
from latentwire.utils.files import read_json, write_json, write_text

_METRICS = ("f1", "first_token_acc", "bits_per_answer_byte")
_FIGURES = ("f1", "f1_ci95", "paragraphs", "first_token_acc", "bits_per_answer_byte", "empty_answers")


class Ranking:
    """The summary of a sweep. questions: those that all configurations are judged by; baselines: folder of theirs."""

    def __init__(
        self, folder: Path, grid: Sequence[Configuration], questions: Sequence[Question], baselines: Path, seed: int
    ):
        self.folder, self.grid, self.baselines, self.seed = folder, grid, baselines, seed
        self._paragraphs = {q.id: q.paragraph for q in questions}
        self._entries: dict[str, dict] = {}

    def write(self) -> dict:
        """Renew sweep_summary.json and sweep_results.csv; the summary is returned."""
        found = [self._entry(configuration) for configuration in self.grid if configuration.is_finished(self.folder)]
        ranked = sorted(found, key=lambda entry: (-entry["f1"], entry["name"]))
        summary = {
            "schema": SCHEMA, "n": len(self._paragraphs), "split": "held_out", "ranked": ranked,
            "best": {metric: _best(ranked, metric) for metric in _METRICS},
            "baselines": self.baseline_rows(), "failed": self._failed(),
        }  # fmt: skip
        write_json(self.folder / "sweep_summary.json", summary)
        write_text(self.folder / "sweep_results.csv", self._table(summary))
        return summary

    def report(self, name: str) -> None:
        """Renew the files, and say how a configuration ended and how many have."""
        summary = self.write()
        ends = {entry["name"]: "F1 " + _figures(entry) for entry in summary["ranked"]}
        ends |= {failed["name"]: f"failed: {failed['error']}" for failed in summary["failed"]}
        print(f"{len(ends)}/{len(self.grid)} {name}  {ends[name]}", flush=True)

    def baseline_rows(self) -> list[dict]:
        """F1 of each baseline that these configurations need, in an order of its own."""
        path = self.baselines / "results.json"
        sizes = {None, *(configuration.latent_len for configuration in self.grid)}
        rows = [row for row in read_json(path)["results"] if row["m"] in sizes] if path.is_file() else []
        kept = ("condition", "m", "d_z", "llm", "f1", "f1_ci95", "paragraphs")
        ordered = sorted(rows, key=lambda row: (row["condition"], row["m"] or 0))
        return [{key: row[key] for key in kept if key in row} for row in ordered]

    def draw(self, summary: Mapping) -> Path:
        """Write sweep.png."""
        charts.sweep(summary).savefig(self.folder / "sweep.png", dpi=130)
        return self.folder / "sweep.png"

    def _entry(self, configuration: Configuration) -> dict:
        """A finished configuration's figures; read once."""
        name, m = configuration.name, configuration.latent_len
        if name not in self._entries:
            folder = self.folder / name / "eval"
            rows = [
                row
                for row in read_json(folder / "results.json")["results"]
                if (row["condition"], row["m"]) == ("latentwire", m)
            ]
            predictions = Predictions(folder / "predictions.jsonl", read_only=True)
            lines = [predictions.of(row) for row in rows]
            means = [np.mean([found[id_]["f1"] for found in lines]) for id_ in self._paragraphs]
            self._entries[name] = {
                **_settings(configuration), "f1": float(np.mean([row["f1"] for row in rows])),
                "f1_ci95": mean_ci(means, list(self._paragraphs.values()), self.seed),
                "paragraphs": len(set(self._paragraphs.values())),
                "llms": {row["llm"]: {key: row[key] for key in _FIGURES if key in row} for row in rows},
            }  # fmt: skip
        return self._entries[name]

    def _failed(self) -> list[dict]:
        paths = {c.name: self.folder / c.name / ERROR for c in self.grid if not c.is_finished(self.folder)}
        return [
            {"name": name, "error": path.read_text(encoding="utf-8").splitlines()[0]}
            for name, path in paths.items()
            if path.is_file()
        ]

    def _table(self, summary: Mapping) -> str:
        """One row per configuration; a failed one has its error and no figure."""
        errors = {failed["name"]: failed["error"] for failed in summary["failed"]}
        rows = [_flat(entry) for entry in summary["ranked"]]
        rows += [_settings(c) | {"error": errors[c.name]} for c in self.grid if c.name in errors]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "error"))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns, "error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _settings(configuration: Configuration) -> dict:
    return {"name": configuration.name, **vars(configuration)}


def _best(ranked: Sequence[Mapping], metric: str) -> str | None:
    """Name of the configuration with the best mean over the LLMs; of equal ones, the higher ranked."""
    sign = 1 if metric == "bits_per_answer_byte" else -1
    means = {entry["name"]: sign * np.mean([llm[metric] for llm in entry["llms"].values()]) for entry in ranked}
    return min(means, key=means.get, default=None)


def _figures(entry: Mapping) -> str:
    """ "NAME 0.41 [0.35, 0.47]" for each LLM."""
    return "  ".join(f"{name} {llm['f1']:.3f} {show_interval(llm['f1_ci95'])}" for name, llm in entry["llms"].items())


def _flat(entry: Mapping) -> dict:
    """A ranked entry as one row of a table."""
    row = {key: value for key, value in entry.items() if key not in ("f1_ci95", "llms")}
    row |= _bounds("f1", entry["f1_ci95"])
    for name, llm in entry["llms"].items():
        row |= {f"{name}_{key}": value for key, value in llm.items() if key != "f1_ci95"}
        row |= _bounds(f"{name}_f1", llm["f1_ci95"])
    return row


def _bounds(name: str, ci: Sequence[float] | None) -> dict:
    low, high = ci or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
