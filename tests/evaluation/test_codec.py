"""The compact codec of a checkpoint: fitted, evaluated, sent and read."""

import math
import shutil
import zlib

import pytest
import torch
from evaluation.evaluations import config, predictions

from latentwire import LatentWire, Wire
from latentwire.conditions.base import Reader, Sender, Shared
from latentwire.data.squad import load
from latentwire.evaluation import sizes
from latentwire.evaluation.codec import fit_codec
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import CodecSettings
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.checkpoint import load_encoder
from latentwire.models.wire import COMPACT, SCALAR

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def fitted(checkpoint_of, tmp_path_factory, surroundings):
    """A checkpoint with tables."""
    folder = shutil.copytree(checkpoint_of("prompt"), tmp_path_factory.mktemp("codec") / "ckpt")
    fit_codec(CodecSettings(ckpt=str(folder), dataset="sample", samples=40, device="cpu"))
    return folder


def test_a_compact_wire_is_answered_from_in_a_few_bytes(fitted, short_questions):
    lw, q = LatentWire.from_pretrained(fitted), short_questions[0]
    assert lw.codecs == (*SCALAR, *COMPACT)
    wires = {codec: lw.encode(q.context, q.question, codec=codec) for codec in lw.codecs}
    texts, asked = [q.context for q in short_questions], [q.question for q in short_questions]
    small, other = (sum(map(len, lw.encode(texts, asked, codec=codec))) for codec in ("compact2", "int4"))
    assert small < other / 3, "of all texts: one alone may end a word of the coder later"
    assert lw.encode([q.context] * 2, [q.question] * 2, codec="compact8") == [wires["compact8"]] * 2
    words = {codec: lw.wire(wire).words() for codec, wire in wires.items()}
    assert all(found == words["fp16"] for found in words.values())
    reader = lw.reader("llama")
    unpacked = torch.from_numpy(lw.wire(wires["compact2"]).z)
    slot, tail = reader.adapter(unpacked), reader.prompts.tail("")
    (expected,) = reader.llm.generate_with_prefix(reader.prompts.head, [slot], [tail], 3)
    assert reader.answer(wires["compact2"], max_new_tokens=3) == expected


def test_tables_are_asked_for_and_change_neither_other_wires_nor_the_encoders_id(
    fitted, checkpoint_of, short_questions
):
    before, lw, q = LatentWire(checkpoint_of("prompt")), LatentWire(fitted), short_questions[0]
    assert before.wire_id == lw.wire_id
    assert before.encode(q.context, q.question) == lw.encode(q.context, q.question)
    with pytest.raises(ValueError, match=r"codec='compact2'.*fit_codec\.py"):
        before.encode(q.context, q.question, codec="compact2")
    with pytest.raises(ValueError, match="name the checkpoint"):
        Wire.unpack(lw.encode(q.context, q.question, codec="compact2"))


def test_tables_of_another_fit_do_not_read_a_wire(fitted, tmp_path, short_questions):
    q = short_questions[0]
    wire = LatentWire(fitted).encode(q.context, q.question, codec="compact2")
    other = shutil.copytree(fitted, tmp_path / "other")
    fit_codec(CodecSettings(ckpt=str(other), dataset="sample", samples=20, device="cpu"))
    with pytest.raises(ValueError, match="tables of another checkpoint"):
        LatentWire(other).wire(wire)


def test_an_evaluation_sends_compact_wires_and_leaves_rivals_exact(fitted, variables, tmp_path):
    more = {
        "ckpt": str(fitted),
        "conditions": "latentwire,oracle_wire,pca",
        "latent_len": None,
        "d_z": None,
        "samples": 4,
    }
    found = {codec: evaluate(config(tmp_path / codec, codec=codec, **more)) for codec in ("fp16", "compact2")}
    rows = {codec: {(r["condition"], r["llm"]): r for r in results["results"]} for codec, results in found.items()}
    assert rows["compact2"]["latentwire", "llama"]["wire_bytes"] < rows["fp16"]["latentwire", "llama"]["wire_bytes"] / 5
    assert rows["compact2"]["oracle_wire", "qwen"]["wire_bytes"] < rows["fp16"]["oracle_wire", "qwen"]["wire_bytes"] / 5
    pca = [[p for p in predictions(tmp_path / codec) if p["condition"] == "pca"] for codec in found]
    assert [p["prediction"] for p in pca[0]] == [p["prediction"] for p in pca[1]]


def test_a_compact_evaluation_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"codec='compact2'.*needs a checkpoint"):
        evaluate(config(tmp_path, codec="compact2"))


def test_an_evaluation_is_not_continued_with_tables_of_another_fit(fitted, variables, tmp_path):
    ckpt = shutil.copytree(fitted, tmp_path / "ckpt")
    more = {"ckpt": str(ckpt), "codec": "compact2", "conditions": "latentwire", "samples": 2}
    more |= {"latent_len": None, "d_z": None}
    evaluate(config(tmp_path / "run", **more))
    fit_codec(CodecSettings(ckpt=str(ckpt), dataset="sample", samples=20, device="cpu"))
    with pytest.raises(ValueError, match="tables: "):
        evaluate(config(tmp_path / "run", **more))


def test_every_way_of_the_bytes_table_codes_the_same_texts(fitted, variables, monkeypatch, llms, texts):
    questions = load("sample", "dev").questions[:4]
    encoder = load_encoder(fitted)
    shared = Shared(questions, sender=Sender(encoder, "prompt", "fp16"), train_texts=texts)
    reader = Reader(llms["llama"], PromptBuilder(llms["llama"].tokenizer, "prompt", "plain"))
    assert sizes.bytes_table(questions, "prompt", 12, shared, reader) == [], "too few"
    monkeypatch.setattr(sizes, "QUESTIONS", 3)
    monkeypatch.setattr(sizes, "_DICTIONARY", 2000)
    found = {row["way"]: row["bytes"] for row in sizes.bytes_table(questions, "prompt", 12, shared, reader)}
    plain = sum(len(f"Context: {q.context}\nQuestion: {q.question}".encode()) for q in questions[:3]) / 3
    assert found["text, UTF-8"] == plain
    asked = [f"Context: {q.context}\nQuestion: {q.question}" for q in questions[:3]]
    tokens = [len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in asked]
    assert found["text, 2 bytes per token"] == pytest.approx(2 * sum(tokens) / 3)
    assert found["text, zlib"] == pytest.approx(sum(len(zlib.compress(text.encode(), 9)) for text in asked) / 3)
    chosen = map(encoder.tokenizer.decode, encoder.select(questions[:3], "prompt", 12))
    sent = sum(len(text.encode()) for text in chosen)
    assert found["the selected tokens as text"] == pytest.approx(sent / 3)
    assert found["text, zstd with a dictionary of train text"] < found["text, zlib"] < plain
    assert found["the wire, fp16"] == 18 + 2 * 12 * 24
    llm, text = llms["llama"], questions[0].question
    ids = reader.prompts.plain(text)
    with torch.no_grad():
        logits = llm.model(torch.tensor([[llm.tokenizer.bos_token_id, *ids]])).logits[0].double()
    bits = sum(-logits[n + 1].log_softmax(0)[token].item() / math.log(2) for n, token in enumerate(ids[1:]))
    assert sizes._by_llm(reader, [text, "a"]) == [2 + math.ceil(bits / 8), 2], "2 bytes for the first token"
    assert found["text, coded by llama itself"] > 2 and "text, 2 bytes per token" in found
    assert [sizes._bytes_of_an_id(range(n)) for n in (256, 257, 65_536, 128_256)] == [1, 2, 2, 3]
    assert sizes._by_zstd(["a text"], ["one train text"]) == [], "too few for a dictionary"
    monkeypatch.setattr(sizes, "_LONGEST", 20)
    ways = [row["way"] for row in sizes.bytes_table(questions, "prompt", 12, shared, reader)]
    assert ways == [*found][:-1], "not by an LLM that cannot read the texts"
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "QUESTIONS", 3)
    monkeypatch.setattr(sizes, "_start", lambda _: None)
    ways = [row["way"] for row in sizes.bytes_table(questions, "prompt", 12, shared, reader)]
    assert "text, coded by llama itself" not in ways, "nor by one without a token to begin with"
