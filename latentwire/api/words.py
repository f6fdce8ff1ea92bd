"""Which words latents came from: the nearest codes of the codebook."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latentwire.api.message import Wire
from latentwire.models.weights import read_config, read_weights, weights_file

_CODEBOOK = "codebook.weight"


def nearest_words(wire: Wire) -> list[str]:
    """As `Wire.words`; the wire knows its checkpoint."""
    codebook, tokenizer = _codebook(wire.checkpoint)
    if codebook is None:
        kind = read_config(wire.checkpoint)["encoder"]["type"]
        raise ValueError(f"words: the encoder {kind!r} of {wire.checkpoint} has free queries, which stand for no words")
    nearest = torch.cdist(torch.from_numpy(wire.z), codebook).argmin(dim=1)
    return [tokenizer.decode([i]) for i in nearest.tolist()]


@cache
def _codebook(folder: Path) -> tuple[Tensor | None, PreTrainedTokenizerBase]:
    """Codes [V, d_z] and the wire's tokenizer; no encoder is built for it."""
    weights = read_weights(weights_file(folder, "encoder"))
    codebook = weights[_CODEBOOK].float() if _CODEBOOK in weights else None
    return codebook, AutoTokenizer.from_pretrained(folder / "wire_tokenizer", local_files_only=True)
