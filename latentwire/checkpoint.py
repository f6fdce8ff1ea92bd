"""A trained (or closed-form) LatentWire on disk.

    FOLDER/config.json          what is needed to rebuild the modules, and how they were made
    FOLDER/encoder.pt           state dict
    FOLDER/adapter_NAME.pt      state dict, one per LLM
    FOLDER/wire_tokenizer/      the tokenizer that the encoder reads with

Loading is strict: a mismatch is an error that names the file and the keys, never a score from half a checkpoint.
"""

import hashlib
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from latentwire.adapter import Adapter
from latentwire.encoder import CodebookEncoder
from latentwire.run import read_json, reason, write_json


def save_checkpoint(folder: Path, encoder: CodebookEncoder, adapters: Mapping[str, Adapter], config: dict) -> None:
    """Write a checkpoint under a temporary name and rename it: what is read back is whole, the new one or the old.

    config needs "d_z" and "llms" (name to id); the shapes are added here.
    """
    assert set(adapters) == set(config["llms"])
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    torch.save(encoder.state_dict(), part / "encoder.pt")
    for name, adapter in adapters.items():
        torch.save(adapter.state_dict(), part / f"adapter_{name}.pt")
    encoder.tokenizer.save_pretrained(part / "wire_tokenizer")
    widths = {name: adapter.linear.out_features for name, adapter in adapters.items()}
    write_json(part / "config.json", config | {"vocabulary": encoder.codebook.num_embeddings, "widths": widths})
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)


def load_checkpoint(folder: Path, llms: Mapping[str, str]) -> tuple[CodebookEncoder, dict[str, Adapter], dict]:
    """Encoder, adapters and config of a checkpoint for the given LLMs (name to id).

    Raises FileNotFoundError or ValueError if a file is missing, unreadable, of other shapes, or made for other LLMs.
    """
    config = read_config(folder)
    try:
        trained, vocabulary, d_z, widths = (config[key] for key in ("llms", "vocabulary", "d_z", "widths"))
    except KeyError as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks the key {error}; it is not a LatentWire checkpoint"
        ) from error
    for name, llm_id in llms.items():
        if trained.get(name) != llm_id:
            raise ValueError(
                f"{folder} was made for {name}={trained.get(name)!r}, not {llm_id!r}; "
                f"set {name.upper()}_ID to match, or name other --llms"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "wire_tokenizer")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'wire_tokenizer'} cannot be read ({reason(error)})") from error
    encoder = CodebookEncoder(tokenizer, vocabulary, d_z)
    _load_strict(encoder, folder / "encoder.pt")
    adapters = {name: Adapter(d_z, widths[name]) for name in llms}
    for name, adapter in adapters.items():
        _load_strict(adapter, folder / f"adapter_{name}.pt")
    return encoder, adapters, config


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json; FileNotFoundError if there is none.

    A save that was killed between its two renames is undone first.
    """
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.is_dir():
        old.rename(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder} (no config.json); train one, or leave out --ckpt")
    return read_json(folder / "config.json")


def checkpoint_sha256(folder: Path) -> str:
    """One hash of a checkpoint's files, so that an evaluation is not continued with other ones."""
    digest = hashlib.sha256()
    files = (folder / "config.json", *folder.glob("*.pt"), *folder.glob("wire_tokenizer/*"))
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _load_strict(module: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the checkpoint lacks {path}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path} is cut or damaged ({reason(error)}); restore it or train again") from error
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this program: {' '.join(str(error).split())}") from error
