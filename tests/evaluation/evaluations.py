"""Short evaluations, and what they leave on disk."""

from latentwire.evaluation.settings import EvalSettings
from latentwire.utils.files import read_lines

OF_A_RUN = ("seconds", "examples_per_s", "git")  # somebody may commit while these tests run


def config(folder, **changes):
    defaults = {
        "dataset": "sample", "samples": 9, "batch_size": 4, "latent_len": 16, "d_z": 24, "max_new_tokens": 4,
        "conditions": "text,token_budget,pca,latentwire,no_context", "device": "cpu", "save_dir": str(folder),
    }  # fmt: skip
    return EvalSettings(**(defaults | changes))


def timeless(value):
    """The same without times, rates and the commit."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in OF_A_RUN}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def predictions(folder):
    return read_lines(folder / "predictions.jsonl")
