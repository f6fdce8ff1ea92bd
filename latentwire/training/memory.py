"""How much memory a training process needs, estimated before anything is loaded; what cannot fit is refused."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from latentwire.conditions.base import CONDITIONS
from latentwire.data.question import Question
from latentwire.llms.arithmetic import ENCODER, Shape
from latentwire.llms.loading import counted_shape, device_map
from latentwire.models.backbones import backbone_shape
from latentwire.models.lora import read_origin
from latentwire.models.weights import weights_bytes
from latentwire.training.settings import TrainSettings
from latentwire.training.stages import STAGES
from latentwire.utils.surroundings import memory_mb

_HEAD, _TAIL = 256, 64  # positions: worked examples; question, anchor and answer
_APART = 16  # places with a label beyond K + 1: the answers of a batch end together, and begin apart
_CHARACTERS = 4  # of a context for a token: fewer than most have
_ENCODER_QUESTION = 60e6  # bytes that the backward pass of all-MiniLM-L6-v2 keeps for one question
_FREE = 0.95  # of the memory may be planned for


def within_memory(config: TrainSettings, questions: Sequence[Question]) -> tuple[TrainSettings, str]:
    """The settings with `micro_batch`, and what a process is expected to need, as a line to print. Unless it is given,
    the batch is halved until it fits. config: with its device and dtype set; questions: those to train on, whose
    longest context fills a batch of its like.

    Raises ValueError with the numbers and what to change where not even that fits, unless config.ignore_memory.
    """
    llm_ids = config.llm_ids if STAGES[config.stage].needs_llms else {}
    shapes = {name: counted_shape(name, llm_id) for name, llm_id in llm_ids.items()}
    there, longest = total_bytes(config.device), max(len(q.context) for q in questions)
    size = config.micro_batch or config.batch_size
    while True:
        parts = training_bytes(config, shapes, longest, size)
        needed = sum(parts.values())
        if config.ignore_memory or config.micro_batch or size == 1 or needed <= _FREE * there:
            break
        size = (size + 1) // 2
    told = f"{needed / 1e9:.1f} GB per process ({', '.join(f'{what} {n / 1e9:.1f}' for what, n in parts.items())})"
    if needed > _FREE * there and not config.ignore_memory:
        remedies = [f"MICRO_BATCH (--micro_batch) below {size}"] if size > 1 else []
        remedies += ["DTYPE=bfloat16"] if config.dtype == "float32" else []
        remedies += ["fewer LLMS"] if len(shapes) > 1 else []
        remedies += ["DEVICE_MAP=auto with NPROC=1"] if torch.cuda.device_count() > 1 else []
        remedies.append("smaller LLMs")
        raise ValueError(
            f"memory: this training needs about {told}, and {there / 1e9:.1f} GB are there; "
            f"choose {' or '.join(remedies)}, or a larger device; --ignore_memory starts it all the same"
        )
    at_once = f"; {size} questions at a time" if size < config.batch_size else ""
    config = dataclasses.replace(config, micro_batch=size if size < config.batch_size else None)
    return config, f"memory: about {told}, of {there / 1e9:.1f} GB{at_once}"


def training_bytes(config: TrainSettings, shapes: Mapping[str, Shape], longest: int, at_once: int) -> dict[str, float]:
    """Bytes at the peak of a step, by what takes them; shapes: of the LLMs that take part; longest: characters of the
    longest context, which only one stage's LLMs read as it is; at_once: questions."""
    size = torch.empty(0, dtype=getattr(torch, config.dtype)).element_size()
    stage = STAGES[config.stage]
    whole = bool(stage.rival) and CONDITIONS[stage.rival].cost == "whole"
    slot = longest // _CHARACTERS if whole else config.most_latents
    positions = at_once * (slot + _TAIL)
    heads = at_once * _HEAD
    parts = {"weights of the LLMs": 0.0, "kept for the gradient": 0.0, "logits": 0.0}
    for shape in shapes.values():
        parts["weights of the LLMs"] += size * shape.parameters
        own = kept_bytes(shape, size) + attention_bytes(shape, size, slot + _TAIL, config.device)
        parts["kept for the gradient"] += shape.layers * (positions * own + heads * 2 * shape.key_width * size)
        # as they come, in float32, and the gradient of both
        parts["logits"] += at_once * (config.k + 1 + _APART) * shape.vocabulary * 2 * (size + 4)
    if not stage.rival:
        parts["encoder and adapters"] = _encoder_bytes(config, at_once)
    return parts


def _encoder_bytes(config: TrainSettings, at_once: int) -> float:
    """Weights of encoder and adapters, gradients and two moments of AdamW, all float32; and what questions keep."""
    folder = Path(config.init)
    begun = bool(config.init) and (folder / "backbone" / "config.json").is_file()
    lora = read_origin(folder / "backbone") if begun else getattr(config.encoder, "lora", 0)
    found, kept = 4.0 * (weights_bytes(folder) if config.init else 0), _ENCODER_QUESTION
    if hasattr(config.encoder, "encoder_id") and folder.is_dir():
        shape = backbone_shape(str(folder / "backbone") if begun else config.encoder.encoder_id)
        found += shape.counted * (4 if lora else 0 if begun else 16)  # with LoRA they stay, and lie elsewhere
        kept *= shape.layers * shape.width / (ENCODER.layers * ENCODER.width)
    return found + at_once * kept


def kept_bytes(shape: Shape, size: int) -> int:
    """Bytes that one position leaves in one frozen layer for the backward pass: queries, keys, values, the attention's
    output, three products of the MLP in the LLM's type, and the inputs of two RMSNorms in float32."""
    queries = shape.query_width or shape.width
    return size * (2 * queries + 2 * shape.key_width + 3 * shape.inner) + 2 * 4 * shape.width


def attention_bytes(shape: Shape, size: int, own: int, device: str) -> float:
    """What a position's attention leaves in one layer beside that. own: positions behind the head. On a CPU the weights
    of every head, over the shared head and half of its own positions on average; on a GPU keys and values of the
    head and of its own ones, repeated for all heads of queries."""
    if device == "cpu":
        return size * shape.heads * (_HEAD + own / 2)
    return size * 2 * ((shape.query_width or shape.width) - shape.key_width) * (1 + _HEAD / own)


def total_bytes(device: str) -> int:
    """Memory of a process: of its GPU (of all, with DEVICE_MAP), or its share of this machine or container."""
    if device.startswith("cuda"):
        cards = range(torch.cuda.device_count()) if device_map() else [device]
        return sum(torch.cuda.get_device_properties(card).total_memory for card in cards)
    return int(1e6 * memory_mb()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
