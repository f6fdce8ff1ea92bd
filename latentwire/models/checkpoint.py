"""A trained (or closed-form) LatentWire on disk.

    FOLDER/config.json              what is needed to rebuild the modules, and how they were made
    FOLDER/encoder.safetensors      state dict; encoder.pt beside it holds the same
    FOLDER/adapter_NAME.safetensors state dict, one per LLM; adapter_NAME.pt beside it holds the same
    FOLDER/wire_tokenizer/          the tokenizer that the encoder reads with
    FOLDER/backbone/                config and tokenizer of a pretrained backbone
    FOLDER/training.pt              only in checkpoint_last: optimizer, scheduler and step, to continue exactly

Tuned rivals are kept alike: config.json and soft_prompt_NAME. A checkpoint with .pt files alone, as older ones are,
loads too. config.json has the sha256 of every weights file. Loading is strict: a mismatch is an error that names the
file and the keys, never a score from half a checkpoint.
"""

import hashlib
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from latentwire.llms.known import id_variable
from latentwire.models.adapters import ADAPTERS, Adapter
from latentwire.models.encoders.base import ENCODERS, Encoder
from latentwire.utils.cli import reason
from latentwire.utils.files import read_json, write_json
from latentwire.utils.registry import Registry

_PROMPT = "prompt"  # the one tensor of a soft prompt's file
_ENDS = (".safetensors", ".pt")  # the first one that is there is read
_FIRST_ADAPTER = "residual_mlp"  # of checkpoints that do not say their kind


def save_checkpoint(
    folder: Path,
    encoder: Encoder,
    adapters: Mapping[str, Adapter],
    config: dict,
    training: dict | None = None,
    forms: Sequence[str] = _ENDS,
) -> None:
    """Write a checkpoint under a temporary name and rename it: what is read back is whole, the new one or the old.

    config needs "d_z" and "llms" (name to id); the shapes are added here. training: what `load_training` gives back;
    forms: of the weights files.
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
    }
    with _replaced(folder) as part:
        _write(part, "encoder", encoder.state_dict(), forms)
        for name, adapter in adapters.items():
            _write(part, f"adapter_{name}", adapter.state_dict(), forms)
        encoder.tokenizer.save_pretrained(part / "wire_tokenizer")
        encoder.save_parts(part)
        if training is not None:
            torch.save(training, part / "training.pt")
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
    kind, *_ = _known(ENCODERS, [shape.get("type")], folder)
    arguments = {key: value for key, value in shape.items() if key != "type"}
    try:
        encoder = kind.of_shape(tokenizer, d_z, folder, **arguments)
    except TypeError as error:  # arguments that this class does not take
        raise ValueError(f"{folder / 'config.json'} does not fit the encoder {kind.name} ({error})") from error
    _load_strict(encoder, folder, "encoder")
    kinds = _known(ADAPTERS, [config.get("adapters", {}).get(name, _FIRST_ADAPTER) for name in llms], folder)
    adapters = {name: kind(d_z, widths[name]) for name, kind in zip(llms, kinds, strict=True)}
    for name, adapter in adapters.items():
        _load_strict(adapter, folder, f"adapter_{name}")
    return encoder, adapters, config


def save_soft_prompts(folder: Path, prompts: Mapping[str, Tensor], config: dict, training: dict | None = None) -> None:
    """Write soft prompts [vectors, d] by LLM, as `save_checkpoint` does. config needs "llms" and "stage"."""
    with _replaced(folder) as part:
        for name, prompt in prompts.items():
            _write(part, f"soft_prompt_{name}", {_PROMPT: prompt})
        if training is not None:
            torch.save(training, part / "training.pt")
        write_json(part / "config.json", config | {"sha256": _hashes(part)})


def load_soft_prompts(folder: Path, llms: Mapping[str, str]) -> dict[str, Tensor]:
    """Soft prompts [vectors, d] by LLM. Raises FileNotFoundError or ValueError like `load_checkpoint`."""
    _check_llms(folder, read_config(folder).get("llms", {}), llms)
    prompts = {}
    for name in llms:
        path = _weights(folder, f"soft_prompt_{name}")
        found = _read(path)
        prompts[name] = found.get(_PROMPT) if isinstance(found, Mapping) else found  # older ones hold the tensor alone
        if not isinstance(prompts[name], Tensor) or prompts[name].ndim != 2:
            raise ValueError(f"{path} holds no soft prompt; train it again")
    return prompts


def load_training(folder: Path) -> dict:
    """Optimizer, scheduler and step of a checkpoint_last."""
    return _read(folder / "training.pt")


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json; FileNotFoundError if there is none.

    A save that was killed between its two renames is undone first.
    """
    old = folder.resolve().with_name(f".{folder.resolve().name}.old")
    if not folder.exists() and old.is_dir():
        old.rename(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder} (no config.json); train one, or leave out --ckpt")
    return read_json(folder / "config.json")


def checkpoint_sha256(folder: Path) -> str:
    """One hash of a checkpoint's files, so that an evaluation is not continued with other ones."""
    read_config(folder)  # it says what is missing, and undoes a killed save
    digest = hashlib.sha256()
    parts = ("*.safetensors", "*.pt", "wire_tokenizer/*", "backbone/*")
    for path in sorted([folder / "config.json", *(path for part in parts for path in folder.glob(part))]):
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
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own
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


def _check_llms(folder: Path, trained: Mapping[str, str], llms: Mapping[str, str]) -> None:
    for name, llm_id in llms.items():
        if trained.get(name) != llm_id:
            raise ValueError(
                f"{folder} was made for {name}={trained.get(name)!r}, not {llm_id!r}; "
                f"set {id_variable(name)} to match, or name other --llms"
            )


def weights_bytes(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's folder, each counted once; 0 where there is none."""
    stems = {path.stem for end in _ENDS for path in folder.glob(f"*{end}")} - {"training"}
    return sum(_weights(folder, stem).stat().st_size for stem in stems)


def _require_registered(registry: Registry, module: nn.Module) -> None:
    """ValueError for a class that a checkpoint could not be loaded with again."""
    if registry.get(getattr(module, "name", "")) is not type(module):
        raise ValueError(
            f"{type(module).__name__} is not registered, so its checkpoint could not be loaded again; register the "
            f"class itself (known as {registry.kind}: {', '.join(registry)})"
        )


def _known(registry: Registry, names: Sequence[str], folder: Path) -> list[type]:
    """What the names in a checkpoint's config.json stand for."""
    for name in names:
        if name not in registry:
            raise ValueError(
                f"{folder / 'config.json'} names the {registry.kind} {name!r}, which this program does not know; "
                f"it knows {', '.join(registry)}"
            )
    return [registry[name] for name in names]


def _write(folder: Path, stem: str, state: Mapping[str, Tensor], forms: Sequence[str] = _ENDS) -> None:
    """The same weights in each form: as .safetensors, and as .pt, whose names are a contract."""
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}
    if ".pt" in forms:
        torch.save(state, folder / f"{stem}.pt")
    if ".safetensors" in forms:
        save_file(state, folder / f"{stem}.safetensors")


def _weights(folder: Path, stem: str) -> Path:
    """The file of these weights that is there, .safetensors first."""
    there = [folder / f"{stem}{end}" for end in _ENDS if (folder / f"{stem}{end}").is_file()]
    if not there:
        raise FileNotFoundError(f"the checkpoint lacks {folder / stem}.pt (and .safetensors)")
    return there[0]


def _load_strict(module: nn.Module, folder: Path, stem: str) -> None:
    path = _weights(folder, stem)
    try:
        module.load_state_dict(_read(path), strict=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this program: {' '.join(str(error).split())}") from error


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for end in _ENDS for path in sorted(folder.glob(f"*{end}"))}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict | Tensor:
    """A weights file, once its hash is what config.json promises: altered weights would be loaded in silence."""
    try:
        found, promised = _sha256(path), read_config(path.parent).get("sha256", {}).get(path.name)
        if found != promised:
            raise ValueError(
                f"{path} is cut or damaged (sha256 {found[:16]}, config.json says {str(promised)[:16]}); "
                "restore it or train again"
            )
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the checkpoint lacks {path}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut or damaged ({reason(error)}); restore it or train again") from error
