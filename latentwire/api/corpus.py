"""A corpus: the wires of many documents in a folder of Parquet files, written by Ray Data and read by id.

    config.json, results.json        what the corpus is of; what has been done, and how fast (growth.png)
    shards/SSSSS-NNNNNN.parquet      id, wire, words, text_bytes, wire_bytes: the rows of part N of source S
    errors.parquet                   place, id, error: the rows that were kept out

The input is cut into parts of `shard_rows` rows. A part becomes one file, which gets its name when it is whole: what a
kill interrupts is done again, and what has its name is not. Its footer holds the rows that were kept out of it.
"""

import hashlib
import itertools
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from reprlib import repr as shown  # of anything, in a few words
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard
from tqdm import tqdm

from latentwire.api.encoding import LatentWire
from latentwire.api.message import Wire
from latentwire.api.settings import CorpusSettings
from latentwire.api.words import words_of
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.rows import Row, Source, sources
from latentwire.models.wire import COMPACT
from latentwire.reporting.charts import documents, growth
from latentwire.utils.cli import SCHEMA, reason, require, require_text
from latentwire.utils.cluster import start_ray
from latentwire.utils.files import read_json, sha256_of, write_json
from latentwire.utils.machine import device_of, give_memory_back, peak_memory_mb
from latentwire.utils.runs import RunFolder, digest, identity

_NO_PART = ("ckpt", "device", "output", "workers", "worker_gpus")  # of what makes two corpora the same one
_COLUMNS = pa.schema(
    {"id": pa.string(), "wire": pa.binary(), "words": pa.list_(pa.string())}
    | dict.fromkeys(("text_bytes", "wire_bytes"), pa.int64())
)
_ERRORS = pa.schema(dict.fromkeys(("place", "id", "error"), pa.string()))
_FOOTER = b"latentwire"
_ZSTD = 19  # level that the text is compressed with, to compare
_LOOKED_AT = 100  # rows that must have the columns
_READERS = 16  # sources that are read at a time
_TOLD = ("rows", "encoder_seconds", "memory_mb")  # of each part, as soon as it is there
_SHOWN = 20  # rows that are kept out and named on the screen


def encode_corpus(config: CorpusSettings) -> dict:
    """Encode what is left of the input, and return what was written to results.json.

    Raises ValueError or FileNotFoundError for an input, checkpoint or column that is not there, and for a folder that
    holds another corpus, or is in use.
    """
    lw = LatentWire.from_pretrained(config.ckpt, device="cpu")
    known = encoder_reads_question(lw.source)
    require(
        bool(config.question_column) == known, "question_column", config.question_column,
        f"the source of {config.ckpt} is {lw.source!r}: " + (
            "each text is encoded with its question, so name the column of the questions" if known
            else "texts are encoded alone; leave it out"
        ),
    )  # fmt: skip
    _probe(lw, config)  # a codec or a checkpoint that is wrong is told before Ray starts
    given = sources(config.input, config.split)
    require(bool(given), "input", config.input, "names nothing; name files, a data set or a hub id")
    _require_columns(config, given)
    facts = {"latent_len": config.latent_len or lw.m, "encoder": lw.wire_id.hex(), "source": lw.source}
    facts |= {"content": digest(*(source.digest() for source in given)), "tables": None}
    if config.codec in COMPACT:
        facts["tables"] = digest(*(sha256_of(path) for path in sorted((lw.folder / "codec").iterdir())))
    with RunFolder(config.output, identity(config, _NO_PART, **facts), device=config.device) as run:
        corpus = _Progress(run, config)
        if len(corpus.footers) != corpus.record.get("shards"):  # else all of it is done
            _on_ray(config, given, corpus)
        found = corpus.finish()
    print(_said(found, run.path), file=sys.stderr)
    return found


def _probe(lw: LatentWire, config: CorpusSettings) -> bytes:
    """Some wire."""
    return lw.encode("A text.", "A question?" if encoder_reads_question(lw.source) else None, **config.how)


def _require_columns(config: CorpusSettings, given: Sequence[Source]) -> None:
    """ValueError where the first rows have other columns than those that were named."""
    wanted = {n: getattr(config, n) for n in ("text_column", "question_column", "id_column") if getattr(config, n)}
    rows = [row for _, row in islice(given[0].rows(), _LOOKED_AT) if isinstance(row, Mapping)]
    there = sorted({column for row in rows for column in row if column is not None})
    for name, column in wanted.items():
        require(not rows or column in there, name, column, f"{given[0].names[0]} has {', '.join(there) or 'none'}")


class _Progress:
    """results.json, which is written after each part: nothing of what a killed run measured is lost."""

    def __init__(self, run: RunFolder, config: CorpusSettings):
        self.folder, self._path, self._started = run.path, run.path / "results.json", 0.0
        begun = {"schema": SCHEMA, **run.origin, "ckpt": config.ckpt, "codec": config.codec, "runs": []}
        before = read_json(self._path) if self._path.is_file() else begun
        self.record = before | run.origin | {"ckpt": config.ckpt}  # the checkpoint may lie elsewhere now
        write_json(self._path, self.record)  # from here on the folder belongs to this corpus
        (self.folder / "shards").mkdir(exist_ok=True)
        for left in (self.folder / "shards").glob(".*"):  # of a part that a kill interrupted
            left.unlink(missing_ok=True)

    @property
    def footers(self) -> list[dict]:
        """What the encoders said of the parts that are done."""
        return [_footer(path) for path in sorted((self.folder / "shards").glob("*.parquet"))]

    def add(self, rows: int, seconds: float, memory_mb: float) -> None:
        """So many more rows are done; seconds: that the encoder took for them; memory_mb: the most that it had so far.
        The run's time counts from where the first encoder began: starting Ray and loading models is no encoding."""
        now, this = time.time(), self.record["runs"][-1]
        self._started = self._started or now - seconds
        this["rows"] += rows
        this["seconds"] = now - self._started
        this["rows_per_second"] = this["rows"] / this["seconds"]
        this["progress"].append({name: this[name] for name in ("rows", "seconds")} | {"memory_mb": memory_mb})
        write_json(self._path, self.record)

    def finish(self) -> dict:
        """Add up what was said of the parts, and write errors.parquet."""
        footers = self.footers
        kept_out = [error for footer in footers for error in footer["errors"]]
        _write(pa.Table.from_pylist(kept_out, _ERRORS), self.folder / "errors.parquet")
        sums = ("rows", "text_bytes", "text_zstd_bytes", "wire_bytes", "encoder_seconds")
        self.record |= {name: sum(footer[name] for footer in footers) for name in sums}
        self.record |= {
            "kept_out": len(kept_out), "shards": len(footers),
            "disk_bytes": sum(path.stat().st_size for path in (self.folder / "shards").iterdir()),
            "rows_sha256": digest(*(footer["rows_sha256"] for footer in footers)),
        }  # fmt: skip
        write_json(self._path, self.record)
        if grown := documents(self.record["runs"]):
            growth(grown).savefig(self.folder / "growth.png", dpi=130)
        return self.record


def _said(found: Mapping, folder: Path) -> str:
    """results.json in one line."""
    this = found["runs"][-1]
    rate = f"{this['rows_per_second']:.1f} rows/s with {this['workers']} workers; " if this["rows"] else ""
    return (
        f"{rate}{found['rows']:,} wires of {found['wire_bytes']:,} bytes, for {found['text_bytes']:,} bytes of text "
        f"({found['text_zstd_bytes']:,} as zstd); {found['disk_bytes']:,} on disk in {folder}; {found['kept_out']:,} "
        "rows kept out (errors.parquet)"
    )


def _on_ray(config: CorpusSettings, given: Sequence[Source], corpus: _Progress) -> None:
    """A reader of each source cuts it into parts, and a pool of encoders writes them."""
    counts, done = [source.count() for source in given], sum(f["rows"] + len(f["errors"]) for f in corpus.footers)
    total, at = None if None in counts else sum(counts), os.getcwd()
    ray = _ray()
    try:
        pool = _pool(config, ray.cluster_resources())
        this = {"workers": pool["concurrency"], "worker_gpus": pool["num_gpus"], "rows": 0, "seconds": 0.0}
        this["progress"] = []
        corpus.record["runs"].append(this)
        packed = [{"source": pickle.dumps((number, source))} for number, source in enumerate(given)]
        parts = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
            _parts, fn_args=[config, at], batch_size=1, num_cpus=0, concurrency=min(len(packed), _READERS)
        )
        written = parts.map_batches(_Encoder, fn_constructor_args=[config, at], batch_size=1, **pool)
        with tqdm(total=total, initial=done, unit="row", desc="encoding") as bar:
            for part in written.iter_rows():
                errors = json.loads(part["errors"])
                corpus.add(part["rows"], part["encoder_seconds"], part["memory_mb"])
                bar.update(part["rows"] + len(errors))
                told = [f"kept out: {error['place']}: {error['error']}" for error in errors[:_SHOWN]]
                told += [f"kept out: {len(errors) - _SHOWN} more rows of {part['name']}"] if errors[_SHOWN:] else []
                tqdm.write("\n".join(told), file=sys.stderr, end="\n" if told else "")
    except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
        mine = _cause(error)
        if mine is None:
            raise
        raise ValueError(str(mine)) from error
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    """Ray with its data library, started."""
    ray = start_ray("data", "pip install -e '.[corpus]', or bash scripts/encode_corpus.sh")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # bytes: each part is a block of its own, so that encoders share them
    return ray


def _pool(config: CorpusSettings, there: Mapping[str, float]) -> dict:
    """How many encoders there are, and what each has for itself, of the cluster's CPUs and GPUs."""
    cards, processors = there.get("GPU", 0.0), there.get("CPU", 1.0)
    gpus = config.worker_gpus
    gpus = float(cards > 0 and config.device != "cpu") if gpus is None else gpus
    most = int(cards / gpus) if gpus else int(processors)
    require(most >= 1, "worker_gpus", gpus, f"there are {cards:.0f} GPUs")
    workers = config.workers or most
    require(workers <= most or not gpus, "workers", workers, f"there are GPUs for {most}")
    return {"concurrency": workers, "num_gpus": gpus, "num_cpus": min(1.0, processors / workers)}


def _cause(error: BaseException) -> ValueError | OSError | None:
    """What a reader or an encoder raised itself, without what Ray says around it."""
    inner = getattr(error, "cause", None) or error.__cause__
    return (inner and _cause(inner)) or (error if isinstance(error, ValueError | OSError) else None)


def _parts(batch: Mapping[str, np.ndarray], config: CorpusSettings, at: str) -> Iterator[dict[str, list]]:
    """The parts of a source that have no file yet, each a list of (place, row) with the columns that are needed; at:
    the folder that paths count from."""
    os.chdir(at)
    (packed,) = batch["source"]
    number, source = pickle.loads(packed)
    columns = {config.text_column, config.question_column, config.id_column}
    rows = source.rows()
    for part in itertools.count():
        some = list(islice(rows, config.shard_rows))
        if not some:
            return
        name = f"{number:05}-{part:06}.parquet"
        if not (Path(config.output) / "shards" / name).is_file():
            some = [(p, row if isinstance(row, str) else {c: row[c] for c in columns & row.keys()}) for p, row in some]
            yield {"name": [name], "rows": [pickle.dumps(some)]}


class _Encoder:
    """One of the pool: writes a file for each part that it gets."""

    def __init__(self, config: CorpusSettings, at: str):
        import torch

        os.chdir(at)
        torch.set_num_threads(1)  # its processor's; more encoders do more than more threads
        self.config, self.device = config, device_of(config.device)
        self.lw = LatentWire.from_pretrained(config.ckpt, device=self.device)
        self._table([("", "")], {"": _probe(self.lw, config)})  # what loads at first use is loaded now

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list]:
        (name,), (packed,) = batch["name"], batch["rows"]
        started, rows, errors, given = time.time(), [], [], pickle.loads(packed)
        for place, row in given:
            try:
                rows.append((place, *self._checked(place, row)))
            except ValueError as error:
                id_ = row.get(self.config.id_column) if isinstance(row, Mapping) else None
                id_ = id_ if id_ is None or str(id_).isprintable() else shown(id_)  # no half of a surrogate pair is
                errors.append({"place": place, "id": None if id_ is None else str(id_), "error": str(error)})
        wires = self._encoded(rows, errors)
        order = {place: number for number, (place, _) in enumerate(given)}
        errors.sort(key=lambda error: order[error["place"]])  # those that the encoder refused stand last
        table = self._table(rows, wires)
        stands = slice(2, 3 if question_in_tail(self.lw.source) else 4)  # what the wires stand for
        said = "\n".join(part for row in rows if row[0] in wires for part in row[stands]).encode()
        footer = {
            "rows": len(table), "errors": errors, "rows_sha256": _sha256(table),
            "text_bytes": sum(table["text_bytes"].to_pylist()), "wire_bytes": sum(table["wire_bytes"].to_pylist()),
            "text_zstd_bytes": len(zstandard.ZstdCompressor(level=_ZSTD).compress(said)) if said else 0,
            "encoder_seconds": time.time() - started, "memory_mb": peak_memory_mb(self.device),
        }  # fmt: skip
        table = table.replace_schema_metadata({_FOOTER: json.dumps(footer)})
        _write(table, Path(self.config.output) / "shards" / str(name))
        give_memory_back()
        told = {"name": str(name), "errors": json.dumps(errors)} | {n: footer[n] for n in _TOLD}
        return {key: [value] for key, value in told.items()}

    def _checked(self, place: str, row: Row) -> tuple[str, ...]:
        """(id, text), or (id, text, question), of a row; ValueError where it is damaged."""
        if isinstance(row, str):
            raise ValueError(row)
        config, found = self.config, [] if self.config.id_column else [place]
        for column in filter(None, (config.id_column, config.text_column, config.question_column)):
            value = row.get(column)
            if value is None:
                raise ValueError(f"{column}: {'null' if column in row else 'the row has no such column'}")
            value = str(value) if column == config.id_column else value
            if not isinstance(value, str):
                raise ValueError(f"{column}: {type(value).__name__}, no text")
            require_text(column, value)
            found.append(value)
        return tuple(found)

    def _encoded(self, rows: Sequence[tuple[str, ...]], errors: list[dict]) -> dict[str, bytes]:
        """The wires by place; a text that the encoder refuses has none, and is named in `errors`."""
        if not rows:
            return {}
        asked = [row[3] for row in rows] if encoder_reads_question(self.lw.source) else None
        try:
            wires = self.lw.encode([row[2] for row in rows], asked, **self.config.how)
            return {row[0]: wire for row, wire in zip(rows, wires, strict=True)}
        except ValueError as error:
            if len(rows) == 1:
                errors.append({"place": rows[0][0], "id": rows[0][1], "error": str(error)})
                return {}
        half = len(rows) // 2
        return self._encoded(rows[:half], errors) | self._encoded(rows[half:], errors)

    def _table(self, rows: Sequence[tuple[str, ...]], wires: Mapping[str, bytes]) -> pa.Table:
        kept = [row[1] for row in rows if row[0] in wires]
        read = [self.lw.wire(wire) for wire in wires.values()]
        known = self.config.keep_words and self.lw.encoder.chooses_tokens
        words = words_of(read, self.device) if known else [None] * len(read)
        columns = (kept, wires.values(), words, [wire.text_bytes for wire in read], map(len, wires.values()))
        return pa.table([pa.array([*c], f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS)


class Corpus:
    """Wires by the ids of their documents. `LatentWire.open_corpus` makes it; the ids are read into memory when the
    first one is asked for."""

    def __init__(self, folder: str | Path, ckpt: str | Path = ""):
        self.folder = Path(folder)
        if not (self.folder / "results.json").is_file() or not (self.folder / "shards").is_dir():
            raise FileNotFoundError(f"no corpus in {str(folder)!r}; encode_corpus.py --output {folder} makes one")
        made, by = read_json(self.folder / "config.json")["config"], read_json(self.folder / "results.json")["ckpt"]
        self._lw = LatentWire.from_pretrained(ckpt or by)
        require(
            self._lw.wire_id.hex() == made["encoder"], "ckpt", str(ckpt or by),
            f"{self.folder} is of encoder {made['encoder']} ({by}), this is {self._lw.wire_id.hex()}",
        )  # fmt: skip
        self._files = sorted((self.folder / "shards").glob("*.parquet"))

    def __getitem__(self, id: str) -> Wire:
        """The wire of a document; ValueError for an id that none has, or more than one."""
        found = np.flatnonzero(pc.equal(self._ids, id).to_numpy())
        if len(found) == 1:
            file = int(np.searchsorted(self._ends, found[0], side="right"))
            row = int(found[0] - self._ends[file - 1]) if file else int(found[0])
            return self._lw.wire(pq.read_table(self._files[file], columns=["wire"])["wire"][row].as_py())
        raise ValueError(f"id={id!r}: {len(found)} documents of {self.folder} have it{self._why(id)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids.to_pylist())

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        columns = [pq.read_table(path, columns=["id"])["id"] for path in self._files]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    @cached_property
    def _ends(self) -> np.ndarray:
        """How many rows stand in each file and those before it."""
        return np.cumsum([pq.read_metadata(path).num_rows for path in self._files])

    def _why(self, id: str) -> str:
        """Why a document has no wire, where that is known."""
        errors = [error for path in self._files for error in _footer(path)["errors"]]
        return next((f"; it was kept out: {e['error']}" for e in errors if id in (e["id"], e["place"])), "")


def _write(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is whole once it has its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _footer(path: Path) -> dict:
    """What the encoder said of a part."""
    try:
        return json.loads(pq.read_schema(path).metadata[_FOOTER])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}); remove it, and encode again") from error


def _sha256(table: pa.Table) -> str:
    """Of ids and wires, in their order."""
    found = hashlib.sha256()
    for id_, wire in zip(table["id"].to_pylist(), table["wire"].to_pylist(), strict=True):
        found.update(f"{len(id_)} {len(wire)} {id_}".encode() + wire)
    return found.hexdigest()
