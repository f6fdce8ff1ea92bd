"""The wire: latents as bytes, and back. `api.message` puts them into what one program sends to another.

Layout, little-endian:

    magic "LWIR" | version u8 | codec u8 | M u16 | d_z u16 | count u32 | scales f16 | payload | CRC-32 u32

`fp16` has no scales. `int8` and `int4` quantise symmetrically with one scale per group of GROUP values of one latent
(the last group of a latent may be shorter); int4 stores two values a byte, low nibble first.
The checksum covers everything before it. Anything unexpected raises ValueError: a wrong Z is never returned.
"""

import struct
import zlib
from collections.abc import Collection

import numpy as np

MAGIC = b"LWIR"
VERSION = 1
CODECS = {"fp16": 0, "int8": 1, "int4": 2}
GROUP = 32
_HEADER = struct.Struct("<4sBBHHI")
_CRC = struct.Struct("<I")
_LEVELS = {"int8": 127, "int4": 7}


def pack(z: np.ndarray, codec: str) -> bytes:
    """Encode latents.

    z: float array [count, M, d_z]; codec: one of CODECS. Returns the packed bytes.
    Raises ValueError for an unknown codec, a wrong shape, or values that the codec cannot hold (nan, inf, overflow).
    """
    z = np.asarray(z, np.float32)
    if z.ndim != 3:
        raise ValueError(f"the wire takes latents of shape [count, M, d_z], got {list(z.shape)}")
    count, m, d_z = z.shape
    if m > 0xFFFF or d_z > 0xFFFF:
        raise ValueError(f"M={m}, d_z={d_z}: the wire holds at most 65535 of each")
    values = pack_values(z, codec)
    return sealed(_HEADER.pack(MAGIC, VERSION, CODECS[codec], m, d_z, count) + values)


def unpack(data: bytes) -> np.ndarray:
    """Decode what `pack` made: float32 [count, M, d_z]. Raises ValueError on short, altered or foreign bytes."""
    body = opened(data, (VERSION,))
    _, _, code, m, d_z, count = _HEADER.unpack_from(body)
    return unpack_values(memoryview(body)[_HEADER.size :], (count, m, d_z), codec_of(code))


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


def pack_values(z: np.ndarray, codec: str) -> bytes:
    """Scales and values of float32 latents [count, M, d_z]. Raises ValueError for an unknown codec, and for values that
    it cannot hold."""
    if codec not in CODECS:
        raise ValueError(f"unknown wire codec {codec!r}; choose one of {', '.join(CODECS)}")
    if not np.isfinite(z).all():
        raise ValueError("the latents hold nan or inf, so there is nothing to send; look at the encoder's output")
    return _pack_fp16(z) if codec == "fp16" else _pack_int(z, codec)


def unpack_values(payload: memoryview, shape: tuple[int, int, int], codec: str) -> np.ndarray:
    """The reverse: float32 of this shape. What the header claims is compared with what is there before memory is taken.

    Raises ValueError where they differ, or for values that no sender packs.
    """
    expected = payload_bytes(shape, codec)
    if len(payload) != expected:
        raise ValueError(
            f"wire length does not fit its header, which promises {expected} bytes of latents, not {len(payload)}"
        )
    z = _unpack_fp16(payload, shape) if codec == "fp16" else _unpack_int(payload, shape, codec)
    if not np.isfinite(z).all():
        raise ValueError("the wire holds nan or inf, which no sender packs; it was forged or made by another program")
    return z


def payload_bytes(shape: tuple[int, int, int], codec: str) -> int:
    """Bytes of scales and values that [count, M, d_z] latents take, without header and checksum."""
    count, m, d_z = shape
    if codec == "fp16":
        return 2 * count * m * d_z
    row = d_z if codec == "int8" else (d_z + 1) // 2
    return count * m * (row + 2 * _groups(d_z))


def _groups(d_z: int) -> int:
    return -(-d_z // GROUP)


def _pack_fp16(z: np.ndarray) -> bytes:
    if np.abs(z).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"latent value {np.abs(z).max():.3g} does not fit fp16; rescale the latents")
    return z.astype("<f2").tobytes()


def _unpack_fp16(payload: memoryview, shape: tuple[int, int, int]) -> np.ndarray:
    return np.frombuffer(payload, "<f2").astype(np.float32).reshape(shape)


def _pack_int(z: np.ndarray, codec: str) -> bytes:
    count, m, d_z = z.shape
    levels, groups = _LEVELS[codec], _groups(d_z)
    grouped = np.zeros((count * m, groups * GROUP), np.float32)
    grouped[:, :d_z] = z.reshape(count * m, d_z)
    grouped = grouped.reshape(count * m, groups, GROUP)
    largest = np.abs(grouped).max(axis=2) / levels
    if largest.max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"latent scale {largest.max():.3g} does not fit fp16; rescale the latents")
    scales = _round_up_to_fp16(largest)
    # Quantise with the scale as the receiver will read it; where it rounds to 0 every value of the group is 0.
    step = np.where(scales > 0, scales.astype(np.float32), 1)[:, :, None]
    values = np.clip(np.rint(grouped / step), -levels, levels) * (scales > 0)[:, :, None]
    values = values.reshape(count * m, groups * GROUP)[:, :d_z].astype(np.int8)
    return scales.tobytes() + (values.tobytes() if codec == "int8" else _nibbles(values).tobytes())


def _round_up_to_fp16(values: np.ndarray) -> np.ndarray:
    """The nearest fp16 values that are not smaller, so that the largest value of a group is never clipped."""
    nearest = values.astype("<f2")
    below = nearest < values
    nearest[below] = np.nextafter(nearest[below], np.float16(np.inf))
    return nearest


def _unpack_int(payload: memoryview, shape: tuple[int, int, int], codec: str) -> np.ndarray:
    count, m, d_z = shape
    groups = _groups(d_z)
    split = 2 * count * m * groups
    scales = np.frombuffer(payload[:split], "<f2").astype(np.float32).reshape(count * m, groups)
    if codec == "int8":
        values = np.frombuffer(payload[split:], np.int8).reshape(count * m, d_z)
    else:
        packed = np.frombuffer(payload[split:], np.uint8).reshape(count * m, (d_z + 1) // 2)
        values = (
            np.stack([packed & 0x0F, packed >> 4], axis=2)
            .reshape(count * m, 2 * packed.shape[1])[:, :d_z]
            .astype(np.int8)
            - 8
        )
    return (values * np.repeat(scales, GROUP, axis=1)[:, :d_z]).astype(np.float32).reshape(shape)


def _nibbles(values: np.ndarray) -> np.ndarray:
    """int8 [rows, d_z] in -7..7 to uint8 [rows, ceil(d_z / 2)]: two values a byte, offset by 8, low nibble first."""
    rows, d_z = values.shape
    padded = np.full((rows, d_z + d_z % 2), 8, np.uint8)
    padded[:, :d_z] = (values + 8).astype(np.uint8)
    return padded[:, 0::2] | (padded[:, 1::2] << 4)
