"""Rivals that may train too: the text of another condition behind a soft prompt (see `training.soft_prompts`)."""

from collections.abc import Sequence

import torch

from latentwire.conditions import latents, selected  # noqa: F401 - they register what is tuned below
from latentwire.conditions.base import CONDITIONS, Condition, Reader, Shared, Slot
from latentwire.data.question import Question


def tuned(base: str, colour: str, groups: tuple[str, ...] = ("tuned",)) -> Condition:
    """Register BASE_tuned: the slots of BASE behind its soft prompt, trained on LatentWire's data and loss."""
    behind = CONDITIONS[base]
    name = f"{base}_tuned"

    def build(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
        soft = shared.soft_prompts[name][reader.llm.name].to(reader.llm.device, reader.llm.dtype)
        slots = behind.slots(reader, questions, m, shared)
        return [Slot(torch.cat([soft, slot.embeds]), slot.sent, len(soft)) for slot in slots]

    build.__doc__ = f"{base} behind a soft prompt that was trained on LatentWire's data and loss (see --tuned)."
    made = Condition(
        build, colour, behind.cost, uses=(*behind.uses, "tuned"), needs=behind.needs, sources=behind.sources,
        default_in=(), groups=groups, base=behind,
    )  # fmt: skip
    return CONDITIONS.register(name)(made)


TUNED = [
    tuned("text", "#7fa3c7"),
    tuned("token_budget", "#8fbf9f"),
    tuned("selected_text", "#cdb98a"),
    tuned("selected_words", "#d9a57c", groups=()),  # older folders of tuned rivals have none
]
