"""A model card says what the checkpoint's config.json says, and the hub can read its head."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from latentwire.reporting.card import card

MADE = {
    "stage": "joint", "source": "prompt", "latent_len": 16, "d_z": 24, "train_seed": 3, "samples": 8, "git": "abc",
    "encoder_id": "some/encoder", "llms": {"llama": "offline:smollm2-135m-instruct", "qwen": "Qwen/Qwen2.5-7B"},
    "settings": {"epochs": 2, "batch_size": 4, "dtype": "float32", "dataset": "squad"},
    "sha256": {"encoder.safetensors": "1234"},
}  # fmt: skip


def made(**more):
    return card(MADE | more, Path("checkpoints/mine"), "| a table |\n")


def test_the_head_is_what_the_hub_reads():
    data = ModelCard(made()).data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "latentwire")
    assert data.datasets == ["rajpurkar/squad"] and data.metrics == ["f1", "exact_match"]
    assert data.base_model == ["Qwen/Qwen2.5-7B"], "an offline model is no repository of the hub"
    assert "prompt-compression" in data.tags


def test_what_is_not_on_the_hub_is_not_in_the_head():
    own = {"settings": MADE["settings"] | {"dataset": "sample"}, "llms": {"llama": "offline:smollm2-135m-instruct"}}
    data = ModelCard(made(**own)).data
    assert data.datasets is None and data.base_model is None


def test_the_text_says_how_it_was_made_and_how_to_use_it():
    text = ModelCard(made()).text
    assert "# mine\n" in text and "| a table |" in text and "1234  encoder.safetensors" in text
    assert "16 latents of 24 values" in text and "2 epochs" in text and "seed 3" in text and "commit abc" in text
    assert "python latentwire/demo.py --ckpt checkpoints/mine" in text
    assert "serves no other question" in text and "serves no other question" not in made(source="context")


def test_a_fact_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="git"):
        card({key: value for key, value in MADE.items() if key != "git"}, Path("x"), "")
