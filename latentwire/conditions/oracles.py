"""An encoder that knows the reference answer: how much is lost by reading, and how much by selection."""

from collections.abc import Sequence

from latentwire.conditions.base import Reader, Shared, Slot, condition, text_slot
from latentwire.data.question import Question

_NEEDS = ("chooses_tokens", "spans")


@condition("oracle_text", "#9c8f80", "places", uses=("m", "wire"), needs=_NEEDS, default_in=(), groups=("oracles",))
def oracle_text(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The M wire tokens that an encoder would choose who knows the reference answer, as text."""
    chosen = [text for _, text in shared.sender.encoder.perfect(questions, reader.prompts.source, m)]
    return [text_slot(reader, reader.prompts.plain(text)) for text in chosen]


@condition(
    "oracle_wire", "#c2777f", "places", uses=("m", "d_z", "wire"), needs=_NEEDS, default_in=(), groups=("oracles",)
)
def oracle_wire(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The same tokens through wire and adapter, which never saw such windows around an answer: no ceiling."""
    chosen = [z for z, _ in shared.sender.encoder.perfect(questions, reader.prompts.source, m)]
    return [shared.sender.slot(shared.sender.pack(z), reader.adapter) for z in chosen]
