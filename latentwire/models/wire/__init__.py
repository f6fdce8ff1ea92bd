"""The wire: latents as bytes, and back. `api.message` puts them into what one program sends to another.

Version 1, little-endian:

    magic "LWIR" | version u8 | codec u8 | M u16 | d_z u16 | count u32 | payload | CRC-32 u32

Codecs with tables, whose reader knows what a latent is, take less around it (version 3; version 1 of them is still
read):

    magic "LZ" | codec u8 | M varint | count varint | payload | CRC-32 u32 of the tables' hash and everything before

What a payload holds is said in `scalar` (fp16, int8, int4) and `compact` (the others). The checksum covers everything
before it. Anything unexpected raises ValueError: a wrong Z is never returned.
"""

import struct
import zlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from latentwire.models.wire.scalar import pack_scalars, unpack_scalars

if TYPE_CHECKING:
    from latentwire.models.wire.compact import Compact

MAGIC, SHORT = b"LWIR", b"LZ"
VERSION, SHORT_VERSION = 1, 3
SCALAR = ("fp16", "int8", "int4")
# Of each: directions of the residual, and how many of the tables' steps one of its steps is.
COMPACT = {
    **{f"compact{directions}": (directions, 1) for directions in (0, 1, 2, 4, 8)},
    **{f"coarse{steps}": (8, steps) for steps in (2, 4, 8)},
}
CODECS = {codec: number for number, codec in enumerate((*SCALAR, *COMPACT))}
_MOST = 0xFFFF
_HEADER = struct.Struct("<4sBBHHI")
_CRC = struct.Struct("<I")
_LEAST = len(SHORT) + 3 + _CRC.size  # bytes of a short wire


def pack(z: np.ndarray, codec: str, compact: "Compact | None" = None) -> bytes:
    """Encode latents.

    z: float array [count, M, d_z]; codec: one of CODECS; compact: tables, for those of COMPACT. Returns the packed
    bytes. Raises ValueError for an unknown codec, a wrong shape, or values that it cannot hold (nan, inf, overflow).
    """
    z = np.asarray(z, np.float32)
    if z.ndim != 3:
        raise ValueError(f"the wire takes latents of shape [count, M, d_z], got {list(z.shape)}")
    count, m, d_z = z.shape
    if m > _MOST or d_z > _MOST:
        raise ValueError(f"M={m}, d_z={d_z}: the wire holds at most {_MOST} of each")
    values = pack_values(z, codec, compact)
    if codec in COMPACT:
        body = SHORT + bytes([CODECS[codec]]) + _varint(m) + _varint(count) + values[len(compact.id) :]
        return body + _CRC.pack(zlib.crc32(body, zlib.crc32(compact.digest)))
    return sealed(_HEADER.pack(MAGIC, VERSION, CODECS[codec], m, d_z, count) + values)


def unpack(data: bytes, compact: "Compact | None" = None, most: int | None = None) -> np.ndarray:
    """Decode what `pack` made: float32 [count, M, d_z]. Raises ValueError on short, altered or foreign bytes, and for
    more than `most` latents, before they are decoded."""
    if data.startswith(SHORT):
        return _unpack_short(data, compact, most)
    body = opened(data, (VERSION,))
    _, _, code, m, d_z, count = _HEADER.unpack_from(body)
    require_most(count * m, most)
    return unpack_values(memoryview(body)[_HEADER.size :], (count, m, d_z), codec_of(code), compact)


def header(data: bytes, versions: Collection[int]) -> tuple[int, str]:
    """Version and codec of a wire of one of these versions. Raises ValueError on short, altered or foreign bytes; a
    checksum with tables (version 3) is left to `unpack`."""
    if data.startswith(SHORT) and SHORT_VERSION in versions:
        if len(data) < _LEAST:
            raise ValueError(f"wire too short: {len(data)} bytes")
        return SHORT_VERSION, codec_of(data[len(SHORT)])
    body = opened(data, versions)
    return body[len(MAGIC)], codec_of(body[len(MAGIC) + 1])


class TooManyError(ValueError):
    """A whole wire with more latents than its reader has positions."""


def require_most(latents: int, most: int | None) -> None:
    """TooManyError for more: coded latents can be far smaller than what they stand for."""
    if most is not None and latents > most:
        raise TooManyError(f"the wire holds {latents:,} latents, and its reader has {most:,} positions; send fewer")


def _unpack_short(data: bytes, compact: "Compact | None", most: int | None) -> np.ndarray:
    (_, codec), body = header(data, (SHORT_VERSION,)), data[: -_CRC.size]
    if codec not in COMPACT:
        raise ValueError(f"wire header: codec {codec} has no such layout: that is no wire of this program")
    tables = _tables(compact, codec)
    if data[-_CRC.size :] != _CRC.pack(zlib.crc32(body, zlib.crc32(tables.digest))):
        raise ValueError(
            "wire checksum mismatch: the bytes were cut or altered, or packed with the tables of another checkpoint; "
            "send it again, or read it with that one"
        )
    m, at = _from_varint(body, len(SHORT) + 1)
    count, at = _from_varint(body, at)
    require_most(count * m, most)
    found = tables.unpack(body[at:], count * m, *COMPACT[codec])
    return found.reshape(count, m, tables.codes.shape[1])


def _varint(number: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _from_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and where it ends. ValueError for one that no sender writes."""
    number = 0
    for place, byte in enumerate(data[at : at + 5]):
        number |= (byte & 0x7F) << (7 * place)
        if byte <= 0x7F:
            if place and not byte:
                break
            return number, at + place + 1
    raise ValueError("wire header: a number in it does not end: that is no wire of this program")


def sealed(body: bytes) -> bytes:
    """The body and its checksum."""
    return body + _CRC.pack(zlib.crc32(body))


def opened(data: bytes, versions: Collection[int]) -> bytes:
    """The body of a sealed wire of one of these versions. Raises ValueError on short, altered or foreign bytes."""
    if len(data) < _HEADER.size + _CRC.size:
        raise ValueError(f"wire too short: {len(data)} bytes, the header alone takes {_HEADER.size + _CRC.size}")
    body, (crc,) = data[: -_CRC.size], _CRC.unpack(data[-_CRC.size :])
    if body[: len(MAGIC)] != MAGIC:
        raise ValueError(f"not a LatentWire wire: it starts with {bytes(body[: len(MAGIC)])!r}, not {MAGIC!r}")
    version = body[len(MAGIC)]
    if version not in versions:
        known = " and ".join(map(str, versions))
        raise ValueError(f"wire version {version} is unknown; this program reads version {known}")
    if zlib.crc32(body) != crc:
        raise ValueError("wire checksum mismatch: the bytes were cut or altered; send it again")
    return body


def codec_of(number: int) -> str:
    """The codec with this number; ValueError for one that is unknown."""
    names = {number: name for name, number in CODECS.items()}
    if number not in names:
        raise ValueError(f"wire codec number {number} is unknown; known: {names}")
    return names[number]


def pack_values(z: np.ndarray, codec: str, compact: "Compact | None" = None) -> bytes:
    """Payload of float32 latents [count, M, d_z]. Raises ValueError for an unknown codec, and for values that it cannot
    hold."""
    if codec not in CODECS:
        raise ValueError(f"unknown wire codec {codec!r}; choose one of {', '.join(CODECS)}")
    if not np.isfinite(z).all():
        raise ValueError("the latents hold nan or inf, so there is nothing to send; look at the encoder's output")
    if codec in SCALAR:
        return pack_scalars(z, codec)
    tables = _tables(compact, codec)
    return tables.id + tables.pack(z.reshape(-1, z.shape[2]), *COMPACT[codec])


def unpack_values(
    payload: memoryview, shape: tuple[int, int, int], codec: str, compact: "Compact | None" = None
) -> np.ndarray:
    """The reverse: float32 of this shape. What the header claims is compared with what is there before memory is taken.

    Raises ValueError where they differ, or for values that no sender packs.
    """
    if codec in SCALAR:
        return unpack_scalars(payload, shape, codec)
    tables, (count, m, d_z) = _tables(compact, codec), shape
    if d_z != tables.codes.shape[1]:
        raise ValueError(f"the wire says that latents are {d_z} wide; this checkpoint's are {tables.codes.shape[1]}")
    size = len(tables.id)
    if payload[:size] != tables.id:
        raise ValueError("the wire was packed with the tables of another checkpoint; read it with that one")
    return tables.unpack(bytes(payload[size:]), count * m, *COMPACT[codec]).reshape(shape)


def _tables(compact: "Compact | None", codec: str) -> "Compact":
    if compact is None:
        raise ValueError(f"codec {codec}: a wire alone does not hold its tables; name the checkpoint")
    return compact
