"""LoRA in a backbone's linear layers (Hu et al. 2021, arXiv:2106.09685), through peft.

The backbone's own weights stay as they are and no checkpoint keeps them: it keeps where they come from, and their hash.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from latentwire.utils.files import read_json, weights_sha256, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECORD = "lora.json"


def add_lora(model: "PreTrainedModel", rank: int) -> str:
    """Put trainable matrices of this rank beside the weights of each linear layer, and freeze all others: they become
    buffers that no state dict holds. Returns the hash of the frozen ones. ValueError where peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and needed here alone
    except ImportError as error:
        raise ValueError(f'lora={rank}: {error.name} is not installed: pip install -e ".[lora]"') from error
    found = weights_sha256(model.state_dict())
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.requires_grad:
                delattr(module, name)
                module.register_buffer(name, weight.detach(), persistent=False)
    return found


def write_origin(folder: Path, origin: dict) -> None:
    """What rebuilds a backbone with LoRA, beside its config: encoder_id, rank, and sha256 of the frozen weights."""
    write_json(folder / _RECORD, origin)


def read_origin(folder: Path) -> dict | None:
    """The reverse of `write_origin`; None for a backbone without LoRA."""
    return read_json(folder / _RECORD) if (folder / _RECORD).is_file() else None
