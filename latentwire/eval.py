"""Evaluate conditions on questions with frozen LLMs.

    python latentwire/eval.py --ckpt FOLDER --samples 1000
    python latentwire/eval.py --dataset sample --conditions text,token_budget,token_budget@64,latentwire

Writes config.json, manifest.json, predictions.jsonl (as it goes) and results.json. Run again, it keeps what is finished
and computes the rest; --fresh_eval starts over. --reuse takes over what an earlier evaluation has from the same
checkpoint, or from none.
"""

from latentwire.evaluation.evaluate import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
