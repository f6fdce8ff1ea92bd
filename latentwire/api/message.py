"""A wire as one program sends it to another: latents in blocks, and what their reader must know.

Version 2, little-endian:

    magic "LWIR" | version u8 | codec u8 | source u8 | blocks u16 | d_z u16 | encoder 8 bytes | text bytes u32 |
    text tokens u32 | latents of each block u16 | payload | CRC-32 u32

Payloads are those of `models.wire`. `encoder` names the encoder by its weights: only its readers can read the
latents. Versions 1 and 3 (`models.wire`) are latents alone; they are read, too, but cannot say whose they are.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentwire.data.content import SOURCES
from latentwire.models import wire

if TYPE_CHECKING:
    from latentwire.models.wire.compact import Compact

VERSION = 2
_HEADER = struct.Struct("<4sBBBHH8sII")
_MOST = 0xFFFF


@dataclass(frozen=True)
class Wire:
    """Latents as their reader gets them, and what the header says.

    z: float32 [P, d_z], P latents of all blocks; blocks: latents of each; codec: of the bytes; source: what text they
    stand for, "" where the wire does not say; encoder: its id as hex, likewise; text_bytes (UTF-8), text_tokens: size
    of that text, 0 likewise; packed: the bytes; checkpoint: folder of the checkpoint, to look up words.
    """

    z: np.ndarray = field(repr=False)
    blocks: tuple[int, ...]
    codec: str
    source: str
    encoder: str
    text_bytes: int
    text_tokens: int
    packed: bytes = field(repr=False)
    checkpoint: Path | None = field(default=None, repr=False, compare=False)

    @classmethod
    def pack(
        cls,
        blocks: Sequence[np.ndarray],
        codec: str,
        source: str,
        encoder: bytes,
        text_bytes: int,
        text_tokens: int,
        compact: "Compact | None" = None,
    ) -> "Wire":
        """blocks: float32 [M_i, d_z] each; compact: tables, for codecs that need them. Raises ValueError for values
        that the codec cannot hold, and for more than 65,535 blocks or latents of one block."""
        lengths = [len(block) for block in blocks]
        if max(len(lengths), *lengths) > _MOST:
            raise ValueError(f"{len(lengths)} blocks of at most {max(lengths)} latents: the wire holds {_MOST} of each")
        z = np.concatenate(blocks)
        values = wire.pack_values(z[None], codec, compact)
        header = _HEADER.pack(
            wire.MAGIC, VERSION, wire.CODECS[codec], SOURCES.index(source), len(blocks), z.shape[1], encoder,
            text_bytes, text_tokens,
        )  # fmt: skip
        body = header + struct.pack(f"<{len(lengths)}H", *lengths) + values
        return cls.unpack(wire.sealed(body), compact=compact)

    @classmethod
    def unpack(
        cls,
        data: bytes,
        checkpoint: Path | None = None,
        compact: "Compact | None" = None,
        most: int | None = None,
    ) -> "Wire":
        """The wire of these bytes; compact: tables, else those of the checkpoint; most: latents that are taken. Raises
        ValueError on short, altered, foreign or newer bytes, and for more latents: a wrong latent is never returned,
        and what a header claims takes no memory before it is compared with the bytes that are there."""
        data = bytes(data)
        version, codec = wire.header(data, (wire.VERSION, wire.SHORT_VERSION, VERSION))
        if codec in wire.COMPACT and compact is None and checkpoint is not None:
            from latentwire.models.wire.compact import tables_of  # imports torch

            compact = tables_of(checkpoint)
        if version != VERSION:
            z = wire.unpack(data, compact, most)
            blocks = (z.shape[1],) * len(z) if z.size else ()  # a header can claim billions of empty ones
            return cls(z.reshape(-1, z.shape[2]), blocks, codec, "", "", 0, 0, data, checkpoint)
        body = wire.opened(data, (VERSION,))
        if len(body) < _HEADER.size:
            raise ValueError(f"wire too short: {len(data)} bytes, the header of version {VERSION} does not fit")
        _, _, _, source, count, d_z, encoder, text_bytes, text_tokens = _HEADER.unpack_from(body)
        lengths_end = _HEADER.size + 2 * count
        if source >= len(SOURCES) or len(body) < lengths_end:
            raise ValueError(f"wire header: source number {source}, {count} blocks: that is no wire of this program")
        blocks = struct.unpack_from(f"<{count}H", body, _HEADER.size)
        wire.require_most(sum(blocks), most)
        z = wire.unpack_values(memoryview(body)[lengths_end:], (1, sum(blocks), d_z), codec, compact)[0]
        return cls(z, blocks, codec, SOURCES[source], encoder.hex(), text_bytes, text_tokens, data, checkpoint)

    @property
    def version(self) -> int:
        """Of the layout of its bytes."""
        return wire.header(self.packed, (wire.VERSION, wire.SHORT_VERSION, VERSION))[0]

    @property
    def m(self) -> int:
        """Latents of all blocks: positions that a reader's LLM spends on them."""
        return len(self.z)

    @property
    def d_z(self) -> int:
        """Width of a latent."""
        return self.z.shape[1]

    def __bytes__(self) -> bytes:
        return self.packed

    def __str__(self) -> str:
        blocks = f" in {len(self.blocks)} blocks" if len(self.blocks) > 1 else ""
        of = f" for {self.text_bytes:,} bytes of text" if self.text_bytes else ""
        who = f"source {self.source}, encoder {self.encoder}" if self.encoder else "it does not say whose"
        return f"wire: {self.m} latents x {self.d_z}{blocks}, {self.codec}, {who}, {len(self.packed):,} bytes{of}"

    def words(self) -> list[str]:
        """The token whose code is nearest to each latent, as text: what the latents came from.

        Raises ValueError where no checkpoint is known (`LatentWire.wire` knows it), or where its latents stand for no
        words.
        """
        from latentwire.api.words import words_of  # reads the codebook; imports torch

        if self.checkpoint is None:
            raise ValueError("words: a wire alone does not hold its codebook; get it by LatentWire.wire(bytes)")
        return words_of([self])[0]
