"""Rows of files of every form: each with its place, and what is damaged told by name."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.data.rows import sources
from latentwire.data.squad import SAMPLE_DIR, load


def rows(given, split="train"):
    return [row for source in sources(str(given), split) for row in source.rows()]


def test_lines_count_from_one_and_empty_ones_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n[1]\n{"text": \xff}\n{"text": "two"}')
    found = rows(path)
    assert [place for place, _ in found] == [f"{path}:{n}" for n in (1, 3, 4, 5)]
    assert (found[0][1], found[3][1]) == ({"text": "one"}, {"text": "two"})
    assert found[1][1] == "a JSON list, no object" and found[2][1].startswith("no JSON")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in rows(f"{path}.gz")] == [row for _, row in found]
    assert sources(f"{path}.gz", "")[0].count() == 5


def test_a_table_has_a_header_and_its_damage_is_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'text,n\n"two\nlines",1\nshort\nlatin \xe9,2\n' + b"x" * 200_000 + b',3\n"closed" early,4\nmore,5\n'
    )
    found = [row for _, row in rows(path)]
    assert found[0] == {"text": "two\nlines", "n": "1"} and found[1] == {"text": "short", "n": None}
    assert found[2]["text"] == "latin \udce9" and len(found[3]["text"]) == 200_000
    assert found[4].startswith("no CSV (") and found[4].endswith(", from line 7 on)")
    assert found[5:] == [{"text": "more", "n": "5"}]
    path.write_text("id,text\n1,one\n2,The mill, built in 1794\n3,three\n")
    found = [row for _, row in rows(path)]
    assert found[1] == "no CSV (more fields than the header has)" and found[2] == {"id": "3", "text": "three"}
    path.write_text("id,text\n1,one,\n")
    assert rows(path)[0][1]["text"] == "one", "a last comma says nothing"


def test_a_quote_that_is_never_closed_ends_the_reading_and_hides_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\n"never closed,4\nmore,5\n')
    found = sources(str(tmp_path / "a.csv"), "")[0].rows()
    with pytest.raises(ValueError, match=r"a\.csv: a quote that opens in line 4 or later is never closed"):
        for _, row in found:
            assert row == {"text": "two\nlines", "n": "1"}


@pytest.mark.parametrize("text", ['"text,n\none,1\n', '"te"xt,n\none,1\n'])
def test_a_header_that_is_no_csv_gives_its_place_to_no_row(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=r"a\.csv: its header is no CSV"):
        rows(tmp_path / "a.csv")


def test_parquet_rows_and_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pa.array([b"good", b"\xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken, "n": [1, 2, 3]}), path)
    found = rows(path)
    assert found[0] == (f"{path}:1", {"text": "good", "n": 1}) and found[2][1] == {"text": None, "n": 3}
    assert found[1][1].startswith("no UTF-8 text") and sources(str(path), "")[0].count() == 3
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a\.parquet: no Parquet file"):
        rows(path)


def test_a_parquet_file_with_a_damaged_page_or_footer_is_named(tmp_path):
    path, damaged = tmp_path / "a.parquet", r"a\.parquet: no Parquet file, or a damaged one \(.+\)$"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(9)]}), path)
    data = path.read_bytes()
    end = len(data) - 8  # of the footer, whose size and a mark stand behind it
    begin = end - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:4] + bytes(begin - 4) + data[begin:])
    assert sources(str(path), "")[0].count() == 9
    with pytest.raises(ValueError, match=damaged):
        rows(path)
    path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    for read in (rows, lambda path: sources(str(path), "")[0].count()):
        with pytest.raises(ValueError, match=damaged):
            read(path)


def test_a_folder_a_pattern_and_files_with_commas(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    for hidden in (".hidden", ".git/HEAD", "x/.cache/e.txt"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_text("no")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.jsonl").write_text('{"text": "third"}\n')
    found = [row for _, row in rows(tmp_path)]
    assert found[:3] == [{"text": "third"}, {"text": "first"}, {"text": "second"}]
    assert found[3].startswith("no UTF-8 text")
    assert [row for _, row in rows(tmp_path / "[ab].txt")] == found[1:3]
    assert [row for _, row in rows(f"{tmp_path / 'b.txt'}, {tmp_path / 'd.jsonl'}")] == [found[0], found[2]]
    twice = f"{tmp_path / '[ab].txt'},{tmp_path}/./a.txt,{tmp_path / 'b.txt'},{tmp_path / 'd.jsonl'},{tmp_path / 'd*'}"
    assert [row for _, row in rows(twice)] == found[:3], "a file that two names stand for is read once"
    (tmp_path / "f[1].txt").write_text("no pattern")
    assert [row for _, row in rows(tmp_path / "f[1].txt")] == [{"text": "no pattern"}]
    (tmp_path / "e.docx").write_text("no")
    with pytest.raises(ValueError, match=r"e\.docx ends like no form that is read"):
        sources(str(tmp_path), "")
    with pytest.raises(FileNotFoundError, match=r"'nothing\.csv' is no file, folder, pattern or data set"):
        sources("nothing.csv", "")


def test_a_file_whose_name_is_no_text_has_a_place_that_is(tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("first")
    ((place, row),) = sources(str(tmp_path), "")[0].rows()
    assert place.endswith("/caf\\udce9.txt") and place.isprintable() and row == {"text": "first"}


def test_a_data_set_gives_each_paragraph_once_with_its_first_question():
    questions = load("sample", "dev").questions
    found = [row for _, row in rows("sample", "dev")]
    assert [row["text"] for row in found] == list(dict.fromkeys(q.context for q in questions))
    first = {}
    for q in questions:
        first.setdefault(q.context, q)
    assert all(
        (row["question"], row["id"]) == (q.question, q.paragraph) for row, q in zip(found, first.values(), strict=True)
    )
    assert [row for _, row in rows(SAMPLE_DIR / "dev.json")] == found


def test_content_that_changes_changes_the_digest(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}))
    before = sources(str(path), "")[0].digest()
    path.write_text(json.dumps({"text": "two"}))
    assert sources(str(path), "")[0].digest() != before
    assert sources("sample", "dev")[0].digest() != sources("sample", "train")[0].digest()


def test_a_hub_id_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*given, **how):
        asked.append((given, how))
        if given[0] == "no/thing":
            raise ValueError("no such data set\nmore")
        return datasets.Dataset.from_dict({"text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("latentwire.data.rows.hub_answers", lambda: True)
    assert rows("some/set:part") == [("some/set:part:1", {"text": "one"}), ("some/set:part:2", {"text": "two"})]
    assert asked == [(("some/set", "part"), {"split": "train"})]
    with pytest.raises(ValueError, match=r"'no/thing' is no file, .* the hub gave none \(no such data set\)"):
        rows("no/thing")


@pytest.mark.parametrize(
    ("kind", "why", "says"),
    [
        ("RuntimeError", None, "scripts are no longer supported"),
        ("DatasetGenerationError", ValueError("column n is no number\nmore"), "column n is no number"),
    ],
)
def test_a_data_set_that_cannot_be_made_is_told_with_the_reason(monkeypatch, kind, why, says):
    import datasets

    def load_dataset(*_, **__):
        raise getattr(datasets.exceptions, kind, RuntimeError)("scripts are no longer supported\nmore") from why

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("latentwire.data.rows.hub_answers", lambda: True)
    with pytest.raises(ValueError, match=rf"'some/set' is no file, .* the hub gave none \({says}\)$"):
        rows("some/set")
