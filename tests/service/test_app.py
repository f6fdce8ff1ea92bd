"""The service: what the API gives comes out over HTTP; whatever else comes in has a clear status and harms nobody."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import torch
from service.service_tools import MOST_WAIT_S, listening, until

from latentwire import LatentWire
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import ADAPTERS, grown
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.wire.compact import Compact, codebook_of
from latentwire.service import app as app_module
from latentwire.service.app import app_of, load_readers, serve
from latentwire.service.batching import Batcher, ClosingError, FullError
from latentwire.service.settings import ServeSettings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def readers(lw):
    return load_readers(ServeSettings(ckpt=str(lw.folder)), lw)


@pytest.fixture(scope="module")
def wires(lw, short_questions):
    some = short_questions[:20]
    return lw.encode([q.context for q in some], [q.question for q in some])


@pytest.fixture(scope="module")
def longest(readers, wires):
    """The wire with the longest answer."""
    return max(wires, key=lambda wire: len(readers["llama"].answer(wire, max_new_tokens=256)))


@pytest.fixture
def app(lw, readers):
    """app(**settings): the service, without a page."""

    def make(**settings):
        return app_of(ServeSettings(ckpt=str(lw.folder), page=False, **settings), lw, readers)

    return make


@asynccontextmanager
async def client(app, **how):
    """An HTTP client of an app, without sockets."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=MOST_WAIT_S, **how) as found:
        yield found


def post(app, path, **how):
    async def run():
        async with client(app) as http:
            return await http.post(path, **how)

    return asyncio.run(run())


def text_of(wire):
    return base64.b64encode(wire).decode()


def events_of(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def test_over_a_socket_encoding_and_answering_are_those_of_the_api(app, lw, readers, short_questions):
    q = short_questions[0]
    asked = {"context": q.context, "question": q.question}
    expected = lw.encode(q.context, q.question)
    with listening(app()) as address, httpx.Client(base_url=address, timeout=MOST_WAIT_S) as http:
        told = http.post("/v1/encode", json=asked).json()
        assert base64.b64decode(told["wire"]) == expected
        assert (told["bytes"], told["latents"]) == (len(expected), 12)
        raw = http.post("/v1/encode", json=asked, headers={"Accept": "application/octet-stream"})
        assert raw.content == expected and raw.headers["content-type"] == "application/octet-stream"
        for llm, reader in readers.items():
            told_back = http.post("/v1/answer", json={"wire": told["wire"], "llm": llm, "max_new_tokens": 9})
            assert told_back.json() == {"answer": reader.answer(expected, max_new_tokens=9)}
        about = http.get("/v1/models").json()
        assert about["wire_id"] == lw.wire_id.hex() and about["readers"].keys() == {"llama", "qwen"}
        assert (about["source"], about["m"], about["d_z"], about["role"]) == ("prompt", 12, 24, "both")
        assert {"/v1/encode", "/v1/answer"} <= http.get("/openapi.json").json()["paths"].keys()
        assert http.get("/health").json() == {"status": "ok"} and http.get("/docs").status_code == 200
        counted = http.get("/metrics").text
        assert 'latentwire_requests_total{route="/v1/answer",status="200"} 2.0' in counted
        assert 'latentwire_batch_size_count{kind="encode"} 2.0' in counted


def test_lists_codecs_and_sizes_reach_the_encoder(app, lw, readers, short_questions):
    contexts, asked = [q.context for q in short_questions[:3]], [q.question for q in short_questions[:3]]
    for how in ({"m": 5, "codec": "int4"}, {"budget": 20.0, "codec": "int8"}):
        told = post(app(), "/v1/encode", json={"context": contexts, "question": asked, **how}).json()
        expected = lw.encode(contexts, asked, **how)
        assert [base64.b64decode(wire) for wire in told["wire"]] == expected
        assert told["latents"] == [lw.wire(wire).m for wire in expected]
    told = post(app(), "/v1/answer", json={"wire": [*map(text_of, expected)]}).json()
    assert told["answer"] == readers["llama"].answer(expected)


def test_wires_are_decoded_while_others_are_served(app, lw, short_questions, monkeypatch):
    threads, wire = [], lw.wire
    monkeypatch.setattr(lw, "wire", lambda packed: threads.append(threading.current_thread()) or wire(packed))
    contexts, asked = [q.context for q in short_questions[:3]], [q.question for q in short_questions[:3]]
    told = post(app(), "/v1/encode", json={"context": contexts, "question": asked}).json()
    assert told["latents"] == [12] * 3 and len(threads) == 3
    assert threading.current_thread() not in threads, "which is the event loop's"


def test_compact_wires_are_served_where_there_are_tables(checkpoint_of, short_questions):
    lw, other = (LatentWire.from_pretrained(checkpoint_of("prompt", seed=seed)) for seed in (5, 6))
    q, settings = short_questions[0], ServeSettings(page=False)
    body = {"context": q.context, "question": q.question, "codec": "compact2"}
    assert post(app_of(settings, other, {}), "/v1/encode", json=body).status_code == 422
    codes, latents = codebook_of(lw.folder), torch.from_numpy(lw.wire(lw.encode(q.context, q.question)).z)
    Compact.fit(codes, latents, torch.ones(len(codes))).save(lw.folder)
    reader = lw.reader("llama")
    app, wire = app_of(settings, lw, {"llama": reader}), lw.encode(q.context, q.question, codec="compact2")
    told = post(app, "/v1/encode", json=body).json()
    assert (told["wire"], told["latents"]) == (text_of(wire), lw.wire(wire).m)
    assert post(app, "/v1/answer", json={"wire": text_of(wire)}).json()["answer"] == reader.answer(wire)
    without = post(
        app_of(settings, other, {"llama": other.reader("llama")}), "/v1/answer", json={"wire": text_of(wire)}
    )
    assert without.status_code == 400 and "compact codecs need tables" in without.text


def test_with_source_context_each_answer_has_its_question(checkpoint_of, short_questions):
    lw = LatentWire.from_pretrained(checkpoint_of("context"))
    reader = lw.reader("qwen")
    app = app_of(ServeSettings(page=False), lw, {"qwen": reader})
    wire = base64.b64decode(post(app, "/v1/encode", json={"context": short_questions[0].context}).json()["wire"])
    assert wire == lw.encode(short_questions[0].context)
    asked = [q.question for q in short_questions[:2]]
    told = post(app, "/v1/answer", json={"wire": [text_of(wire)] * 2, "question": asked}).json()
    assert told["answer"] == reader.answer([wire] * 2, asked)
    for body in ({"wire": text_of(wire)}, {"wire": text_of(wire), "question": " "}):
        refused = post(app, "/v1/answer", json=body)
        assert refused.status_code == 422 and "question" in refused.json()["error"]


def test_with_source_aware_both_requests_have_the_question(checkpoint_of, short_questions):
    lw, q = LatentWire.from_pretrained(checkpoint_of("aware")), short_questions[0]
    reader = lw.reader("qwen")
    app = app_of(ServeSettings(page=False), lw, {"qwen": reader})
    asked = {"context": q.context, "question": q.question}
    wire = base64.b64decode(post(app, "/v1/encode", json=asked).json()["wire"])
    assert wire == lw.encode(q.context, q.question)
    told = post(app, "/v1/answer", json={"wire": text_of(wire), "question": q.question}).json()
    assert told["answer"] == reader.answer(wire, q.question)
    for path, body in (("/v1/encode", {"context": q.context}), ("/v1/answer", {"wire": text_of(wire)})):
        refused = post(app, path, json=body)
        assert refused.status_code == 422 and "question" in refused.json()["error"]


def test_requests_at_the_same_time_are_answered_together_and_as_alone(app, lw, readers, short_questions, wires):
    service = app(batch=8)

    async def run():
        async with client(service) as http:
            encoded = [
                http.post("/v1/encode", json={"context": q.context, "question": q.question})
                for q in short_questions[:20]
            ]
            bodies = [
                {"wire": text_of(wire), "llm": "qwen", "max_new_tokens": 3 + i % 2} for i, wire in enumerate(wires)
            ]
            return await asyncio.gather(*encoded, *(http.post("/v1/answer", json=body) for body in bodies))

    found = [response.json() for response in asyncio.run(run())]
    assert [base64.b64decode(told["wire"]) for told in found[:20]] == wires
    alone = [readers["qwen"].answer(wire, max_new_tokens=3 + i % 2) for i, wire in enumerate(wires)]
    assert [told["answer"] for told in found[20:]] == alone and len(set(alone)) > 1
    counted = service.state.service.registry.get_sample_value
    assert counted("latentwire_batch_size_sum", {"kind": "answer qwen"}) == 20
    assert counted("latentwire_batch_size_count", {"kind": "answer qwen"}) <= 6


def test_fewer_wires_are_read_together_where_they_have_many_latents(app, readers, wires, monkeypatch):
    monkeypatch.setattr(app_module, "_MOST_LATENTS", 3)
    service = app(batch=8)  # room for 24 latents, and a wire has 12
    told = post(service, "/v1/answer", json={"wire": [*map(text_of, wires[:4])], "llm": "qwen"}).json()
    assert told["answer"] == [readers["qwen"].answer(wire) for wire in wires[:4]]
    counted = service.state.service.registry.get_sample_value
    assert counted("latentwire_batch_size_sum", {"kind": "answer qwen"}) == 4
    assert counted("latentwire_batch_size_count", {"kind": "answer qwen"}) == 2


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_a_stream_comes_in_pieces_and_joined_it_is_the_answer(app, readers, wires, llm):
    service = app()

    async def run():
        async with client(service) as http:
            bodies = [{"wire": text_of(wire), "llm": llm, "max_new_tokens": 20} for wire in wires]
            streams = [http.post("/v1/answer", json=body | {"stream": True}) for body in bodies]
            return await asyncio.gather(*streams, *(http.post("/v1/answer", json=body) for body in bodies))

    found = asyncio.run(run())
    expected = [readers[llm].answer(wire, max_new_tokens=20) for wire in wires]
    assert found[0].headers["content-type"].startswith("text/event-stream")
    events = [events_of(response.text) for response in found[:20]]
    assert [told[-1]["answer"] for told in events] == expected
    assert ["".join(piece["text"] for piece in told[:-1]) for told in events] == expected
    assert max(map(len, events)) > 4
    assert [response.json()["answer"] for response in found[20:]] == expected


def test_an_error_before_the_first_piece_has_its_status(app, readers, wires, monkeypatch):
    monkeypatch.setattr(readers["llama"].llm, "positions", 5)
    refused = post(app(), "/v1/answer", json={"wire": text_of(wires[0]), "stream": True})
    assert refused.status_code == 422 and "positions" in refused.json()["error"]


@pytest.mark.parametrize(
    ("error", "says"), [(ValueError("too late"), "too late"), (KeyError("a mistake of ours"), "its log has it")]
)
def test_an_error_after_the_first_piece_is_the_last_event(app, readers, longest, monkeypatch, error, says):
    answer = readers["llama"].answer

    def late(*given):
        answer(*given)
        raise error

    monkeypatch.setattr(readers["llama"], "answer", late)
    asked = {"wire": text_of(longest), "max_new_tokens": 20, "stream": True}
    found = post(app(), "/v1/answer", json=asked)
    events = events_of(found.text)
    assert found.status_code == 200 and len(events) > 1 and says in events[-1]["error"]
    assert "mistake" not in found.text


BAD = [
    ("/v1/answer", {"wire": "%%%"}, 400, "no base64"),
    ("/v1/answer", {"wire": ""}, 400, "wire too short"),
    ("/v1/answer", {"wire": lambda wire: wire[:-9]}, 400, "checksum mismatch"),
    ("/v1/answer", {"wire": lambda wire: b"LWIR\x09" + wire[5:]}, 400, "wire version 9 is unknown"),
    ("/v1/answer", {"wire": [lambda wire: wire, lambda wire: b"\x89PNG" + wire]}, 400, "item 2: not a LatentWire wire"),
    ("/v1/answer", {"wire": []}, 422, "wire=[]"),
    ("/v1/answer", {"wire": lambda wire: wire, "llm": "gemma"}, 404, "choose one of llama, qwen"),
    ("/v1/answer", {"wire": lambda wire: wire, "question": "Who?"}, 422, "holds its question"),
    ("/v1/answer", {"wire": lambda wire: wire, "max_new_tokens": 10**6}, 422, "max_new_tokens"),
    ("/v1/answer", {"wire": [lambda wire: wire], "stream": True}, 422, "one wire at a time"),
    ("/v1/answer", {"wire": [lambda wire: wire] * 9}, 413, "9 in one request"),
    ("/v1/encode", {"context": "", "question": "Who?"}, 422, "context=''"),
    ("/v1/encode", {"context": ["A text.", "\n"], "question": ["Who?", "What?"]}, 422, "item 2: context="),
    ("/v1/encode", {"context": "A text."}, 422, "needs the question"),
    ("/v1/encode", {"context": ["a", "b"], "question": ["Who?"]}, 422, "question: 1 for 2"),
    ("/v1/encode", {"context": ["a"], "question": "Who?"}, 422, "question: 1 for 1"),
    ("/v1/encode", {"context": ["a"] * 9, "question": ["Who?"] * 9}, 413, "9 in one request"),
    ("/v1/encode", {"context": "a", "question": "Who?", "codec": "zip"}, 422, "codec"),
    ("/v1/encode", {"context": "a", "question": "Who?", "m": 0}, 422, "m: "),
    ("/v1/encode", {"context": "a", "question": "Who?", "m": 4, "budget": 1}, 422, "leave one out"),
    ("/v1/encode", {"context": "a", "question": "Who?", "budget": float("inf")}, 422, "budget"),
    ("/v1/encode", {"context": "a", "question": "Who?", "colour": "red"}, 422, "colour"),
    ("/v1/encode", {"context": "\ud800", "question": "Who?"}, 422, "context"),
    ("/v1/encode", {"context": 7}, 422, "context"),
    ("/v1/encode", None, 422, "JSON"),
    ("/v1/encode", "[" * 200_000, 400, "body"),
    ("/v1/nothing", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_with_a_request_is_said_by_status_and_text(app, wires, path, body, status, says):
    def filled(value):
        if isinstance(value, list):
            return [filled(one) for one in value]
        return text_of(value(wires[0])) if callable(value) else value

    data = (
        body
        if isinstance(body, str)
        else "no json"
        if body is None
        else json.dumps({k: filled(v) for k, v in body.items()})
    )
    found = post(app(items=8), path, content=data, headers={"Content-Type": "application/json"})
    assert found.status_code == status and says in found.json()["error"], found.text


def test_a_wire_of_another_checkpoint_is_refused_by_name(app, checkpoint_of, short_questions):
    other = LatentWire.from_pretrained(checkpoint_of("prompt", seed=1))
    wire = text_of(other.encode(short_questions[0].context, short_questions[0].question))
    refused = post(app(), "/v1/answer", json={"wire": wire})
    assert refused.status_code == 422 and f"encoder {other.wire_id.hex()}" in refused.json()["error"]


def test_ten_megabytes_are_refused_while_they_come_and_nobody_else_notices(app, short_questions):
    """Over a socket, with and without a length that says so before."""

    def parts():
        yield b'{"question": "Who?", "context": "'
        for _ in range(1000):
            yield b"a word or two " * 750
        yield b'"}'

    q = short_questions[0]
    with listening(app()) as address, httpx.Client(base_url=address, timeout=MOST_WAIT_S) as http:
        for content in (parts(), b"".join(parts())):
            refused = http.post("/v1/encode", content=content, headers={"Content-Type": "application/json"})
            assert refused.status_code == 413 and "2,000,000 bytes" in refused.json()["error"]
        assert http.post("/v1/encode", json={"context": q.context, "question": q.question}).status_code == 200


def test_no_more_of_a_body_is_taken_than_may_be(app):
    taken = []

    async def parts():
        for _ in range(50):
            taken.append(1)
            yield b"x" * 2**20

    refused = post(app(), "/v1/encode", content=parts(), headers={"Content-Type": "application/json"})
    assert refused.status_code == 413 and len(taken) <= 3


def test_a_bad_request_fails_alone(app, readers, wires):
    """All wait together, so they are one batch."""
    service = app(batch=32)
    bodies = [{"wire": text_of(wire)} | ({"question": "Who?"} if i % 5 == 2 else {}) for i, wire in enumerate(wires)]

    async def run():
        async with client(service) as http:
            return await asyncio.gather(*(http.post("/v1/answer", json=body) for body in bodies))

    for i, (wire, found) in enumerate(zip(wires, asyncio.run(run()), strict=True)):
        assert found.status_code == (422 if i % 5 == 2 else 200)
        assert i % 5 == 2 or found.json() == {"answer": readers["llama"].answer(wire)}
    assert service.state.service.registry.get_sample_value("latentwire_batch_size_count", {"kind": "answer llama"}) < 3


def test_of_a_thousand_at_once_some_are_told_to_come_back_and_all_others_have_their_own_answer(app, readers, wires):
    service, most = app(queue=100), 1000
    answers = readers["qwen"].answer(wires)

    async def run():
        async with client(service) as http:
            bodies = [{"wire": text_of(wires[i % 20]), "llm": "qwen"} for i in range(most)]
            return await asyncio.gather(*(http.post("/v1/answer", json=body) for body in bodies))

    found = asyncio.run(run())
    served = {i for i, response in enumerate(found) if response.status_code == 200}
    assert len(served) >= 100
    assert all(found[i].json() == {"answer": answers[i % 20]} for i in served)
    refused = [response for i, response in enumerate(found) if i not in served]
    assert {response.status_code for response in refused} == {429}
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    assert "come back" in refused[0].json()["error"]
    counted = service.state.service.registry.get_sample_value
    assert counted("latentwire_requests_total", {"route": "/v1/answer", "status": "429"}) == len(refused) > 0


def test_a_token_is_asked_for_where_one_is_set(app, wires, monkeypatch):
    monkeypatch.setenv("LATENTWIRE_TOKEN", "sesame")
    service, body = app(), {"wire": text_of(wires[0])}
    basic = base64.b64encode(b"anybody:sesame").decode()
    for header, status in (
        ("", 401), ("Bearer wrong", 401), ("sesame", 401), ("Basic %%%", 401), ("Bearer sesame", 200),
        ("bearer sesame", 200), (f"Basic {basic}", 200),
    ):  # fmt: skip
        headers = {"Authorization": header} if header else {}
        found = post(service, "/v1/answer", json=body, headers=headers)
        assert found.status_code == status, header
        assert status == 200 or ("token" in found.json()["error"] and "Basic" in found.headers["WWW-Authenticate"])

    async def run():
        async with client(service) as http:
            return [(await http.get(path)).status_code for path in ("/health", "/metrics", "/docs", "/v1/models")]

    assert asyncio.run(run()) == [200, 401, 401, 401]
    monkeypatch.setenv("LATENTWIRE_TOKEN", "sesame\n")  # as a file that holds it ends
    assert post(app(), "/v1/answer", json=body, headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_without_a_token_it_listens_on_this_machine_only(monkeypatch):
    monkeypatch.delenv("LATENTWIRE_TOKEN", raising=False)
    for host in ("0.0.0.0", "192.168.0.7", "::"):
        with pytest.raises(ValueError, match="LATENTWIRE_TOKEN"):
            ServeSettings(host=host)
    monkeypatch.setenv("LATENTWIRE_TOKEN", " \n")
    with pytest.raises(ValueError, match="LATENTWIRE_TOKEN"):
        ServeSettings(host="0.0.0.0")
    monkeypatch.setenv("LATENTWIRE_TOKEN", "sesame")
    assert ServeSettings(host="0.0.0.0").host == "0.0.0.0"
    with pytest.raises(ValueError, match="port=70000: at most 65535"):
        ServeSettings(port=70000)


def test_a_request_may_be_as_large_as_its_items_allow(app, wires):
    config = ServeSettings()
    body = json.dumps({"wire": [text_of(bytes(16_417))] * config.items})
    assert len(body) < config.body_bytes, "what one request encodes another one can bring back"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(lw):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}"):
            serve(ServeSettings(ckpt="nowhere", port=port))


def test_a_service_that_ends_refuses_new_work_and_finishes_what_waits(app, readers, wires, monkeypatch):
    service, submitted = app(batch=1), []
    batcher = service.state.service.answering["llama"]
    submit = batcher.submit
    monkeypatch.setattr(batcher, "submit", lambda *given: submitted.append(given) or submit(*given))

    async def run():
        async with client(service) as http:
            body = {"wire": text_of(wires[0]), "max_new_tokens": 20}
            asked = [asyncio.create_task(http.post("/v1/answer", json=body)) for _ in range(4)]
            while len(submitted) < 4:
                await asyncio.sleep(0)
            closing = asyncio.create_task(service.state.service.close())
            await asyncio.sleep(0)
            late, health = await http.post("/v1/answer", json=body), await http.get("/health")
            await closing
            return await asyncio.gather(*asked), late, health

    asked, late, health = asyncio.run(run())
    assert [found.json() for found in asked] == [{"answer": readers["llama"].answer(wires[0], max_new_tokens=20)}] * 4
    assert (late.status_code, health.status_code) == (503, 503) and "shutting down" in late.json()["error"]


def test_work_of_clients_who_vanished_is_dropped(app, readers, wires, monkeypatch):
    """One client's work runs, two wait, one of them goes away."""
    service, go, seen, answer = app(batch=1), threading.Event(), [], readers["llama"].answer

    def slow(z, short_questions, most):
        seen.append(most)
        assert go.wait(MOST_WAIT_S)
        return answer(z, short_questions, most)

    monkeypatch.setattr(readers["llama"], "answer", slow)
    batcher = service.state.service.answering["llama"]

    def ask(most):
        sent = json.dumps({"wire": text_of(wires[0]), "max_new_tokens": most}).encode()
        head = f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
        found = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        found.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + sent)
        return found

    with listening(service) as address:
        sockets = [ask(1)]
        until(lambda: seen == [1])
        sockets += [ask(2), ask(3)]
        until(lambda: batcher.waiting == 2)
        sockets[1].close()
        until(lambda: batcher.waiting == 1)
        go.set()
        for found in (sockets[0], sockets[2]):
            with found, found.makefile("rb") as file:
                assert b" 200 " in file.readline()
    assert seen == [1, 3]
    counted = service.state.service.registry.get_sample_value
    assert counted("latentwire_requests_total", {"route": "/v1/answer", "status": "499"}) == 1


def test_an_answer_that_nobody_waits_for_is_not_finished(app, readers, longest):
    """The client of a stream leaves after the first piece."""
    steps = []
    handle = readers["llama"].llm.embedding.register_forward_hook(lambda _, given, __: steps.append(given[0].shape))
    readers["llama"].answer(longest, max_new_tokens=256)
    needed = len(steps)
    steps.clear()
    body = {"wire": text_of(longest), "max_new_tokens": 256, "stream": True}
    service = app()
    with listening(service) as address, httpx.Client(base_url=address, timeout=MOST_WAIT_S) as http:
        with http.stream("POST", "/v1/answer", json=body) as response:
            assert "text" in next(response.iter_lines())
        until(lambda: service.state.service.answering["llama"]._runner.done())
    handle.remove()
    assert len(steps) < needed - 50


def test_an_error_of_the_service_itself_is_500_and_not_its_end(app, readers, wires, monkeypatch):
    def broken(*_):
        raise KeyError("a mistake of ours")

    service = app()
    with monkeypatch.context() as patch:
        patch.setattr(readers["llama"], "answer", broken)
        failed = post(service, "/v1/answer", json={"wire": text_of(wires[0])})
    assert failed.status_code == 500 and "log" in failed.json()["error"] and "mistake" not in failed.text
    assert post(service, "/v1/answer", json={"wire": text_of(wires[0])}).status_code == 200


def test_a_role_has_its_half_only(lw, readers, short_questions, wires, tmp_path):
    encoder = app_of(ServeSettings(role="encoder"), lw, {})
    assert post(encoder, "/v1/answer", json={"wire": text_of(wires[0])}).status_code == 404
    folder = shutil.copytree(lw.folder, tmp_path / "readers")
    for path in folder.glob("encoder*"):
        path.unlink()
    reading = LatentWire.from_pretrained(folder)
    reader = app_of(ServeSettings(role="reader"), reading, {"qwen": reading.reader("qwen")})
    q = short_questions[0]
    assert post(reader, "/v1/encode", json={"context": q.context, "question": q.question}).status_code == 404
    told = post(reader, "/v1/answer", json={"wire": text_of(wires[0])}).json()
    assert told == {"answer": readers["qwen"].answer(wires[0])}


@pytest.mark.parametrize(
    ("role", "needs"), [("encoder", ["encoder"]), ("reader", ["llm"]), ("both", ["encoder", "llm"])]
)
def test_a_role_loads_its_half_only(lw, monkeypatch, role, needs):
    loaded = []
    monkeypatch.setattr(app_module, "load_readers", lambda *_: loaded.append("llm") or {})
    monkeypatch.setattr(LatentWire, "encoder", property(lambda _: loaded.append("encoder")))
    monkeypatch.setattr(app_module._Server, "run", lambda *_, **__: None)
    serve(ServeSettings(ckpt=str(lw.folder), role=role, port=0, page=False))
    assert loaded == needs


def test_the_llms_that_are_named_are_loaded_alone(lw):
    assert [*load_readers(ServeSettings(ckpt=str(lw.folder), llm=" qwen"), lw)] == ["qwen"]


@pytest.mark.parametrize("kind", ["preamble", "deep"])
def test_what_all_prompts_begin_with_is_read_before_the_first_request(
    lw, llms, short_questions, tmp_path, monkeypatch, kind
):
    encoder, adapters, made = load_checkpoint(lw.folder, lw.llms)
    heads = {name: PromptBuilder(llm.tokenizer, lw.source, "chat").head for name, llm in llms.items()}
    kept = {name: grown(one, ADAPTERS[kind], llms[name], heads[name]) for name, one in adapters.items()}
    save_checkpoint(tmp_path / kind, encoder, kept, made)
    (reader,) = load_readers(ServeSettings(ckpt=str(tmp_path / kind), llm="qwen"), LatentWire(tmp_path / kind)).values()
    assert reader.adapter.constant > 0
    for constant in (0, reader.adapter.constant):  # of text, and of wires
        assert (reader.prompts.head, constant) in reader.llm._openings
    monkeypatch.setattr(reader.llm, "_read_on", lambda *_: pytest.fail("read again"))
    wire = lw.encode(short_questions[0].context, short_questions[0].question)
    assert reader.answer([wire] * 2) == [reader.answer(wire)] * 2


def test_an_encoding_service_imports_and_holds_no_llm(lw, short_questions):
    code = f"""
import gc, sys
from fastapi.testclient import TestClient
from latentwire import LatentWire
from latentwire.service.app import app_of
from latentwire.service.settings import ServeSettings
from transformers import PreTrainedModel
app = app_of(ServeSettings(role="encoder"), LatentWire.from_pretrained({str(lw.folder)!r}), {{}})
body = {{"context": {short_questions[0].context!r}, "question": {short_questions[0].question!r}}}
assert TestClient(app).post("/v1/encode", json=body).status_code == 200
print(*{{type(x).__name__ for x in gc.get_objects() if isinstance(x, PreTrainedModel)}})
print(*[name for name in sys.modules if name.startswith("latentwire.llms.") or name == "gradio"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    models, modules = done.stdout.splitlines()[-2:]
    assert "BertModel" in models and "CausalLM" not in models
    assert not {"latentwire.llms.frozen", "latentwire.llms.loading", "gradio"} & set(modules.split())


def test_sigterm_ends_the_script_once_it_has_finished_what_it_was_asked(lw, readers, longest, warm, tmp_path):
    """As an operator does it: scripts/serve.sh with its page, a browser's open connection, a stream that runs, a
    request that waits."""
    variables = warm | {"CKPT": str(lw.folder), "PORT": "0", "BATCH": "1", "BIND": "127.0.0.1"}
    command = ["bash", str(ROOT / "scripts" / "serve.sh")]
    with open(tmp_path / "log", "w") as log:
        service = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log)
    until(lambda: "serving " in (tmp_path / "log").read_text() or service.poll() is not None)
    found = re.search(r"serving .* on (http://\S+)", (tmp_path / "log").read_text())
    assert found, (tmp_path / "log").read_text()
    body = {"wire": text_of(longest), "max_new_tokens": 256}
    with (
        httpx.Client(base_url=found[1], timeout=MOST_WAIT_S) as http,
        http.stream("GET", "/gradio_api/heartbeat/x") as open_,
    ):
        assert "ALIVE" in next(open_.iter_lines())
        with http.stream("POST", "/v1/answer", json=body | {"stream": True}) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            waiting = []
            thread = threading.Thread(target=lambda: waiting.append(http.post("/v1/answer", json=body)))
            thread.start()
            until(lambda: 'latentwire_waiting{kind="answer llama"} 1.0' in http.get("/metrics").text)
            service.send_signal(signal.SIGTERM)
            events += lines
        thread.join()
    expected = readers["llama"].answer(longest, max_new_tokens=256)
    assert events_of("\n".join(events))[-1] == {"answer": expected}
    assert waiting[0].json() == {"answer": expected}
    assert service.wait(MOST_WAIT_S) in (0, -signal.SIGTERM) and service.stdout.read() == b""
    with pytest.raises(httpx.ConnectError):
        httpx.get(found[1])


def batches_of(batcher, keys):
    """Submit one job per key at once; the results, errors included."""

    async def run():
        futures = [batcher.submit(key, [item])[0] for item, key in enumerate(keys)]
        return await asyncio.gather(*futures, return_exceptions=True)

    return asyncio.run(run())


def test_only_jobs_of_the_same_key_share_a_batch_and_first_come_is_first_served():
    seen = []

    def work(key, jobs):
        seen.append((key, [job.item for job in jobs]))
        return [f"{key}{job.item}" for job in jobs]

    batcher = Batcher("test", work, batch=2, queue=9)
    assert batches_of(batcher, "abaabb") == ["a0", "b1", "a2", "a3", "b4", "b5"]
    assert seen == [("a", [0, 2]), ("b", [1, 4]), ("a", [3]), ("b", [5])]
    assert batches_of(batcher, "c") == ["c0"], "it works again after it had nothing to do"


def test_a_batch_of_several_is_no_larger_than_the_room():
    seen = []

    def work(_, jobs):
        seen.append([len(job.item) for job in jobs])
        return [len(job.item) for job in jobs]

    batcher = Batcher("test", work, batch=8, queue=9, size=len, room=10)

    async def run(*sizes):
        return await asyncio.gather(*batcher.submit("a", ["x" * size for size in sizes]))

    for sizes in ((5, 5, 5), (99, 1), (1, 99)):
        assert asyncio.run(run(*sizes)) == [*sizes]
    assert seen == [[5, 5], [5], [99], [1], [1], [99]], "one alone may be larger"

    async def called():
        return await asyncio.gather(batcher.call(lambda: "one"), batcher.call(lambda: "two"))

    assert asyncio.run(called()) == ["one", "two"], "a function has no size"


def test_a_batch_that_fails_is_tried_one_by_one():
    def work(_, jobs):
        if any(job.item == 1 for job in jobs):
            raise ValueError("item 1")
        return [job.item for job in jobs]

    found = batches_of(Batcher("test", work, batch=8, queue=9), "aaaa")
    assert [found[0], *found[2:]] == [0, 2, 3] and isinstance(found[1], ValueError)


def test_a_full_queue_takes_all_items_of_a_request_or_none():
    async def run():
        batcher = Batcher("test", lambda _, jobs: [job.item for job in jobs], batch=2, queue=3)
        first = batcher.submit("a", [1, 2])
        with pytest.raises(FullError):
            batcher.submit("a", [3, 4])
        assert batcher.waiting == 2
        first[0].cancel()
        second = batcher.submit("a", [3, 4])
        assert await asyncio.gather(first[1], *second) == [2, 3, 4]
        await batcher.close()
        with pytest.raises(ClosingError):
            batcher.submit("a", [5])

    asyncio.run(run())
