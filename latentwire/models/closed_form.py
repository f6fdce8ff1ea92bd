"""Stage 0, in closed form: one codebook that every LLM can already read.

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

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from latentwire.llms.frozen import FrozenLLM

_CHUNK = 16384
_REPORT_TOKENS = 1000
_SMOOTHING = 1.0  # added to every token's count, so that none is left out


@dataclass
class Interface:
    """codebook: float32 [V, d_z]; adapters: per LLM, (weight [d_l, d_z], bias [d_l])."""

    codebook: Tensor
    adapters: dict[str, tuple[Tensor, Tensor]]


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Occurrences of each token id in the texts: float64 [V]."""
    ids = [i for text in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in text]
    return torch.bincount(torch.tensor(ids), minlength=len(tokenizer)).double()


def wire_table(llm: FrozenLLM, wire_tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The LLM's input embedding of every token of the wire vocabulary: float32 [V, d]."""
    table = llm.embedding_table()
    # Some tokenizers know more tokens than the model has embeddings for; those cannot be read.
    vocabulary = {token: i for token, i in llm.tokenizer.get_vocab().items() if i < len(table)}
    tokens = wire_tokenizer.convert_ids_to_tokens(range(len(wire_tokenizer)))
    same = {i: vocabulary[token] for i, token in enumerate(tokens) if token in vocabulary}
    others = [i for i in range(len(tokens)) if i not in same]
    texts = [wire_tokenizer.decode([i]) for i in others]
    pieces = llm.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    out = torch.empty(len(tokens), table.shape[1])
    out[list(same)] = table[list(same.values())]
    for i, text, ids in zip(others, texts, pieces, strict=True):
        if "\ufffd" in text:  # part of a character: its bytes are tokens of their own in a byte-level vocabulary
            ids = [vocabulary[sign] for sign in tokens[i] if sign in vocabulary]
        ids = [piece for piece in ids if piece < len(table)]
        out[i] = table[ids].mean(dim=0) if ids else table.mean(dim=0)
    return out


def build_interface(tables: Mapping[str, Tensor], counts: Tensor, d_z: int) -> Interface:
    """Joint codebook and adapters of LLMs given their wire tables [V, d_l] and the tokens' counts [V]."""
    width = sum(table.shape[1] for table in tables.values())
    if not 1 <= d_z <= width:
        raise ValueError(f"d_z={d_z}: the LLMs' embeddings span {width} dimensions together; choose 1 to {width}")
    weights = ((counts + _SMOOTHING) / (counts + _SMOOTHING).sum()).float()[:, None]
    means = {name: (weights * table).sum(dim=0) for name, table in tables.items()}
    centred = {name: table - means[name] for name, table in tables.items()}
    # One scale per LLM: dimensions keep their relative size, and every LLM has the same total variance.
    scales = {name: (weights * table.square()).sum().sqrt() for name, table in centred.items()}
    stacked = torch.cat([centred[name] / scales[name] for name in tables], dim=1)
    directions, _ = principal_directions(stacked, weights, d_z)
    codes = stacked @ directions
    rms = (weights * codes.square()).sum().div(d_z).sqrt()
    blocks = directions.split([table.shape[1] for table in tables.values()])
    adapters = {name: (scales[name] * rms * block, means[name]) for name, block in zip(tables, blocks, strict=True)}
    return Interface(codes / rms, adapters)


def random_interface(like: Interface, seed: int) -> Interface:
    """Codes and maps of the same shapes and sizes that know nothing of any LLM: what the closed form must beat."""
    drawing = torch.Generator().manual_seed(seed)

    def drawn(found: Tensor) -> Tensor:
        return found.square().mean().sqrt() * torch.randn(found.shape, generator=drawing)

    adapters = {name: (drawn(weight), torch.zeros_like(bias)) for name, (weight, bias) in like.adapters.items()}
    return Interface(drawn(like.codebook), adapters)


def interface_report(interface: Interface, tables: Mapping[str, Tensor], counts: Tensor) -> dict[str, dict[str, float]]:
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
    report = {}
    for name, table in tables.items():
        weight, bias = interface.adapters[name]
        restored = interface.codebook @ weight.T + bias
        variance = (weights * (table - (weights * table).sum(dim=0)).square()).sum()
        report[name] = {"explained_variance": float(1 - (weights * (table - restored).square()).sum() / variance)}
        vocabulary = normalize(table, dim=1).T
        for key, ids in draws.items():
            found = (normalize(restored[ids], dim=1) @ vocabulary).argmax(dim=1)
            # Tokens that this LLM splits alike share one embedding: finding its twin is finding it.
            report[name][key] = float(torch.isclose(table[found], table[ids]).all(dim=1).float().mean())
    return report


def principal_directions(centred: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k principal directions [d, k] and all d variances, largest first, of rows [V, d] with weights [V, 1].

    The sign of each direction is fixed, so that the same input gives the same directions.
    """
    covariance = torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float64)
    for rows, share in zip(centred.split(_CHUNK), weights.split(_CHUNK), strict=True):  # bounds the float64 copies
        covariance += (rows * share).double().T @ rows.double()
    variances, directions = torch.linalg.eigh(covariance)
    directions = directions.flip(1)[:, :k]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return (directions * largest.sign()).float(), variances.flip(0).float()
