"""Rows of files of many forms, one by one: what a corpus is made of.

A row is a mapping of columns, or a text that says why it is none. Its place is FILE:NUMBER, counted from 1; of JSON
lines, empty ones are no rows, but they count. What is damaged beyond a row ends the reading with a ValueError.
"""

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import latentwire.data
from latentwire.data.question import Question
from latentwire.data.registry import DATASETS
from latentwire.data.squad import load, read_squad_file, why
from latentwire.utils.cli import listed, reason
from latentwire.utils.files import UNREADABLE, sha256_of
from latentwire.utils.registry import import_all
from latentwire.utils.runs import digest
from latentwire.utils.surroundings import hub_answers

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Row = Mapping[str, object] | str
_TEXTS = "texts"  # the name of all text files together, each of them a row
_BATCH = 1024  # rows of a Parquet file that are read at once


@dataclass(frozen=True)
class Source:
    """Rows that are read one behind the other. names: files, or the one name of a data set or of a hub's; form: how
    they are read, one of the functions below; split: of a data set."""

    names: tuple[str, ...]
    form: Callable[["Source"], Iterator[tuple[str, Row]]]
    split: str = ""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """(place, row), always in the same order; what of a file's name is no text stands in its place as \\udcNN.
        Raises ValueError naming a file that is damaged."""
        for place, row in self.form(self):
            yield place.encode("utf-8", "backslashreplace").decode(), row

    def count(self) -> int | None:
        """How many rows there are, None where that cannot be told at once."""
        if self.form is lines:
            return sum(1 for _ in _numbered(self.names[0]))
        if self.form is parquet:
            with _parquet_file(self.names[0]) as file:
                return file.metadata.num_rows
        return len(self.names) if self.form is texts else None

    def digest(self) -> str:
        """What changes where the content does."""
        if self.form is hub:
            return _of_hub(self)._fingerprint
        if self.form is questions:
            return digest(load(self.names[0], self.split).questions)
        return digest(*(sha256_of(Path(name)) for name in self.names))


def sources(given: str, split: str) -> list[Source]:
    """What `given` names, with commas between: files, folders, patterns, data sets, hub ids (ID or ID:CONFIGURATION).

    Raises FileNotFoundError or ValueError naming what is no such thing.
    """
    import_all(latentwire.data)
    found, documents, seen = [], [], set()
    for name in listed(given):
        if name in DATASETS:
            found.append(Source((name,), questions, split))
            continue
        files = _files(name)
        new = [file for file in files if Path(file).resolve() not in seen]  # one that two names stand for is read once
        seen.update(Path(file).resolve() for file in new)
        documents += [file for file in new if file.endswith((".txt", ".md"))]
        found += [Source((file,), _form(file)) for file in new if not file.endswith((".txt", ".md"))]
        if not files:
            if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in _FORMS:
                raise FileNotFoundError(
                    f"input: {name!r} is no file, folder, pattern or data set ({', '.join(DATASETS)})"
                )
            found.append(Source((name,), hub, split))
    return [*found, *([Source(tuple(documents), texts)] if documents else [])]


def _files(name: str) -> list[str]:
    """The files of a folder, a pattern or a file's own name, in order."""
    if Path(name).is_file():  # its name may look like a pattern
        return [str(Path(name))]
    if not Path(name).is_dir():
        return [str(Path(path)) for path in sorted(glob(name, recursive=True)) if Path(path).is_file()]
    inside = {path: path.relative_to(name).parts for path in sorted(Path(name).rglob("*")) if path.is_file()}
    return [str(path) for path, parts in inside.items() if not any(part.startswith(".") for part in parts)]


def _form(file: str) -> Callable[[Source], Iterator[tuple[str, Row]]]:
    suffix = Path(file.removesuffix(".gz")).suffix
    if suffix not in _FORMS or (suffix == ".parquet" and file.endswith(".gz")):
        raise ValueError(f"input: {file} ends like no form that is read ({', '.join(_FORMS)}, .txt, .md)")
    return _FORMS[suffix]


def lines(source: Source) -> Iterator[tuple[str, Row]]:
    """JSON objects, one a line."""
    (name,) = source.names
    for number, line in _numbered(name):
        if line.strip():
            yield f"{name}:{number}", _object(line)


def table(source: Source) -> Iterator[tuple[str, Row]]:
    """A CSV file with a header. Bytes that are no UTF-8 become halves of surrogate pairs, which no text has."""
    (name,) = source.names
    csv.field_size_limit(sys.maxsize)
    decoded = (line.decode("utf-8-sig" if n == 1 else "utf-8", "surrogateescape") for n, line in _numbered(name))
    reader = csv.DictReader(decoded, strict=True)
    try:
        _ = reader.fieldnames
    except csv.Error as error:
        raise ValueError(f"{name}: its header is no CSV ({error})") from error
    for number in itertools.count(1):
        first = reader.reader.line_num + 1
        try:
            row = next(reader)
            yield f"{name}:{number}", "no CSV (more fields than the header has)" if any(row.get(None, ())) else row
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ValueError(f"{name}: a quote that opens in line {first} or later is never closed") from error
            yield f"{name}:{number}", f"no CSV ({error}, from line {first} on)"


def parquet(source: Source) -> Iterator[tuple[str, Row]]:
    """A Parquet file."""
    (name,) = source.names
    number = 0
    with _parquet_file(name) as file:
        for batch in file.iter_batches(_BATCH):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield f"{name}:{number}", {column: batch[column][i].as_py() for column in batch.schema.names}
                except UnicodeDecodeError as error:
                    yield f"{name}:{number}", f"no UTF-8 text ({error})"


def squad_form(source: Source) -> Iterator[tuple[str, Row]]:
    """The paragraphs of a file in SQuAD's form, each with its first question."""
    (name,) = source.names
    yield from _paragraphs(name, read_squad_file(Path(name)))


def questions(source: Source) -> Iterator[tuple[str, Row]]:
    """The paragraphs of a data set that has its name here, each with its first question."""
    (name,) = source.names
    yield from _paragraphs(name, load(name, source.split).questions)


def hub(source: Source) -> Iterator[tuple[str, Row]]:
    """A data set of the hub, through `datasets`."""
    (name,) = source.names
    for number, row in enumerate(_of_hub(source), 1):
        yield f"{name}:{number}", row


def texts(source: Source) -> Iterator[tuple[str, Row]]:
    """Text files, each a row whose one column is "text"."""
    for name in source.names:
        try:
            yield name, {"text": Path(name).read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            yield name, f"no UTF-8 text ({error})"


_FORMS = {".jsonl": lines, ".ndjson": lines, ".csv": table, ".parquet": parquet, ".json": squad_form}


def _paragraphs(name: str, found: list[Question]) -> Iterator[tuple[str, Row]]:
    first = {q.context: q for q in reversed(found)}
    for number, q in enumerate((q for q in found if first[q.context] is q), 1):
        yield f"{name}:{number}", {"id": q.paragraph, "title": q.title, "text": q.context, "question": q.question}


def _object(line: bytes) -> Row:
    try:
        found = json.loads(line)
    except UNREADABLE as error:
        return f"no JSON ({error})"
    return found if isinstance(found, dict) else f"a JSON {type(found).__name__}, no object"


def _numbered(name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _opened(name) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{name}: broken gzip file after line {number} ({error}); fetch it again") from error


def _opened(name: str) -> BinaryIO:
    return gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")


@contextmanager
def _parquet_file(name: str) -> Iterator["ParquetFile"]:
    """The file, open; ValueError with its name where damage is found while it is read."""
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            yield file
    except (pa.ArrowException, OSError) as error:  # damage within a file may be either
        raise ValueError(f"{name}: no Parquet file, or a damaged one ({reason(error)})") from error


def _of_hub(source: Source) -> object:
    """The split of a hub's data set; ValueError with the reason where there is none."""
    import datasets

    name, _, configuration = source.names[0].partition(":")
    if not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True  # the local cache may still hold it
    try:
        return datasets.load_dataset(name, configuration or None, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"input: {name!r} is no file, folder or data set ({', '.join(DATASETS)}), and the hub gave none "
            f"({why(error)})"
        ) from error
