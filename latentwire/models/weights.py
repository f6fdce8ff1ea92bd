"""Weights and config of a checkpoint, as they lie on disk. An LLM's adapter is read without the encoder.

See `checkpoint` for the folder's files.
"""

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latentwire.llms.known import NOT_IN_NAMES, id_variable
from latentwire.models.adapters import ADAPTERS, PLAIN, Adapter
from latentwire.utils.cli import reason
from latentwire.utils.files import json_text, read_sealed, sha256_of
from latentwire.utils.registry import Registry

FORMS = (".safetensors", ".pt")  # of weights; the first one that is there is read
PROMPT = "prompt"  # the one tensor of a soft prompt's file
PARTS = ("wire_tokenizer", "backbone")  # folders of what an encoder reads with
OF_EACH_LLM = ("llms", "wordings", "frozen_sha256")  # what every config keeps by LLM
TABLES = Path("codec", "tables.safetensors")  # of compact codecs
_WIRE_ID = 8  # bytes
_PIECE = 2**20  # of a file, in bytes

M = TypeVar("M", bound=nn.Module)


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json; FileNotFoundError if there is none, ValueError if it was altered.

    A save that was killed between its two renames is undone first.
    """
    old = folder.resolve().with_name(f".{folder.resolve().name}.old")
    if not folder.exists() and old.is_dir():
        old.rename(folder.resolve())
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder} (no config.json); train one, or name another")
    config = read_sealed(folder / "config.json")
    for name in config.get("llms", {}):  # files are called by them
        if NOT_IN_NAMES & set(name):
            raise ValueError(f"{folder / 'config.json'} calls an LLM {name!r}, which can be no part of a file's name")
    return config


def train_seed(made: Mapping, llms: Sequence[str]) -> int | None:
    """The seed of what reads, by a checkpoint's config: of the joining where an LLM joined; None for several seeds."""
    joined = {llm: how["settings"].get("seed") for llm, how in made.get("joined", {}).items()}
    seeds = {joined.get(llm, made.get("train_seed")) for llm in llms}
    return seeds.pop() if len(seeds) == 1 else None


def checkpoint_sha256(folder: Path) -> str:
    """One hash of a checkpoint's files, so that an evaluation is not continued with other ones. Whether its config is
    sealed makes no difference."""
    config = read_config(folder)  # it says what is missing, and undoes a killed save
    digest, own = hashlib.sha256(), folder / "config.json"
    parts = ("*.safetensors", "*.pt", *(f"{part}/**/*" for part in PARTS))
    files = [path for part in parts for path in folder.glob(part) if path.is_file()]
    for path in sorted([own, *files]):
        digest.update(path.name.encode())
        if path == own:
            digest.update(json_text(config).encode())
            continue
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def load_adapters(folder: Path, llms: Mapping[str, str]) -> dict[str, Adapter]:
    """Adapters of a checkpoint for the given LLMs (name to id). Raises FileNotFoundError or ValueError if a file is
    missing, unreadable, of other shapes, or made for other LLMs."""
    config = read_config(folder)
    check_llms(folder, asked(config, "llms", folder), llms)
    kinds = registered(ADAPTERS, [config.get("adapters", {}).get(name, PLAIN) for name in llms], folder)
    d_z, widths = asked(config, "d_z", folder), asked(config, "widths", folder)
    adapters = {}
    for name, kind in zip(llms, kinds, strict=True):
        build = partial(kind, d_z, asked(widths, name, folder), **config.get("adapter_shapes", {}).get(name, {}))
        adapters[name] = load_strict(build, folder, f"adapter_{name}", f"adapter {kind.name}")
    return adapters


def wire_id(folder: Path) -> bytes:
    """8 bytes that name an encoder by its weights: the same for all checkpoints whose readers read the same wires."""
    config = read_config(folder)
    if "wire_id" in config:
        return bytes.fromhex(config["wire_id"])
    return wire_id_of(read_weights(weights_file(folder, "encoder")))


def wire_id_of(state: Mapping[str, Tensor]) -> bytes:
    """The id of an encoder with this state dict."""
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy())  # half-precision files keep their id
    return digest.digest()[:_WIRE_ID]


def asked(config: Mapping, key: str, folder: Path) -> object:
    """What a checkpoint's config must say; ValueError where it does not."""
    if key not in config:
        raise ValueError(f"{folder / 'config.json'} lacks the key {key!r}; it is not a LatentWire checkpoint")
    return config[key]


def load_soft_prompts(folder: Path, llms: Mapping[str, str]) -> dict[str, Tensor]:
    """Soft prompts [vectors, d] by LLM. Raises FileNotFoundError or ValueError like `load_checkpoint`."""
    check_llms(folder, read_config(folder).get("llms", {}), llms)
    prompts = {}
    for name in llms:
        path = weights_file(folder, f"soft_prompt_{name}")
        found = read_weights(path)
        prompts[name] = found.get(PROMPT) if isinstance(found, Mapping) else found  # older ones hold the tensor alone
        if not isinstance(prompts[name], Tensor) or prompts[name].ndim != 2:
            raise ValueError(f"{path} holds no soft prompt; train it again")
    return prompts


def load_training(folder: Path) -> dict:
    """Optimizer, scheduler and step of a checkpoint_last."""
    return read_weights(folder / "training.pt")


def weights_bytes(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's folder, each counted once; 0 where there is none."""
    return sum(weights_file(folder, stem).stat().st_size for stem in weights_stems(folder))


def weights_stems(folder: Path) -> set[str]:
    """Names of the weights in a checkpoint's folder, without their ends: "encoder", "adapter_NAME"."""
    return {path.stem for end in FORMS for path in folder.glob(f"*{end}")} - {"training"}


def check_llms(folder: Path, trained: Mapping[str, str], llms: Mapping[str, str]) -> None:
    for name, llm_id in llms.items():
        if trained.get(name) != llm_id:
            if name not in trained:
                raise ValueError(f"{folder} has nothing for {name}; name others with --llms: {', '.join(trained)}")
            raise ValueError(
                f"{folder} was made for {name}={trained[name]!r}, not {llm_id!r}; "
                f"set {id_variable(name)} to match, or name other --llms"
            )


def registered(registry: Registry, names: Sequence[str], folder: Path) -> list[type]:
    """What the names in a checkpoint's config.json stand for."""
    for name in names:
        if name not in registry:
            raise ValueError(
                f"{folder / 'config.json'} names the {registry.kind} {name!r}, which this program does not know; "
                f"it knows {', '.join(registry)}"
            )
    return [registry[name] for name in names]


def weights_file(folder: Path, stem: str) -> Path:
    """The file of these weights that is there, .safetensors first."""
    there = [folder / f"{stem}{end}" for end in FORMS if (folder / f"{stem}{end}").is_file()]
    if not there:
        raise FileNotFoundError(f"the checkpoint lacks {folder / stem}.pt (and .safetensors)")
    return there[0]


def load_strict(build: Callable[[], M], folder: Path, stem: str, what: str) -> M:
    """A module, `what`, that `build` makes of the shape that config.json tells, with its weights, `stem`. What that
    claims is compared with the file before it takes memory: FileNotFoundError or ValueError where they differ."""
    path = weights_file(folder, stem)
    state = read_weights(path)
    try:
        with torch.device("meta"):
            claimed = build()
    except (TypeError, RuntimeError) as error:  # arguments that its class does not take
        raise ValueError(f"{folder / 'config.json'} does not fit the {what} ({reason(error)})") from error
    try:
        claimed.load_state_dict(
            {**state}, strict=True, assign=True
        )  # torch notes in a state itself that it is assigned
        del claimed  # with LoRA it holds a whole backbone
        module = build()
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this program: {' '.join(str(error).split())}") from error
    return module


def require_parts(folder: Path, config: Mapping) -> None:
    """ValueError where what an encoder reads with is not what config.json promises (older ones promise nothing): an
    altered tokenizer would be loaded in silence."""
    for name, promised in config.get("parts_sha256", {}).items():
        path, parts = folder / name, Path(name).parts
        if not parts or parts[0] not in PARTS or ".." in parts:
            raise ValueError(f"{folder / 'config.json'} names {name!r}, which is no part of a checkpoint")
        if not path.is_file() or sha256_of(path) != promised:
            raise ValueError(f"{path.parent} cannot be read ({path.name} is lacking or damaged); restore it")


def read_weights(path: Path) -> dict | Tensor:
    """A weights file, once its hash is what config.json promises: altered weights would be loaded in silence."""
    try:
        found, promised = sha256_of(path), read_config(path.parent).get("sha256", {}).get(path.name)
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
