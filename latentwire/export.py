"""Make a checkpoint ready to be shipped: half precision, with a model card.

    python latentwire/export.py runs/experiments/latentwire/checkpoint_best checkpoints/latentwire_m32
    python latentwire/eval.py --ckpt checkpoints/latentwire_m32 --save_dir results/shipped
    python latentwire/export.py … --results results/shipped        # the same again, with its figures on the card

What is exported loads like any other checkpoint; config.json has the sha256 of its weights.
"""

from latentwire.reporting.card import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
