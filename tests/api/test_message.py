"""The wire as a message: what goes in comes out, and whatever is not exactly that is refused."""

import struct
import zlib

import numpy as np
import pytest
from models.test_compact import made

from latentwire.api.message import VERSION, Wire
from latentwire.models import wire as version_1
from latentwire.models.wire import SCALAR

ID = bytes(range(8))
HEADER = 27  # up to the blocks' lengths


def latents(rows: int, d_z: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, d_z)).astype(np.float32)


def packed(blocks=(), codec="fp16", source="context") -> bytes:
    return bytes(Wire.pack(blocks or [latents(5), latents(3, seed=1)], codec, source, ID, 321, 77))


def forged(data: bytes, offset: int, value: bytes) -> bytes:
    body = bytearray(data[:-4])
    body[offset : offset + len(value)] = value
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


@pytest.mark.parametrize("codec", SCALAR)
@pytest.mark.parametrize("rows", [[4], [4, 1, 9]])
def test_what_was_packed_comes_back(codec, rows):
    blocks = [latents(n, seed=n) for n in rows]
    found = Wire.unpack(packed(blocks, codec))
    assert (found.blocks, found.codec, found.source, found.encoder) == (tuple(rows), codec, "context", ID.hex())
    assert (found.m, found.d_z, found.text_bytes, found.text_tokens) == (sum(rows), 40, 321, 77)
    assert np.array_equal(found.z, version_1.unpack(version_1.pack(np.concatenate(blocks)[None], codec))[0])


def test_a_wire_of_version_1_is_still_read_and_says_nothing_of_its_encoder():
    z = latents(6)
    found = Wire.unpack(version_1.pack(z[None], "fp16"))
    assert np.array_equal(found.z, z.astype(np.float16).astype(np.float32))
    assert (found.blocks, found.encoder, found.source) == ((6,), "", "")
    assert "does not say whose" in str(found)


def test_a_short_wire_is_read_with_its_tables_alone():
    compact, found, _ = made()
    data = version_1.pack(found.numpy()[None], "coarse4", compact)
    wire = Wire.unpack(data, compact=compact)
    assert (wire.version, wire.blocks, wire.codec, wire.encoder) == (3, (len(found),), "coarse4", "")
    assert np.array_equal(wire.z, version_1.unpack(data, compact)[0])
    with pytest.raises(ValueError, match="name the checkpoint"):
        Wire.unpack(data)
    assert [Wire.unpack(kind).version for kind in (packed(), version_1.pack(latents(6)[None], "fp16"))] == [2, 1]


def test_more_latents_than_a_reader_takes_are_refused_before_they_are_decoded(monkeypatch):
    compact, found, _ = made()
    short = version_1.pack(found.numpy()[None], "coarse4", compact)
    for data, count in ((packed(), 8), (version_1.pack(latents(6)[None], "fp16"), 6), (short, len(found))):
        assert Wire.unpack(data, compact=compact, most=count).m == count
        with pytest.raises(version_1.TooManyError, match=f"holds {count} latents, and its reader has {count - 1} pos"):
            Wire.unpack(data, compact=compact, most=count - 1)
    monkeypatch.setattr(type(compact), "unpack", None)  # decoding anything would fail
    with pytest.raises(version_1.TooManyError):
        Wire.unpack(short, compact=compact, most=1)


def test_a_wire_shows_what_it_is():
    shown = str(Wire.unpack(packed()))
    assert all(part in shown for part in ("8 latents x 40", "2 blocks", "fp16", "source context", ID.hex(), "321"))


def test_every_cut_and_every_altered_byte_is_refused():
    data = packed(codec="int4")
    for end in range(len(data)):
        with pytest.raises(ValueError):
            Wire.unpack(data[:end])
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x10
        with pytest.raises(ValueError):
            Wire.unpack(bytes(altered))


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (0, b"PNG\r", "not a LatentWire wire"),
        (4, bytes([VERSION + 1]), f"wire version {VERSION + 1} is unknown"),
        (5, bytes([99]), "codec number 99"),
        (6, bytes([7]), "source number 7"),
        (7, b"\xff\xff", "that is no wire"),
        (9, b"\xff\xff", "does not fit its header"),
        (HEADER, b"\xff\xff\xff\xff", "does not fit its header"),
    ],
)
def test_a_forged_header_is_refused_by_name(offset, value, says):
    with pytest.raises(ValueError, match=says):
        Wire.unpack(forged(packed(), offset, value))


def test_a_header_that_claims_much_is_refused_by_its_size():
    """A version-1 wire of 65,535 x 65,535 x 4 billion values, in 18 bytes."""
    body = struct.pack("<4sBBHHI", b"LWIR", 1, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF)
    with pytest.raises(ValueError, match="does not fit its header"):
        Wire.unpack(body + struct.pack("<I", zlib.crc32(body)))


def test_latents_that_no_reader_could_use_are_not_packed():
    with pytest.raises(ValueError, match="nan or inf"):
        packed([np.full((2, 4), np.nan, np.float32)])
    with pytest.raises(ValueError, match="unknown wire codec 'zip'"):
        packed(codec="zip")
    with pytest.raises(ValueError, match="65535 of each"):
        packed([np.zeros((70_000, 1), np.float32)])


def test_words_need_a_checkpoint():
    with pytest.raises(ValueError, match=r"LatentWire\.wire"):
        Wire.unpack(packed()).words()
