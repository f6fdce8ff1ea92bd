"""The wire over HTTP: texts in and wires out, wires in and answers out.

    app = app_of(config, lw, readers)          # FastAPI
    serve(config)                              # loads all of it and runs it until SIGTERM

Requests are worked on in batches (`batching`): one thread encodes, and each LLM has one. Whatever is wrong with one is
{"error": "..."} with a status that says whose fault it is.
"""

import asyncio
import base64
import binascii
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from latentwire import __version__
from latentwire.api.encoding import LatentWire
from latentwire.api.message import Wire
from latentwire.models.wire import CODECS, TooManyError
from latentwire.service import batching
from latentwire.service.gate import Gate
from latentwire.service.settings import ServeSettings

if TYPE_CHECKING:
    from latentwire.api.reading import WireReader

RAW = "application/octet-stream"
_INTERRUPTED = 130  # status of a program that Ctrl+C ended
_LEAVE_S = 3  # for answers to reach their clients, once all work is done
_VANISHED = 499  # nobody reads it but the metrics
_STATUS = {ValueError: 422, batching.VanishedError: _VANISHED, batching.ClosingError: 503}  # whose texts are for users
_OURS = "an error of the service; its log has it"
_MOST_LATENTS, _MOST_TOKENS = 1024, 256  # of one request


class EncodeBody(BaseModel):
    """A text, or several. question: what will be asked of each, unless the checkpoint's source is "context"."""

    model_config = ConfigDict(extra="forbid")
    context: str | list[str]
    question: str | list[str] | None = None
    m: int | None = Field(None, ge=1, le=_MOST_LATENTS)
    codec: Literal[*CODECS] = "fp16"
    budget: float | None = Field(None, gt=0, le=_MOST_LATENTS, allow_inf_nan=False)
    blocks: int | None = Field(None, ge=1)


class AnswerBody(BaseModel):
    """A wire in base64, or several. question: what is asked of each, unless the checkpoint's source is "prompt"."""

    model_config = ConfigDict(extra="forbid")
    wire: str | list[str]
    question: str | list[str] | None = None
    llm: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] = 12
    stream: bool = False


class Service:
    """What all requests share: the checkpoint, its readers by name, their queues, and what is counted."""

    def __init__(self, config: ServeSettings, lw: LatentWire, readers: Mapping[str, "WireReader"]):
        self.config, self.lw, self.readers, self.closing = config, lw, readers, False
        _ = lw.wire_id  # read now: a request would wait for it
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        made = {"registry": self.registry, "namespace": "latentwire"}
        self.requests = prometheus.Counter("requests", "by route and status", ["route", "status"], **made)
        self.seconds = prometheus.Histogram("request_seconds", "from first to last byte", ["route"], **made)
        sizes = prometheus.Histogram(
            "batch_size", "worked on together", ["kind"], buckets=(1, 2, 4, 8, 16, 32, 64), **made
        )
        waiting = prometheus.Gauge("waiting", "texts or wires that wait", ["kind"], **made)

        def batcher(name: str, work: batching.Work, **limits: object) -> batching.Batcher:
            found = batching.Batcher(name, work, config.batch, config.queue, sizes.labels(name).observe, **limits)
            waiting.labels(name).set_function(lambda: found.waiting)
            return found

        self.encoding = None if config.role == "reader" else batcher("encode", self._encode)
        limits = {"size": lambda item: item[0].m, "room": _MOST_LATENTS * config.batch}
        self.answering = {
            name: batcher(f"answer {name}", batching.answers_of(reader), **limits) for name, reader in readers.items()
        }

    def about(self) -> dict:
        """What /v1/models says."""
        lw, readers = self.lw, {name: reader.llm.id for name, reader in self.readers.items()}
        return {
            "checkpoint": self.config.ckpt, "source": lw.source, "wire_id": lw.wire_id.hex(), "m": lw.m,
            "d_z": lw.d_z, "codecs": [*lw.codecs], "role": self.config.role,
            "readers": readers, "version": __version__,
        }  # fmt: skip

    async def close(self) -> None:
        """Refuse new work, and finish what runs and what waits."""
        self.closing = True
        batchers = [*self.answering.values(), *([] if self.encoding is None else [self.encoding])]
        for batcher in batchers:
            batcher.closing = True  # all of them at once
        await asyncio.gather(*(batcher.close() for batcher in batchers))

    def _encode(self, key: tuple, jobs: Sequence[batching.Job]) -> list[bytes]:
        without_question, *how = key
        contexts, questions = zip(*(job.item for job in jobs), strict=True)
        return self.lw.encode(contexts, None if without_question else questions, **dict(how))


def app_of(config: ServeSettings, lw: LatentWire, readers: Mapping[str, "WireReader"]) -> FastAPI:
    """The service, whose state holds its `Service`; readers: by the name of their LLM, none for role "encoder"."""
    service = Service(config, lw, readers)
    app = FastAPI(title="LatentWire", version=__version__, description=__doc__.splitlines()[0])
    app.state.service = service
    app.add_middleware(Gate, service=service)
    _say_errors(app)

    @app.get("/health")
    async def health() -> Response:
        """200 while the service takes work, 503 while it ends."""
        return JSONResponse({"status": "closing" if service.closing else "ok"}, 503 if service.closing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(prometheus.generate_latest(service.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict:
        """Which wires this service makes and reads."""
        return service.about()

    if service.encoding is not None:

        @app.post("/v1/encode")
        async def encode(body: EncodeBody, request: Request) -> Response:
            """Wires of texts, in base64; with `Accept: application/octet-stream` the bytes of the one wire."""
            return await _encoded(service, body, request)

    if service.answering:

        @app.post("/v1/answer")
        async def answer(body: AnswerBody, request: Request) -> Response:
            """Greedy answers from wires. stream: events with {"text": piece} as they come, then {"answer": all}."""
            return await _answered(service, body, request)

    if config.page and config.role == "both":
        from latentwire.service.page import mount  # gradio is slow to import

        mount(app, service)
    return app


async def _encoded(service: Service, body: EncodeBody, request: Request) -> Response:
    contexts, questions = _items(service, "context", body.context, body.question)
    key = (body.question is None, *((name, getattr(body, name)) for name in ("m", "codec", "budget", "blocks")))
    futures = service.encoding.submit(key, [*zip(contexts, questions, strict=True)])
    wires = await batching.results(futures, request.receive)
    if isinstance(body.context, str) and RAW in request.headers.get("accept", ""):
        return Response(wires[0], media_type=RAW)
    latents = await asyncio.to_thread(lambda: [service.lw.wire(wire).m for wire in wires])  # decoding takes its time
    told = {
        "wire": [base64.b64encode(wire).decode() for wire in wires], "bytes": [*map(len, wires)], "latents": latents,
    }  # fmt: skip
    return JSONResponse({name: found[0] for name, found in told.items()} if isinstance(body.context, str) else told)


async def _answered(service: Service, body: AnswerBody, request: Request) -> Response:
    name = body.llm or next(iter(service.readers))
    if name not in service.readers:
        raise HTTPException(404, f"llm={name!r}: not served here; choose one of {', '.join(service.readers)}")
    sent, questions = _items(service, "wire", body.wire, body.question)
    one = isinstance(body.wire, str)
    if body.stream and not one:
        raise ValueError("stream: one wire at a time; send it as text, not as a list")

    def unpacked() -> list[Wire]:
        reader = service.readers[name]
        return [_unpacked(reader, text, "" if one else f"item {i}: ") for i, text in enumerate(sent, 1)]

    wires = await asyncio.to_thread(unpacked)  # decoding takes its time; others are served meanwhile
    items = [*zip(wires, questions, strict=True)]
    batcher, key = service.answering[name], body.max_new_tokens
    if body.stream:
        return await _streamed(request, batcher, key, items)
    answers = await batching.results(batcher.submit(key, items), request.receive)
    return JSONResponse({"answer": answers[0] if one else answers})


def _items(
    service: Service, name: str, given: str | list[str], question: str | list[str] | None
) -> tuple[list[str], list[str | None]]:
    """Texts or wires, and the question of each. ValueError, or HTTP 413, where there are too few or too many."""
    items = [given] if isinstance(given, str) else given
    if len(items) > service.config.items:
        raise HTTPException(413, f"{name}: {len(items)} in one request, and {service.config.items} may be; split them")
    if not items:
        raise ValueError(f"{name}=[]: empty; send at least one")
    if question is None:
        return items, [None] * len(items)
    questions = [question] if isinstance(question, str) else question
    if len(questions) != len(items) or isinstance(given, str) != isinstance(question, str):
        raise ValueError(f"question: {len(questions)} for {len(items)} of {name!r}; as many, and text or list like it")
    return items, questions


def _unpacked(reader: "WireReader", text: str, where: str) -> Wire:
    """The wire; HTTP 400 for what is no whole wire, ValueError for one that this reader cannot read."""
    try:
        wire = Wire.unpack(base64.b64decode(text, validate=True), reader.folder, most=reader.llm.positions)
    except TooManyError as error:
        raise ValueError(f"{where}{error}") from error
    except (ValueError, FileNotFoundError) as error:  # the latter: a codec that needs tables, and there are none
        what = "the wire is no base64: " if isinstance(error, binascii.Error) else ""
        raise HTTPException(400, f"{where}{what}{error}") from error
    try:
        return reader.wire(wire)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


async def _streamed(request: Request, batcher: batching.Batcher, key: int, items: Sequence) -> Response:
    """Server-sent events. The response begins with the first token: an error before it has its own status."""
    loop, known = asyncio.get_running_loop(), asyncio.Queue()
    (future,) = batcher.submit(key, items, lambda text: loop.call_soon_threadsafe(known.put_nowait, text))
    future.add_done_callback(lambda _: known.put_nowait(None))
    with ExitStack() as failing:
        failing.callback(future.cancel)
        first = await batching.while_there(known.get(), request.receive)
        if first is None:
            future.result()  # raises what went wrong
        failing.pop_all()

    async def events() -> AsyncIterator[str]:
        """Pieces of text as they come, then the answer or the error."""
        sent, text = "", first
        try:
            while text is not None:
                if len(text) > len(sent) and text.startswith(sent):
                    yield _event({"text": text[len(sent) :]})
                    sent = text
                text = await known.get()
            if error := future.exception():
                told = isinstance(error, tuple(_STATUS))
                yield _event({"error": str(error) if told else _OURS})
                if not told:
                    raise error  # into the log
                return
            answer = future.result()
            if len(answer) > len(sent) and answer.startswith(sent):
                yield _event({"text": answer[len(sent) :]})
            yield _event({"answer": answer})
        finally:
            future.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(content: Mapping) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _say_errors(app: FastAPI) -> None:
    """Every error as {"error": "..."}."""

    def said(status: int, text: str, headers: Mapping | None = None) -> Response:
        return JSONResponse({"error": text}, status, headers)

    def shown(error: RequestValidationError) -> str:
        found = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()]
        return "; ".join(found[:3])

    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, lambda _, error, status=status: said(status, str(error)))
    app.add_exception_handler(RequestValidationError, lambda _, error: said(422, shown(error)))
    app.add_exception_handler(
        batching.FullError, lambda _, error: said(429, str(error), {"Retry-After": str(error.seconds)})
    )
    app.add_exception_handler(AnyHTTPException, lambda _, error: said(error.status_code, str(error.detail)))
    app.add_exception_handler(Exception, lambda *_: said(500, _OURS))


def serve(config: ServeSettings) -> None:
    """Load what the role needs, and answer until SIGTERM or Ctrl+C. Raises ValueError where the port is taken."""
    listening = _bound(config)  # told before the models are loaded
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    if config.role != "reader":
        _status(f"loading the encoder of {config.ckpt}")
        _ = lw.encoder
    app = app_of(config, lw, load_readers(config, lw) if config.role != "encoder" else {})
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    how = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _LEAVE_S}
    _Server(uvicorn.Config(app, **how), app.state.service, address).run(sockets=[listening])


def load_readers(config: ServeSettings, lw: LatentWire) -> dict[str, "WireReader"]:
    """The readers that the settings name, each with the head of its prompts read already."""
    readers = {}
    for name in filter(None, config.llm.split(",")) if config.llm else lw.llms:
        _status(f"loading the LLM {name.strip()}")
        reader = readers[name.strip()] = lw.reader(name.strip(), dtype=config.dtype)
        reader.llm.prefill(reader.prompts.head, [reader.llm.embed([])], [reader.prompts.tail("")])  # of text
        reader.read_opening()
    return readers


class _Server(uvicorn.Server):
    """Says where it listens. At SIGTERM it refuses new work, finishes what it has, and only then stops to listen."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str):
        super().__init__(config)
        self.service, self.address = service, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _status(f"serving {self.service.config.ckpt} on {self.address} (Ctrl+C ends it)")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _status("finishing what was asked; no new work is taken")
        closing = asyncio.create_task(self.service.close())
        while not closing.done() and not self.force_exit:  # a second Ctrl+C does not wait
            await asyncio.wait([closing], timeout=0.1)
        await super().shutdown(sockets)
        if self.force_exit:  # else Python would wait for the thread that computes
            os._exit(_INTERRUPTED)


def _bound(config: ServeSettings) -> socket.socket:
    """A socket that nobody can connect to yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ValueError(f"port={config.port}: {config.host} cannot listen there ({error}); choose others") from error
    return found


def _status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
