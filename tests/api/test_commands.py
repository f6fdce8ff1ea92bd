"""send.py, answer.py and inspect_wire.py: pipes of bytes and of JSON lines, and one clear line where they cannot."""

import base64
import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from latentwire import LatentWire, answer, inspect_wire, send
from latentwire.api import commands, costs
from latentwire.api.message import Wire
from latentwire.llms.loading import shape_of
from latentwire.utils import cli

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def call(lw, monkeypatch, capsysbinary):
    """call(program, *flags, data): what a program printed, as bytes, and its last line on stderr."""

    def run(program, *flags, data=b"", fails=False):
        ckpt = [] if "--ckpt" in flags else ["--ckpt", str(lw.folder)]
        monkeypatch.setattr("sys.argv", [program.__name__, *ckpt, *flags])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) if fails else nullcontext() as ended:
            cli.run(program.main)
        assert not fails or ended.value.code == 2
        out, err = capsysbinary.readouterr()
        return out, (err.decode().strip().splitlines() or [""])[-1]

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory, short_questions):
    """A file with a text, and JSON lines with three."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(short_questions[0].context + "\n", encoding="utf-8")
    lines = [{"id": q.id, "context": q.context, "question": q.question} for q in short_questions[:3]]
    (folder / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n\n" for line in lines), encoding="utf-8")
    return folder


def test_a_wire_goes_through_a_pipe_and_is_answered_as_the_api_does(lw, warm, short_questions, files):
    """As a shell does it, each program in a process of its own."""
    program = f"{warm['PYTHON']} latentwire/{{}}.py --ckpt {lw.folder}"
    pipe = f"{program.format('send')} --context {files / 'text.txt'} --question '{short_questions[0].question}' "
    pipe += f"| tee {files / 'z.lwir'} | {program.format('answer')} --llm qwen"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {pipe}"], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | warm,
    )  # fmt: skip
    wire = lw.encode(short_questions[0].context, short_questions[0].question)
    assert (files / "z.lwir").read_bytes() == wire and str(lw.wire(wire)) in done.stderr
    assert done.stdout.rstrip("\n") == lw.reader("qwen").answer(wire)


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        (["--latent_len", "5"], {"m": 5}),
        (["--budget", "9", "--codec", "int8"], {"budget": 9.0, "codec": "int8"}),
    ],
)
def test_how_a_text_becomes_a_wire_is_said_by_flags(call, lw, short_questions, files, tmp_path, flags, how):
    q, given = short_questions[0], ["--context", str(files / "text.txt")]
    sent, _ = call(send, *given, "--question", q.question, *flags)
    assert sent == lw.encode(q.context, q.question, **how) != lw.encode(q.context, q.question)
    nothing, _ = call(send, *given, "--question", q.question, *flags, "--out", str(tmp_path / "z.lwir"))
    assert (tmp_path / "z.lwir").read_bytes() == sent and not nothing


def test_a_long_text_is_sent_in_as_many_parts_as_the_flag_allows(call, lw, short_questions, tmp_path):
    document, question = " ".join(dict.fromkeys(q.context for q in short_questions[:8])), short_questions[0].question
    (tmp_path / "d.txt").write_text(document)
    sent, _ = call(send, "--context", str(tmp_path / "d.txt"), "--question", question, "--blocks", "2")
    assert len(lw.wire(sent).blocks) == 2 and sent == lw.encode(document, question, blocks=2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "error: out='': a wire is bytes, no text"),
        (["--out", "no/such/z.lwir"], "error: out='no/such/z.lwir': name a file in a folder that is there"),
        (["--out", "."], "error: out='.': name a file in a folder that is there"),
    ],
)
def test_where_no_wire_can_go_is_told_before_the_checkpoint_is_loaded(call, files, monkeypatch, flags, says):
    monkeypatch.setattr(LatentWire, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, said = call(send, "--context", str(files / "text.txt"), "--question", "Who?", *flags, fails=True)
    assert said.startswith(says) and not out


def test_a_terminal_may_show_what_goes_to_a_file(call, files, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    call(send, "--context", str(files / "text.txt"), "--question", "Who?", "--out", str(tmp_path / "z.lwir"))
    assert (tmp_path / "z.lwir").is_file()


def test_a_text_may_come_through_a_pipe_that_the_shell_names(call, lw, short_questions, tmp_path):
    q = short_questions[0]
    reading, writing = os.pipe()
    os.write(writing, q.context.encode())
    os.close(writing)
    sent, _ = call(send, "--context", f"/dev/fd/{reading}", "--question", q.question)
    assert sent == lw.encode(q.context, q.question)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        commands._opened(str(tmp_path))


def test_json_lines_keep_their_other_keys(call, lw, short_questions, files):
    sent, _ = call(send, data=(files / "lines.jsonl").read_bytes())
    wires = [json.loads(line) for line in sent.splitlines()]
    assert [base64.b64decode(line["wire"]) for line in wires] == lw.encode(
        [q.context for q in short_questions[:3]], [q.question for q in short_questions[:3]]
    )
    answered, _ = call(answer, "--batch_size", "2", data=sent)
    found = [json.loads(line) for line in answered.splitlines()]
    assert [line["id"] for line in found] == [q.id for q in short_questions[:3]]
    assert [line["question"] for line in found] == [q.question for q in short_questions[:3]]
    reader, packed = lw.reader("llama"), [base64.b64decode(line["wire"]) for line in wires]
    assert [line["answer"] for line in found] == reader.answer(packed[:2]) + reader.answer(packed[2:])


def test_json_lines_of_an_aware_checkpoint_are_asked_when_they_are_sent_and_answered(
    call, checkpoint_of, short_questions, files
):
    ckpt = ("--ckpt", str(checkpoint_of("aware")))
    lw = LatentWire.from_pretrained(checkpoint_of("aware"))
    sent, _ = call(send, *ckpt, data=(files / "lines.jsonl").read_bytes())
    wires = [base64.b64decode(json.loads(line)["wire"]) for line in sent.splitlines()]
    asked = [q.question for q in short_questions[:3]]
    assert wires == lw.encode([q.context for q in short_questions[:3]], asked)
    answered, _ = call(answer, *ckpt, data=sent)
    assert [json.loads(line)["answer"] for line in answered.splitlines()] == lw.reader("llama").answer(wires, asked)


def raising(error):
    def fails(*_):
        raise error

    return fails


def test_inspect_says_what_a_wire_holds(call, lw, short_questions, tmp_path, checkpoint_of, monkeypatch):
    wire = lw.encode(short_questions[0].context, short_questions[0].question)
    (tmp_path / "z.lwir").write_bytes(wire)
    words, _ = call(inspect_wire, str(tmp_path / "z.lwir"))
    shown = words.decode()
    assert str(lw.wire(wire)) in shown and "checksum right" in shown and "after" in shown
    found, _ = call(inspect_wire, "--json", data=wire)
    told = json.loads(found)
    assert told["words"] == lw.wire(wire).words() and told["blocks"] == [12] and told["bytes"] == len(wire)
    cost = told["break_even"]["qwen"]
    assert cost["questions"] == pytest.approx(cost["encode_gflop"] / cost["saved_gflop"])
    saved = 2 * shape_of("qwen", lw.llms["qwen"]).body * (lw.wire(wire).text_tokens - 12)
    assert cost["saved_gflop"] == pytest.approx(saved / 1e9)
    other, _ = call(inspect_wire, "--ckpt", str(checkpoint_of("prompt", seed=1)), data=wire)
    assert b"is of another encoder" in other
    for error in (ValueError("cannot load the model"), FileNotFoundError("no config.json in /models/x")):
        monkeypatch.setattr(costs, "shape_of", raising(error))
        words, _ = call(inspect_wire, data=wire)
        assert b"words: " in words and f"qwen: not known: {error}".encode() in words


def test_a_bad_line_is_named_and_loses_nothing_that_was_before_it(call, lw, short_questions):
    wire = base64.b64encode(lw.encode(short_questions[0].context, short_questions[0].question)).decode()
    good, cut = json.dumps({"id": 1, "wire": wire}), json.dumps({"wire": wire[:80]})
    for bad, says in (('{"wire": "%%%"}', "the wire is no base64"), (cut, "wire "), ("{", "no JSON")):
        found, said = call(answer, data=f"{good}\n\n{bad}\n".encode(), fails=True)
        assert json.loads(found)["id"] == 1 and said.startswith(f"error: line 3: {says}")
    many = Wire.pack([np.zeros((5000, lw.wire(base64.b64decode(wire)).d_z))], "int4", "prompt", lw.wire_id, 9, 9)
    bad = json.dumps({"wire": base64.b64encode(bytes(many)).decode()})
    found, said = call(answer, data=f"{good}\n{good}\n{bad}\n{good}\n".encode(), fails=True)
    assert len(found.splitlines()) == 2 and said.startswith("error: line 3: the wire")
    good = json.dumps({"context": short_questions[0].context, "question": short_questions[0].question})
    bad = json.dumps({"context": " ", "question": "Who?"})
    found, said = call(send, data=f"{good}\n{bad}\n{good}\n".encode(), fails=True)
    assert json.loads(found)["wire"] == wire and said.startswith("error: line 2: context=' '")
    bad = json.dumps({"context": "A text.", "question": "long " * 300})
    found, said = call(send, data=f"{good}\n\n{bad}\n{good}\n".encode(), fails=True)
    assert json.loads(found)["wire"] == wire and said.startswith("error: line 3: question")


def test_json_lines_may_begin_with_a_mark_and_blank_lines_and_keep_what_utf8_cannot_say(call, lw, short_questions):
    q = short_questions[0]
    line = json.dumps({"name": "\ud83d", "context": q.context, "question": q.question}).encode()
    sent, _ = call(send, data=b"\xef\xbb\xbf\n\n\n\n\n" + line)
    for before in (b"", b"\xef\xbb\xbf", b"\n \n\n\n\n", b"\n\xef\xbb\xbf"):
        found, _ = call(answer, data=before + sent)
        assert json.loads(found)["name"] == "\ud83d" and "answer" in json.loads(found)
    found, _ = call(answer, data=sent.replace(b', "wire"', b',\r"wire"'))
    assert "answer" in json.loads(found), "a lone carriage return is white space"
    _, said = call(answer, data=b"\xef\xbb\xbf\n\n\n\n{no", fails=True)
    assert said.startswith("error: line 5: no JSON")


@pytest.mark.parametrize(
    ("program", "flags", "data", "says"),
    [
        (answer, ["nowhere.lwir"], b"", "error: wire='nowhere.lwir': there is no such file or folder"),
        (answer, [], b"", "error: wire too short: 0 bytes"),
        (answer, [], b"\x89PNG and whatever else a picture has", "error: not a LatentWire wire"),
        (answer, ["--llm", "gemma"], b"LWIR", "error: wire too short"),
        (answer, ["--question", "Who?"], b'{"wire": ""}', "error: question='Who?': JSON lines have"),
        (inspect_wire, [], b"LWIR\x09 a wire of a program that is to come", "error: wire version 9 is unknown"),
        (send, [], b"no json\n", "error: line 1: no JSON"),
        (send, [], b'{"text": "x"}\n', 'error: line 1: needs an object with "context"'),
        (send, [], b'{"context": "x"}\n', "error: line 1: question=''"),
        (send, ["--question", "Who?"], b"", "error: question='Who?': needs --context"),
        (send, ["--out", "z"], b"", "error: out='z': JSON lines"),
        (answer, ["--id", "x"], b"", "error: id='x': --corpus"),
        (send, ["--context", "-", "--question", "Who?"], b"\xff\xfe", "error: context='-': not UTF-8"),
        (send, ["--context", "-", "--question", "Who?"], b" \n", "error: context='-': the file is empty"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_status_2(call, program, flags, data, says):
    _, said = call(program, *flags, data=data, fails=True)
    assert said.startswith(says)
