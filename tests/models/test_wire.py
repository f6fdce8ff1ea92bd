"""The wire: round trips, error bounds, exact bytes, and refusal of whatever is not exactly what was packed."""

import struct
import zlib

import numpy as np
import pytest

from latentwire.models.wire import CODECS, SCALAR, pack, unpack
from latentwire.models.wire.scalar import GROUP, payload_bytes

HEADER, CRC = 14, 4
LEVELS = {"int8": 127, "int4": 7}
WIDTHS = (1, 7, 32, 33, 256)


def latents(count: int, m: int, d_z: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(d_z).standard_normal((count, m, d_z)) * scale).astype(np.float32)


def received_scales(z: np.ndarray, codec: str) -> np.ndarray:
    """The fp16 scale, rounded up, that applies to each value of z, worked out value by value."""
    scales = np.empty_like(z)
    for start in range(0, z.shape[2], GROUP):
        group = z[:, :, start : start + GROUP]
        exact = np.abs(group).max(axis=2, keepdims=True) / LEVELS[codec]
        nearest = np.float16(exact)
        above = np.nextafter(nearest, np.float16(np.inf))
        scales[:, :, start : start + GROUP] = np.where(nearest < exact, above, nearest)
    return scales


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def forged(data: bytes, offset: int, value: int) -> bytes:
    body = bytearray(data[:-CRC])
    body[offset] = value
    return with_crc(bytes(body))


def is_refused(data: bytes) -> bool:
    try:
        unpack(data)
    except ValueError as error:
        return "wire" in str(error).lower()
    return False


@pytest.mark.parametrize("d_z", WIDTHS)
@pytest.mark.parametrize("count", [1, 3])
def test_fp16_round_trip_is_the_nearest_half_float(count, d_z):
    z = latents(count, 5, d_z)
    back = unpack(pack(z, "fp16"))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, z.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1, 1.0, 300.0])
@pytest.mark.parametrize("d_z", WIDTHS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("codec", LEVELS)
def test_integer_round_trip_stays_within_half_a_received_scale_step(codec, count, d_z, scale):
    z = latents(count, 5, d_z, scale)
    back = unpack(pack(z, codec))
    assert back.dtype == np.float32
    assert back.shape == z.shape
    assert (np.abs(back - z) <= received_scales(z, codec) * 0.5001).all()


@pytest.mark.parametrize("codec", LEVELS)
def test_integer_codecs_give_back_whole_steps_exactly(codec):
    levels = LEVELS[codec]
    steps = np.arange(-levels, levels + 1, dtype=np.float32)
    steps = np.resize(steps, (2, 4, GROUP))
    steps[:, :, 0] = levels
    np.testing.assert_array_equal(unpack(pack(steps * 0.25, codec)), steps * 0.25)


@pytest.mark.parametrize("d_z", WIDTHS)
@pytest.mark.parametrize("codec", SCALAR)
def test_decoded_latents_pack_to_the_same_bytes_again(codec, d_z):
    data = pack(latents(2, 3, d_z), codec)
    assert pack(unpack(data), codec) == data


@pytest.mark.parametrize("codec", LEVELS)
def test_an_outlier_costs_precision_only_in_its_own_group_and_latent(codec):
    z = latents(1, 2, GROUP + 1, 0.01)
    z[0, 0, GROUP] = 100.0
    error = np.abs(unpack(pack(z, codec)) - z)
    assert error[0, 0, :GROUP].max() <= np.abs(z[0, 0, :GROUP]).max() / LEVELS[codec]
    assert error[0, 1].max() <= np.abs(z[0, 1]).max() / LEVELS[codec]


@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 0, 4), (0, 0, 0), (2, 3, 0)])
@pytest.mark.parametrize("codec", SCALAR)
def test_empty_latents_keep_their_shape(codec, shape):
    assert unpack(pack(np.zeros(shape), codec)).shape == shape


@pytest.mark.parametrize("codec", SCALAR)
def test_an_all_zero_group_stays_zero_beside_a_full_one(codec):
    z = latents(1, 2, 2 * GROUP)
    z[0, 0, :GROUP] = 0
    back = unpack(pack(z, codec))
    assert (back[0, 0, :GROUP] == 0).all()
    assert (back[0, 0, GROUP:] != 0).any()


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-6, 1e-8, 1e-30])
@pytest.mark.parametrize("codec", LEVELS)
def test_tiny_values_lose_no_more_than_the_smallest_fp16_scale_explains(codec, size):
    z = latents(2, 3, 40)
    z *= size / np.abs(z).max()
    error = np.abs(unpack(pack(z, codec)) - z)
    assert (error <= LEVELS[codec] * 2.0**-25 + received_scales(z, codec) / 2 + 1e-12).all()


def test_fp16_keeps_subnormal_values():
    z = np.array([[[6e-8, -1e-6, 3e-5]]], np.float32)
    np.testing.assert_allclose(unpack(pack(z, "fp16")), z, rtol=0, atol=2.0**-25)


@pytest.mark.parametrize("d_z", WIDTHS)
@pytest.mark.parametrize("codec", SCALAR)
def test_packed_length_is_header_payload_and_checksum(codec, d_z):
    shape = (2, 3, d_z)
    assert len(pack(np.zeros(shape), codec)) == HEADER + payload_bytes(shape, codec) + CRC


@pytest.mark.parametrize(
    ("shape", "codec", "expected"),
    [
        ((1, 32, 256), "fp16", 16_384),
        ((1, 32, 256), "int8", 32 * (256 + 8 * 2)),
        ((1, 32, 256), "int4", 4_096 + 32 * 8 * 2),
        ((4, 32, 256), "fp16", 65_536),
        ((1, 1, 33), "int8", 33 + 2 * 2),
        ((1, 1, 33), "int4", 17 + 2 * 2),
        ((2, 3, 1), "int4", 6 * (1 + 2)),
    ],
)
def test_payload_bytes_are_the_figures_of_the_design(shape, codec, expected):
    assert payload_bytes(shape, codec) == expected


@pytest.mark.parametrize(
    ("values", "codec", "body"),
    [
        ([1.0, -2.0], "fp16", "4c574952 01 00 0100 0200 01000000  003c 00c0"),
        ([127.0, -1.0, 0.0], "int8", "4c574952 01 01 0100 0300 01000000  003c  7f ff 00"),
        ([7.0, -3.0, 1.0], "int4", "4c574952 01 02 0100 0300 01000000  003c  5f 89"),
    ],
)
def test_bytes_equal_the_example_worked_out_by_hand(values, codec, body):
    golden = with_crc(bytes.fromhex(body))
    z = np.array([[values]], np.float32)
    assert pack(z, codec) == golden
    np.testing.assert_array_equal(unpack(golden), z)


def test_scales_stand_before_the_payload_in_latent_then_group_order():
    z = np.zeros((1, 2, GROUP + 1), np.float32)
    z[0, 0, 0], z[0, 0, GROUP], z[0, 1, 0], z[0, 1, GROUP] = 127, 254, 508, 63.5
    assert pack(z, "int8")[HEADER : HEADER + 8] == struct.pack("<4e", 1, 2, 4, 0.5)


def test_header_numbers_are_little_endian():
    data = pack(np.zeros((3, 0x0102, 1)), "fp16")
    assert data[6:8] == b"\x02\x01"
    assert data[8:10] == b"\x01\x00"
    assert data[10:14] == b"\x03\x00\x00\x00"
    assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")


@pytest.mark.parametrize("codec", SCALAR)
def test_pack_depends_on_the_values_alone(codec):
    z = latents(2, 3, 33)
    reference = pack(z, codec)
    assert pack(z.copy(), codec) == reference
    assert pack(z.astype(np.float64), codec) == reference
    assert pack(np.asfortranarray(z), codec) == reference
    assert pack(z.astype(">f4"), codec) == reference


@pytest.mark.parametrize("codec", SCALAR)
def test_pack_leaves_its_input_alone(codec):
    z = latents(1, 2, 33)
    before = z.copy()
    pack(z, codec)
    np.testing.assert_array_equal(z, before)


@pytest.mark.parametrize("codec", SCALAR)
def test_every_other_value_of_every_single_byte_is_refused(codec):
    data = pack(latents(1, 2, 5), codec)
    accepted = [
        (position, flip)
        for position in range(len(data))
        for flip in range(1, 256)
        if not is_refused(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
    ]
    assert accepted == []


@pytest.mark.parametrize("codec", SCALAR)
def test_every_truncation_is_refused(codec):
    data = pack(latents(2, 2, 7), codec)
    assert [size for size in range(len(data)) if not is_refused(data[:size])] == []
    assert [start for start in range(1, len(data)) if not is_refused(data[start:])] == []


@pytest.mark.parametrize("codec", SCALAR)
def test_extra_bytes_are_refused_even_under_a_fitting_checksum(codec):
    data = pack(latents(1, 2, 7), codec)
    with pytest.raises(ValueError, match="checksum mismatch"):
        unpack(data + b"\x00")
    with pytest.raises(ValueError, match=f"promises {len(data) - CRC - HEADER} bytes of latents"):
        unpack(with_crc(data[:-CRC] + b"\x00"))
    assert is_refused(data + data)


@pytest.mark.parametrize("codec", SCALAR)
def test_missing_payload_is_refused_even_under_a_fitting_checksum(codec):
    data = pack(latents(1, 2, 7), codec)
    with pytest.raises(ValueError, match=f"promises {len(data) - CRC - HEADER} bytes"):
        unpack(with_crc(data[: -CRC - 1]))


@pytest.mark.parametrize("offset", [6, 8, 10], ids=["M", "d_z", "count"])
def test_a_header_that_promises_another_size_is_refused_under_a_fitting_checksum(offset):
    with pytest.raises(ValueError, match="does not fit its header"):
        unpack(forged(pack(latents(1, 2, 7), "fp16"), offset, 9))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_unknown_version_is_refused_and_named(version):
    with pytest.raises(ValueError, match=f"version {version} is unknown.* version 1"):
        unpack(forged(pack(latents(1, 2, 3), "fp16"), 4, version))


@pytest.mark.parametrize("code", [len(CODECS), 255])
def test_unknown_codec_number_is_refused_and_named(code):
    with pytest.raises(ValueError, match=f"codec number {code} is unknown.*int4"):
        unpack(forged(pack(latents(1, 2, 3), "fp16"), 5, code))


def test_foreign_bytes_are_refused_and_their_start_is_named():
    with pytest.raises(ValueError, match="not a LatentWire wire: it starts with b'RIFF'"):
        unpack(with_crc(b"RIFF" + pack(latents(1, 2, 3), "fp16")[4:-CRC]))


@pytest.mark.parametrize("size", [0, 1, 17])
def test_fewer_bytes_than_a_header_are_refused_with_their_number(size):
    with pytest.raises(ValueError, match=f"too short: {size} bytes"):
        unpack(b"LWIR\x01".ljust(size, b"\x00")[:size])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", SCALAR)
def test_nan_and_inf_are_refused(codec, value):
    z = latents(1, 2, 33)
    z[0, 1, 32] = value
    with pytest.raises(ValueError, match="nan or inf"):
        pack(z, codec)


@pytest.mark.parametrize(
    ("codec", "fits", "too_large", "named"),
    [
        ("fp16", 65_504, 70_000, "latent value 7e.04"),
        ("fp16", -65_504, -70_000, "latent value 7e.04"),
        ("int8", 65_504 * 127, 1.27e7, "latent scale 1e.05"),
        ("int4", -65_504 * 7, -7e5, "latent scale 1e.05"),
    ],
)
def test_overflow_is_refused_and_the_largest_value_that_fits_is_kept(codec, fits, too_large, named):
    z = np.zeros((1, 1, 33), np.float32)
    z[0, 0, 32] = fits
    np.testing.assert_array_equal(unpack(pack(z, codec)), z)
    z[0, 0, 32] = too_large
    with pytest.raises(ValueError, match=f"{named} does not fit fp16; rescale"):
        pack(z, codec)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (1, 2, 4, 1)])
def test_wrong_number_of_dimensions_is_refused_with_the_shape(shape):
    with pytest.raises(ValueError, match=rf"\[count, M, d_z\], got \[{', '.join(map(str, shape))}\]"):
        pack(np.zeros(shape), "fp16")


@pytest.mark.parametrize("shape", [(1, 65_536, 1), (1, 1, 65_536)])
def test_sizes_that_the_header_cannot_hold_are_refused(shape):
    with pytest.raises(ValueError, match=f"M={shape[1]}, d_z={shape[2]}.*65535"):
        pack(np.zeros(shape), "fp16")


@pytest.mark.parametrize("codec", ["fp32", "", "FP16"])
def test_unknown_codec_name_is_refused_with_the_choices(codec):
    with pytest.raises(ValueError, match=f"codec '{codec}'; choose one of fp16, int8, int4"):
        pack(latents(1, 2, 3), codec)
