"""Fit the tables that the compact codecs need, on questions of train; they are written beside the checkpoint.

    python latentwire/fit_codec.py                                     # of the checkpoint that ships here
    python latentwire/fit_codec.py --ckpt runs/mine/checkpoint_best
    python latentwire/eval.py --ckpt runs/mine/checkpoint_best --codec compact2 --conditions latentwire

A compact wire holds the token under each latent, and the latent's residual on 0, 1, 2, 4 or 8 directions.
"""

from latentwire.evaluation.settings import CodecSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One fit."""
    config = parse(CodecSettings)
    from latentwire.evaluation.codec import fit_codec  # slow to import: a wrong flag is told before

    fit_codec(config)


if __name__ == "__main__":
    run(main)
