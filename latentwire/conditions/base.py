"""What the LLM finds in the content slot: LatentWire, its rivals and its controls, one function each.

A condition turns questions into slots. Everything around the slot is the same for all of them (see `prompts`), and
whatever consists of latents, PCA coefficients included, is packed to bytes and decoded again on its way.
Shapes: P positions, d LLM width, k coefficients a position.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latentwire.data.relevance import relevance, sentences
from latentwire.data.squad import Question
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.prompts import PromptBuilder
from latentwire.models import wire
from latentwire.models.adapters import Adapter
from latentwire.models.closed_form import principal_directions, token_counts
from latentwire.models.encoders.base import Encoder
from latentwire.utils.settings import SOURCES


@dataclass
class Slot:
    """embeds: [P, d] for one LLM; sent: bytes that would have to be transmitted for them."""

    embeds: Tensor
    sent: int


class Sender:
    """Encodes each question once and keeps the packed bytes, so that all LLMs decode the same ones."""

    def __init__(self, encoder: Encoder, source: str, codec: str):
        self.encoder, self.source, self.codec = encoder, source, codec
        self._packed: dict[tuple[str, int], bytes] = {}

    def send(self, questions: Sequence[Question], m: int) -> list[bytes]:
        """The packed Z of each question."""
        missing = [q for q in questions if (q.id, m) not in self._packed]
        for question, z in zip(missing, self.encoder.encode(missing, self.source, m), strict=True):
            self._packed[question.id, m] = wire.pack(z[None].cpu().numpy(), self.codec)
        return [self._packed[q.id, m] for q in questions]


class Pca:
    """Principal directions of one LLM's input embeddings, fitted on the tokens of train text."""

    def __init__(self, llm: FrozenLLM, train_texts: Sequence[str]):
        table = llm.embedding_table()
        counts = token_counts(llm.tokenizer, train_texts)[: len(table)]
        table = table[: len(counts)]
        weights = (counts / counts.sum()).float()[:, None]
        self.mean = (weights * table).sum(dim=0)
        self.directions, self.variances = principal_directions(table - self.mean, weights, table.shape[1])

    def explained_variance(self, k: int) -> float:
        """Share of the variance that the first k directions hold."""
        return float(self.variances[:k].sum() / self.variances.sum())

    def project(self, embeds: Tensor, k: int) -> Tensor:
        """Coefficients [P, k] of embeddings [P, d]."""
        return (embeds.float().cpu() - self.mean) @ self.directions[:, :k]

    def restore(self, coefficients: Tensor) -> Tensor:
        """Embeddings [P, d] of coefficients [P, k]."""
        return coefficients @ self.directions[:, : coefficients.shape[1]].T + self.mean


@dataclass
class Setting:
    """What the conditions of one LLM need.

    sender, adapter: only where a condition reads the wire; pool: the evaluated questions, for shuffled_z to draw from;
    soft_prompts: by condition, the tuned rivals' vectors [16, d] for this LLM; stage0: sender and adapter before any
    training.
    """

    llm: FrozenLLM
    prompts: PromptBuilder
    sender: Sender | None
    adapter: Adapter | None
    codec: str
    d_z: int
    train_texts: Sequence[str]
    pool: Sequence[Question]
    seed: int
    soft_prompts: Mapping[str, Tensor] = field(default_factory=dict)
    stage0: tuple[Sender, Adapter] | None = None

    @cached_property
    def pca(self) -> Pca:
        """Fitted when first asked for."""
        return Pca(self.llm, self.train_texts)

    def text_slot(self, ids: list[int]) -> Slot:
        """A slot of token ids; what is sent is their text."""
        return Slot(self.llm.embed(ids), len(self.llm.tokenizer.decode(ids).encode()))

    def latent_slot(self, z: Tensor, restore: Callable[[Tensor], Tensor]) -> Slot:
        """A slot of latents [P, k] after the wire; `restore` maps them to embeddings [P, d]."""
        packed = wire.pack(z[None].numpy(), self.codec)
        return self.received_slot(packed, restore)

    def received_slot(self, packed: bytes, restore: Callable[[Tensor], Tensor]) -> Slot:
        """A slot of what the packed bytes hold."""
        with torch.no_grad():
            return Slot(restore(torch.from_numpy(wire.unpack(packed)[0])), len(packed))

    def partner(self, question: Question) -> Question:
        """A question on another article, always the same one for the same seed."""
        others = [q for q in self.pool if q.title != question.title]
        if not others:
            raise ValueError("shuffled_z needs questions on two articles or more; raise --samples")
        return random.Random(f"{self.seed} {question.id}").choice(others)


@dataclass(frozen=True)
class Condition:
    """build(setting, questions, m) gives one slot a question; or, where no LLM is asked (by_llm False), its answer.

    uses: what it depends on, of "m", "d_z", "wire" (encoder and adapters), "stage0" (those before any training) and
    "tuned" (soft prompts); sources: those it can serve; default_in: where it runs unless conditions are named.
    """

    name: str
    build: Callable[[Setting, Sequence[Question], int], list[Slot] | list[str]]
    uses: tuple[str, ...]
    sources: tuple[str, ...]
    default_in: tuple[str, ...]
    by_llm: bool


CONDITIONS: dict[str, Condition] = {}


def _condition(
    uses: tuple[str, ...] = (),
    sources: tuple[str, ...] = SOURCES,
    default_in: tuple[str, ...] = SOURCES,
    by_llm: bool = True,
) -> Callable:
    def register(build: Callable) -> Callable:
        name = build.__name__
        CONDITIONS[name] = Condition(name, build, uses, sources, default_in, by_llm)
        return build

    return register


def parse_conditions(text: str, source: str, m: int) -> list[tuple[Condition, int]]:
    """ "NAME,NAME@M,..." to conditions with their M; empty text means all that belong to the source by default."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    names = names or [c.name for c in CONDITIONS.values() if source in c.default_in]
    chosen = []
    for name in names:
        base, _, own = name.partition("@")
        if base not in CONDITIONS:
            raise ValueError(f"conditions={base!r}: unknown; choose among {', '.join(CONDITIONS)}")
        if source not in CONDITIONS[base].sources:
            raise ValueError(
                f"conditions={base!r}: needs source {' or '.join(CONDITIONS[base].sources)}, not {source!r}"
            )
        if own and not (own.isdigit() and int(own) > 0):
            raise ValueError(f"conditions={name!r}: M after @ must be a whole number of at least 1")
        chosen.append((CONDITIONS[base], int(own or m)))
    return list(dict.fromkeys(chosen))


@_condition()
def text(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The whole content as text: the upper bound."""
    return [setting.text_slot(_content_ids(setting, q)) for q in questions]


@_condition(uses=("m",))
def token_budget(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The first M tokens of question and context, in that order, so that the question survives."""
    return [setting.text_slot(_question_first_ids(setting, q)[:m]) for q in questions]


@_condition(uses=("m",), default_in=("prompt",))
def token_budget_context(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The first M tokens of the context, and the whole question on top (where it is text anyway: token_budget)."""
    if setting.prompts.source == "context":
        return token_budget(setting, questions, m)
    ids = setting.prompts.ids
    return [
        setting.text_slot(ids("Context:") + ids(f" {q.context}")[:m] + ids(f"\nQuestion: {q.question}"))
        for q in questions
    ]


@_condition(uses=("m",))
def token_select(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """token_budget with the context's sentences in another order: the one that fits the question best comes first."""
    slots = []
    for q in questions:
        parts = sentences(q.context)
        order = np.argsort(-relevance(q.question, parts), kind="stable")
        chosen = " ".join(parts[i] for i in order)
        slots.append(setting.text_slot(_question_first_ids(setting, replace(q, context=chosen))[:m]))
    return slots


@_condition(uses=("m", "d_z"))
def pca(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """token_budget's M embeddings, projected on d_z principal directions and back."""
    embeds = [setting.llm.embed(_question_first_ids(setting, q)[:m]) for q in questions]
    return [setting.latent_slot(setting.pca.project(e, setting.d_z), setting.pca.restore) for e in embeds]


@_condition(uses=("m", "d_z"))
def pca_pool(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The whole content in M contiguous windows, averaged, projected on d_z directions and back."""
    slots = []
    for q in questions:
        windows = setting.llm.embed(_content_ids(setting, q)).tensor_split(m)
        pooled = torch.stack([window.mean(dim=0) for window in windows if len(window)])
        slots.append(setting.latent_slot(setting.pca.project(pooled, setting.d_z), setting.pca.restore))
    return slots


@_condition(uses=("m",))
def pca_rank(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """Every position kept, each embedding projected on M directions and back: positions not matched."""
    embeds = [setting.llm.embed(_content_ids(setting, q)) for q in questions]
    return [setting.latent_slot(setting.pca.project(e, m), setting.pca.restore) for e in embeds]


@_condition(uses=("m", "d_z", "wire"))
def latentwire(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """Z through the adapter, after the wire."""
    return [setting.received_slot(packed, setting.adapter) for packed in setting.sender.send(questions, m)]


@_condition(uses=("m", "d_z", "stage0"), default_in=())
def untrained(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The wire before any training (stage 0): LatentWire minus this is what training added."""
    sender, adapter = setting.stage0
    return latentwire(replace(setting, sender=sender, adapter=adapter), questions, m)


@_condition(uses=("m", "wire"), default_in=())
def selected_text(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The encoder's own M tokens as plain text: LatentWire minus this is what latents and training on them add."""
    encoder = setting.sender.encoder
    chosen = [encoder.tokenizer.decode(encoder.select(q, setting.prompts.source, m)) for q in questions]
    return [setting.text_slot(setting.prompts.ids(text)) for text in chosen]


@_condition(uses=("wire",), sources=("prompt",), default_in=(), by_llm=False)
def encoder_only(setting: Setting, questions: Sequence[Question], m: int) -> list[str]:
    """The encoder's own best span, no LLM: what it read already, before any LLM did."""
    return [setting.sender.encoder.read(q) for q in questions]


@_condition(uses=("tuned",), default_in=())
def text_tuned(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """text behind a soft prompt that was trained on LatentWire's data and loss (see --tuned)."""
    return _tuned(setting, "text_tuned", text(setting, questions, m))


@_condition(uses=("m", "tuned"), default_in=())
def token_budget_tuned(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """token_budget behind a soft prompt that was trained on LatentWire's data and loss (see --tuned)."""
    return _tuned(setting, "token_budget_tuned", token_budget(setting, questions, m))


@_condition(uses=("m", "wire", "tuned"), default_in=())
def selected_text_tuned(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """selected_text behind such a soft prompt: LatentWire minus this is what latents add where text may train too."""
    return _tuned(setting, "selected_text_tuned", selected_text(setting, questions, m))


@_condition()
def no_context(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """An empty slot: the question alone if the tail holds it, else nothing."""
    return [setting.text_slot([]) for _ in questions]


@_condition(uses=("m", "d_z", "wire"))
def shuffled_z(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """Z of a question on another article: must fall to no_context, or Z is not what carries the answer."""
    return latentwire(setting, [setting.partner(q) for q in questions], m)


@_condition(uses=("m", "wire"), default_in=())
def oracle_text(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """The M wire tokens that an encoder would choose who knows the reference answer, as text."""
    chosen = [setting.sender.encoder.perfect(q, setting.prompts.source, m)[1] for q in questions]
    return [setting.text_slot(setting.prompts.ids(text)) for text in chosen]


@_condition(uses=("m", "d_z", "wire"), default_in=())
def oracle_wire(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
    """Their latents, through wire and adapter: the ceiling of reading, and what LatentWire lacks to it is selection."""
    chosen = [setting.sender.encoder.perfect(q, setting.prompts.source, m)[0] for q in questions]
    return [setting.latent_slot(z.cpu(), setting.adapter) for z in chosen]


def explained_variance(condition: Condition, setting: Setting, m: int) -> float | None:
    """Share of the train tokens' embedding variance that a PCA condition's directions hold; None for the others."""
    kept: Mapping[str, int] = {"pca": setting.d_z, "pca_pool": setting.d_z, "pca_rank": m}
    return setting.pca.explained_variance(kept[condition.name]) if condition.name in kept else None


def _tuned(setting: Setting, condition: str, slots: list[Slot]) -> list[Slot]:
    soft = setting.soft_prompts[condition].to(setting.llm.device, setting.llm.dtype)
    return [Slot(torch.cat([soft, slot.embeds]), slot.sent) for slot in slots]


def _content_ids(setting: Setting, question: Question) -> list[int]:
    return setting.prompts.ids(setting.prompts.content_text(question.context, question.question))


def _question_first_ids(setting: Setting, question: Question) -> list[int]:
    return setting.prompts.ids(setting.prompts.question_first_text(question.context, question.question))
