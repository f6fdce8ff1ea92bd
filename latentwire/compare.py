"""Evaluations of the same questions side by side, each paired with the first: ablations, seeds, codecs.

    python latentwire/compare.py BASE OTHER ...
    python latentwire/compare.py SEED0,SEED1,SEED2 OTHER ... --save_dir results/ablations

Folders joined by commas are training seeds of one thing: their F1 is averaged question by question, and the spread of
their means is told. Prints a table; with --save_dir writes comparison.json, comparison.md and comparison.png, too.
"""

from latentwire.studies.paired import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
