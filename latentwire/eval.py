"""Evaluate conditions on questions with frozen LLMs.

    python latentwire/eval.py --ckpt FOLDER --samples 1000
    python latentwire/eval.py --dataset sample --conditions text,token_budget,token_budget@64,latentwire

Writes config.json, manifest.json, predictions.jsonl (as it goes) and results.json. Run again, it keeps what is finished
and computes the rest; --fresh_eval starts over. --reuse takes over what an earlier evaluation has from the same
checkpoint, or from none.
"""

from latentwire.evaluation.settings import EvalSettings
from latentwire.utils.cli import parse, run
from latentwire.utils.glance import glance


def conditions() -> str:
    """What --help says of conditions."""
    return glance("latentwire.conditions.base").conditions_help()


def main() -> None:
    """One evaluation."""
    config = parse(EvalSettings, epilog=conditions)
    from latentwire.evaluation.evaluate import evaluate  # slow to import: a wrong flag is told before

    evaluate(config)


if __name__ == "__main__":
    run(main)
