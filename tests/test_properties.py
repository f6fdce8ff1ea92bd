"""Whatever is cut or altered, at any byte: an error that names the file, or what was there before; never another score.

Hypothesis draws the damage, the same at each run.
"""

import gzip
import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latentwire.data.question import Question
from latentwire.data.squad import read_squad_file
from latentwire.evaluation.predictions import Predictions
from latentwire.models.adapters import ResidualAdapter
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.weights import FORMS, read_config
from latentwire.models.wire import SCALAR, pack, sealed, unpack
from latentwire.utils.files import read_lines

LLMS = {"llama": "some/llama", "qwen": "some/qwen"}
TEXT = "The museum opened in 1907; its tower is 31 metres high."
CONTEXTS = ["The harbour of Łódź has 120 boats and one ferry.", 'Nobody "counts" the gulls.\nThey are many.']
QUESTIONS = {
    "data": [
        {"title": f"Town {n}", "paragraphs": [{"context": context, "qas": [
            {"id": f"q{n}{place}", "question": f"What is {word}?", "answers": [{"text": word, "answer_start": start}]}
            for place, (word, start) in enumerate([("The", 0), ("harbour", 4)] if n == 0 else [("Nobody", 0)])
        ]}]}
        for n, context in enumerate(CONTEXTS)
    ],
    "version": "1.1",
}  # fmt: skip
LINES = [
    {"condition": condition, "m": m, "llm": llm, "id": id_, "prediction": f"Łódź {m}", "f1": 0.5, "em": 0.0, "sent": 12}
    for condition, m in (("text", None), ("pca", 16))
    for llm in LLMS
    for id_ in ("q1", "q2")
]


def drawn(examples):
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


@st.composite
def damages(draw):
    """A change of bytes that is none only by chance: one byte is another, some are lost, or some come in."""
    kind = draw(st.sampled_from(["altered", "cut off", "cut out", "put in"]))
    where = random.Random(draw(st.integers(0, 2**32))).random()  # anywhere: what is drawn itself is mostly small
    what = draw(st.integers(1, 255))
    some = draw(st.binary(min_size=1, max_size=4))

    def damage(data):
        place = int(where * len(data))
        if kind == "altered":
            return data[:place] + bytes([data[place] ^ what]) + data[place + 1 :]
        if kind == "cut off":
            return data[:place]
        return data[:place] + (some if kind == "put in" else b"") + data[place + (kind == "cut out") * len(some) :]

    damage.__qualname__ = f"{kind} at {where} {what} {some}"
    return damage


def paths(value, found=()):
    """Where something stands in a JSON document."""
    yield found
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*found, key))


def replaced(document, path, junk):
    """The document with something else, or nothing, at that place."""
    if not path:
        return junk
    document = json.loads(json.dumps(document))
    *way, last = path
    inside = document
    for key in way:
        inside = inside[key]
    inside[last] = junk
    return document


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=5) | st.just("The"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "qas", "id", "x"]), inner),
    max_leaves=4,
)


def assert_questions_or_an_error_that_names(path, expected=None):
    """What is read is sound (and as expected), or the error names the file."""
    try:
        found = read_squad_file(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert expected is None or found == expected
    for question in found:
        assert isinstance(question, Question) and question.context and question.question.strip()
        for answer, start in zip(question.answers, question.starts, strict=True):
            assert answer.strip() and question.context[start : start + len(answer)] == answer
    assert found and len({question.id for question in found}) == len(found)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"data":' * 200_000, f"[{'9' * 5000}]", "9" * 100_000])
@pytest.mark.parametrize("packed", [True, False])
def test_json_that_no_reader_takes_is_refused_by_file(tmp_path, text, packed):
    data = gzip.compress(text.encode()) if packed else text.encode()
    (tmp_path / "questions.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{tmp_path}/questions\.json: not JSON \("):
        read_squad_file(tmp_path / "questions.json")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: not JSON \("):
        read_config(tmp_path)
    line = f"{text}\n".encode()
    path = tmp_path / ("predictions.jsonl.gz" if packed else "predictions.jsonl")
    path.write_bytes(gzip.compress(line) if packed else line)
    with pytest.raises(ValueError, match=rf"{tmp_path}/predictions\.jsonl:1 is damaged \("):
        read_lines(tmp_path / "predictions.jsonl")


@drawn(200)
@given(damages(), st.booleans())
def test_damaged_questions_are_refused_by_file_or_are_questions(tmp_path_factory, damage, ascii_only):
    path = tmp_path_factory.getbasetemp() / "questions.json"
    path.write_bytes(damage(json.dumps(QUESTIONS, ensure_ascii=ascii_only).encode()))
    assert_questions_or_an_error_that_names(path)


@drawn(200)
@given(damages(), st.sampled_from(["questions.json", "questions.json.gz"]))
def test_damaged_packed_questions_are_refused_by_file_or_are_the_same(tmp_path_factory, damage, name):
    plain, path = (tmp_path_factory.getbasetemp() / name for name in ("plain.json", name))
    plain.write_text(json.dumps(QUESTIONS))
    path.write_bytes(damage(gzip.compress(plain.read_bytes(), mtime=0)))
    assert_questions_or_an_error_that_names(path, read_squad_file(plain))


@drawn(300)
@given(st.sampled_from([*paths(QUESTIONS)]), JUNK)
def test_questions_with_something_else_anywhere_are_refused_by_file_or_are_questions(tmp_path_factory, path, junk):
    file = tmp_path_factory.getbasetemp() / "questions.json"
    file.write_text(json.dumps(replaced(QUESTIONS, path, junk)))
    assert_questions_or_an_error_that_names(file)


def lines_of(predictions):
    return [line for row in LINES for line in predictions.of(row).values() if line["id"] == row["id"]]


@pytest.mark.parametrize("packed", [True, False])
@drawn(200)
@given(damage=damages())
def test_damaged_predictions_are_refused_by_line_or_computed_again(tmp_path_factory, damage, packed):
    folder = tmp_path_factory.getbasetemp() / "predictions"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    Predictions(folder / "predictions.jsonl").append(LINES)
    file = folder / "predictions.jsonl"
    if packed:
        (folder / "predictions.jsonl.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        file.unlink()
        file = folder / "predictions.jsonl.gz"
    file.write_bytes(damage(file.read_bytes()))
    try:
        found = lines_of(Predictions(folder / "predictions.jsonl"))
    except ValueError as error:
        assert str(folder / "predictions.jsonl") in str(error)
        return
    assert all({key: line.get(key) for key in LINES[0]} in LINES for line in found), "another score"


@pytest.fixture(scope="module")
def checkpoint(llms, tmp_path_factory):
    """(folder, what it holds)."""
    folder = tmp_path_factory.mktemp("damaged") / "best"
    torch.manual_seed(0)
    tokenizer = llms["llama"].tokenizer
    encoder = ClosedFormEncoder(tokenizer, 8, len(tokenizer))
    adapters = {name: ResidualAdapter(8, llms[name].width) for name in LLMS}
    config = {"d_z": 8, "llms": LLMS, "latent_len": 16, "stage": "joint", "source": "prompt", "train_seed": None}
    save_checkpoint(folder, encoder, adapters, config)
    return folder, held(folder)


def held(folder):
    """Config, weights and tokenizer."""
    encoder, adapters, config = load_checkpoint(folder, LLMS)
    states = [encoder.state_dict(), *(adapters[name].state_dict() for name in LLMS)]
    weights = [(key, value.tolist()) for state in states for key, value in state.items()]
    tokenizer = encoder.tokenizer
    reads = tokenizer.backend_tokenizer.to_str(), tokenizer.all_special_ids, tokenizer(TEXT)["input_ids"]
    return config, weights, reads


FILES = (
    "config.json", "encoder.safetensors", "encoder.pt", "adapter_llama.safetensors", "adapter_llama.pt",
    "adapter_qwen.safetensors", "adapter_qwen.pt", "wire_tokenizer/tokenizer.json",
    "wire_tokenizer/tokenizer_config.json", "wire_tokenizer/chat_template.jinja",
)  # fmt: skip


def test_the_files_of_a_checkpoint_are_all_damaged(checkpoint):
    folder, _ = checkpoint
    assert sorted(FILES) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_or_an_error_that_names(folder, expected, config=True):
    """config: also what it says, beside keys that nothing reads: the damaged name of its own hash is one."""
    try:
        found = held(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error)
        return
    assert found[1:] == expected[1:]
    assert not config or found[0] | expected[0] == found[0]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_is_refused_or_is_the_same(checkpoint, name):
    folder, expected = checkpoint
    before = (folder / name).read_bytes()
    (folder / name).unlink()
    try:
        assert_same_or_an_error_that_names(folder, expected)
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_by_file_or_is_the_same(checkpoint, name):
    folder, expected = checkpoint
    before = (folder / name).read_bytes()

    @drawn(20 if "." + name.rpartition(".")[2] in FORMS else 80)
    @given(damages())
    def damaged(damage):
        (folder / name).write_bytes(damage(before))
        assert_same_or_an_error_that_names(folder, expected)

    try:
        damaged()
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("older", [False, True])
def test_a_checkpoint_whose_config_lacks_anything_is_refused_by_file_or_is_the_same(checkpoint, older):
    """An older one, whose config has no hash of its own, has the same weights at least."""
    folder, expected = checkpoint
    text = (folder / "config.json").read_text()
    before = json.dumps(read_config(folder)) if older else text
    try:
        for *way, last in filter(None, paths(json.loads(before))):
            document = json.loads(before)
            inside = document
            for key in way:
                inside = inside[key]
            del inside[last]
            (folder / "config.json").write_text(json.dumps(document))
            assert_same_or_an_error_that_names(folder, expected, config=not older)
    finally:
        (folder / "config.json").write_text(text)


LATENTS = arrays(np.float32, st.tuples(*[st.integers(0, 3), st.integers(0, 4), st.integers(0, 40)]),
                 elements=st.floats(-8, 8, width=16))  # fmt: skip


@drawn(300)
@given(LATENTS, st.sampled_from([*SCALAR]), damages())
def test_a_damaged_wire_is_refused(z, codec, damage):
    data = pack(z, codec)
    assert unpack(data).shape == z.shape
    damaged = damage(data)
    if damaged != data:
        with pytest.raises(ValueError):
            unpack(damaged)


@drawn(300)
@given(st.binary(max_size=80))
@example(b"LWIR\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff")
def test_foreign_bytes_are_refused_or_are_finite_latents(data):
    for wire in (data, sealed(data), sealed(b"LWIR\x01" + data)):
        try:
            z = unpack(wire)
        except ValueError:
            continue
        assert z.dtype == np.float32 and z.ndim == 3 and np.isfinite(z).all()
        assert sum(z.shape) == 0 or z.nbytes <= 8 * len(wire)
