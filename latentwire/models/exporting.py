"""Make a checkpoint ready to be shipped: half precision, one form of the weights, nothing of its machine but the ids of
its LLMs, which a reader is checked by."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from latentwire.models.adapters import Adapter
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.weights import (
    OF_EACH_LLM,
    TABLES,
    load_adapters,
    read_config,
    read_weights,
    weights_file,
    weights_stems,
    wire_id,
)
from latentwire.models.wire.compact import tables_of
from latentwire.utils.cli import reason, require
from latentwire.utils.files import read_json, sha256_of, write_sealed

# What a checkpoint on a user's machine says that nobody else needs.
_PRIVATE = (
    "init", "save_dir", "teacher", "resume", "save_minutes", "tensorboard", "tracker", "ignore_memory", "device",
)  # fmt: skip
_OF_ITS_READERS = ("step", "validation")  # which others take the place of
_MADE_ANEW = ("encoder", "adapters", "widths", "sha256", "parts_sha256")


def export(checkpoint: Path, folder: Path, readers: Sequence[Path] = ()) -> dict:
    """Write `checkpoint` to `folder` in float16, as .safetensors alone, with its codec; its config is returned.

    readers: checkpoints of stage join, whose LLMs read the same wire; the adapters that they trained are taken too.

    Raises FileNotFoundError or ValueError if the checkpoint is no trained LatentWire, if it had no joint stage and an
    LLM of it has not joined, if readers are of another wire, or if something else lies in `folder`.
    """
    _require_free(folder, [checkpoint, *readers])
    made = read_config(checkpoint)
    remedy = "export the checkpoint of stage joint, or that of stage scores with a reader of stage join for each LLM"
    require(made.get("stage") in ("joint", "scores"), "checkpoint", str(checkpoint), remedy)
    encoder, own, _ = load_checkpoint(checkpoint, made["llms"])
    adapters = dict(own)
    taken: dict[str, Path] = {}
    for other in readers:
        found, trained = _trained(other, checkpoint, own)
        for llm in trained:
            require(llm not in taken, "readers", str(other), f"{taken.get(llm)} trained {llm!r}, too; name one of them")
        taken |= dict.fromkeys(trained, other)
        adapters |= trained
        made = {key: value for key, value in made.items() if key not in _OF_ITS_READERS}
        made |= {key: (made.get(key) or {}) | value for key, value in found.items()}
    joined = made["stage"] == "joint" or own.keys() <= made.get("joined", {}).keys()
    require(joined, "checkpoint", str(checkpoint), remedy)
    origin = getattr(getattr(encoder, "backbone", None), "origin", None)
    here = origin["encoder_id"] if origin and Path(origin["encoder_id"]).is_dir() else ""
    lacking = f"its LoRA needs the backbone in {here}, which only this machine has; train on one of the hub"
    require(not here, "checkpoint", str(checkpoint), lacking)
    for module in (encoder, *adapters.values()):
        module.to(torch.float16)
    kept = _public({key: value for key, value in made.items() if key not in ("llms", "settings", *_MADE_ANEW)})
    kept |= {"llms": made["llms"], "settings": _public(made["settings"])}
    if "joined" in made:
        kept["joined"] = {llm: how | {"settings": _public(how["settings"])} for llm, how in made["joined"].items()}
    tables = tables_of(checkpoint) if (checkpoint / TABLES).is_file() else None
    whole = kept | {"weights": "float16"}
    save_checkpoint(folder, encoder, adapters, whole, forms=(".safetensors",), tables=tables)
    return read_config(folder)


def _require_free(folder: Path, sources: Sequence[Path]) -> None:
    """ValueError for a folder that holds anything but a checkpoint, or holds what is exported: it is replaced."""
    there = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    found = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    own = isinstance(found, dict) and {"encoder", "sha256"} <= found.keys()
    remedy = "it holds other things than a checkpoint, and would be replaced; name a new folder"
    require(not there or own, "folder", str(folder), remedy)
    for source in sources:
        inside = folder.resolve() in (source.resolve(), *source.resolve().parents)
        require(not inside, "folder", str(folder), f"{source} lies there, and would be replaced; name another")


def _trained(other: Path, checkpoint: Path, own: Mapping[str, Adapter]) -> tuple[dict, dict[str, Adapter]]:
    """What the config of `other` says of the readers that `checkpoint` has not, or has otherwise (`own`), and they."""
    same = wire_id(other) == wire_id(checkpoint)
    require(same, "readers", str(other), f"its LLMs read other wires than those of {checkpoint}; train it on that")
    of = read_config(other)
    there = load_adapters(other, {llm: of["llms"][llm] for llm in of.get("joined", {})})
    new = {llm: adapter for llm, adapter in there.items() if llm not in own or not _alike(adapter, own[llm])}
    require(
        bool(new), "readers", str(other), f"no reader of it was trained beyond {checkpoint}; name one of stage join"
    )
    keys = (*OF_EACH_LLM, "interface", "joined")
    return {key: {llm: of[key][llm] for llm in new if llm in of.get(key, {})} for key in keys}, new


def _alike(one: Adapter, other: Adapter) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _public(said: Mapping) -> dict:
    """Without what is private, and of a file or folder, such as an encoder's, the name alone."""
    return {key: _named(value) for key, value in said.items() if key not in _PRIVATE}


def _named(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _named(one) for key, one in value.items()}
    here = isinstance(value, str) and (Path(value).is_absolute() or (os.sep in value and Path(value).exists()))
    return Path(value).name if here else value


def as_safetensors(checkpoint: Path, folder: Path) -> None:
    """Write all weights of a checkpoint into `folder` as .safetensors, as they are, and a config that knows them.

    Raises OSError if it cannot be written.
    """
    config = read_config(checkpoint)
    hashes = {}
    for stem in weights_stems(checkpoint):
        weights = read_weights(weights_file(checkpoint, stem))
        try:
            save_file(weights, folder / f"{stem}.safetensors")
        except SafetensorError as error:  # it reports a full disk as its own
            raise OSError(f"cannot write the checkpoint {folder} ({reason(error)}); make room") from error
        hashes[f"{stem}.safetensors"] = sha256_of(folder / f"{stem}.safetensors")
    write_sealed(folder / "config.json", config | {"sha256": hashes, "wire_id": wire_id(checkpoint).hex()})


def table_of(results: Path | None, folder: Path) -> str:
    """table.md of an evaluation of `folder`; ValueError if it is one of another checkpoint."""
    if results is None:
        return "Not evaluated yet.\n"
    evaluated = read_json(results / "results.json")["checkpoint"]
    same = Path(evaluated).resolve() == folder.resolve()
    require(same, "results", str(results), f"is an evaluation of {evaluated}, not of {folder}; evaluate that")
    return (results / "table.md").read_text(encoding="utf-8")
