"""Files that survive a crash: a reader sees the whole new content or the whole old one."""

import gzip
import json
import os
import zlib
from pathlib import Path


def read_json(path: Path) -> dict:
    """A JSON file's content; ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); remove it or restore it") from error


def read_lines(path: Path) -> list[dict]:
    """The finished lines of a predictions.jsonl, or of its .gz beside it; none without either.

    Raises ValueError naming the file, or the line, that is damaged.
    """
    lines = []
    for number, text in enumerate(_bytes(path).split(b"\n")[:-1], start=1):  # a last line without its end was cut off
        try:
            lines.append(json.loads(text))
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path}:{number} is damaged ({error}); evaluate again with --fresh_eval") from error
    return lines


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _bytes(path: Path) -> bytes:
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        return path.read_bytes()
    if not packed.is_file():
        return b""
    try:
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{packed}: broken gzip file ({error}); restore it") from error
