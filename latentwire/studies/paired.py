"""Evaluations of the same questions side by side, each paired with the first; and one evaluation recomputed."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from latentwire.data.question import Question, Scorer
from latentwire.data.squad import load
from latentwire.evaluation import results as made
from latentwire.evaluation.results import row_key, summarise
from latentwire.evaluation.scores import difference_ci, mean_ci
from latentwire.reporting.charts import comparison
from latentwire.reporting.tables import comparison_markdown
from latentwire.utils.cli import SCHEMA, require
from latentwire.utils.files import read_json, read_lines, write_json, write_text

_SAME = ("dataset", "split", "n", "source", "dtype")  # what evaluations must share to be paired
_NO_FIGURE = ("seconds", "examples_per_s", "taken_from")  # of a row: times, which no second look repeats


def recompute(folder: Path) -> dict:
    """results.json of an evaluation, made again from its predictions, each answer scored anew; `not_kept`: a line per
    row of which no predictions were kept.

    Raises FileNotFoundError without any predictions, ValueError naming what differs from results.json.
    """
    before, predicted = _results(folder), _lines(folder)
    questions, score = _questions(folder, before)
    kept = {row_key(line) for line in predicted}
    recorded = [row for row in before["results"] if row_key(row) in kept]
    rows, scores = [], {}
    for row in recorded:
        lines = {line["id"]: line for line in predicted if row_key(line) == row_key(row)}
        lacking = [q.id for q in questions if q.id not in lines]
        require(
            not lacking, "run", str(folder), f"lacks the predictions of {row_key(row)} for {len(lacking)} questions"
        )
        lines = {q.id: lines[q.id] | score(lines[q.id]["prediction"], q.answers) for q in questions}
        rows.append({**row, **summarise(lines, questions, before["seed"])})
        scores[row_key(row)] = [lines[q.id]["f1"] for q in questions]
    pairs = made.compare(rows, scores, [q.paragraph for q in questions], before["seed"])
    differing = [
        f"{' '.join(map(str, row_key(old)))}: {key}"
        for old, new in zip(recorded, rows, strict=True)
        for key in sorted(old.keys() - set(_NO_FIGURE))
        if not _equal(old[key], new[key])
    ]
    differing += [] if _equal(_among(recorded, before["comparisons"]), pairs) else ["comparisons"]
    require(
        not differing, "run", str(folder), f"results.json says otherwise than its predictions: {', '.join(differing)}"
    )
    left = [row for row in before["results"] if row not in recorded]
    not_kept = [f"no predictions were kept: {row['llm'] or 'no LLM'} {row['condition']}" for row in left]
    return before | {"results": rows, "comparisons": pairs, "not_kept": not_kept}


def _among(rows: Sequence[Mapping], comparisons: Sequence[Mapping]) -> list[Mapping]:
    """The comparisons of which both sides are among the rows."""
    there = {(row["condition"], row["llm"]) for row in rows}
    return [c for c in comparisons if all({(c[side], c["llm"]), (c[side], None)} & there for side in ("a", "b"))]


def _equal(a: object, b: object) -> bool:
    """Whether two parts of a record are the same, last digits of floating point aside."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.isclose(a, b, rtol=1e-9, atol=1e-12)) if isinstance(a, float) and isinstance(b, float) else a == b


def write(compared: Mapping, folder: Path | None) -> None:
    """comparison.json, comparison.md and comparison.png, if there is a folder for them."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", compared)
    write_text(folder / "comparison.md", comparison_markdown(compared))
    comparison(compared).savefig(folder / "comparison.png", dpi=130)
    print(f"wrote {folder / 'comparison.md'}, comparison.json and comparison.png")


def compare(runs: Sequence[Sequence[Path]], condition: str) -> dict:
    """Rows by run and LLM; `diff` and its 95% interval (bootstrap by paragraph) are to the first run's row of that LLM.

    Raises FileNotFoundError for a folder without an evaluation, ValueError where two are not of the same questions.
    """
    found = {folder: _results(folder) for folders in runs for folder in folders}
    (first, base), *others = found.items()
    ids = _ids(first)
    for folder, results in others:
        differing = [name for name in _SAME if results[name] != base[name]]
        same = not differing and _ids(folder) == ids
        require(
            same, "run", str(folder), f"is not of the questions of {first} ({', '.join(differing) or 'ids'} differ)"
        )
    paragraphs = [q.paragraph for q in _questions(first, base)[0]]
    rows, unchanged = [], {}
    names = _names([*found])
    for folders in runs:
        for row in (row for row in found[folders[0]]["results"] if row["condition"] == condition):
            same = [_row(folder, found[folder], row) for folder in folders]
            f1 = np.mean([[_scores(folder, r)[id_] for id_ in ids] for folder, r in zip(folders, same, strict=True)], 0)
            before = unchanged.setdefault(row["llm"], f1)
            means = [r["f1"] for r in same]
            commits = sorted({found[folder]["git"] for folder in folders})
            rows.append({
                "name": " ".join(names[folder] for folder in folders),
                "runs": [str(folder) for folder in folders], "git": commits,
                "llm": row["llm"], "llm_id": row["llm_id"], "m": row["m"], "codec": found[folders[0]]["codec"],
                "f1": float(f1.mean()), "f1_ci95": mean_ci(f1, paragraphs), "seed_f1": means,
                "seed_sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
                "first_token_acc": _mean(same, "first_token_acc"), "nll_per_token": _mean(same, "nll_per_token"),
                "wire_bytes": row["wire_bytes"], "diff": float((f1 - before).mean()),
                "diff_ci95": difference_ci(f1, before, paragraphs) if f1 is not before else None,
            })  # fmt: skip
    require(bool(rows), "condition", condition, f"{first} has none such")
    return (
        {"schema": SCHEMA, "condition": condition, "machine": base["machine"]}
        | {name: base[name] for name in (*_SAME, "seed")}
        | {"rows": rows}
    )


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """What tells the folders' paths apart: without the parts that all of them begin and end with."""
    parts = [list(folder.parts) for folder in folders]
    for end in (0, -1):
        while len(folders) > 1 and all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                p.pop(end)
    return {folder: str(Path(*p)) for folder, p in zip(folders, parts, strict=True)}


def _results(folder: Path) -> dict:
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; name the folder of an evaluation that has ended")
    return read_json(folder / "results.json")


def _row(folder: Path, results: Mapping, like: Mapping) -> Mapping:
    """The row of another seed's evaluation; M may not differ."""
    wanted = {name: like[name] for name in ("condition", "llm", "m")}
    rows = [row for row in results["results"] if all(row[name] == wanted[name] for name in wanted)]
    require(len(rows) == 1, "run", str(folder), f"has no row {wanted}; seeds of one thing must have the same rows")
    return rows[0]


def _mean(rows: Sequence[Mapping], key: str) -> float | None:
    """Mean over seeds; None where no LLM was asked."""
    return None if rows[0][key] is None else float(np.mean([row[key] for row in rows]))


def _scores(folder: Path, row: Mapping) -> dict[str, float]:
    """F1 by question id."""
    return {line["id"]: line["f1"] for line in _lines(folder) if row_key(line) == row_key(row)}


@cache
def _lines(folder: Path) -> list[dict]:
    """The prediction lines of an evaluation, packed or not."""
    lines = read_lines(folder / "predictions.jsonl")
    if not lines:
        raise FileNotFoundError(
            f"{folder} holds no predictions (predictions.jsonl or predictions.jsonl.gz), so nothing can be recomputed"
        )
    return lines


def _ids(folder: Path) -> list[str]:
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} holds no manifest.json, which names the questions; evaluate again")
    return read_json(folder / "manifest.json")["ids"]


def _questions(folder: Path, results: Mapping) -> tuple[list[Question], Scorer]:
    """The questions of an evaluation, in its order, and what scores answers to them. ValueError where the data at hand
    are other ones."""
    loaded = load(results["dataset"], results["split"])
    by_id = {q.id: q for q in loaded.questions}
    missing = [id_ for id_ in _ids(folder) if id_ not in by_id]
    require(
        not missing, "dataset", results["dataset"],
        f"{len(missing)} of the questions of {folder} are not in the data at hand ({loaded.name}); set SQUAD_DIR",
    )  # fmt: skip
    return [by_id[id_] for id_ in _ids(folder)], loaded.score
