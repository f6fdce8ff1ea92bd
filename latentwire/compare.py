"""Evaluations of the same questions side by side, each paired with the first: ablations, seeds, codecs, conditions.

    python latentwire/compare.py BASE OTHER ...     # RUN alone: its table again, held against its results.json
    python latentwire/compare.py A0,A1,A2 B0,B1,B2 A0:text --margin 0.01 --save_dir runs/compared

Folders joined by commas are training seeds of one thing. docs/studies.md says how intervals and verdicts are made.
"""

import argparse
from pathlib import Path

from latentwire.studies.settings import parse_run
from latentwire.utils.cli import require, run


def main() -> None:
    """One comparison, or one evaluation recomputed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="FOLDER[,FOLDER...][:CONDITION] of evaluations")
    parser.add_argument("--condition", default="latentwire", help="where a RUN names none (default: latentwire)")
    parser.add_argument("--margin", type=float, help="say whether F1 differs by less than this (equivalence)")
    parser.add_argument("--pair_seeds", action="store_true", help="seeds of the same place belong together")
    parser.add_argument("--selection", type=Path, help="a checkpoint: tell apart the questions whose answer it sends")
    parser.add_argument("--save_dir", type=Path, help="where to write comparison.json, .md and .png")
    args = parser.parse_args()
    runs = [parse_run(text, args.condition) for text in args.runs]
    from latentwire.reporting.tables import table_markdown  # slow to import
    from latentwire.reporting.writing import write_comparison
    from latentwire.studies.paired import compare, recompute

    if len(runs) == len(runs[0].folders) == 1:
        for name in ("save_dir", "margin", "pair_seeds", "selection"):
            require(not vars(args)[name], name, str(vars(args)[name]), "one RUN is only recomputed; name two or more")
        again = recompute(runs[0].folders[0])
        return print(table_markdown(again), *again["not_kept"], "equal to results.json", sep="\n")
    write_comparison(compare(runs, args.margin, args.selection, args.pair_seeds), args.save_dir)


if __name__ == "__main__":
    run(main)
