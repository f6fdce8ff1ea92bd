"""The page: it answers what the service answers, marks the right words, and loads nothing from elsewhere."""

import json
import os
import re
import shutil
import subprocess

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from service.service_tools import listening, until
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from latentwire import LatentWire
from latentwire.service.app import app_of, load_readers
from latentwire.service.page import LONGEST, _html_of, _marked
from latentwire.service.settings import ServeSettings

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def readers(lw):
    return load_readers(ServeSettings(ckpt=str(lw.folder)), lw)


def cells(table):
    """The rows of a table of answers: [reads, answer, positions, KV cache, sent, time]."""
    rows = re.findall(r"<tr class=.*?</tr>", table)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def test_a_client_gets_both_answers_of_each_llm_and_what_they_cost(lw, readers, short_questions):
    q, m, codec = short_questions[0], 9, "int8"
    wire = lw.encode(q.context, q.question, m=m, codec=codec)
    app = app_of(ServeSettings(ckpt=str(lw.folder)), lw, readers)
    with listening(app) as address:
        client = Client(address, verbose=False)
        table, marked = client.predict(q.context, q.question, m, codec, api_name="/ask")
        for wrong, says in (
            (("", "Who?"), "text="),
            (("A text.", " "), "question="),
            (("a" * (LONGEST + 1), "Who?"), "signs"),
        ):
            with pytest.raises(AppError, match=says):
                client.predict(*wrong, m, codec, api_name="/ask")
    rows = cells(table)
    assert [row[0] for row in rows] == ["text", "wire"] * 2
    for reader, (from_text, from_wire) in zip(readers.values(), (rows[:2], rows[2:]), strict=True):
        llm, prompts = reader.llm, reader.prompts
        whole = prompts.content_text(q.context, q.question)
        ids = prompts.plain(whole)
        (expected,) = llm.generate_with_prefix(prompts.head, [llm.embed(ids)], [prompts.tail(q.question)], 24)
        for row, answer, positions, sent in (
            (from_text, expected, len(ids), len(whole.encode())),
            (from_wire, reader.answer(wire, max_new_tokens=24), m, len(wire)),
        ):
            assert plain(row[1]) == (answer or "(nothing)")
            assert row[2:5] == [f"{positions}", f"{llm.kv_bytes * positions:,} B", f"{sent:,} B"]
            assert row[5].endswith(" ms")
    assert plain(re.sub("</?mark>", "", marked.split("</div>")[0].split(">", 1)[1])) == q.context
    assert "<mark>" in marked


def plain(escaped):
    import html

    return html.unescape(escaped)


@pytest.mark.parametrize("source", ["context", "aware"])
def test_where_the_wire_holds_no_question_the_page_asks_when_answering(checkpoint_of, short_questions, source):
    lw, q = LatentWire.from_pretrained(checkpoint_of(source)), short_questions[0]
    reader = lw.reader("qwen")
    app = app_of(ServeSettings(), lw, {"qwen": reader})
    document = " ".join(dict.fromkeys(q.context for q in short_questions[:12]))  # of several blocks
    with listening(app) as address:
        table, marked = Client(address, verbose=False).predict(document, q.question, 12, "fp16", api_name="/ask")
    wire = lw.wire(lw.encode(document, q.question if source == "aware" else None))
    assert (len(wire.blocks) > 1) == (source == "context")
    assert source != "context" or "<mark>" in marked[len(marked) // 2 :], "in all of its parts"
    assert plain(cells(table)[1][1]) == (reader.answer(wire, q.question, 24) or "(nothing)")
    assert plain(re.sub("</?mark>", "", marked.split("</div>")[0].split(">", 1)[1])) == document


def test_marked_words_are_those_that_were_chosen(lw, short_questions):
    for q in short_questions[:5]:
        wire = lw.wire(lw.encode(q.context, q.question))
        marked = re.findall("<mark>(.*?)</mark>", _marked(lw, wire, q.context, q.question))
        words = "".join(word for run in marked for word in plain(run).split())
        chosen = [q.context[begin:end] for begin, end in lw.encoder.chosen_spans([q], "prompt", wire.m)[0]]
        assert chosen and words == "".join(part for one in chosen for part in one.split())


def test_what_is_marked_is_escaped_and_joined():
    assert _html_of("<b> is a tag", [(0, 3), (3, 6)]) == "<mark>&lt;b&gt; is</mark> a tag"
    assert _html_of("a  word", [(1, 2), (2, 7)]) == "a  <mark>word</mark>"
    assert _html_of("a word", [(1, 6), (3, 3)]) == "a <mark>word</mark>"


DRIVER = """<!doctype html><iframe style="width: 1200px; height: 800px"></iframe><script>
const origin = location.origin;  // without the password that the address may hold
const frame = document.querySelector("iframe"), page = () => frame.contentDocument;
const find = (selector) => page() && page().querySelector(selector);
const until = async (holds) => { while (!holds()) await new Promise((go) => setTimeout(go, 50)); };
const fill = (selector, text) => {
  find(selector).value = text;
  find(selector).dispatchEvent(new Event("input", { bubbles: true }));
};
frame.src = `${origin}/`;
(async () => {
  await until(() => find("#ask") && find("#text textarea"));
  const prefilled = find("#text textarea").value;
  fill("#text textarea", %s);
  fill("#question textarea, #question input", %s);
  await new Promise((go) => setTimeout(go, 300));
  find("#ask").click();
  await until(() => find("#answers table") && !find("#answers").textContent.includes("…"));
  const answers = [...page().querySelectorAll("#answers td.answer")].map((cell) => cell.textContent);
  const asked = frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name);
  const seen = { prefilled, answers, marked: find("#marked .text").innerHTML, asked };
  await fetch(`${origin}/done`, { method: "POST", body: JSON.stringify(seen) });
})();
</script>"""


def in_html(text: str) -> str:
    """What a browser keeps of a text: no NUL, and "\\n" for every end of a line (HTML, 13.2.3.5 and 13.2.6.4.7)."""
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on PATH, and CHROMIUM is not set")
@pytest.mark.parametrize("token", ["", "sesame"])
def test_in_a_browser_a_click_shows_answers_and_nothing_comes_from_elsewhere(
    lw, readers, short_questions, tmp_path, monkeypatch, token
):
    """Where there is a token, the browser sends it as the password of the page."""
    monkeypatch.setenv("LATENTWIRE_TOKEN", token)
    q, seen = short_questions[1], []
    context = f"{q.context} <i>Not</i> a tag & no link."

    async def done(request: Request) -> Response:
        seen.append(await request.json())
        return Response()

    app = app_of(ServeSettings(ckpt=str(lw.folder)), lw, readers)
    page = DRIVER % (json.dumps(context), json.dumps(q.question))
    for route in (Route("/drive", lambda _: HTMLResponse(page)), Route("/done", done, methods=["POST"])):
        app.router.routes.insert(0, route)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr"
    )
    with listening(app) as address:
        address = address.replace("http://", f"http://anybody:{token}@") if token else address
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"{address}/drive"]
        with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log, stdout=log) as browser:
            try:
                until(lambda: seen or browser.poll() is not None)
            finally:
                browser.terminate()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "CONSOLE" in line or "Uncaught" in line]
    assert seen and not said, said
    wire = lw.encode(context, q.question)
    from_wire = [in_html(reader.answer(wire, max_new_tokens=24) or "(nothing)") for reader in readers.values()]
    assert seen[0]["answers"][1::2] == from_wire and len(seen[0]["answers"]) == 4
    assert "lighthouse" in seen[0]["prefilled"]
    assert "&lt;i&gt;" in re.sub("</?mark>", "", seen[0]["marked"]) and "<mark>" in seen[0]["marked"]
    origin = re.sub(r"//.*@", "//", address)
    assert seen[0]["asked"] and all(name.startswith((origin, "data:", "blob:")) for name in seen[0]["asked"])
