"""How long work will take on this machine: operations at a stored rate, corrected by what runs here really took.

Each training times its first steps, and each long evaluation a few batches. What the stored rate said of them and what
they took is kept in LATENTWIRE_CACHE/pace.json, the last of each kind of work; the next estimate is corrected by it.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from filelock import FileLock

from latentwire.data.question import Question
from latentwire.llms.arithmetic import Prompt, Shape, answer_flops
from latentwire.llms.known import cache_dir
from latentwire.utils.files import read_json, write_json
from latentwire.utils.surroundings import threads

TRAINING, ANSWERING = "training", "answering"
# Operations per second, of a GPU or of one thread of a CPU. Those of CPUs were fitted on results/ (docs/studies.md says
# how well); those of a GPU are a guess.
RATES = {
    TRAINING: {"cuda": 1e14, "float32": 70e9, "bfloat16": 105e9},
    ANSWERING: {"cuda": 1e14, "float32": 40e9, "bfloat16": 60e9},
}
_TOKEN = 4.3  # characters, mean of SQuAD's texts in the LLMs that were measured


@dataclass(frozen=True)
class Work:
    """Work of one kind (TRAINING or ANSWERING), on a device, in a dtype; llms: ids of those that take part; together:
    whether questions on a text share its reading."""

    kind: str
    device: str
    dtype: str
    llms: tuple[str, ...]
    together: bool = False

    def stored(self, operations: float) -> float:
        """Seconds at the stored rate."""
        rates = RATES[self.kind]
        if self.device.startswith("cuda"):
            return operations / rates["cuda"]
        return operations / (rates.get(self.dtype, rates["float32"]) * threads())

    def seconds(self, operations: float) -> float:
        """Seconds as far as this machine is known."""
        last = _kept().get(self._name)
        return self.stored(operations) * (last["took"] / last["stored"] if last else 1.0)

    def note(self, operations: float, took: float) -> None:
        """Keep what some work really took, in seconds; where nothing can be written, a line says so."""
        path = cache_dir() / "pace.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock")):  # trainings that begin together note it together
                write_json(path, _kept() | {self._name: {"stored": self.stored(operations), "took": took}})
        except OSError as error:
            print(f"note: the next estimate will not know how fast this was ({error})", file=sys.stderr)

    @property
    def _name(self) -> str:
        return " ".join([self.kind, self.device, self.dtype, *self.llms, *(["together"] if self.together else [])])


def answer_operations(model: Shape, cost: str, m: int, text: float, tokens: int) -> float:
    """Operations of one answer. cost: of a condition, which tells whether the LLM reads the whole text, M places or
    nothing; text: tokens of the whole; tokens: of the answer."""
    return sum(answer_flops(model, Prompt(), {"whole": text, "places": m, "nothing": 0}[cost], tokens))


def text_tokens(questions: Sequence[Question]) -> float:
    """Mean tokens of a context with its question, as far as characters tell."""
    return statistics.mean(len(q.context) + len(q.question) for q in questions) / _TOKEN


def _kept() -> dict[str, Mapping[str, float]]:
    """What runs took; nothing, and a line that says so, where the file is damaged."""
    path = cache_dir() / "pace.json"
    if not path.is_file():
        return {}
    try:
        kept = read_json(path)
        if all(last["stored"] > 0 and last["took"] > 0 for last in kept.values()):
            return kept
        reason = f"{path}: a time is not above 0"
    except (ValueError, AttributeError, KeyError, TypeError) as error:  # not JSON, or not what `note` writes
        reason = f"{path}: {error}"
    print(f"note: damaged, so estimates are not corrected until the next run: {reason}", file=sys.stderr)
    return {}
