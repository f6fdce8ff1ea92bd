"""Train one stage of LatentWire, all stages in order, or a rival's soft prompts.

    torchrun --nproc_per_node=1 latentwire/train.py --stage all --save_dir runs/lw
    torchrun --nproc_per_node=1 latentwire/train.py --stage scores --init runs/lw/stages/codebook/checkpoint_best ...

Writes config.json, metrics.jsonl (as it goes), checkpoint_last/, checkpoint_best/ (by F1 on held-out articles of
train), first_token_accuracy.png and loss.png. A killed run continues and ends with the same weights. Ends with status
143 after SIGTERM, when the checkpoint is saved.
"""

import json
import os
from pathlib import Path

from latentwire.training.settings import TrainSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One stage, or all of them."""
    config = parse(TrainSettings)
    from latentwire.reporting.charts import draw_curves
    from latentwire.training.running import altogether, train

    found = train(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if config.estimate:
        if config.json:
            print(json.dumps(altogether(found)))
        return
    for log in sorted(Path(config.save_dir).rglob("metrics.jsonl")):
        for path in draw_curves(log.parent):
            print(f"drew {path}")


if __name__ == "__main__":
    run(main)
