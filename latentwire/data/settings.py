"""The settings of every program that reads questions."""

from dataclasses import dataclass

from latentwire.data.content import SOURCES
from latentwire.utils.cli import Settings, is_path, option


@dataclass(kw_only=True)
class QuestionSettings(Settings):
    """Which questions."""

    dataset: str = option(
        "squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path", there=is_path
    )
    seed: int = option(0, "seed of every choice: of questions, of their order, of new weights, of the bootstrap")


@dataclass(kw_only=True)
class DataSettings(QuestionSettings):
    """Which questions, and what the encoder reads of them."""

    source: str = option(
        "prompt", "prompt: Z stands for context and question; context: for the context alone, the question is text; "
        "aware: as context, but the encoder reads the question, too", choices=SOURCES,
    )  # fmt: skip
