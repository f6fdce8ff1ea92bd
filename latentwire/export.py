"""Make a checkpoint ready to be shipped: half precision, with a model card.

    python latentwire/export.py runs/experiments/latentwire/checkpoint_best checkpoints/mine
    python latentwire/eval.py --ckpt checkpoints/mine --save_dir runs/mine && python latentwire/report.py runs/mine
    python latentwire/export.py ... --results runs/mine        # the same again, with its figures on the card
    python latentwire/export.py checkpoints/mine checkpoints/more --readers runs/join/checkpoint_best ...

What is exported loads like any other checkpoint; config.json has the sha256 of its weights.
"""

import argparse
from pathlib import Path

from latentwire.utils.cli import require_there, run


def main() -> None:
    """One checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained checkpoint")
    parser.add_argument("folder", type=Path, help="where to; a checkpoint that is there is replaced")
    more = "checkpoints of stage join, whose LLMs come with it"
    parser.add_argument("--readers", type=Path, nargs="+", default=[], help=more)
    parser.add_argument("--results", type=Path, help="evaluation of the exported checkpoint, for the card")
    args = parser.parse_args()
    for name in ("checkpoint", "results"):
        require_there(name, str(vars(args)[name] or "."))
    from latentwire.models.exporting import export, table_of
    from latentwire.reporting.card import card
    from latentwire.utils.files import write_text

    table = table_of(args.results, args.folder)
    made = export(args.checkpoint, args.folder, args.readers)
    write_text(args.folder / "README.md", card(made, args.folder, table))
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"wrote {args.folder} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
