"""Which words latents came from: the nearest codes of the codebook."""

import torch
from transformers import AutoTokenizer

from latentwire.api.message import Wire
from latentwire.models.wire.compact import codebook_of, nearest


def nearest_words(wire: Wire) -> list[str]:
    """As `Wire.words`; the wire knows its checkpoint."""
    codebook = codebook_of(wire.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(wire.checkpoint / "wire_tokenizer", local_files_only=True)
    return [tokenizer.decode([i]) for i in nearest(torch.from_numpy(wire.z), codebook).tolist()]
