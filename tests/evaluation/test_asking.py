"""The demo answers as an evaluation would, and says what is wrong with what it is given."""

import pytest

from latentwire import demo
from latentwire.data.squad import load
from latentwire.evaluation.asking import Demo, converse, read_context
from latentwire.evaluation.settings import DemoSettings
from latentwire.models.checkpoint import save_checkpoint
from latentwire.models.closed_form import closed_form

M, D_Z = 12, 24
pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.fixture(scope="module")
def checkpoint(llms, texts, llm_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    encoder, adapters, _ = closed_form(llms, texts, D_Z)
    ids = {name: llm_folders[f"{name.upper()}_ID"] for name in llms}
    made = {"schema": 1, "stage": "joint", "source": "prompt", "latent_len": M, "d_z": D_Z, "llms": ids}
    save_checkpoint(folder, encoder, adapters, made)
    return str(folder)


@pytest.fixture
def question():
    return load("sample", "dev").questions[0]


@pytest.fixture
def text_file(tmp_path, question):
    path = tmp_path / "text.txt"
    path.write_text(question.context + "\n", encoding="utf-8")
    return str(path)


def test_both_llms_answer_from_text_and_wire(checkpoint, question, llms):
    ready = Demo(DemoSettings(ckpt=checkpoint))
    lines = ready.answers(question.context, question.question).split("\n")
    for reader, (as_text, as_wire) in zip(ready.readers, (lines[:2], lines[2:4]), strict=True):
        llm, prompts = reader.llm, reader.prompts
        assert f"{llm.name} from text" in as_text and f"{llm.name} from wire" in as_wire
        ids = prompts.plain(prompts.content_text(question.context, question.question))
        slot, tail = llm.embed(ids), prompts.tail(question.question)
        (answer,) = llm.generate_with_prefix(prompts.head, [slot], [tail], 12)
        assert f"{len(ids)} positions" in as_text and as_text.endswith(answer or "(nothing)")
        assert f"{M} positions" in as_wire and f"{M * D_Z * 2 + 18} bytes" in as_wire  # header and checksum
    words = lines[4].removeprefix("latents: ").split("|")
    assert len(words) >= M and "Question" in "".join(words)


def test_the_command_line_prints_the_same(checkpoint, question, text_file, monkeypatch, capsys):
    argv = ["demo.py", "--ckpt", checkpoint, "--context", text_file, "--question", question.question]
    monkeypatch.setattr("sys.argv", argv)
    demo.main()
    said = capsys.readouterr().out.rstrip("\n").split("\n")
    assert said[-5:] == Demo(DemoSettings(ckpt=checkpoint)).answers(question.context, question.question).split("\n")


def test_a_conversation_outlives_mistakes(checkpoint, question, text_file, monkeypatch, capsys):
    typed = iter(["/no/such/file", text_file, question.question, "word " * 3000, question.question, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    converse(Demo(DemoSettings(ckpt=checkpoint)))
    said = capsys.readouterr().out
    assert "'/no/such/file'" in said and "reads 2048; shorten it" in said
    assert said.count("from wire") == 4 and next(typed, None) is None


@pytest.mark.parametrize(
    ("asked", "says"), [("\udcff", "question: sign 0 is half of a pair"), (" \n", "question=.*: empty; give a text")]
)
def test_a_question_that_is_no_text_is_refused(checkpoint, question, asked, says):
    with pytest.raises(ValueError, match=says):
        Demo(DemoSettings(ckpt=checkpoint, llms="qwen")).answers(question.context, asked)


def test_the_end_of_input_ends_a_conversation(monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    converse(None)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfThe mill was built in 1794.\n")
    assert read_context(str(tmp_path / "text.txt")).strip() == "The mill was built in 1794."


@pytest.mark.parametrize(("content", "says"), [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_without_text_is_refused(tmp_path, content, says):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_context(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_context(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context": "a.txt"}, "question=''"),
        ({"question": "Who?"}, "context=''"),
        ({"codec": "fp8"}, "codec='fp8'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        DemoSettings(**settings)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Demo(DemoSettings(ckpt=str(tmp_path / "none")))
