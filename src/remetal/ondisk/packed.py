"""What Linux packs its initramfs, modules and firmware with: streams that are unpacked a piece at a time.

Sources: Linux lib/decompress*.c; the "legacy frame" of lz4's frame format.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

import lz4.block
import zstandard

from remetal.ondisk.regions import BadStructureError
from remetal.units import KIB, MIB

PIECE = 256 * KIB
"""About so many bytes are unpacked at once: up to 16 MiB in the worst case."""
MAGIC_SIZE = 8
"""So many bytes tell how a stream is packed."""

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO\x00\r\n\x1a", "lzo"),
)
_MEMORY = 128 * MIB
_ZSTD_PIECE = 512
"""Bytes of Zstandard that are unpacked at once: they may grow to 16 MiB."""
_LZ4_MAGIC = 0x184C2102
_LZ4_BLOCK = 8 * MIB
_ERRORS = (zlib.error, OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError)


class NotReadHereError(BadStructureError):
    """It may be sound, but it is packed in a way that is not read here, or larger than what is."""


class Engine(Protocol):
    """Unpacks one stream."""

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def unused(self) -> bytes:
        """What was given and lies behind the stream's end."""
        ...

    @property
    def hungry(self) -> bool:
        """Whether nothing more comes out before something more goes in."""
        ...

    def unpack(self, data: bytes) -> bytes:
        """Take a piece of the stream, or nothing unless it is hungry, and return a piece of what is in it."""
        ...


def find_packing(magic: bytes) -> str:
    """Return how a stream with these first 8 bytes is packed: `gzip`, `xz`, …; empty if it is not, as far as we know.

    Raises NotReadHereError for a way that is not read here.
    """
    found = next((name for start, name in _MAGICS if magic.startswith(start)), "")
    if found and found not in _ENGINES:
        raise NotReadHereError(f"it is packed with {found.upper()}, which remetal does not read")
    return found


class Unpacker:
    """Unpacks one stream that is packed as `find_packing` says."""

    def __init__(self, packing: str) -> None:
        self._engine = _ENGINES[packing]()

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        return self._engine.ended

    @property
    def unused(self) -> bytes:
        """What was taken and lies behind the stream's end."""
        return self._engine.unused

    def unpack(self, more: Callable[[], bytes]) -> bytes:
        """Return a piece of what is in the stream; nothing at its end.

        `more` returns a further piece of the stream, nothing where there is none. Raises BadStructureError if it is
        damaged or cut off.
        """
        while not self._engine.ended:
            hungry = self._engine.hungry
            data = more() if hungry else b""
            try:
                piece = self._engine.unpack(data)
            except _ERRORS as error:
                raise BadStructureError(f"a packed archive is damaged: {error}") from error
            if piece:
                return piece
            if hungry and not data and not self._engine.ended:
                raise BadStructureError("a packed archive is cut off")
        return b""


def unpack_whole(data: bytes, *, limit: int) -> bytes:
    """Return what is in a file that is one packed stream, or is not packed. Raises BadStructureError beyond `limit`."""
    packing = find_packing(data[:MAGIC_SIZE])
    if not packing:
        return data
    pieces, rest, size = [], [data], 0
    unpacker = Unpacker(packing)
    while piece := unpacker.unpack(lambda: rest.pop() if rest else b""):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise BadStructureError(f"it is larger than {limit} bytes when it is unpacked")
    return b"".join(pieces)


def pack_lz4(data: bytes) -> bytes:
    """Return a stream of LZ4 as the kernel takes it; several may stand one behind the other."""
    blocks = [
        lz4.block.compress(data[at : at + _LZ4_BLOCK], store_size=False) for at in range(0, len(data), _LZ4_BLOCK)
    ]
    numbers = [_LZ4_MAGIC, *(len(each) for each in blocks)]
    return b"".join(number.to_bytes(4, "little") + block for number, block in zip(numbers, (b"", *blocks), strict=True))


class _Zlib:
    def __init__(self) -> None:
        self._library = zlib.decompressobj(31)

    @property
    def ended(self) -> bool:
        return self._library.eof

    @property
    def unused(self) -> bytes:
        return self._library.unused_data

    @property
    def hungry(self) -> bool:
        return not self._library.unconsumed_tail

    def unpack(self, data: bytes) -> bytes:
        return self._library.decompress(self._library.unconsumed_tail or data, PIECE)


class _Bounded:
    """bz2 and lzma, whose objects are used alike."""

    def __init__(self, library: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._library = library

    @property
    def ended(self) -> bool:
        return self._library.eof

    @property
    def unused(self) -> bytes:
        return self._library.unused_data

    @property
    def hungry(self) -> bool:
        return self._library.needs_input

    def unpack(self, data: bytes) -> bytes:
        return self._library.decompress(data, PIECE)


class _Zstandard:
    def __init__(self) -> None:
        self._library = zstandard.ZstdDecompressor(max_window_size=_MEMORY).decompressobj()
        self._rest = b""
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._library.eof

    @property
    def unused(self) -> bytes:
        return self._library.unused_data + self._rest[self._at :]

    @property
    def hungry(self) -> bool:
        return self._at >= len(self._rest)

    def unpack(self, data: bytes) -> bytes:
        if self.hungry:
            self._rest, self._at = data, 0
        pieces: list[bytes] = []
        size = 0
        while not (self.hungry or self._library.eof or size >= PIECE):
            pieces.append(self._library.decompress(self._rest[self._at : self._at + _ZSTD_PIECE]))
            size += len(pieces[-1])
            self._at += _ZSTD_PIECE
        return b"".join(pieces)


class _Lz4:
    """The legacy frame: blocks of up to 8 MiB behind their sizes. It has no end but zeros, or that of the file."""

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def unused(self) -> bytes:
        return self._rest

    @property
    def hungry(self) -> bool:
        return self._block() is None

    def unpack(self, data: bytes) -> bytes:
        at_end = not data and self.hungry
        self._rest += data
        block = self._block()
        if block is None:
            self._ended = at_end and not self._rest.strip(b"\0")  # fewer zeros than a size has
            return b""
        if block == 0:
            self._ended = True
            return b""
        if block == _LZ4_MAGIC:
            self._rest = self._rest[4:]
            return b""
        if block > _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16:
            raise BadStructureError("a packed archive is damaged: a block of LZ4 has an impossible size")
        packed, self._rest = self._rest[4 : 4 + block], self._rest[4 + block :]
        return bytes(lz4.block.decompress(packed, uncompressed_size=_LZ4_BLOCK))

    def _block(self) -> int | None:
        """Return the next block's size, or what stands in its place; None while the block is not all there."""
        if len(self._rest) < 4:
            return None
        size = int.from_bytes(self._rest[:4], "little")
        known = size in {0, _LZ4_MAGIC} or size > 2 * _LZ4_BLOCK
        return size if known or len(self._rest) >= 4 + size else None


_ENGINES: dict[str, Callable[[], Engine]] = {
    "gzip": _Zlib,
    "bzip2": lambda: _Bounded(bz2.BZ2Decompressor()),
    "lzma": lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY)),
    "xz": lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)),
    "lz4": _Lz4,
    "zstd": _Zstandard,
}
