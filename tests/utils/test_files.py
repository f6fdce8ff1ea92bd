"""Files: a reader sees all of the old content or all of the new, and what is damaged is named."""

import gzip
import json

import pytest

from latentwire.utils import files
from latentwire.utils.files import (
    json_line,
    read_json,
    read_lines,
    read_sealed,
    write_json,
    write_sealed,
    write_text,
)

LINES = [{"id": "q1", "f1": 0.5}, {"id": "q2", "prediction": "Łódź"}]
TEXT = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)


def test_what_is_written_is_read_and_stays_legible(tmp_path):
    content = {"b": [1, 2.5, None], "a": "Łódź\n"}
    write_json(tmp_path / "f.json", content)
    assert read_json(tmp_path / "f.json") == content and [*read_json(tmp_path / "f.json")] == ["b", "a"]
    text = (tmp_path / "f.json").read_text(encoding="utf-8")
    assert "Łódź" in text and text.endswith("}\n") and text.count("\n") > 3
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    write_text(tmp_path / "f.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/f\.txt \(No space.*before is kept") as error:
        write_text(tmp_path / "f.txt", "new")
    assert error.value.errno == 28
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f.txt", "old")]
    with pytest.raises(OSError, match=r"cannot write .*nowhere/f"):
        write_text(tmp_path / "nowhere" / "f.txt", "new")


def test_content_that_is_no_json_is_refused_before_the_old_one_is_touched(tmp_path):
    write_json(tmp_path / "f.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "f.json", {"a": object()})
    assert read_json(tmp_path / "f.json") == {"a": 1}


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "f.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert read_json(tmp_path / "f.json") == {"a": 1} and read_lines(tmp_path / "f.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_sealed_file_tells_whether_it_was_altered(tmp_path):
    path = tmp_path / "config.json"
    content = {"b": [1, 2.5, None, float("inf")], "a": "Łódź\n", "c": {"llama": 1e-7}}
    write_sealed(path, content)
    assert read_sealed(path) == content and [*read_sealed(path)] == ["b", "a", "c"]
    text = path.read_text(encoding="utf-8")
    write_sealed(path, read_json(path))
    assert path.read_text(encoding="utf-8") == text, "what is read and written again has one hash, its own"
    for altered in (text.replace("2.5", "2.6"), text.replace("Łódź", "Łodz"), text.replace('"a"', '"A"')):
        path.write_text(altered, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{path} was altered; restore it, or take 'config_sha256' out"):
            read_sealed(path)
    write_json(path, content)
    assert read_sealed(path) == content, "an older file promises nothing"


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}}', b"\xff\xfe{", b"[" * 200_000, b"9" * 5000])
def test_a_damaged_json_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/f\.json: not JSON \(.*; remove it or restore it"):
        read_json(tmp_path / "f.json")


def test_lines_are_read_plain_or_packed_and_without_either_there_are_none(tmp_path):
    path = tmp_path / "predictions.jsonl"
    assert read_lines(path) == []
    (tmp_path / "predictions.jsonl.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert read_lines(path) == LINES
    path.write_text(TEXT.splitlines()[0] + "\n", encoding="utf-8")
    assert read_lines(path) == LINES[:1], "the plain file comes first"
    path.write_text("")
    assert read_lines(path) == []


@pytest.mark.parametrize("packed", [True, False])
def test_a_last_line_that_was_cut_off_does_not_count(tmp_path, packed):
    data = TEXT.encode()[:-3]
    (tmp_path / ("f.jsonl.gz" if packed else "f.jsonl")).write_bytes(gzip.compress(data) if packed else data)
    assert read_lines(tmp_path / "f.jsonl") == LINES[:1]


@pytest.mark.parametrize("damaged", [b'{"id": "q', b"\xff\xfe", b"", b"[" * 200_000, b"9" * 5000])
def test_a_damaged_line_is_named(tmp_path, damaged):
    first, second, _ = TEXT.encode().split(b"\n")
    (tmp_path / "f.jsonl").write_bytes(b"\n".join([first, damaged, second, b""]))
    with pytest.raises(ValueError, match=r"f\.jsonl:2 is damaged .*--fresh_eval"):
        read_lines(tmp_path / "f.jsonl")


def test_a_line_that_was_altered_is_named_where_it_has_a_checksum(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(map(json_line, LINES)), encoding="utf-8")
    assert read_lines(path) == LINES, "without what belongs to the file"
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]).keys() == {"id", "f1", "crc32"}
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("Łódź", "Łodz"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"f\.jsonl:2 is damaged \(it was altered\).*--fresh_eval"):
        read_lines(path)
    path.write_text(text.replace("0.5", "0.50"), encoding="utf-8")
    assert read_lines(path) == LINES, "the same, written otherwise"


@pytest.mark.parametrize("text", ["5", "[]", "null", '"id"'])
def test_a_line_that_is_no_object_is_damaged(tmp_path, text):
    (tmp_path / "f.jsonl").write_text(f"{text}\n")
    with pytest.raises(ValueError, match=r"f\.jsonl:1 is damaged \(not a JSON object\)"):
        read_lines(tmp_path / "f.jsonl")


PACKED = gzip.compress((TEXT * 50).encode(), mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        b"plain text",
        PACKED[: len(PACKED) // 2],
        PACKED[:-1],
        PACKED[:10] + b"\xff" + PACKED[11:],  # an invalid block
        PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:],  # a wrong checksum
    ],
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    (tmp_path / "f.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.jsonl\.gz: broken gzip file \(.*; restore it"):
        read_lines(tmp_path / "f.jsonl")
