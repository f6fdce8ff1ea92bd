"""Files that survive a crash: a reader sees the whole new content or the whole old one."""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CRC = "crc32"
_SEAL = "config_sha256"
# What json raises of text that it cannot read: also of numbers of thousands of digits, and of endless brackets.
UNREADABLE = (ValueError, RecursionError)


def read_json(path: Path) -> dict:
    """A JSON file's content; ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UNREADABLE as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); remove it or restore it") from error


def read_sealed(path: Path) -> dict:
    """The object that `write_sealed` wrote; one without a hash, as older programs wrote it, promises nothing. Raises
    ValueError naming the file when it is no JSON object, or was altered."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; restore it")
    promised = content.pop(_SEAL, None)
    if promised not in (None, _sha256(content)):
        raise ValueError(f"{path} was altered; restore it, or take {_SEAL!r} out of it if you altered it yourself")
    return content


def write_sealed(path: Path, content: Mapping) -> None:
    """Write a JSON object that tells, by a hash of all that it says, whether it was altered."""
    content = {key: value for key, value in content.items() if key != _SEAL}
    write_json(path, content | {_SEAL: _sha256(json.loads(json.dumps(content)))})


def _sha256(content: Mapping) -> str:
    """Of what JSON says, however it is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_lines(path: Path) -> list[dict]:
    """The finished lines of a .jsonl file, or of its .gz beside it; none without either.

    Raises ValueError naming the file, or the line, that is damaged: one that is no JSON object, or whose CRC-32, where
    it has one (`json_line`), is another.
    """
    lines = []
    for number, text in enumerate(_bytes(path).split(b"\n")[:-1], start=1):  # a last line without its end was cut off
        try:
            lines.append(_checked(json.loads(text)))
        except UNREADABLE as error:  # not JSON, or not UTF-8
            raise ValueError(
                f"{path}:{number} is damaged ({error}); restore it, or start the run over (eval.py: --fresh_eval)"
            ) from error
    return lines


def drop_cut_line(path: Path) -> None:
    """Take a last line without its end, which a kill cut off, from a file of lines, if there is one."""
    written = path.read_bytes() if path.is_file() else b""
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        os.truncate(path, whole)


def append_lines(path: Path, lines: Iterable[Mapping]) -> None:
    """Write lines (`json_line`) so that they survive a crash of the machine."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(map(json_line, lines))
        file.flush()
        os.fsync(file.fileno())


def json_line(content: Mapping) -> str:
    """A line of JSON that tells, by a CRC-32 of the rest, whether it was altered."""
    return json.dumps({**content, _CRC: _crc(content)}, ensure_ascii=False) + "\n"


def _checked(line: object) -> dict:
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    if line.pop(_CRC, None) not in (None, _crc(line)):
        raise ValueError("it was altered")
    return line


def _crc(content: Mapping) -> int:
    return zlib.crc32(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(weights: Mapping[str, "Tensor"]) -> str:
    """One hash of all weights of a model, by name."""
    from torch import uint8  # slow to import

    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.cpu().reshape(-1).view(uint8).numpy())
    return digest.hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader never sees half a file."""
    write_text(path, json_text(content))


def json_text(content: object) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it. Raises OSError naming the file; the previous one stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be written
            temporary.unlink()
        raise OSError(error.errno, f"cannot write {path} ({error.strerror}); what was there before is kept") from error


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
