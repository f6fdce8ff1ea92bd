"""Make a checkpoint ready to be shipped: half precision, with a model card.

    python latentwire/export.py runs/experiments/latentwire/checkpoint_best checkpoints/latentwire_m32
    python latentwire/eval.py --ckpt checkpoints/latentwire_m32 --save_dir results/shipped
    python latentwire/export.py … --results results/shipped        # the same again, with its figures on the card

What is exported loads like any other checkpoint; config.json has the sha256 of its weights.
"""

import argparse
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latentwire.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from latentwire.utils.runs import read_json, write_text
from latentwire.utils.settings import require

# What a checkpoint on a user's machine says that nobody else needs.
_PRIVATE = ("init", "save_dir", "resume", "save_minutes", "tensorboard", "device")


def main() -> None:
    """Command line: one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained checkpoint")
    parser.add_argument("folder", type=Path, help="where to; replaced if it is there")
    parser.add_argument("--results", type=Path, help="evaluation of the exported checkpoint, for the card")
    args = parser.parse_args()
    export(args.checkpoint, args.folder, args.results)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"wrote {args.folder} ({size / 1e6:.1f} MB)")


def export(checkpoint: Path, folder: Path, results: Path | None = None) -> None:
    """Write `checkpoint` to `folder` in float16, with a README.md that shows table.md of `results`, an evaluation of
    `folder`.

    Raises FileNotFoundError or ValueError if the checkpoint is no trained LatentWire, or the evaluation of another one.
    """
    made = read_config(checkpoint)
    require(made.get("stage") == "joint", "checkpoint", str(checkpoint), "export the checkpoint of stage joint")
    if results:
        evaluated = read_json(results / "results.json")["checkpoint"]
        same = Path(evaluated).resolve() == folder.resolve()
        require(same, "results", str(results), f"is an evaluation of {evaluated}, not of {folder}; evaluate that")
    encoder, adapters, _ = load_checkpoint(checkpoint, made["llms"])
    for module in (encoder, *adapters.values()):
        module.to(torch.float16)
    kept = {key: value for key, value in made.items() if key not in ("encoder", "widths", "sha256", *_PRIVATE)}
    kept["settings"] = {key: value for key, value in made["settings"].items() if key not in _PRIVATE}
    save_checkpoint(folder, encoder, adapters, kept | {"weights": "float16"})
    table = (results / "table.md").read_text(encoding="utf-8") if results else "Not evaluated yet.\n"
    write_text(folder / "README.md", card(folder, table))


def card(folder: Path, table: str) -> str:
    """The model card of the checkpoint in `folder`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    template = environment.get_template("model_card.md.jinja")
    return template.render(name=folder.name, folder=folder.as_posix(), made=read_config(folder), table=table.strip())
