"""Linear compression of the LLM's own text embeddings: if this is as good, nothing needs to be learned."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentwire.conditions.base import Reader, Shared, Slot, condition, latent_slot
from latentwire.conditions.texts import content_ids, question_first_ids
from latentwire.data.question import Question
from latentwire.llms.frozen import FrozenLLM
from latentwire.models.closed_form import principal_directions, token_counts, wire_table


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


def fitted(reader: Reader, shared: Shared) -> Pca:
    """The reader's PCA, fitted when first asked for."""
    key = "pca", reader.llm.name
    if key not in shared.kept:
        shared.kept[key] = Pca(reader.llm, shared.train_texts)
    return shared.kept[key]


def _of_width(reader: Reader, m: int, shared: Shared) -> float:
    return fitted(reader, shared).explained_variance(shared.d_z)


def _of_places(reader: Reader, m: int, shared: Shared) -> float:
    return fitted(reader, shared).explained_variance(m)


@condition("pca", "#3fa7a3", "places", uses=("m", "d_z"), groups=("baselines", "quick"), explained=_of_width)
def cut(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """token_budget's M embeddings, projected on d_z principal directions and back."""
    return [_sent(reader, reader.llm.embed(question_first_ids(reader, q)[:m]), shared.d_z, shared) for q in questions]


@condition("pca_pool", "#7f9a3a", "places", uses=("m", "d_z"), groups=("baselines",), explained=_of_width)
def pooled(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The whole content in M contiguous windows, averaged, projected on d_z directions and back."""
    slots = []
    for q in questions:
        windows = reader.llm.embed(content_ids(reader, q)).tensor_split(m)
        means = torch.stack([window.mean(dim=0) for window in windows if len(window)])
        slots.append(_sent(reader, means, shared.d_z, shared))
    return slots


@condition("pca_rank", "#a0705a", "whole", uses=("m",), groups=("baselines",), explained=_of_places)
def rank(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """Every position kept, each embedding projected on M directions and back: positions not matched."""
    return [_sent(reader, reader.llm.embed(content_ids(reader, q)), m, shared) for q in questions]


@condition(
    "pca_selected", "#2f6f8f", "places", uses=("m", "d_z", "wire"), needs=("chooses_tokens",), default_in=(),
    groups=("learned",), explained=_of_width,
)  # fmt: skip
def selected(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The M tokens that the encoder selected, each as the LLM's own embedding, projected and back: pca without its cut.

    What the LLM's vocabulary lacks is the mean of its pieces, as in the closed form, so that a token takes one place.
    """
    encoder, key = shared.sender.encoder, ("wire_table", reader.llm.name)
    if key not in shared.kept:
        shared.kept[key] = wire_table(reader.llm, encoder.tokenizer)
    chosen = encoder.select(questions, reader.prompts.source, m)
    return [_sent(reader, shared.kept[key][ids], shared.d_z, shared) for ids in chosen]


def _sent(reader: Reader, embeds: Tensor, k: int, shared: Shared) -> Slot:
    """Embeddings [P, d] as k coefficients over the wire and back."""
    found = fitted(reader, shared)
    return latent_slot(found.project(embeds, k), shared.codec, found.restore)
