"""Data sets by name. Adding one: a function in a file of this folder, registered in one line.

@dataset("mine", score=my_scores, spans=False)
def mine(split: str) -> list[Question]: ...
"""

from collections.abc import Callable
from dataclasses import dataclass

from latentwire.data.question import Question, Scorer
from latentwire.data.scoring import squad_scores
from latentwire.utils.registry import Registry


@dataclass
class Dataset:
    """A kind of data. read(split): questions of "train" or "dev" with the name of the data that they really come from;
    score: of an answer; spans: whether every answer stands in its context, at `starts`."""

    read: Callable[[str], tuple[str, list[Question]]]
    score: Scorer
    spans: bool
    name: str = ""


DATASETS: Registry[Dataset] = Registry("dataset")


def dataset(name: str, score: Scorer = squad_scores, spans: bool = True) -> Callable:
    """Register a function that gives the questions of a split, or (name of the real data, questions)."""

    def register(function: Callable[[str], list[Question] | tuple[str, list[Question]]]) -> Callable:
        def read(split: str) -> tuple[str, list[Question]]:
            found = function(split)
            return found if isinstance(found, tuple) else (name, found)

        DATASETS.register(name)(Dataset(read, score, spans))
        return function

    return register
