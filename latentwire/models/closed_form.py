"""The closed form: a codebook that every LLM can already read, and the adapters that read it, before any training.

Each token v of a wire vocabulary has an input embedding in every LLM: its own where the LLM's vocabulary holds the same
token, else the mean of its pieces' embeddings. The LLMs' tables are standardised and stacked side by side; the top d_z
principal directions P give the codebook (codes C = X P / rms), and their column blocks are ready-made linear adapters:

    X = [(E_1 - mean_1) / scale_1 | (E_2 - mean_2) / scale_2 | ...]          [V, d_1 + d_2 + ...]
    E_l ~ C @ weight_l.T + bias_l   with   weight_l = scale_l * rms * P_l,  bias_l = mean_l

rms makes the root mean square of a code's entries 1: latents have a unit, whatever the LLMs. Because C's columns are
uncorrelated, weight_l is also the least-squares map from C to E_l. Rows are weighted by how often a token occurs in
train text: a code is spent on what will be sent.
Shapes: V wire vocabulary, d_l width of LLM l, d_z width of a latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentwire.data.question import subset
from latentwire.data.squad import load
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.prompts import AS_TEXT
from latentwire.models.adapters import ADAPTERS, PLAIN, Adapter
from latentwire.models.encoders.codebook import ClosedFormEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIT_QUESTIONS = 5000  # train questions whose text weighs the codebook and fits the PCA
_CHUNK = 16384
_REPORT_TOKENS = 1000
_SMOOTHING = 1.0  # added to every token's count, so that none is left out


@dataclass
class ClosedForm:
    """codebook: float32 [V, d_z]; adapters: per LLM, (weight [d_l, d_z], bias [d_l])."""

    codebook: Tensor
    adapters: dict[str, tuple[Tensor, Tensor]]


def fit_texts(dataset: str) -> list[str]:
    """Contexts and questions of train, for what is fitted in closed form."""
    some = subset(load(dataset, "train").questions, FIT_QUESTIONS, seed=0)
    return sorted({q.context for q in some}) + [q.question for q in some]


def closed_form(
    llms: Mapping[str, FrozenLLM],
    texts: Sequence[str],
    d_z: int,
    random_seed: int | None = None,
    adapter_type: str = "",
) -> tuple[ClosedFormEncoder, dict[str, Adapter], dict]:
    """Encoder, adapters, and the figures of `report`. The wire's vocabulary is that of the first LLM.

    random_seed: draw a codebook that knows nothing instead, to learn what the closed form is worth; adapter_type: kind
    of the adapters, residual_mlp unless given.
    """
    tokenizer = next(iter(llms.values())).tokenizer
    tables = {name: wire_table(llm, tokenizer) for name, llm in llms.items()}
    counts = token_counts(tokenizer, texts)
    found = joint_codebook(tables, counts, d_z, next(iter(llms.values())).device)
    if random_seed is not None:
        found = random_codebook(found, random_seed)
    encoder = ClosedFormEncoder.from_codebook(tokenizer, found.codebook)
    kind = ADAPTERS.pick(adapter_type or PLAIN)
    adapters = {name: kind.from_closed_form(*maps) for name, maps in found.adapters.items()}
    return encoder, adapters, report(found, tables, counts)


def token_counts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> Tensor:
    """Occurrences of each token id in the texts: float64 [V]."""
    ids = [i for text in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in text]
    return torch.bincount(torch.tensor(ids), minlength=vocabulary_size(tokenizer)).double()


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest token id: some vocabularies have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def wire_table(llm: FrozenLLM, wire_tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """The LLM's input embedding of every token of the wire vocabulary: float32 [V, d]."""
    table = llm.embedding_table()
    # Some tokenizers know more tokens than the model has embeddings for; those cannot be read.
    vocabulary = {token: i for token, i in llm.tokenizer.get_vocab().items() if i < len(table)}
    known = {i: token for token, i in wire_tokenizer.get_vocab().items()}
    tokens = [known.get(i, "") for i in range(vocabulary_size(wire_tokenizer))]
    same = {i: vocabulary[token] for i, token in enumerate(tokens) if token in vocabulary}
    others = [i for i in range(len(tokens)) if i not in same]
    texts = [_text_of(wire_tokenizer, i) if tokens[i] else "" for i in others]
    pieces = llm.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    out = torch.empty(len(tokens), table.shape[1])
    out[list(same)] = table[list(same.values())]
    for i, text, ids in zip(others, texts, pieces, strict=True):
        if "\ufffd" in text:  # part of a character: its bytes are tokens of their own in a byte-level vocabulary
            ids = [vocabulary[sign] for sign in tokens[i] if sign in vocabulary]
        ids = [piece for piece in ids if piece < len(table)]
        out[i] = table[ids].mean(dim=0) if ids else table.mean(dim=0)
    return out


def _text_of(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """What a token stands for inside a text: alone, some tokenizers decode a word without the space before it."""
    (first,) = tokenizer("a", **AS_TEXT)["input_ids"][:1]
    return tokenizer.decode([first, token])[len(tokenizer.decode([first])) :]


def joint_codebook(
    tables: Mapping[str, Tensor], counts: Tensor, d_z: int, device: torch.device | str = "cpu"
) -> ClosedForm:
    """Joint codebook and adapters of LLMs given their wire tables [V, d_l] and the tokens' counts [V]; device: that
    finds the directions."""
    width = sum(table.shape[1] for table in tables.values())
    if not 1 <= d_z <= width:
        raise ValueError(f"d_z={d_z}: the LLMs' embeddings span {width} dimensions together; choose 1 to {width}")
    weights = ((counts + _SMOOTHING) / (counts + _SMOOTHING).sum()).float()[:, None]
    means = {name: (weights * table).sum(dim=0) for name, table in tables.items()}
    centred = {name: table - means[name] for name, table in tables.items()}
    # One scale per LLM: dimensions keep their relative size, and every LLM has the same total variance.
    scales = {name: (weights * table.square()).sum().sqrt() for name, table in centred.items()}
    stacked = torch.cat([centred[name] / scales[name] for name in tables], dim=1)
    directions, _ = principal_directions(stacked, weights, d_z, device)
    codes = stacked @ directions
    rms = (weights * codes.square()).sum().div(d_z).sqrt()
    blocks = directions.split([table.shape[1] for table in tables.values()])
    adapters = {name: (scales[name] * rms * block, means[name]) for name, block in zip(tables, blocks, strict=True)}
    return ClosedForm(codes / rms, adapters)


def least_squares_map(codebook: Tensor, table: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from a finished codebook [V, d_z] to another LLM's wire table [V, d], with tokens weighted by
    their counts [V]: (weight [d, d_z], bias [d]), float32, as an adapter begins with."""
    weights = ((counts + _SMOOTHING) / (counts + _SMOOTHING).sum()).double()[:, None]
    codes = torch.cat([codebook, torch.ones(len(codebook), 1)], dim=1)  # [V, d_z + 1]
    products = torch.zeros(codes.shape[1], codes.shape[1] + table.shape[1], dtype=torch.float64)
    for code, embedding, share in zip(*(x.split(_CHUNK) for x in (codes, table, weights)), strict=True):
        code = code.double()
        products += (code * share).T @ torch.cat([code, embedding.double()], dim=1)
    squares, mixed = products.split([codes.shape[1], table.shape[1]], dim=1)
    solution = torch.linalg.lstsq(squares, mixed, driver="gelsd").solution.float()  # [d_z + 1, d]
    return solution[:-1].T.contiguous(), solution[-1]


def random_codebook(like: ClosedForm, seed: int) -> ClosedForm:
    """Codes and maps of the same shapes and sizes that know nothing of any LLM: what the closed form must beat."""
    drawing = torch.Generator().manual_seed(seed)

    def drawn(table: Tensor) -> Tensor:
        return table.square().mean().sqrt() * torch.randn(table.shape, generator=drawing)

    adapters = {name: (drawn(weight), torch.zeros_like(bias)) for name, (weight, bias) in like.adapters.items()}
    return ClosedForm(drawn(like.codebook), adapters)


def report(found: ClosedForm, tables: Mapping[str, Tensor], counts: Tensor) -> dict[str, dict[str, float]]:
    """Per LLM, how well the codes stand for its own embeddings.

    explained_variance: share of the embeddings' variance over the counted text. nearest_token_recall: how often the
    vocabulary entry with the largest cosine to the restored embedding is the right token, for tokens drawn as in the
    text and (`_uniform`) for tokens drawn evenly from the vocabulary.
    """
    drawing = torch.Generator().manual_seed(0)
    draws = {
        "nearest_token_recall": torch.multinomial(counts, _REPORT_TOKENS, replacement=True, generator=drawing),
        "nearest_token_recall_uniform": torch.randint(len(counts), (_REPORT_TOKENS,), generator=drawing),
    }
    weights = (counts / counts.sum()).float()[:, None]
    figures = {}
    for name, table in tables.items():
        weight, bias = found.adapters[name]
        restored = found.codebook @ weight.T + bias
        variance = (weights * (table - (weights * table).sum(dim=0)).square()).sum()
        figures[name] = {"explained_variance": float(1 - (weights * (table - restored).square()).sum() / variance)}
        vocabulary = normalize(table, dim=1).T
        for key, ids in draws.items():
            nearest = (normalize(restored[ids], dim=1) @ vocabulary).argmax(dim=1)
            # Tokens that this LLM splits alike share one embedding: finding its twin is finding it.
            figures[name][key] = float(torch.isclose(table[nearest], table[ids]).all(dim=1).float().mean())
    return figures


def principal_directions(
    centred: Tensor, weights: Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Top k principal directions [d, k] and all d variances, largest first, of rows [V, d] with weights [V, 1], found
    on a device.

    The sign of each direction is fixed, so that the same input gives the same directions.
    """
    covariance = torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float64, device=device)
    for rows, share in zip(centred.split(_CHUNK), weights.split(_CHUNK), strict=True):  # bounds the float64 copies
        rows, share = rows.to(device), share.to(device)
        covariance += (rows * share).double().T @ rows.double()
    variances, directions = (found.cpu() for found in torch.linalg.eigh(covariance))
    directions = directions.flip(1)[:, :k]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return (directions * largest.sign()).float(), variances.flip(0).float()
