"""Fit the compact codec of a checkpoint: which tokens its wires hold, and where their residuals lie."""

from pathlib import Path

import torch
from tqdm import tqdm

from latentwire.data.question import subset
from latentwire.data.squad import load
from latentwire.evaluation.settings import CodecSettings
from latentwire.models.checkpoint import load_encoder
from latentwire.models.closed_form import fit_texts, token_counts
from latentwire.models.weights import TABLES, asked, read_config
from latentwire.models.wire.compact import Compact, codebook_of
from latentwire.utils.machine import device_of

_AT_ONCE = 64


def fit_codec(config: CodecSettings) -> Compact:
    """Encode questions of train, fit and save the tables; prints what a latent costs by them.

    Raises FileNotFoundError or ValueError without a checkpoint, or for an encoder without a codebook.
    """
    folder = Path(config.ckpt)
    source, m = (asked(read_config(folder), key, folder) for key in ("source", "latent_len"))
    codes = codebook_of(folder)
    encoder = load_encoder(folder).to(device_of(config.device)).eval()
    questions = subset(load(config.dataset, "train").questions, config.samples, config.seed)
    latents = []
    for start in tqdm(range(0, len(questions), _AT_ONCE), unit="batch", desc="encoding"):
        latents += [z.cpu() for z in encoder.encode(questions[start : start + _AT_ONCE], source, m)]
    counts = token_counts(encoder.tokenizer, fit_texts(config.dataset))
    compact = Compact.fit(codes, torch.cat(latents), counts)
    compact.save(folder)
    print(f"fitted on {sum(map(len, latents)):,} latents of {len(questions):,} questions of train")
    print(f"wrote {folder / TABLES}")
    return compact
