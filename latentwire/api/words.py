"""Which words latents came from: the nearest codes of the codebook."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latentwire.api.message import Wire
from latentwire.models.wire.compact import codebook_of, nearest


def words_of(wires: Sequence[Wire], device: str = "cpu") -> list[list[str]]:
    """The words of wires that are of one checkpoint, which they know; device: that looks for the nearest codes."""
    if not wires:
        return []
    codebook, tokenizer = codebook_of(wires[0].checkpoint), _tokenizer(wires[0].checkpoint)
    z = torch.cat([torch.from_numpy(wire.z) for wire in wires])
    words = [tokenizer.decode([i]) for i in nearest(z.to(device), codebook.to(device)).tolist()]
    ends = torch.tensor([wire.m for wire in wires]).cumsum(0).tolist()
    return [words[end - wire.m : end] for wire, end in zip(wires, ends, strict=True)]


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "wire_tokenizer", local_files_only=True)
