"""Train one stage of LatentWire, or a rival's soft prompts.

    torchrun --nproc_per_node=1 latentwire/train.py --stage codebook --save_dir runs/lw/codebook
    torchrun --nproc_per_node=1 latentwire/train.py --stage scores --init runs/lw/codebook/checkpoint_best ...

Writes config.json, metrics.jsonl (as it goes), checkpoint_last/, checkpoint_best/ (by F1 on held-out articles of
train), first_token_accuracy.png and loss.png. With --resume a killed run continues and ends with the same weights. Ends
with status 143 after SIGTERM, when the checkpoint is saved.
"""

from latentwire.training.stages import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
