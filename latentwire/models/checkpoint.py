"""A trained (or closed-form) LatentWire on disk.

    FOLDER/config.json              what is needed to rebuild the modules, and how they were made
    FOLDER/encoder.safetensors      state dict; encoder.pt beside it holds the same
    FOLDER/adapter_NAME.safetensors state dict, one per LLM; adapter_NAME.pt beside it holds the same
    FOLDER/wire_tokenizer/          the tokenizer that the encoder reads with
    FOLDER/backbone/                config and tokenizer of a pretrained backbone
    FOLDER/codec/tables.safetensors what compact codecs need, once it is fitted (see `wire.compact`)
    FOLDER/training.pt              only in checkpoint_last: optimizer, scheduler and step, to continue exactly

Tuned rivals are kept alike: config.json and soft_prompt_NAME. A checkpoint with .pt files alone, as older ones are,
loads too. config.json has the sha256 of every weights file, of tokenizer and backbone, and of all that it says itself.
Loading is strict: a mismatch is an error that names the file and the keys, never a score from half a checkpoint. No
code of a checkpoint is run, and what it claims to hold is compared with its files before that takes memory.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from latentwire.models.adapters import ADAPTERS, Adapter
from latentwire.models.encoders.base import ENCODERS, Encoder
from latentwire.models.weights import (
    FORMS,
    PARTS,
    PROMPT,
    asked,
    check_llms,
    load_adapters,
    load_strict,
    read_config,
    registered,
    require_parts,
    wire_id_of,
)
from latentwire.utils.cli import reason
from latentwire.utils.files import sha256_of, write_sealed
from latentwire.utils.registry import Registry

if TYPE_CHECKING:
    from latentwire.models.wire.compact import Compact


def save_checkpoint(
    folder: Path,
    encoder: Encoder,
    adapters: Mapping[str, Adapter],
    config: dict,
    training: dict | None = None,
    forms: Sequence[str] = FORMS,
    tables: "Compact | None" = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it: what is read back is whole, the new one or the old.

    config needs "d_z" and "llms" (name to id); the shapes are added here. training: what `load_training` gives back;
    forms: of the weights files; tables: of its compact codecs.
    Raises OSError if it cannot be written; the previous checkpoint stays.
    """
    assert set(adapters) == set(config["llms"])
    _require_registered(ENCODERS, encoder)
    for adapter in adapters.values():
        _require_registered(ADAPTERS, adapter)
    shapes = {
        "encoder": {"type": encoder.name, **encoder.shape()},
        "adapters": {name: adapter.name for name, adapter in adapters.items()},
        "widths": {name: adapter.width for name, adapter in adapters.items()},
        "adapter_shapes": {name: adapter.shape() for name, adapter in adapters.items()},
        "wire_id": wire_id_of(encoder.state_dict()).hex(),
    }
    with _replaced(folder) as part:
        _write(part, "encoder", encoder.state_dict(), forms)
        for name, adapter in adapters.items():
            _write(part, f"adapter_{name}", adapter.state_dict(), forms)
        encoder.tokenizer.save_pretrained(part / "wire_tokenizer")
        encoder.save_parts(part)
        if training is not None:
            torch.save(training, part / "training.pt")
        write_sealed(part / "config.json", config | shapes | {"sha256": _hashes(part), "parts_sha256": _parts(part)})
        if tables is not None:
            tables.save(part)


def load_checkpoint(folder: Path, llms: Mapping[str, str]) -> tuple[Encoder, dict[str, Adapter], dict]:
    """Encoder, adapters and config of a checkpoint for the given LLMs (name to id).

    Raises FileNotFoundError or ValueError if a file is missing, unreadable, of other shapes, or made for other LLMs.
    """
    config = read_config(folder)
    check_llms(folder, asked(config, "llms", folder), llms)
    encoder = load_encoder(folder)
    return encoder, load_adapters(folder, llms), config


def load_encoder(folder: Path) -> Encoder:
    """The encoder of a checkpoint, and no LLM's adapter. Raises as `load_checkpoint` does."""
    config = read_config(folder)
    require_parts(folder, config)
    shape, d_z = asked(config, "encoder", folder), asked(config, "d_z", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder / "wire_tokenizer", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'wire_tokenizer'} cannot be read ({reason(error)})") from error
    kind, *_ = registered(ENCODERS, [shape.get("type")], folder)
    arguments = {key: value for key, value in shape.items() if key != "type"}
    build = partial(kind.of_shape, tokenizer, d_z, folder, **arguments)
    return load_strict(build, folder, "encoder", f"encoder {kind.name}")


def save_soft_prompts(folder: Path, prompts: Mapping[str, Tensor], config: dict, training: dict | None = None) -> None:
    """Write soft prompts [vectors, d] by LLM, as `save_checkpoint` does. config needs "llms" and "stage"."""
    with _replaced(folder) as part:
        for name, prompt in prompts.items():
            _write(part, f"soft_prompt_{name}", {PROMPT: prompt})
        if training is not None:
            torch.save(training, part / "training.pt")
        write_sealed(part / "config.json", config | {"sha256": _hashes(part)})


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes `folder`'s place when all is written; that of a link's target."""
    folder = folder.resolve()
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for path in (path for path in part.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # before the old one goes
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"cannot write the checkpoint {folder} ({reason(error)}); make room; the previous one is kept"
        ) from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:  # who read it in this moment took it for a killed save, and put the old one back
        folder.rename(old)
        part.rename(folder)
    for evaluation in old.glob("eval_*"):  # of the checkpoint that was here, as its config.json tells
        evaluation.rename(folder / evaluation.name)
    shutil.rmtree(old, ignore_errors=True)


def _require_registered(registry: Registry, module: nn.Module) -> None:
    """ValueError for a class that a checkpoint could not be loaded with again."""
    if registry.get(getattr(module, "name", "")) is not type(module):
        raise ValueError(
            f"{type(module).__name__} is not registered, so its checkpoint could not be loaded again; register the "
            f"class itself (known as {registry.kind}: {', '.join(registry)})"
        )


def _write(folder: Path, stem: str, state: Mapping[str, Tensor], forms: Sequence[str] = FORMS) -> None:
    """The same weights in each form: as .safetensors, and as .pt, whose names are a contract."""
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}
    if ".pt" in forms:
        torch.save(state, folder / f"{stem}.pt")
    if ".safetensors" in forms:
        save_file(state, folder / f"{stem}.safetensors")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for end in FORMS for path in sorted(folder.glob(f"*{end}"))}


def _parts(folder: Path) -> dict[str, str]:
    found = sorted(path for part in PARTS for path in (folder / part).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in found}
