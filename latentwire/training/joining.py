"""A new LLM joins a finished wire, or one that reads it already learns more: nothing but its own adapter changes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentwire.conditions.base import Reader, begin_adapters
from latentwire.models.adapters import ADAPTERS, PLAIN, Adapter, grown
from latentwire.models.checkpoint import load_encoder, save_checkpoint
from latentwire.models.closed_form import ClosedForm, fit_texts, least_squares_map, report, token_counts, wire_table
from latentwire.models.encoders.base import Encoder
from latentwire.models.weights import OF_EACH_LLM, check_llms, load_adapters, read_config
from latentwire.training.settings import TrainSettings
from latentwire.utils.cli import require


def of_the_wire(config: TrainSettings) -> TrainSettings:
    """The settings with everything that the finished wire fixes. Raises ValueError for an LLM that reads it already,
    but for training."""
    made = read_config(Path(config.init))
    for name in config.llm_names:
        require(
            config.samples != 0 or name not in made["llms"], "llms", name,
            f"{config.init} has a reader of this name already; name the LLM that joins, or let this one learn more: "
            "--samples above 0",
        )  # fmt: skip
    fixed = {name: made[name] for name in ("source", "latent_len", "d_z")}
    return dataclasses.replace(config, **fixed, encoder_type=made["encoder"]["type"], encoder=None)


def begin(config: TrainSettings, readers: Sequence[Reader]) -> tuple[Encoder, dict[str, Adapter], dict]:
    """The finished wire's encoder, the readers' adapters, and its config with the figures of `closed_form.report`.

    A new LLM's adapter is the closed form's, of the kind that the settings name, else of the kind that the other
    readers have, or the plainest where nothing is trained. One that is there begins as it is, with what the kind that
    is named has besides. Raises ValueError for a new LLM where the encoder has no codebook, and for a kind that would
    lose weights.
    """
    folder = Path(config.init)
    encoder, made, others = load_encoder(folder), read_config(folder), _others(config)
    kind = ADAPTERS.pick(config.adapter_type) if config.adapter_type else None
    usual = PLAIN if config.samples == 0 else next(iter(others.values())).name
    fresh = [reader for reader in readers if reader.llm.name not in others]
    adapters, figures = _closed_form(config, encoder, fresh, kind or ADAPTERS[usual])
    begin_adapters(adapters, fresh)
    for llm, head in ((reader.llm, reader.prompts.head) for reader in readers if reader not in fresh):
        check_llms(folder, made["llms"], {llm.name: llm.id})
        adapters[llm.name] = grown(others[llm.name], kind or type(others[llm.name]), llm, head)
    adapters = {reader.llm.name: adapters[reader.llm.name] for reader in readers}  # as a continued run has them
    return encoder, adapters, made | {"interface": (made.get("interface") or {}) | figures}


def _closed_form(
    config: TrainSettings, encoder: Encoder, fresh: Sequence[Reader], kind: type[Adapter]
) -> tuple[dict[str, Adapter], dict]:
    """Adapters of new LLMs, and the figures of `closed_form.report`."""
    if not fresh:
        return {}, {}
    require(
        hasattr(encoder, "codebook"), "init", config.init,
        f"its encoder {encoder.name!r} has no codebook, so there is nothing that a new LLM could read before training",
    )  # fmt: skip
    codebook = encoder.codebook.weight.detach().float().cpu()
    counts = token_counts(encoder.tokenizer, fit_texts(config.dataset))
    tables = {reader.llm.name: wire_table(reader.llm, encoder.tokenizer) for reader in fresh}
    maps = {name: least_squares_map(codebook, table, counts) for name, table in tables.items()}
    adapters = {name: kind.from_closed_form(*found) for name, found in maps.items()}
    return adapters, report(ClosedForm(codebook, maps), tables, counts)


def save(
    folder: Path,
    encoder: Encoder,
    adapters: Mapping[str, Adapter],
    config: TrainSettings,
    origin: Mapping,
    training: dict | None = None,
    notes: Mapping | None = None,
) -> None:
    """A checkpoint with the new adapters beside those that read the wire already. origin: of the new ones, with the
    "interface" of `begin`; training, notes: as a job's `save` has them."""
    config_json = _joined(config, origin) | {"interface": origin["interface"]} | (notes or {})
    save_checkpoint(folder, encoder, _others(config) | adapters, config_json, training)


def _others(config: TrainSettings) -> dict[str, Adapter]:
    """The adapters that read the wire already, as they are."""
    folder = Path(config.init)
    return load_adapters(folder, read_config(folder)["llms"])


def _joined(config: TrainSettings, origin: Mapping) -> dict:
    """What the checkpoint says: all that it said before, and of each new LLM how it joined."""
    made = read_config(Path(config.init))
    found = {key: made.get(key, {}) | origin[key] for key in OF_EACH_LLM}
    how = {key: origin[key] for key in ("samples", "settings", "git", "machine") if key in origin}
    return made | found | {"joined": made.get("joined", {}) | dict.fromkeys(origin["llms"], how)}
