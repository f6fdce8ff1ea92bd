"""The page at /: both answers of each LLM, from the text and from the wire, and what each of them costs.

It asks the service's own queues, and loads nothing from anywhere else.
"""

import asyncio
import html
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio
from fastapi import FastAPI

from latentwire.api.encoding import LatentWire
from latentwire.api.message import Wire
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.service.batching import ClosingError, FullError
from latentwire.utils.cli import require_text

if TYPE_CHECKING:
    from latentwire.api.reading import WireReader
    from latentwire.service.app import Service

MOST_LATENTS = 64
LONGEST = 20_000  # signs of a text: the LLMs' own windows end sooner
_TOKENS = 24  # of an answer at most
EXAMPLE = (
    "The lighthouse on Skerry Point was finished in 1858, after four winters in which storms carried off the "
    "scaffolding twice. Its builder, the engineer Marta Ellingsen, had the granite cut on the mainland and shipped "
    "over in numbered blocks. The lamp burned whale oil until 1874, then paraffin, and has been electric since 1931. "
    "Eleven keepers lived there over the years. The last of them, Tomas Rehn, left in 1987, when the light became "
    "automatic; his logbooks are kept in the harbour museum of Vardby."
)
ASKED = "Who built the lighthouse?"
_HINT = "<p>Ask, and the answers of each LLM stand here: from the whole text, and from the wire alone.</p>"
_CSS = """
.answers .scroll { overflow-x: auto; }
.answers table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.answers table, .answers tr, .answers th, .answers td { border: 0 !important; }
.answers th, .answers td { padding: .5em .6em; text-align: right; white-space: nowrap; vertical-align: top; }
.answers thead th { font-weight: 400; opacity: .75; }
.answers tr.text > * { border-top: 1px solid var(--border-color-primary) !important; }
.answers tr.wire td { background: color-mix(in srgb, var(--color-accent) 10%, transparent); }
.answers .left { text-align: left; }
.answers .answer { white-space: normal; font-weight: 600; width: 45%; min-width: 8em; overflow-wrap: anywhere; }
.answers small { display: block; font-weight: 400; white-space: normal; max-width: 9em; }
.answers p, .marked p, .answers small { opacity: .75; margin: .4em 0; }
.marked .text { white-space: pre-wrap; line-height: 1.7; overflow-wrap: anywhere; }
.marked mark { background: color-mix(in srgb, var(--color-accent) 32%, transparent); color: inherit;
  border-radius: .2em; padding: .08em 0; }
footer { display: none !important; }
"""
_HEAD = (
    '<thead><tr><th class="left">LLM</th><th class="left">reads</th><th class="left">answer</th><th>positions</th>'
    "<th>KV cache</th><th>sent</th><th>time</th></tr></thead>"
)


@dataclass
class _Row:
    """One answer. sent: bytes; seconds: waiting for others included."""

    llm: str
    reads: str
    answer: str | None = None
    positions: int = 0
    kv_bytes: int = 0
    sent: int = 0
    seconds: float = 0.0


def mount(app: FastAPI, service: "Service") -> None:
    """Put the page at / of the service's app."""
    blocks = _blocks(service)
    blocks.queue(max_size=service.config.queue, default_concurrency_limit=service.config.batch)
    gradio.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, css=_CSS,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip


def _blocks(service: "Service") -> gradio.Blocks:
    lw = service.lw
    known = "knows the question" if encoder_reads_question(lw.source) else "does not know the question"
    about = f"{service.config.ckpt} · source {lw.source}: the encoder {known} · encoder {lw.wire_id.hex()}"
    with gradio.Blocks(title="LatentWire", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# LatentWire\nFrozen LLMs answer from a text, and from a short wire of latents.\n\n{about}")
        with gradio.Row():
            with gradio.Column(scale=2):
                text = gradio.Textbox(EXAMPLE, label="Text", lines=9, max_lines=20, elem_id="text")
                question = gradio.Textbox(ASKED, label="Question", elem_id="question")
                with gradio.Row():
                    m = gradio.Slider(1, MOST_LATENTS, min(lw.m, MOST_LATENTS), step=1, label="M, latents per block")
                    codec = gradio.Radio([*lw.codecs], value="fp16", label="Codec")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column(scale=3):
                answers = gradio.HTML(_HINT, elem_id="answers", elem_classes="answers")
                marked = gradio.HTML(elem_id="marked", elem_classes="marked")
        given, shown = [text, question, m, codec], [answers, marked]
        ask = _asker(service)
        button.click(ask, given, shown, api_name="ask")
        question.submit(ask, given, shown, api_name=False)
    return blocks


def _asker(service: "Service") -> Callable[..., AsyncIterator[tuple[str, str]]]:
    per_position = {name: reader.llm.kv_bytes for name, reader in service.readers.items()}

    async def ask(context: str, question: str, m: float, codec: str) -> AsyncIterator[tuple[str, str]]:
        """The table of answers, which grows, and the text with the words that the latents came from."""
        try:
            require_text("text", context)
            require_text("question", question)
            if len(context) > LONGEST:
                raise ValueError(f"the text has {len(context):,} signs; the page takes {LONGEST:,}")
            async for shown in _answers(service, per_position, context.strip(), question.strip(), int(m), codec):
                yield shown
        except (ValueError, FullError, ClosingError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return ask


async def _answers(
    service: "Service", per_position: Mapping[str, int], context: str, question: str, m: int, codec: str
) -> AsyncIterator[tuple[str, str]]:
    known, later = encoder_reads_question(service.lw.source), question_in_tail(service.lw.source)
    key = (not known, ("m", m), ("codec", codec))
    packed, encoding_s = await _timed(service.encoding.submit(key, [(context, question if known else None)])[0])
    wire = await asyncio.to_thread(service.lw.wire, packed)
    marked = await service.encoding.call(lambda: _marked(service.lw, wire, context, question))
    rows = [_Row(name, reads) for name in service.readers for reads in ("text", "wire")]
    yield _table(service, rows, wire, encoding_s), marked
    for row in rows:
        reader, batcher = service.readers[row.llm], service.answering[row.llm]
        if row.reads == "wire":
            asked = batcher.submit(_TOKENS, [(wire, question if later else None)])[0]
            row.answer, row.seconds = await _timed(asked)
            row.positions, row.sent = wire.m, len(packed)
        else:
            asked = batcher.call(_from_text(reader, context, question))
            (row.answer, row.positions), row.seconds = await _timed(asked)
            row.sent = len(reader.prompts.content_text(context, question).encode())
        row.kv_bytes = per_position[row.llm] * row.positions
        yield _table(service, rows, wire, encoding_s), marked


async def _timed(result: Awaitable) -> tuple:
    begun = time.perf_counter()
    return await result, time.perf_counter() - begun


def _from_text(reader: "WireReader", context: str, question: str) -> Callable[[], tuple[str, int]]:
    """Work for the LLM's thread: its answer from the whole text, and the positions that the text takes."""
    llm, prompts = reader.llm, reader.prompts

    def work() -> tuple[str, int]:
        ids, tail = prompts.plain(prompts.content_text(context, question)), prompts.tail(question)
        needed = len(prompts.head) + len(ids) + len(tail) + _TOKENS
        llm.require_positions(needed, "the text makes a prompt of", "shorten it")
        (answer,) = llm.generate_with_prefix(prompts.head, [llm.embed(ids)], [tail], _TOKENS)
        return answer, len(ids)

    return work


def _table(service: "Service", rows: Sequence[_Row], wire: Wire, encoding_s: float) -> str:
    lines = []
    for row in rows:
        cells = ["…", *[""] * 4]
        if row.answer is not None:
            cells = [
                row.answer or "(nothing)", f"{row.positions:,}", _size(row.kv_bytes), _size(row.sent),
                f"{1000 * row.seconds:,.0f} ms",
            ]  # fmt: skip
        answer, *numbers = map(html.escape, cells)
        of = ""
        if row.reads == "text":  # one cell for both of its rows
            name, model = html.escape(row.llm), html.escape(service.readers[row.llm].llm.id)
            of = f'<th class="left" rowspan="2">{name}<small>{model.removeprefix("offline:")}</small></th>'
        lines.append(
            f'<tr class="{row.reads}">{of}<td class="left">{row.reads}</td><td class="left answer">{answer}</td>'
            f"{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"
        )
    said = f"{str(wire).removeprefix('wire: ')}; encoded in {1000 * encoding_s:,.0f} ms"
    table = f"<table>{_HEAD}<tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div><p>Wire: {html.escape(said)}. Times include waiting.</p>'


def _size(count: int) -> str:
    return f"{count:,} B" if count < 100 * 1024 else f"{count / 1024:,.0f} KiB"


def _marked(lw: LatentWire, wire: Wire, context: str, question: str) -> str:
    """The text as HTML, with the words that the latents came from marked."""
    if not lw.encoder.chooses_tokens:
        return f'<div class="text">{html.escape(context)}</div><p>These latents stand for no words.</p>'
    spans, at = [], 0
    known = question if encoder_reads_question(lw.source) else None
    for part, count in zip(lw.parts(context, known), wire.blocks, strict=True):
        at = context.index(part, at)
        asked = Question("page", "", "", part, question, ("-",))
        (chosen,) = lw.encoder.chosen_spans([asked], lw.source, count)
        spans += [(at + begin, at + end) for begin, end in chosen]
        at += len(part)
    about = f"{wire.m} latents; marked: the words they came from"
    return f'<div class="text">{_html_of(context, spans)}</div><p>{about}</p>'


def _html_of(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text, escaped, with its spans marked; those that touch become one."""
    joined: list[list[int]] = []
    for first, last in sorted(span for span in spans if text[slice(*span)].strip()):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(last, joined[-1][1])
        else:
            joined.append([first, last])
    parts, at = [], 0
    for first, last in joined:
        first = last - len(text[first:last].lstrip())  # a token begins with its space
        parts.append(f"{html.escape(text[at:first])}<mark>{html.escape(text[first:last])}</mark>")
        at = last
    return "".join(parts) + html.escape(text[at:])
