"""Evaluations of the same questions side by side, each paired with the first: ablations, seeds, codecs.

    python latentwire/compare.py BASE OTHER ...
    python latentwire/compare.py SEED0,SEED1,SEED2 OTHER ... --save_dir results/ablations

Folders joined by commas are training seeds of one thing: their F1 is averaged question by question, and the spread of
their means is told. Prints a table; with --save_dir writes comparison.json, comparison.md and comparison.png, too.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latentwire.data.squad import load_questions
from latentwire.evaluation.predictions import Predictions
from latentwire.evaluation.scores import difference_ci, mean_ci, show_interval
from latentwire.reporting.charts import comparison
from latentwire.utils.runs import SCHEMA, read_json, write_json, write_text
from latentwire.utils.settings import require

_SAME = ("dataset", "split", "n", "source", "dtype")  # what evaluations must share to be paired


def main() -> None:
    """Command line: one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of an evaluation, or several, joined by commas")
    parser.add_argument("--condition", default="latentwire", help="which condition (default: latentwire)")
    parser.add_argument("--save_dir", type=Path, help="where to write comparison.json, .md and .png")
    args = parser.parse_args()
    compared = compare([[Path(folder) for folder in run.split(",")] for run in args.runs], args.condition)
    table = table_markdown(compared)
    print(table, end="")
    if args.save_dir:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        write_json(args.save_dir / "comparison.json", compared)
        write_text(args.save_dir / "comparison.md", table)
        comparison(compared).savefig(args.save_dir / "comparison.png", dpi=130)
        print(f"wrote {args.save_dir / 'comparison.md'}, comparison.json and comparison.png")


def compare(runs: Sequence[Sequence[Path]], condition: str) -> dict:
    """Rows by run and LLM; `diff` and its 95% interval (bootstrap by paragraph) are to the first run's row of that LLM.

    Raises FileNotFoundError for a folder without an evaluation, ValueError where two are not of the same questions.
    """
    found = {folder: _results(folder) for folders in runs for folder in folders}
    (first, base), *others = found.items()
    ids = read_json(first / "manifest.json")["ids"]
    for folder, results in others:
        differing = [name for name in _SAME if results[name] != base[name]]
        same = not differing and read_json(folder / "manifest.json")["ids"] == ids
        require(
            same, "run", str(folder), f"is not of the questions of {first} ({', '.join(differing) or 'ids'} differ)"
        )
    _, questions = load_questions(base["dataset"], "dev" if base["split"] == "dev" else "train")
    paragraph = {q.id: q.paragraph for q in questions}
    paragraphs = [paragraph[id_] for id_ in ids]
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
                "llm": row["llm"], "m": row["m"], "codec": found[folders[0]]["codec"],
                "f1": float(f1.mean()), "f1_ci95": mean_ci(f1, paragraphs), "seed_f1": means,
                "seed_sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
                "first_token_acc": float(np.mean([r["first_token_acc"] for r in same])),
                "nll_per_token": float(np.mean([r["nll_per_token"] for r in same])),
                "wire_bytes": row["wire_bytes"], "diff": float((f1 - before).mean()),
                "diff_ci95": difference_ci(f1, before, paragraphs) if f1 is not before else None,
            })  # fmt: skip
    require(bool(rows), "condition", condition, f"{first} has none such")
    return (
        {"schema": SCHEMA, "condition": condition, "machine": base["machine"]}
        | {name: base[name] for name in (*_SAME, "seed")}
        | {"rows": rows}
    )


def table_markdown(compared: Mapping) -> str:
    """The rows as Markdown, with what is needed to believe them."""
    machine = compared["machine"]
    lines = [
        f"Data: {compared['dataset']} {compared['split']}, n={compared['n']}, seed {compared['seed']}; source "
        f"{compared['source']}; {compared['dtype']}; condition {compared['condition']}; "
        f"commit {' '.join(sorted({git for row in compared['rows'] for git in row['git']}))}; "
        f"{', '.join(machine['gpus']) or machine['processor']}, torch {machine['torch']}.",
        "",
        "| run | LLM | M | codec | F1 [95% interval] | seeds | first token | NLL/token | bytes | F1 minus first run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in compared["rows"]:
        seeds = ", ".join(f"{f1:.3f}" for f1 in row["seed_f1"])
        spread = f"{seeds} (sd {row['seed_sd']:.3f})" if row["seed_sd"] is not None else "1"
        difference = f"{row['diff']:+.3f} {show_interval(row['diff_ci95'])}" if row["diff_ci95"] else ""
        lines.append(
            f"| {row['name']} | {row['llm']} | {row['m'] or ''} | {row['codec']} "
            f"| {row['f1']:.3f} {show_interval(row['f1_ci95'])} | {spread} | {row['first_token_acc']:.3f} "
            f"| {row['nll_per_token']:.3f} | {row['wire_bytes']} | {difference} |"
        )
    return "\n".join(lines) + "\n"


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


def _scores(folder: Path, row: Mapping) -> dict[str, float]:
    """F1 by question id."""
    return {id_: line["f1"] for id_, line in Predictions(folder / "predictions.jsonl").of(row).items()}
