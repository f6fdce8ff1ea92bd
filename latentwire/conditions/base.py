"""What every condition shares. Adding one: a function in a file of this folder, registered in one line.

    @condition("mine", colour="#112233", cost="places", uses=("m",))
    def mine(reader, questions, m, shared): return [text_slot(reader, [...]) for q in questions]

A condition turns questions into slots. Everything around the slot is the same for all of them (see `llms.prompts`), and
whatever consists of latents, PCA coefficients included, is packed to bytes and decoded again on its way.
Shapes: P positions, d LLM width, k coefficients per position.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentwire.data.content import SOURCES, reading
from latentwire.data.question import Question
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.known import LLMSettings
from latentwire.llms.loading import load_llm
from latentwire.llms.prompts import PromptBuilder
from latentwire.models import wire
from latentwire.models.adapters import Adapter
from latentwire.models.encoders.base import Encoder
from latentwire.models.wire.compact import Compact
from latentwire.utils.cli import listed, require
from latentwire.utils.files import read_json, write_json
from latentwire.utils.registry import Registry
from latentwire.utils.runs import digest

# What a condition may need of the encoder and of the questions.
_NEEDS = {
    "chooses_tokens": "an encoder that chooses tokens",
    "reads_answers": "an encoder that reads answers itself",
    "spans": "answers that are spans of their contexts",
    "two_articles": "questions on two articles or more",
}
COSTS = ("whole", "places", "nothing")  # what an LLM reads: the whole text, M places, or no text at all


@dataclass
class Slot:
    """embeds: [P, d] for one LLM; sent: bytes that would have to be transmitted for them; constant: how many of the
    first of them are the same for all questions (a preamble, a soft prompt); deltas: what is added to their keys and
    values, [layers, 2, P, k], if anything.
    """

    embeds: Tensor
    sent: int
    constant: int = 0
    deltas: Tensor | None = None


@dataclass
class Reader:
    """One LLM that answers: the frozen model, its prompts, and its adapter, where there is a wire to read."""

    llm: FrozenLLM
    prompts: PromptBuilder
    adapter: Adapter | None = None


class Sender:
    """Encodes each text once and keeps the packed bytes, so that all LLMs decode the same ones. Questions share a text
    where the encoder does not read them."""

    def __init__(self, encoder: Encoder, source: str, codec: str, compact: Compact | None = None):
        """compact: tables, for a codec that needs them."""
        self.encoder, self.source, self.codec, self.compact = encoder, source, codec, compact
        self._packed: dict[tuple[str, int], bytes] = {}

    def send(self, questions: Sequence[Question], m: int) -> list[bytes]:
        """The packed Z of each question."""
        texts = [reading(self.source, q.context, q.question).text for q in questions]
        missing = {text: q for text, q in zip(texts, questions, strict=True) if (text, m) not in self._packed}
        for text, z in zip(missing, self.encoder.encode(list(missing.values()), self.source, m), strict=True):
            self._packed[text, m] = self.pack(z)
        return [self._packed[text, m] for text in texts]

    def pack(self, z: Tensor) -> bytes:
        """The bytes of latents [P, d_z]."""
        return wire.pack(z[None].cpu().numpy(), self.codec, self.compact)

    def slot(self, packed: bytes, adapter: Adapter) -> "Slot":
        """A slot of what the packed bytes hold."""
        with torch.no_grad():
            z = torch.from_numpy(wire.unpack(packed, self.compact)[0])
            return Slot(adapter(z), len(packed), adapter.constant, adapter.deltas(z))


@dataclass
class Shared:
    """What all readers of one evaluation share.

    questions: those that are evaluated; seed: of shuffled_z; sender: where a condition reads the wire; codec, d_z: of
    PCA's coefficients; train_texts: what PCA is fitted on; soft_prompts: by condition and LLM, the tuned rivals'
    vectors [16, d]; untrained: sender and adapters before any training; kept: what conditions compute once.
    """

    questions: Sequence[Question] = ()
    seed: int = 0
    sender: Sender | None = None
    codec: str = "fp16"
    d_z: int = 0
    train_texts: Sequence[str] = ()
    soft_prompts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    untrained: tuple[Sender, Mapping[str, Adapter]] | None = None
    kept: dict[tuple[str, str], object] = field(default_factory=dict)


Build = Callable[[Reader, Sequence[Question], int, Shared], list[Slot] | list[str]]


@dataclass
class Condition:
    """slots(reader, questions, m, shared) gives one slot per question; or, where no LLM is asked (by_llm False), its
    answer.

    colour: in charts; cost: one of COSTS, which tells its time; uses: what it depends on, of "m", "d_z", "wire"
    (encoder and adapters), "untrained" (those before any training) and "tuned" (soft prompts); needs: what the encoder
    or the questions must have, of _NEEDS; sources: those it can serve; default_in: where
    it runs unless conditions are named; groups: names that stand for several; also: multiples of M that a group adds;
    base: the condition behind a tuned rival's soft prompt; explained: share of the embeddings' variance that it keeps.
    """

    slots: Build
    colour: str
    cost: str
    uses: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    sources: tuple[str, ...] = SOURCES
    default_in: tuple[str, ...] = SOURCES
    groups: tuple[str, ...] = ()
    also: tuple[int, ...] = ()
    by_llm: bool = True
    base: "Condition | None" = None
    explained: Callable[[Reader, int, Shared], float] | None = None
    name: str = ""

    @property
    def about(self) -> str:
        """What it is, in one line."""
        return (self.slots.__doc__ or "").strip().splitlines()[0]


CONDITIONS: Registry[Condition] = Registry("condition")


def condition(name: str, colour: str, cost: str, **how: object) -> Callable[[Build], Build]:
    """Register a function as a condition; how: the further fields of `Condition`."""
    assert cost in COSTS, cost

    def register(build: Build) -> Build:
        CONDITIONS.register(name)(Condition(build, colour, cost, **how))
        return build

    return register


def conditions_help() -> str:
    """All conditions and groups, for --help."""
    lines = [f"  {c.name:<22}{c.about}" for c in CONDITIONS.values()]
    groups: dict[str, list[str]] = {}
    for c in CONDITIONS.values():
        for group in c.groups:
            groups.setdefault(group, []).append(c.name)
    lines += ["", "groups of conditions (what the encoder cannot serve is left out):"]
    return "\n".join(
        ["conditions (what the LLM finds in the content slot):", *lines]
        + [f"  {group:<22}{', '.join(names)}" for group, names in groups.items()]
    )


def parse_conditions(text: str, source: str, m: int, able: Collection[str]) -> list[tuple[Condition, int]]:
    """ "NAME,NAME@M,GROUP,..." to conditions with their M; empty text means all that belong to the source by default.

    able: what the encoder and the data have, of `Condition.needs`; a group leaves out what needs more. ValueError for a
    name that is unknown, or that source, encoder or data do not serve.
    """
    chosen: list[tuple[Condition, int]] = []
    for part in listed(text) or [""]:
        name, _, own = part.partition("@")
        if own and not (own.isdigit() and int(own) > 0):
            raise ValueError(f"conditions={part!r}: M after @ must be a whole number of at least 1")
        if name in CONDITIONS:
            _require_served(CONDITIONS[name], source, able)
            chosen.append((CONDITIONS[name], int(own or m)))
        else:
            chosen += _group(name, source, int(own or m), able)
    once: dict[tuple[str, int | None], tuple[Condition, int]] = {}
    for c, places in chosen:
        once.setdefault((c.name, places if "m" in c.uses else None), (c, places))
    return [*once.values()]


def _group(name: str, source: str, m: int, able: Collection[str]) -> list[tuple[Condition, int]]:
    """The conditions of a group, "" for the default ones, as far as they are served."""
    groups = list(dict.fromkeys(group for c in CONDITIONS.values() for group in c.groups))
    if name and name not in groups:
        raise ValueError(
            f"conditions={name!r}: unknown; choose among {', '.join(CONDITIONS)}, or the groups {', '.join(groups)}"
        )
    found = [c for c in CONDITIONS.values() if (name in c.groups if name else source in c.default_in)]
    served = [c for c in found if source in c.sources and set(c.needs) <= set(able)]
    return [(c, times * m) for c in served for times in (1, *(c.also if name else ()))]


def _require_served(found: Condition, source: str, able: Collection[str]) -> None:
    if source not in found.sources:
        raise ValueError(f"conditions={found.name!r}: needs source {' or '.join(found.sources)}, not {source!r}")
    lacking = [what for what in found.needs if what not in able]
    if lacking:
        remedies = " and ".join(_NEEDS[what] for what in lacking)
        raise ValueError(f"conditions={found.name!r}: needs {remedies}; leave it out, or choose other ones")


def readers(config: LLMSettings, source: str, adapters: Mapping[str, Adapter] | None = None) -> list[Reader]:
    """Load each LLM that the settings name, with its prompts and its adapter, on the device that they name."""
    llms = [load_llm(name, llm_id, config.device, config.dtype) for name, llm_id in config.llm_ids.items()]
    return [reader_of(llm, config, source, (adapters or {}).get(llm.name)) for llm in llms]


def reader_of(llm: FrozenLLM, config: LLMSettings, source: str, adapter: Adapter | None = None) -> Reader:
    """The reader of a loaded LLM."""
    prompts = PromptBuilder(llm.tokenizer, source, config.llm_wordings[llm.name])
    return Reader(llm, prompts, adapter.to(llm.device) if adapter else None)


def begin_adapters(adapters: Mapping[str, Adapter], ready: Sequence[Reader]) -> None:
    """Tell new adapters how their LLM's prompt begins."""
    for reader in ready:
        adapters[reader.llm.name].begin(reader.llm, reader.prompts.head)


def require_heads(folder: Path, ready: Sequence[Reader], keep: bool = True) -> None:
    """ValueError where a prompt does not begin as it did when the run in `folder` began: a model's chat template may
    have changed. heads.json keeps what each LLM's prompt begins with; keep: write what it does not say yet."""
    path = folder / "heads.json"
    kept = read_json(path) if path.is_file() else {}
    heads = {reader.llm.name: digest(reader.prompts.head) for reader in ready}
    for name, head in heads.items():
        remedy = f"the prompt of {name} begins otherwise than when that run began; start over in another folder"
        require(kept.get(name, head) == head, "run", str(folder), remedy)
    if keep:
        write_json(path, kept | heads)


def require_positions(reader: Reader, questions: Sequence[Question], places: int, whole: bool, more: int) -> None:
    """ValueError naming the first question whose prompt is longer than the LLM can read: a prompt beyond its positions
    is answered, but by a model that never saw such positions.

    places: the longest slot that is not the whole text; whole: whether whole texts are read; more: tokens that follow.
    """
    prompts, most = reader.prompts, reader.llm.positions or math.inf
    around = len(prompts.head) + len(prompts.tail("")) + more
    for q in questions:
        text = prompts.content_text(q.context, q.question) if whole else ""
        if around + max(places, len(text.encode())) + len(q.question.encode()) <= most:
            continue  # a text has no more tokens than bytes
        slot = max(places, len(prompts.plain(text)))
        needed = len(prompts.head) + slot + len(prompts.tail(q.question)) + more
        remedy = "leave out the conditions that read whole texts, shorten it, or choose another LLM"
        reader.llm.require_positions(needed, f"question {q.id}: its prompt takes", remedy)


def text_slot(reader: Reader, ids: list[int]) -> Slot:
    """A slot of token ids; what is sent is their text."""
    return Slot(reader.llm.embed(ids), len(reader.llm.tokenizer.decode(ids).encode()))


def latent_slot(z: Tensor, codec: str, restore: Callable[[Tensor], Tensor]) -> Slot:
    """A slot of latents [P, k] after the wire; `restore` maps them to embeddings [P, d]."""
    packed = wire.pack(z[None].numpy(), codec)
    return Slot(restore(torch.from_numpy(wire.unpack(packed)[0])), len(packed))
