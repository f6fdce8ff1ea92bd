"""What send.py, answer.py and inspect_wire.py do. Wires and answers go to standard output, all else to stderr."""

import base64
import binascii
import io
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from latentwire.api.costs import break_even
from latentwire.api.encoding import LatentWire
from latentwire.api.message import Wire
from latentwire.api.settings import AnswerSettings, InspectSettings, SendSettings
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.models.wire import MAGIC
from latentwire.utils.cli import require, require_text
from latentwire.utils.files import UNREADABLE

if TYPE_CHECKING:
    from latentwire.api.reading import WireReader

_BLANK = b" \t\r\n" + BOM_UTF8  # signs that may stand before JSON lines
_BATCH = 64  # JSON lines that are encoded before their wires are written


def send(config: SendSettings) -> None:
    """One wire, or one per JSON line."""
    if config.context and config.out:
        out = Path(config.out)
        require(out.parent.is_dir() and not out.is_dir(), "out", config.out, "name a file in a folder that is there")
    elif config.context:
        require(not sys.stdout.isatty(), "out", config.out, "a wire is bytes, no text: add > FILE, | or --out FILE")
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    if not config.context:
        _send_lines(lw, config.how)
        return
    text = _text("context", config.context)
    require(bool(text.strip()), "context", config.context, "the file is empty; name one with text")
    wire = lw.encode(text, config.question or None, progress=len(text) > 100_000, **config.how)
    print(lw.wire(wire), file=sys.stderr)
    if config.out:
        Path(config.out).write_bytes(wire)
    else:
        sys.stdout.buffer.write(wire)


def answer(config: AnswerSettings) -> None:
    """One answer, or one per JSON line."""
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    if config.corpus:
        wire = lw.open_corpus(config.corpus, config.ckpt)[config.id]
        reader = lw.reader(config.llm or next(iter(lw.llms)), dtype=config.dtype)
        print(reader.answer(wire, config.question or None, config.max_new_tokens))
        return
    with _opened(config.wire) as file:
        start = _beginning(file)
        lines = start.lstrip(_BLANK).startswith(b"{")
        wire = None if lines else lw.wire(start + file.read())  # a wrong wire is told before the LLM is loaded
        require(not (lines and config.question), "question", config.question, "JSON lines have their own; leave it out")
        reader = lw.reader(config.llm or next(iter(lw.llms)), dtype=config.dtype)
        if wire:
            print(reader.answer(wire, config.question or None, config.max_new_tokens))
            return
        first = io.BytesIO(start + file.readline())
        _answer_lines(lw, reader, chain(first, file), config)


def inspect(config: InspectSettings) -> None:
    """What a wire holds."""
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    with _opened(config.wire) as file:
        wire = Wire.unpack(file.read(), lw.folder)
    mine = wire.encoder == lw.wire_id.hex()
    found = {
        "version": wire.version, "codec": wire.codec, "source": wire.source, "encoder": wire.encoder,
        "latents": wire.m, "d_z": wire.d_z, "blocks": list(wire.blocks), "bytes": len(wire.packed),
        "text_bytes": wire.text_bytes, "text_tokens": wire.text_tokens,
        "words": lw.wire(wire.packed).words() if mine else None, "break_even": break_even(lw, wire) if mine else None,
    }  # fmt: skip
    print(json.dumps(found, ensure_ascii=False) if config.json else _shown(wire, found, config.ckpt))


def _shown(wire: Wire, found: Mapping, ckpt: str) -> str:
    lines = [str(wire), f"version {found['version']}, checksum right, latents per block: {found['blocks']}"]
    if found["words"] is None:
        return "\n".join([*lines, f"words: not known, since {ckpt} is of another encoder; name its own with --ckpt"])
    lines.append("words: " + "|".join(word.replace("\n", "\\n") for word in found["words"]))
    lines.append(f"text: {wire.text_tokens} tokens; a reader spends {wire.m} positions on it")
    for llm, cost in found["break_even"].items():
        lines.append(f"{llm:>8}: {cost['says']}")
    return "\n".join(lines)


def _send_lines(lw: LatentWire, how: Mapping) -> None:
    known = encoder_reads_question(lw.source)

    def ready(line: dict) -> dict:
        require_text("context", line["context"])
        if known:
            require_text("question", line.get("question") or "")
        return line

    def wires(some: Sequence[tuple[int, dict]]) -> list[bytes]:
        asked = [line["question"] for _, line in some] if known else None
        return lw.encode([line["context"] for _, line in some], asked, **how)

    with tqdm(unit="text", desc="encoding") as bar:
        for some in _batched(_lines(sys.stdin.buffer, "context", ready), _BATCH):
            for line, wire in _done(some, wires):
                kept = {key: value for key, value in line.items() if key != "context"}
                _write(kept | {"wire": base64.b64encode(wire).decode()})
            bar.update(len(some))


def _done(some: Sequence[tuple[int, dict]], work: Callable[[Sequence], list]) -> Iterator[tuple[dict, object]]:
    """Lines, each with what `work` makes of it; where it refuses one, those before, and a ValueError that names it."""
    try:
        found = work(some)
    except ValueError as error:
        if len(some) == 1:
            raise ValueError(f"line {some[0][0]}: {error}") from error
        for one in some:
            yield from _done([one], work)
    else:
        yield from zip([line for _, line in some], found, strict=True)


def _answer_lines(lw: LatentWire, reader: "WireReader", lines: Iterable[bytes], config: AnswerSettings) -> None:
    later = question_in_tail(lw.source)

    def ready(line: dict) -> dict:
        try:
            packed = base64.b64decode(line["wire"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"the wire is no base64 ({error})") from error
        if later:
            require_text("question", line.get("question") or "")
        return line | {"wire": lw.wire(packed)}

    def answers(some: Sequence[tuple[int, dict]]) -> list[str]:
        asked = [line["question"] if later else None for _, line in some]
        return reader.answer([line["wire"] for _, line in some], asked, config.max_new_tokens)

    for some in _batched(_lines(lines, "wire", ready), config.batch_size):
        for line, found in _done(some, answers):
            _write({key: value for key, value in line.items() if key != "wire"} | {"answer": found})


def _beginning(file: BinaryIO) -> bytes:
    """As much of a file as tells a wire from JSON lines, which a byte order mark and blank lines may stand before."""
    start = file.read(len(MAGIC))
    while not start.strip(_BLANK) and (more := file.read(1)):
        start += more
    return start


def _lines(lines: Iterable[bytes], needed: str, ready: Callable[[dict], dict]) -> Iterator[tuple[int, dict]]:
    """What `ready` makes of each JSON object, with its line; ValueError that names the line of anything else."""
    for number, line in enumerate(lines, 1):
        if not line.strip(_BLANK):
            continue
        try:
            found = json.loads(line.strip(_BLANK))
        except UNREADABLE as error:
            raise ValueError(f"line {number}: no JSON ({error})") from error
        if not isinstance(found, dict) or not isinstance(found.get(needed), str):
            raise ValueError(f'line {number}: needs an object with "{needed}" as text')
        try:
            found = ready(found)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield number, found


def _batched(lines: Iterator[tuple[int, dict]], size: int) -> Iterator[list[tuple[int, dict]]]:
    """Lists of lines; where one is bad, those before it come first."""
    some = []
    try:
        for line in lines:
            some.append(line)
            if len(some) == size:
                yield some
                some = []
    except ValueError:
        if some:
            yield some
        raise
    if some:
        yield some


def _write(line: dict) -> None:
    text = json.dumps(line, ensure_ascii=False)
    half = any("\ud800" <= sign <= "\udfff" for sign in text)  # of a surrogate pair, which UTF-8 does not have
    print(json.dumps(line) if half else text, flush=True)


def _text(name: str, path: str) -> str:
    with _opened(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}={path!r}: not UTF-8 text ({error}); convert it") from error


def _opened(path: str) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    if not Path(path).exists() or Path(path).is_dir():  # a pipe is no regular file: <(command)
        raise FileNotFoundError(f"there is no file {path!r}")
    return open(path, "rb")
