"""Evaluations of the same questions side by side, each paired with the first: ablations, seeds, codecs.

    python latentwire/compare.py BASE OTHER ...
    python latentwire/compare.py SEED0,SEED1,SEED2 OTHER ... --save_dir runs/compared
    python latentwire/compare.py RUN        # its table again, from its predictions, held against its results.json

Folders joined by commas are training seeds of one thing: their F1 is averaged question by question, and the spread of
their means is told. Prints a table; with --save_dir writes comparison.json, comparison.md and comparison.png, too.
"""

import argparse
from pathlib import Path

from latentwire.utils.cli import require, run


def main() -> None:
    """One comparison, or one evaluation recomputed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of an evaluation, or several, joined by commas")
    parser.add_argument("--condition", default="latentwire", help="which condition (default: latentwire)")
    parser.add_argument("--save_dir", type=Path, help="where to write comparison.json, .md and .png")
    args = parser.parse_args()
    from latentwire.reporting.tables import comparison_markdown, table_markdown
    from latentwire.studies.paired import compare, recompute, write

    runs = [[Path(folder) for folder in run.split(",")] for run in args.runs]
    if len(runs) == len(runs[0]) == 1:
        require(not args.save_dir, "save_dir", str(args.save_dir), "one RUN is only recomputed; name two or more")
        again = recompute(runs[0][0])
        print(table_markdown(again), *again["not_kept"], "equal to results.json", sep="\n")
    else:
        compared = compare(runs, args.condition)
        print(comparison_markdown(compared), end="")
        write(compared, args.save_dir)


if __name__ == "__main__":
    run(main)
