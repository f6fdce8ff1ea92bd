"""A trained (or closed-form) LatentWire on disk.

    FOLDER/config.json          what is needed to rebuild the modules, and how they were made
    FOLDER/encoder.pt           state dict
    FOLDER/adapter_NAME.pt      state dict, one per LLM
    FOLDER/wire_tokenizer/      the tokenizer that the encoder reads with
    FOLDER/backbone/            config and tokenizer of a pretrained backbone
    FOLDER/training.pt          only in checkpoint_last: optimizer, scheduler and step, to continue exactly

Tuned rivals are kept alike: config.json and soft_prompt_NAME.pt. config.json has the sha256 of every .pt file. Loading
is strict: a mismatch is an error that names the file and the keys, never a score from half a checkpoint.
"""

import hashlib
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latentwire.models.adapters import Adapter
from latentwire.models.backbones import ByteBackbone, PretrainedBackbone, backbone_of_shape, save_backbone_shape
from latentwire.models.encoders.base import CodebookEncoder, Encoder, ResamplingEncoder, SelectingEncoder
from latentwire.utils.runs import read_json, reason, write_json


def save_checkpoint(
    folder: Path, encoder: Encoder, adapters: Mapping[str, Adapter], config: dict, training: dict | None = None
) -> None:
    """Write a checkpoint under a temporary name and rename it: what is read back is whole, the new one or the old.

    config needs "d_z" and "llms" (name to id); the shapes are added here. training: what `load_training` gives back.
    Raises OSError if it cannot be written; the previous checkpoint stays.
    """
    assert set(adapters) == set(config["llms"])
    widths = {name: adapter.linear.out_features for name, adapter in adapters.items()}
    with _replaced(folder) as part:
        torch.save(encoder.state_dict(), part / "encoder.pt")
        for name, adapter in adapters.items():
            torch.save(adapter.state_dict(), part / f"adapter_{name}.pt")
        encoder.tokenizer.save_pretrained(part / "wire_tokenizer")
        if isinstance(getattr(encoder, "backbone", None), PretrainedBackbone):
            save_backbone_shape(encoder.backbone, part / "backbone")
        if training is not None:
            torch.save(training, part / "training.pt")
        shapes = {"encoder": _shape(encoder), "widths": widths}
        write_json(part / "config.json", config | shapes | {"sha256": _hashes(part)})


def load_checkpoint(folder: Path, llms: Mapping[str, str]) -> tuple[Encoder, dict[str, Adapter], dict]:
    """Encoder, adapters and config of a checkpoint for the given LLMs (name to id).

    Raises FileNotFoundError or ValueError if a file is missing, unreadable, of other shapes, or made for other LLMs.
    """
    config = read_config(folder)
    try:
        trained, shape, d_z, widths = (config[key] for key in ("llms", "encoder", "d_z", "widths"))
    except KeyError as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks the key {error}; it is not a LatentWire checkpoint"
        ) from error
    _check_llms(folder, trained, llms)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "wire_tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'wire_tokenizer'} cannot be read ({reason(error)})") from error
    encoder = _of_shape(shape, d_z, tokenizer, folder)
    _load_strict(encoder, folder / "encoder.pt")
    adapters = {name: Adapter(d_z, widths[name]) for name in llms}
    for name, adapter in adapters.items():
        _load_strict(adapter, folder / f"adapter_{name}.pt")
    return encoder, adapters, config


def save_soft_prompts(folder: Path, prompts: Mapping[str, Tensor], config: dict, training: dict | None = None) -> None:
    """Write soft prompts [vectors, d] by LLM, as `save_checkpoint` does. config needs "llms" and "stage"."""
    with _replaced(folder) as part:
        for name, prompt in prompts.items():
            torch.save(prompt, part / f"soft_prompt_{name}.pt")
        if training is not None:
            torch.save(training, part / "training.pt")
        write_json(part / "config.json", config | {"sha256": _hashes(part)})


def load_soft_prompts(folder: Path, llms: Mapping[str, str]) -> dict[str, Tensor]:
    """Soft prompts [vectors, d] by LLM. Raises FileNotFoundError or ValueError like `load_checkpoint`."""
    _check_llms(folder, read_config(folder).get("llms", {}), llms)
    prompts = {name: _read(folder / f"soft_prompt_{name}.pt") for name in llms}
    for name, prompt in prompts.items():
        if not isinstance(prompt, Tensor) or prompt.ndim != 2:
            raise ValueError(f"{folder / f'soft_prompt_{name}.pt'} holds no soft prompt; train it again")
    return prompts


def load_training(folder: Path) -> dict:
    """Optimizer, scheduler and step of a checkpoint_last."""
    return _read(folder / "training.pt")


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
    read_config(folder)  # it says what is missing, and undoes a killed save
    digest = hashlib.sha256()
    files = (folder / "config.json", *folder.glob("*.pt"), *folder.glob("wire_tokenizer/*"), *folder.glob("backbone/*"))
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes `folder`'s place when all is written."""
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"cannot write the checkpoint {folder} ({reason(error)}); make room; the previous one is kept"
        ) from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    for evaluation in old.glob("eval_*"):  # of the checkpoint that was here, as its config.json tells
        evaluation.rename(folder / evaluation.name)
    shutil.rmtree(old, ignore_errors=True)


def _shape(encoder: Encoder) -> dict:
    """What is needed to rebuild an encoder before its state is loaded."""
    if isinstance(encoder, SelectingEncoder):
        return {"type": "hf", "vocabulary": encoder.codebook.num_embeddings, "pooling": encoder.pooling}
    if isinstance(encoder, CodebookEncoder):
        return {"type": "codebook", "vocabulary": encoder.codebook.num_embeddings}
    kind = "byte" if isinstance(encoder.backbone, ByteBackbone) else "queries"
    return {"type": kind, "m": len(encoder.resampler.queries)}


def _of_shape(shape: dict, d_z: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Encoder:
    match shape:
        case {"type": "codebook", "vocabulary": vocabulary}:
            return CodebookEncoder(tokenizer, vocabulary, d_z)
        case {"type": "hf", "vocabulary": vocabulary, "pooling": pooling}:
            return SelectingEncoder(tokenizer, vocabulary, d_z, backbone_of_shape(folder / "backbone"), pooling)
        case {"type": "queries", "m": m}:
            return ResamplingEncoder(tokenizer, d_z, backbone_of_shape(folder / "backbone"), m)
        case {"type": "byte", "m": m}:
            return ResamplingEncoder(tokenizer, d_z, ByteBackbone(), m)
    raise ValueError(f"{folder / 'config.json'} describes an encoder that this program does not know: {shape}")


def _check_llms(folder: Path, trained: Mapping[str, str], llms: Mapping[str, str]) -> None:
    for name, llm_id in llms.items():
        if trained.get(name) != llm_id:
            raise ValueError(
                f"{folder} was made for {name}={trained.get(name)!r}, not {llm_id!r}; "
                f"set {name.upper()}_ID to match, or name other --llms"
            )


def _load_strict(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(_read(path), strict=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this program: {' '.join(str(error).split())}") from error


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.glob("*.pt"))}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict | Tensor:
    """A .pt file, once its hash is the one that config.json promises: torch would load altered weights in silence."""
    try:
        found, promised = _sha256(path), read_config(path.parent).get("sha256", {}).get(path.name)
        if found != promised:
            raise ValueError(
                f"{path} is cut or damaged (sha256 {found[:16]}, config.json says {str(promised)[:16]}); "
                "restore it or train again"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the checkpoint lacks {path}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path} is cut or damaged ({reason(error)}); restore it or train again") from error
