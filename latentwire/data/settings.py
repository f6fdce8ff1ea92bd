"""The settings of every program that reads questions."""

from dataclasses import dataclass
from pathlib import Path

from latentwire.data.content import SOURCES
from latentwire.utils.cli import Settings, is_path, option, require


def require_train_split(dataset: str) -> None:
    """ValueError for a file, which is read as questions to answer: none of it would be trained on."""
    remedy = "a file is read as dev; to train, name a folder with one train*.json and one dev*.json"
    require(not Path(dataset).is_file(), "dataset", dataset, remedy)


@dataclass(kw_only=True)
class QuestionSettings(Settings):
    """Which questions."""

    dataset: str = option(
        "squad",
        "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path: a folder with train*.json and "
        "dev*.json in SQuAD's form, or one file to answer",
        there=is_path,
    )
    seed: int = option(0, "seed of every choice: of questions, of their order, of new weights, of the bootstrap")


@dataclass(kw_only=True)
class DataSettings(QuestionSettings):
    """Which questions, and what the encoder reads of them."""

    source: str = option(
        "prompt", "prompt: Z stands for context and question; context: for the context alone, the question is text; "
        "aware: as context, but the encoder reads the question, too", choices=SOURCES,
    )  # fmt: skip
