"""What the encoder chose or read, as text that a person would write: whole words, whole sentences."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from latentwire.conditions.base import Reader, Shared, Slot, condition, require_positions, text_slot
from latentwire.conditions.latents import ASKED
from latentwire.conditions.texts import content_ids
from latentwire.data.question import Question
from latentwire.data.relevance import in_whole_words, sentence_spans


@condition(
    "selected_words", "#c98a4b", "places", uses=("m", "wire"), needs=("chooses_tokens",), default_in=(),
    groups=("learned",),
)  # fmt: skip
def selected_words(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """selected_text in whole words, with " ... " where something was left out, in at most M of the LLM's tokens.

    The encoder is asked for the most places, M or fewer, whose words fit: its own order of importance decides what
    goes, and a question in the slot stays whole. Where one place takes more than M already, the end is cut.
    """
    choosing = shared.sender.encoder.choosing(questions, reader.prompts.source)
    return [text_slot(reader, _words(reader, q, m, chosen)) for q, chosen in zip(questions, choosing, strict=True)]


@condition(
    "sentence", "#3f8f5f", "places", uses=("wire",), needs=("reads_answers",), sources=ASKED, default_in=(),
    groups=("learned",),
)  # fmt: skip
def sentence(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
    """The sentence that holds the encoder's own answer span (or the sentences, where it crosses), as text."""
    places = shared.sender.encoder.read_at(questions)
    cut = [replace(q, context=_sentence(q.context, *place)) for q, place in zip(questions, places, strict=True)]
    require_positions(reader, cut, 0, whole=True, more=0)
    return [text_slot(reader, content_ids(reader, q)) for q in cut]


def _words(reader: Reader, question: Question, m: int, chosen: Callable[[int], list[tuple[int, int]]]) -> list[int]:
    """Token ids of the content with the chosen words in the context's place; chosen: see `Encoder.choosing`."""

    def of(places: int) -> list[int]:
        return content_ids(reader, replace(question, context=in_whole_words(question.context, chosen(places))))

    for places in range(m, 0, -1):  # more places may take fewer tokens, where a gap closes
        if len(ids := of(places)) <= m:
            return ids
    return ids[:m]


def _sentence(context: str, begin: int, end: int) -> str:
    """The sentences that the characters [begin, end) touch."""
    spans = sentence_spans(context)
    touched = [(a, b) for a, b in spans if a < end and begin < b]
    touched = touched or [next((span for span in spans if span[0] >= end), spans[-1])]  # white space between two
    return context[touched[0][0] : touched[-1][1]]
