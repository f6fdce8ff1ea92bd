"""The wire: latents as bytes, and back. `api.message` puts them into what one program sends to another.

Layout, little-endian:

    magic "LWIR" | version u8 | codec u8 | M u16 | d_z u16 | count u32 | payload | CRC-32 u32

What a payload holds is said in `scalar` (fp16, int8, int4) and `compact` (compact0 to compact8: so many directions).
The checksum covers everything before it. Anything unexpected raises ValueError: a wrong Z is never returned.
"""

import struct
import zlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from latentwire.models.wire.scalar import pack_scalars, unpack_scalars

if TYPE_CHECKING:
    from latentwire.models.wire.compact import Compact

MAGIC = b"LWIR"
VERSION = 1
SCALAR = ("fp16", "int8", "int4")
COMPACT = {"compact0": 0, "compact1": 1, "compact2": 2, "compact4": 4, "compact8": 8}  # residual directions of each
CODECS = {codec: number for number, codec in enumerate((*SCALAR, *COMPACT))}
_HEADER = struct.Struct("<4sBBHHI")
_CRC = struct.Struct("<I")


def pack(z: np.ndarray, codec: str, compact: "Compact | None" = None) -> bytes:
    """Encode latents.

    z: float array [count, M, d_z]; codec: one of CODECS; compact: tables, for those of COMPACT. Returns the packed
    bytes. Raises ValueError for an unknown codec, a wrong shape, or values that it cannot hold (nan, inf, overflow).
    """
    z = np.asarray(z, np.float32)
    if z.ndim != 3:
        raise ValueError(f"the wire takes latents of shape [count, M, d_z], got {list(z.shape)}")
    count, m, d_z = z.shape
    if m > 0xFFFF or d_z > 0xFFFF:
        raise ValueError(f"M={m}, d_z={d_z}: the wire holds at most 65535 of each")
    values = pack_values(z, codec, compact)
    return sealed(_HEADER.pack(MAGIC, VERSION, CODECS[codec], m, d_z, count) + values)


def unpack(data: bytes, compact: "Compact | None" = None) -> np.ndarray:
    """Decode what `pack` made: float32 [count, M, d_z]. Raises ValueError on short, altered or foreign bytes."""
    body = opened(data, (VERSION,))
    _, _, code, m, d_z, count = _HEADER.unpack_from(body)
    return unpack_values(memoryview(body)[_HEADER.size :], (count, m, d_z), codec_of(code), compact)


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
    return _tables(compact, codec).pack(z.reshape(-1, z.shape[2]), COMPACT[codec])


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
    return tables.unpack(bytes(payload), count * m, COMPACT[codec]).reshape(shape)


def _tables(compact: "Compact | None", codec: str) -> "Compact":
    if compact is None:
        raise ValueError(f"codec {codec}: a wire alone does not hold its tables; name the checkpoint")
    return compact
