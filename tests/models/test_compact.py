"""The compact codec: what comes back, what it takes, and refusal of what other tables or no tables made."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from latentwire.models.wire import _HEADER, CODECS, COMPACT, MAGIC, VERSION, pack, pack_values, sealed, unpack
from latentwire.models.wire.compact import DIRECTIONS, LEVELS, TABLES, Compact, nearest

V, D = 300, 24


def made(seed: int = 0) -> tuple[Compact, torch.Tensor, torch.Tensor]:
    """Tables, latents [200, D] that they were fitted on, and the latents' tokens."""
    drawing = torch.Generator().manual_seed(seed)
    codes = torch.randn(V, D, generator=drawing)
    ids = torch.multinomial(torch.arange(1, V + 1).float().pow(-1.5), 200, replacement=True, generator=drawing)
    along = torch.linalg.qr(torch.randn(D, DIRECTIONS, generator=drawing))[0].T
    sizes = torch.tensor([0.5**j for j in range(DIRECTIONS)])
    latents = codes[ids] + 0.1 + (torch.randn(200, DIRECTIONS, generator=drawing) * 0.3 * sizes) @ along
    return Compact.fit(codes, latents, torch.bincount(ids, minlength=V)), latents, ids


@pytest.mark.parametrize("codec", COMPACT)
def test_what_comes_back_is_the_token_and_its_residual_within_half_a_step(codec):
    compact, latents, ids = made()
    found = torch.from_numpy(unpack(pack(latents.numpy().reshape(4, 50, D), codec, compact), compact)).reshape(200, D)
    r, coarse = COMPACT[codec]
    assert torch.equal(nearest(found, compact.codes), ids)
    rest = latents - compact.codes[ids] - compact.mean
    kept = (found - compact.codes[ids] - compact.mean) @ compact.directions.T
    most = coarse * round(LEVELS / coarse) * compact.step
    held = (rest @ compact.directions.T).clamp(-most, most)
    assert ((kept - held)[:, :r].abs() <= coarse * compact.step * 0.5001).all()
    assert (kept[:, r:].abs() < 1e-4).all()


def test_more_directions_and_finer_steps_come_nearer_and_take_more_bytes():
    compact, latents, _ = made()
    for kind in ("compact", "coarse"):
        codecs = [codec for codec in COMPACT if codec.startswith(kind)][:: 1 if kind == "compact" else -1]
        wires = [pack(latents.numpy()[None], codec, compact) for codec in (*codecs, "compact8")]
        errors = [float(np.square(unpack(wire, compact)[0] - latents.numpy()).mean()) for wire in wires]
        assert errors == sorted(errors, reverse=True)
        assert [len(wire) for wire in wires] == sorted(len(wire) for wire in wires)
        assert errors[-1] < errors[0] / 20


def test_bytes_are_about_the_entropy_of_tokens_and_values():
    compact, latents, ids = made()
    bits = -torch.log2(compact.shares[ids]).sum()
    values = ((latents - compact.codes[ids] - compact.mean) @ compact.directions.T / compact.step).round().long()
    for j in range(2):
        bits -= torch.log2(compact.levels[j][values[:, j] + LEVELS]).sum()
    assert len(pack(latents.numpy()[None], "compact2", compact)) == pytest.approx(9 + float(bits) / 8, abs=5)


def test_a_value_beyond_the_tables_is_sent_as_the_largest():
    compact, _, ids = made()
    far = compact.codes[ids[:1]] + compact.mean + 2 * LEVELS * compact.step * compact.directions[0]
    assert torch.equal(nearest(far, compact.codes), ids[:1])
    found = torch.from_numpy(unpack(pack(far.numpy()[None], "compact1", compact), compact)[0])
    sent = (found - compact.codes[ids[:1]] - compact.mean) @ compact.directions[0] / compact.step
    assert sent.item() == pytest.approx(LEVELS, abs=1e-3)


@pytest.mark.parametrize("shape", [(0, 2, D), (1, 0, D), (1, 1, D)])
def test_few_latents_or_none_keep_their_shape(shape):
    compact, *_ = made()
    assert unpack(pack(np.zeros(shape, np.float32), "compact2", compact), compact).shape == shape


def test_the_norms_of_the_codes_are_computed_once(monkeypatch):
    compact, latents, _ = made()
    expected, counts, norm = pack(latents.numpy()[None], "compact2", made()[0]), [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *given, **how: counts.append(1) or norm(*given, **how))
    assert [pack(latents.numpy()[None], "compact2", compact) for _ in range(2)] == [expected] * 2
    assert len(counts) == 1


def test_wires_of_other_tables_or_without_tables_are_refused():
    compact, latents, _ = made()
    wire = pack(latents.numpy()[None], "compact2", compact)
    with pytest.raises(ValueError, match="tables of another checkpoint"):
        unpack(wire, made(seed=1)[0])
    with pytest.raises(ValueError, match="name the checkpoint"):
        unpack(wire)


def long(compact, z, codec, count=None):
    """A wire of these latents [count, M, D] as version 1 has it; count: that its header claims."""
    head = _HEADER.pack(MAGIC, VERSION, CODECS[codec], z.shape[1], D, len(z) if count is None else count)
    return sealed(head + pack_values(z, codec, compact))


def test_wires_from_before_the_short_layout_are_read():
    compact, latents, _ = made()
    z = latents.numpy().reshape(4, 50, D)
    for codec in COMPACT:
        short, before = pack(z, codec, compact), long(compact, z, codec)
        np.testing.assert_array_equal(unpack(before, compact), unpack(short, compact))
        assert len(before) == len(short) + 11
    with pytest.raises(ValueError, match="tables of another checkpoint"):
        unpack(before, made(seed=1)[0])


def closed(compact, body):
    """A short wire with a fitting checksum."""
    return body + zlib.crc32(body, zlib.crc32(compact.digest)).to_bytes(4, "little")


def test_headers_that_claim_more_than_the_bytes_can_hold_are_refused():
    compact, latents, _ = made()
    z = latents.numpy()[None]
    for count in (0xFFFFFFFF, 9):
        with pytest.raises(ValueError, match=r"does not fit|forged"):
            unpack(long(compact, z, "compact2", count), compact)
    body = pack(z, "compact2", compact)[:-4]
    assert body[:6] == b"LZ" + bytes([CODECS["compact2"], 200 & 0x7F | 0x80, 1, 1]), "200 latents of one text"
    for claimed in (b"\x09", b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\xff", b"\x81\x00"):
        with pytest.raises(ValueError, match=r"does not fit|forged|does not end"):
            unpack(closed(compact, body[:5] + claimed + body[6:]), compact)
    with pytest.raises(ValueError, match="codec fp16 has no such layout"):
        unpack(closed(compact, b"LZ\x00" + body[3:]), compact)


def test_every_altered_or_missing_byte_is_refused():
    compact, latents, _ = made()
    for codec in ("compact0", "coarse8"):
        data = pack(latents.numpy()[None, :20], codec, compact)
        altered = [
            data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :] for at in range(len(data)) for flip in (1, 128)
        ]
        for other in (*altered, *(data[:size] for size in range(len(data))), data + b"\x00"):
            with pytest.raises(ValueError, match="wire"):
                unpack(other, compact)


def test_bytes_beyond_the_latents_are_refused():
    compact, latents, _ = made()
    body = pack(latents.numpy()[None], "compact2", compact)[:-4]
    with pytest.raises(ValueError, match="other than its latents"):
        unpack(closed(compact, body + b"\x01\x02\x03\x04"), compact)


def test_tables_come_back_from_disk_and_every_altered_byte_is_refused(tmp_path):
    compact, *_ = made()
    compact.save(tmp_path)
    assert Compact.load(tmp_path, compact.codes).id == compact.id
    data = (tmp_path / TABLES).read_bytes()
    for at in range(0, len(data), len(data) // 60):
        (tmp_path / TABLES).write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            same = Compact.load(tmp_path, compact.codes).id == compact.id
        except ValueError as error:
            assert str(tmp_path / TABLES) in str(error)
        else:
            assert same, at
    with pytest.raises(ValueError, match="of another checkpoint"):
        (tmp_path / TABLES).write_bytes(data)
        Compact.load(tmp_path, compact.codes[:-1])
    (tmp_path / TABLES).unlink()
    with pytest.raises(FileNotFoundError, match=r"fit_codec\.py"):
        Compact.load(tmp_path, compact.codes)


def test_a_full_disk_is_told_and_the_tables_that_were_there_stay(tmp_path, monkeypatch):
    compact, *_ = made()
    compact.save(tmp_path)

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("latentwire.models.wire.compact.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        made(seed=1)[0].save(tmp_path)
    assert Compact.load(tmp_path, compact.codes).id == compact.id


def test_half_precision_codes_have_the_same_id():
    compact, latents, _ = made()
    half = compact.codes.half().float()
    full = Compact.fit(half, latents, torch.ones(V))
    assert replace(full, codes=compact.codes).id == full.id
