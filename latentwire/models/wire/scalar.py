"""Codecs that keep every value of a latent: fp16, int8, int4. They need nothing but the bytes.

`fp16` has no scales. `int8` and `int4` quantise symmetrically with one scale per group of GROUP values of one latent
(the last group of a latent may be shorter); int4 stores two values a byte, low nibble first.
"""

import numpy as np

GROUP = 32
_LEVELS = {"int8": 127, "int4": 7}


def pack_scalars(z: np.ndarray, codec: str) -> bytes:
    """Scales and values of float32 latents [count, M, d_z]. Raises ValueError for values that the codec cannot hold."""
    return _pack_fp16(z) if codec == "fp16" else _pack_int(z, codec)


def unpack_scalars(payload: memoryview, shape: tuple[int, int, int], codec: str) -> np.ndarray:
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
