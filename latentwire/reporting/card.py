"""The model card of an exported checkpoint: what the hub reads of it, and what people do."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

_HUB_DATASETS = {"squad": "rajpurkar/squad"}


def card(made: Mapping, folder: Path, table: str) -> str:
    """README.md of the checkpoint in `folder`. made: its config.json; table: Markdown of its evaluation."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    template = environment.get_template("model_card.md.jinja")
    body = template.render(name=folder.name, folder=folder.as_posix(), made=made, table=table.strip())
    dataset = made["settings"]["dataset"]
    data = ModelCardData(
        language="en", license="mit", library_name="latentwire", metrics=["f1", "exact_match"],
        tags=["latentwire", "prompt-compression", "question-answering"],
        datasets=[_HUB_DATASETS[dataset]] if dataset in _HUB_DATASETS else None,
        base_model=[llm for llm in made["llms"].values() if not llm.startswith("offline:")] or None,
    )  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
