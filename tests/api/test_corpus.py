"""A corpus: the same bytes as encoding alone, no row lost or repeated by a kill, damaged rows named, others refused."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import LatentWire, answer
from latentwire.api.corpus import _cause, _Encoder, _pool, encode_corpus
from latentwire.api.settings import CorpusSettings
from latentwire.reporting.charts import documents, growth
from latentwire.utils import cli

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("surroundings")
ROWS, SHARD = 10, 3


@pytest.fixture(scope="module")
def rows(short_questions):
    return [{"name": f"n{i}", "body": q.context, "ask": q.question} for i, q in enumerate(short_questions[:ROWS])]


@pytest.fixture(scope="module")
def written(rows, tmp_path_factory):
    """A file of lines; six more of them are damaged, the last three amid good ones."""
    path = tmp_path_factory.mktemp("input") / "texts.jsonl"
    more = [{"name": 0, "body": " ", "ask": "?"}, {"name": "half", "body": "a\ud800", "ask": "?"}]
    amid = [{"name": "long", "body": "A text.", "ask": "who " * 200}, {"name": None, "body": "A text.", "ask": "?"}]
    amid.append({"name": "seven", "body": 7, "ask": "?"})
    lines = [json.dumps(row) for row in [*rows[:4], *more, *rows[4:6], *amid, *rows[6:]]]
    path.write_text("\n".join([*lines[:2], "{no JSON", *lines[2:]]) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(lw, written):
    return {
        "input": str(written), "ckpt": str(lw.folder), "text_column": "body", "question_column": "ask",
        "id_column": "name", "shard_rows": SHARD, "workers": 1, "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """(folder, what was returned) of a corpus that nothing interrupted."""
    folder = tmp_path_factory.mktemp("corpus") / "whole"
    return folder, encode_corpus(CorpusSettings(**flags, output=str(folder)))


def read(folder):
    """All rows in order."""
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "shards").glob("*"))]).to_pylist()


def test_each_wire_has_the_bytes_that_encode_gives_its_text_alone(whole, rows, lw):
    folder, found = whole
    assert (found["rows"], found["kept_out"], found["shards"]) == (ROWS, 6, 6)
    (this,) = found["runs"]
    assert len(this["progress"]) == 6 and all(part["memory_mb"] > 0 for part in this["progress"])
    assert (folder / "growth.png").stat().st_size > 1000
    assert {name: this[name] for name in ("rows", "seconds")}.items() <= this["progress"][-1].items()
    assert [row["id"] for row in read(folder)] == [row["name"] for row in rows]
    for row, given in zip(read(folder), rows, strict=True):
        wire = lw.encode(given["body"], given["ask"])
        assert row["wire"] == wire and row["wire_bytes"] == len(wire)
        assert row["words"] == lw.wire(wire).words() and row["text_bytes"] == lw.wire(wire).text_bytes


def test_damaged_rows_are_named_and_kept_out(whole):
    errors = pq.read_table(whole[0] / "errors.parquet").to_pylist()
    said = {Path(error["place"]).name: (error["id"], error["error"]) for error in errors}
    assert [int(name.removeprefix("texts.jsonl:")) for name in said] == [3, 6, 7, 10, 11, 12]
    assert said["texts.jsonl:3"][0] is None and "no JSON" in said["texts.jsonl:3"][1]
    assert said["texts.jsonl:6"] == ("0", "body=' ': empty; give a text")
    assert said["texts.jsonl:7"][0] == "half" and "surrogate" in said["texts.jsonl:7"][1]
    assert said["texts.jsonl:10"][0] == "long" and "word pieces" in said["texts.jsonl:10"][1]
    assert said["texts.jsonl:11"][1] == "name: null" and said["texts.jsonl:12"][1] == "body: int, no text"


def test_a_wire_is_found_by_its_id(whole, rows, lw, checkpoint_of):
    for corpus in (LatentWire.open_corpus(whole[0]), lw.open_corpus(whole[0], lw.folder)):
        assert len(corpus) == ROWS and [*corpus] == [row["name"] for row in rows]
        assert all(bytes(corpus[row["name"]]) == lw.encode(row["body"], row["ask"]) for row in rows)
    with pytest.raises(ValueError, match=r"id='nobody': 0 documents"):
        corpus["nobody"]
    with pytest.raises(ValueError, match=r"id='0': 0 documents .* kept out: body=' ': empty"):
        corpus["0"]
    corpus._ids = pa.chunked_array([["twice", "twice"]])
    with pytest.raises(ValueError, match=r"id='twice': 2 documents"):
        corpus["twice"]
    with pytest.raises(ValueError, match="is of encoder"):
        LatentWire.open_corpus(whole[0], checkpoint_of("prompt", 1))
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        LatentWire.open_corpus(lw.folder)


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of the corpus that a test may change; nothing is left to do."""
    monkeypatch.setattr("latentwire.api.corpus._ray", lambda: pytest.fail("Ray was started"))
    return shutil.copytree(whole[0], tmp_path / "corpus")


def test_a_corpus_says_where_its_checkpoint_lies_by_now(copied, flags, rows, lw, tmp_path, monkeypatch):
    moved = shutil.copytree(lw.folder, tmp_path / "moved")
    told = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps(told | {"ckpt": str(tmp_path / "where it lay")}))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*where it lay"):
        LatentWire.open_corpus(copied)
    monkeypatch.setattr("latentwire.utils.runs.git_sha", lambda: "another commit")
    found = encode_corpus(CorpusSettings(**(flags | {"ckpt": str(moved)}), output=str(copied)))
    assert json.loads((copied / "results.json").read_text()) == found and found["ckpt"] == str(moved)
    assert found["git"] == f"{told['git']}, then another commit"
    assert found["git"] == json.loads((copied / "config.json").read_text())["git"] and found["runs"] == told["runs"]
    assert bytes(LatentWire.open_corpus(copied)["n7"]) == lw.encode(rows[7]["body"], rows[7]["ask"])


def test_a_part_whose_footer_is_damaged_is_named_with_the_remedy(copied, flags):
    path = min(copied.glob("shards/*"))
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[: -8 - size] + bytes(size) + data[-8:])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.+\); remove it, and encode again"):
        encode_corpus(CorpusSettings(**flags, output=str(copied)))


def test_one_bad_text_among_many_is_found_by_halving(flags):
    encoder, calls, errors = object.__new__(_Encoder), [], []

    def encode(contexts, asked, **how):
        calls.append(len(contexts))
        if "bad" in contexts:
            raise ValueError("too long")
        return [f"{context} {question}".encode() for context, question in zip(contexts, asked, strict=True)]

    encoder.config, encoder.lw = CorpusSettings(**flags, output="o"), SimpleNamespace(source="prompt", encode=encode)
    texts = ["bad" if n == 37 else f"text {n}" for n in range(64)]
    wires = encoder._encoded([(f"f:{n}", f"n{n}", text, "?") for n, text in enumerate(texts)], errors)
    good = [(f"f:{n}", f"{text} ?".encode()) for n, text in enumerate(texts) if text != "bad"]
    assert [*wires.items()] == good, "in their order"
    assert errors == [{"place": "f:37", "id": "n37", "error": "too long"}] and len(calls) <= 13


def test_answer_reads_a_corpus(whole, rows, lw, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["answer.py", f"--ckpt={lw.folder}", f"--corpus={whole[0]}", "--id=n7"])
    cli.run(answer.main)
    first = next(iter(lw.llms))
    wire = lw.encode(rows[7]["body"], rows[7]["ask"])
    assert capsys.readouterr().out.rstrip("\n") == lw.reader(first).answer(wire)


def test_killed_in_the_middle_and_continued_the_rows_are_the_same(whole, flags, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "latentwire/encode_corpus.py", f"--output={folder}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (there := [*folder.glob("shards/0*.parquet")]):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGSTOP)  # so that the program has not ended when it is killed
    try:
        with pytest.raises(ValueError, match="is in use by a running process"):
            encode_corpus(CorpusSettings(**flags, output=str(folder)))
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    last = max(path.name for path in whole[0].glob("shards/0*.parquet"))
    assert there[0].name != last
    (folder / "shards" / last).unlink(missing_ok=True)  # workers of Ray went on: something is left to do
    first = there[0].stat().st_mtime_ns
    (folder / "shards" / ".00000-000004.parquet.1").write_bytes(b"half a file")
    found = encode_corpus(CorpusSettings(**flags, output=str(folder)))
    assert read(folder) == read(whole[0]) and found["rows_sha256"] == whole[1]["rows_sha256"]
    assert pq.read_table(folder / "errors.parquet") == pq.read_table(whole[0] / "errors.parquet")
    grown = [(line["value"], line["seconds"]) for line in documents(found["runs"])]
    assert grown == sorted(grown) and 0 < grown[-1][0] <= ROWS
    assert there[0].stat().st_mtime_ns == first and not [*folder.glob("shards/.*")]


def test_a_folder_of_another_corpus_is_refused_by_name(whole, flags, checkpoint_of, tmp_path, rows):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n")
    changes = [("ckpt", str(checkpoint_of("prompt", 1)), "encoder"), ("codec", "int8", "codec")]
    changes += [("input", str(other), "content"), ("latent_len", 5, "latent_len"), ("shard_rows", 4, "shard_rows")]
    for name, value, said in changes:
        with pytest.raises(ValueError, match=rf"another configuration \(.*{said}: "):
            encode_corpus(CorpusSettings(**(flags | {name: value}), output=str(whole[0])))
    found = encode_corpus(CorpusSettings(**(flags | {"workers": 2}), output=str(whole[0])))
    assert len(found["runs"]) == 1, "all of it is done"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question_column": ""}, "question_column='': the source of .* is 'prompt': each text"),
        ({"text_column": "text"}, "text_column='text': .* has ask, body, name"),
        ({"codec": "compact2"}, "codec='compact2': choose one of"),
        ({"input": "no/such/file.jsonl"}, "'no/such/file.jsonl' is no file"),
        ({"input": " , "}, "input=' , ': names nothing"),
        ({"ckpt": "./nothing"}, "no checkpoint in './nothing'"),
    ],
)
def test_what_is_wrong_is_told_before_ray_starts(flags, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr("latentwire.api.corpus._ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        encode_corpus(CorpusSettings(**(flags | change), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_source_context_takes_no_question(flags, checkpoint_of, tmp_path):
    change = {"ckpt": str(checkpoint_of("context"))}
    with pytest.raises(ValueError, match=r"question_column='ask': .* 'context': texts are encoded alone"):
        encode_corpus(CorpusSettings(**(flags | change), output=str(tmp_path)))


def test_a_broken_file_ends_the_run_with_its_name(flags, written, tmp_path):
    packed = gzip.compress(written.read_bytes() * 40)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    change = {"input": str(tmp_path / "cut.jsonl.gz"), "id_column": ""}
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: broken gzip file after line \d+"):
        encode_corpus(CorpusSettings(**(flags | change), output=str(tmp_path / "out")))


def test_growth_begins_with_the_first_row():
    """A first part whose rows are all damaged has none."""
    parts = [{"rows": rows, "seconds": 1.0 + rows, "memory_mb": 9.0} for rows in (0, 3)]
    lines = documents([{"rows": 3, "seconds": 4.0, "progress": parts}])
    assert [line["value"] for line in lines] == [3] and growth(lines).axes


def test_encoders_share_the_gpus_that_there_are(flags):
    def pool(there, **changes):
        return _pool(CorpusSettings(**(flags | {"device": "", "workers": None} | changes), output="o"), there)

    assert pool({"CPU": 8.0, "GPU": 2.0}) == {"concurrency": 2, "num_gpus": 1.0, "num_cpus": 1.0}
    assert pool({"CPU": 8.0, "GPU": 2.0}, worker_gpus=0.5)["concurrency"] == 4
    assert pool({"CPU": 8.0, "GPU": 2.0}, device="cpu") == {"concurrency": 8, "num_gpus": 0.0, "num_cpus": 1.0}
    assert pool({"CPU": 2.0}, workers=4) == {"concurrency": 4, "num_gpus": 0.0, "num_cpus": 0.5}
    with pytest.raises(ValueError, match=r"workers=3: there are GPUs for 2"):
        pool({"CPU": 8.0, "GPU": 2.0}, workers=3)
    with pytest.raises(ValueError, match=r"worker_gpus=1.0: there are 0 GPUs"):
        pool({"CPU": 8.0}, worker_gpus=1.0)


def test_what_went_wrong_is_found_within_what_ray_says():
    outer = RuntimeError("Ray says much")
    with contextlib.suppress(RuntimeError):
        raise outer from ValueError("the file is broken")
    assert str(_cause(outer)) == "the file is broken" and _cause(RuntimeError("?")) is None
