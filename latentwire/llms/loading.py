"""How an LLM comes to be: from the hub, a folder or the offline set, or with random weights in a true shape."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from latentwire.llms.arithmetic import Shape, known_shape, shape_in
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.known import LARGE_SHAPES, id_variable
from latentwire.llms.offline import OFFLINE_LLMS, ensure_offline_model, variant
from latentwire.utils.cli import reason, require
from latentwire.utils.surroundings import hub_answers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_of(name: str, llm_id: str) -> Shape:
    """The shape of an LLM, known here or told by its configuration; no offline model is fetched for it. Raises as
    `load_llm` does."""
    return known_shape(llm_id) or shape_in(_config_of(name, llm_id))


def counted_shape(name: str, llm_id: str) -> Shape:
    """The same with its weights counted, which are built without memory: exact for any architecture."""
    from transformers import AutoModelForCausalLM  # slow to import

    config = _config_of(name, llm_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return replace(shape_in(config), counted=sum(weight.numel() for weight in model.parameters()))


def _config_of(name: str, llm_id: str) -> "PretrainedConfig":
    from transformers import AutoConfig  # slow to import

    where, remedy = _where(name, llm_id)
    try:
        return AutoConfig.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {llm_id!r} ({reason(error)}); {remedy}") from error


def _where(name: str, llm_id: str) -> tuple[dict, str]:
    """Where transformers finds a model, and what to do when it does not."""
    source = str(ensure_offline_model(llm_id)) if llm_id in OFFLINE_LLMS else llm_id
    remedy = f"set {id_variable(name)} to a hub id, a folder with config.json, or one of {', '.join(OFFLINE_LLMS)}"
    if llm_id.startswith("offline:") and llm_id not in OFFLINE_LLMS:
        raise ValueError(f"unknown offline model {llm_id!r}; {remedy}")
    source = os.path.expanduser(source)
    is_path = source.startswith((".", "/")) or Path(source).is_dir()
    if is_path and not Path(source, "config.json").is_file():
        raise FileNotFoundError(f"no model in {source!r} (no config.json there); {remedy}")
    how = {"local_files_only": is_path or not hub_answers(), "trust_remote_code": False}
    return {"pretrained_model_name_or_path": source} | how, remedy


def load_llm(name: str, llm_id: str, device: str, dtype: str) -> FrozenLLM:
    """Load and freeze a causal LM.

    llm_id: one of the offline models ("offline:..."), a folder, or a hub id; dtype: the name of a torch dtype.
    DEVICE_MAP in the environment (auto, balanced, ...) lets accelerate spread the layers over all GPUs instead.
    Raises FileNotFoundError or ValueError that names the id and the way out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, remedy = _where(name, llm_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        kept = variant(Path(where["pretrained_model_name_or_path"]), dtype) if llm_id in OFFLINE_LLMS else None
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where, variant=kept, dtype=getattr(torch, dtype), output_loading_info=True, device_map=device_map()
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model {llm_id!r} ({reason(error)}); {remedy}") from error
    if loaded["missing_keys"]:  # transformers would go on with random weights
        raise ValueError(f"the model {llm_id!r} lacks the weights {sorted(loaded['missing_keys'])}; {remedy}")
    largest, embeddings = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if largest >= embeddings:
        raise ValueError(
            f"the model {llm_id!r} has {embeddings} embeddings, and its tokenizer tokens up to {largest}: they do not "
            f"belong together; {remedy}"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"DEVICE_MAP={device_map()}: the model {llm_id!r} does not fit the GPUs and would be read from main memory "
            "or disk at each step; use more GPUs or a smaller model"
        )
    return FrozenLLM(name, model if device_map() else model.to(device), tokenizer, llm_id)


def device_map() -> str | None:
    """How accelerate spreads each LLM's layers over the GPUs; None keeps an LLM on one device."""
    return os.environ.get("DEVICE_MAP") or None


def random_llm(name: str, llm_id: str, device: str, dtype: str) -> FrozenLLM:
    """The large model of this name in its true shape, with random weights made on the device: right for times, never
    for answers. It reads with the tokenizer of `llm_id`, whose ids must fit. Raises ValueError for an unknown name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    require(name in LARGE_SHAPES, "llms", name, f"random weights have the shapes of {', '.join(LARGE_SHAPES)}")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**LARGE_SHAPES[name]), dtype=getattr(torch, dtype)
        )
    tokenizer = AutoTokenizer.from_pretrained(**_where(name, llm_id)[0])
    return FrozenLLM(name, model, tokenizer, f"{name}, random weights")
