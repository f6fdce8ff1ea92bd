"""How many bytes the text of a question takes by other means, so that a wire's bytes can be judged.

Each way codes the same text: what the wire stands for. A way that a receiver can undo with less is the stronger rival.
"""

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zstandard
from tqdm import tqdm

from latentwire.conditions.base import Reader, Shared
from latentwire.data.content import content
from latentwire.data.question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 200  # that the table is of; evaluations of fewer have none
_DICTIONARY = 64 * 1024  # bytes of zstd's dictionary
_LONGEST = 2048  # tokens of a text that an LLM codes: their logits are in memory at once


def bytes_table(questions: Sequence[Question], source: str, m: int, shared: Shared, reader: Reader) -> list[dict]:
    """Mean bytes of the first QUESTIONS texts, by way: [{"way", "bytes", "n"}]; empty where there are fewer texts.

    shared: sender (its wires are the first row) and train texts; reader: the LLM of the last row, which codes the whole
    text at the cost of its own likelihood (arithmetic coding to within a byte); there is none where a text is too long
    for it.
    """
    some = list(questions[:QUESTIONS])
    if len(some) < QUESTIONS:
        return []
    encoder, codec = shared.sender.encoder, shared.sender.codec
    texts = [content(source, q.context, q.question).text.strip() for q in some]
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    size = _bytes_of_an_id(encoder.tokenizer)
    rows = [
        _row(f"the wire, {codec}", [len(packed) for packed in shared.sender.send(some, m)]),
        _row("text, UTF-8", [len(text.encode()) for text in texts]),
        _row("text, zlib", [len(zlib.compress(text.encode(), 9)) for text in texts]),
        *_by_zstd(texts, shared.train_texts),
        _row(f"text, {size} bytes per token", [size * len(one) for one in ids]),
    ]
    if encoder.chooses_tokens:
        chosen = map(encoder.tokenizer.decode, encoder.select(some, source, m))
        rows.append(_row("the selected tokens as text", [len(text.encode()) for text in chosen]))
    short = max(len(reader.prompts.plain(text)) for text in texts) < min(_LONGEST, reader.llm.positions or _LONGEST)
    if short and _start(reader) is not None:
        rows.append(_row(f"text, coded by {reader.llm.name} itself", _by_llm(reader, texts)))
    return rows


def _by_zstd(texts: Sequence[str], train_texts: Sequence[str]) -> list[dict]:
    """With a dictionary of train text; no row where there are too few texts to make one."""
    try:
        dictionary = zstandard.train_dictionary(_DICTIONARY, [text.encode() for text in train_texts])
    except zstandard.ZstdError:
        return []
    squeeze = zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress
    return [_row("text, zstd with a dictionary of train text", [len(squeeze(text.encode())) for text in texts])]


def _start(reader: Reader) -> int | None:
    """The token that a text stands behind; None for a tokenizer that marks neither a beginning nor an end."""
    tokenizer = reader.llm.tokenizer
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _by_llm(reader: Reader, texts: Sequence[str]) -> list[int]:
    """Bytes that the LLM's own likelihood codes each text in, the first token as its id."""
    llm, head = reader.llm, (_start(reader),)
    found = []
    for text in tqdm(texts, unit="text", desc=f"coding by {llm.name}", leave=False):
        first, *others = reader.prompts.plain(text)
        nats = 0.0
        if others:
            (nats,) = llm.answer_nll(llm.prefill(head, [llm.embed([first])], [[]]), [others]).tolist()
        found.append(_bytes_of_an_id(llm.tokenizer) + math.ceil(nats / math.log(2) / 8))
    return found


def _bytes_of_an_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Whole bytes that tell its tokens apart."""
    return math.ceil(math.log2(len(tokenizer)) / 8)


def _row(way: str, sizes: Sequence[int]) -> dict:
    return {"way": way, "bytes": sum(sizes) / len(sizes), "n": len(sizes)}
