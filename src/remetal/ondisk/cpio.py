"""The archives of an initramfs: cpio ("newc"), several one behind the other, each as it is or packed.

    archive    members, each: 110 bytes of ASCII (magic, 13 numbers of 8 hexadecimal digits), name, padding to 4 bytes,
               content, padding to 4 bytes; the member TRAILER!!! is the last one
    initramfs  archives with any number of zeros in between; a packed stream may hold several. A plain one, and
               whatever stands behind a plain one, begins at a multiple of 4 bytes of what it is in

Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst, init/initramfs.c; cpio(5).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from remetal.ondisk.packed import MAGIC_SIZE, PIECE, NotReadHereError, Unpacker, find_packing
from remetal.ondisk.regions import BadStructureError
from remetal.units import GIB, KIB, MIB, align_up

MAX_UNPACKED = 4 * GIB
"""Bytes that all archives of an initramfs may have when they are unpacked."""
MAX_MEMBERS = 1 << 18
MAX_CONTENT = 64 * MIB
"""Bytes of a single file that are kept."""

_MAGICS = (b"070701", b"070702")
_HEADER = 110
_DIGITS = re.compile(rb"[0-9A-Fa-f]*")
_ALIGNMENT = 4
_MAX_NAME = 4 * KIB
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Member:
    """A file, folder, link or node of an initramfs.

    `name` has no slash at its ends; empty for the root itself. `mode` is as stat(2) has it, `size` in bytes. `data` is
    the content of a file that was asked for, or where a symbolic link points to; else empty. `archive` counts the
    streams that it came in, from 0, and `packing` says how that one is packed: `gzip`, `xz`, …; empty if it is not.
    """

    name: str
    mode: int
    size: int
    archive: int
    packing: str
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class End:
    """How an initramfs ends: its size, how its last stream is packed, and the zeros behind that.

    `unpacked` is what that stream holds, in bytes; a plain archive holds as much as it takes.
    """

    size: int
    packing: str
    unpacked: int
    zeros: int


def read_initramfs(file: BinaryIO, wanted: Callable[[str, int], bool]) -> Iterator[Member]:
    """Yield the members of all archives of an initramfs in order; a later one replaces an earlier one of its name.

    `wanted` says of a regular file's name and size whether its content is to be kept. Raises BadStructureError if the
    kernel could not unpack it either; NotReadHereError if it is larger than `MAX_UNPACKED`, packed in a way that is not
    read here, or followed by what the kernel passes over.
    """
    yield from _read_streams(_Source(file), wanted, [])


def probe_end(file: BinaryIO) -> End:
    """Return how an initramfs ends. Raises BadStructureError as `read_initramfs` does."""
    source, ends = _Source(file), list[tuple[str, int, int]]()
    for _ in _read_streams(source, lambda name, size: False, ends):
        pass
    packing, unpacked, end = ends[-1]
    return End(source.offset, packing, unpacked, source.offset - end)


def _read_streams(
    source: _Source, wanted: Callable[[str, int], bool], ends: list[tuple[str, int, int]]
) -> Iterator[Member]:
    """Yield the members of all streams; put into `ends` how each is packed, what it holds, and where it ends."""
    budget = _Budget(MAX_UNPACKED, MAX_MEMBERS)
    while magic := source.skip_zeros():
        start = source.offset
        packing = find_packing(magic)
        behind_plain = bool(ends) and not ends[-1][0]
        if start % _ALIGNMENT and (behind_plain or not packing):
            raise NotReadHereError(f"the archive at byte {start} does not begin at a multiple of {_ALIGNMENT}")
        if packing:
            content = _Unpacked(source, packing, budget)
            while content.skip_zeros():
                if content.offset % _ALIGNMENT:
                    raise BadStructureError("a packed archive does not begin at a multiple of 4 bytes")
                yield from _read_archive(content, len(ends), packing, wanted, budget)
            ends.append((packing, content.offset, source.offset))
        elif magic[:6] in _MAGICS:
            yield from _read_archive(source, len(ends), "", wanted, budget)
            ends.append(("", source.offset - start, source.offset))
        else:
            kind = NotReadHereError if ends else BadStructureError
            raise kind(f"what begins with {magic.hex()} at byte {start} is no archive that the kernel could unpack")
    if not ends:
        raise BadStructureError("it holds no archive")


@dataclass(slots=True)
class _Budget:
    """What a whole initramfs may still take."""

    size: int
    members: int

    def pay(self, size: int, members: int = 0) -> None:
        self.size -= size
        self.members -= members
        if self.size < 0 or self.members < 0:
            raise NotReadHereError("what it holds is larger than any initramfs")


class _Bytes:
    """Bytes in order, some of them read ahead; `offset` counts those that were passed over or returned."""

    def __init__(self) -> None:
        self._ahead = b""
        self.offset = 0

    def read(self, size: int) -> bytes:
        """Return exactly so many bytes. Raises BadStructureError if there are fewer."""
        return b"".join(self._pieces(size))

    def skip(self, size: int) -> None:
        """Pass over so many bytes. Raises BadStructureError if there are fewer."""
        for _ in self._pieces(size):
            pass

    def skip_zeros(self) -> bytes:
        """Pass over zeros and return up to 8 of the bytes behind them, which stay; none at the end."""
        while not (rest := self._ahead.lstrip(b"\0")):
            self.offset += len(self._ahead)
            self._ahead = self._more()
            if not self._ahead:
                return b""
        self.offset += len(self._ahead) - len(rest)
        self._ahead = rest
        while len(self._ahead) < MAGIC_SIZE and (more := self._more()):
            self._ahead += more
        return self._ahead[:MAGIC_SIZE]

    def _more(self) -> bytes:
        """Return some more bytes; none at the end."""
        raise NotImplementedError

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self._ahead or self._more()
            if not piece:
                raise BadStructureError("it ends in the middle of an archive")
            part, self._ahead = piece[:size], piece[size:]
            size -= len(part)
            self.offset += len(part)
            yield part


class _Source(_Bytes):
    """The initramfs as it lies on the disk."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def take(self) -> bytes:
        """Return a piece of what is there, or nothing at the end."""
        piece, self._ahead = self._ahead or self._more(), b""
        self.offset += len(piece)
        return piece

    def give_back(self, data: bytes) -> None:
        """Take back what a packed stream did not need."""
        self._ahead = data + self._ahead
        self.offset -= len(data)

    def _more(self) -> bytes:
        return self._file.read(PIECE)


class _Unpacked(_Bytes):
    """What one packed stream holds."""

    def __init__(self, source: _Source, packing: str, budget: _Budget) -> None:
        super().__init__()
        self._source = source
        self._unpacker = Unpacker(packing)
        self._budget = budget

    def _more(self) -> bytes:
        if self._unpacker.ended:
            return b""
        piece = self._unpacker.unpack(self._source.take)
        self._budget.pay(len(piece))
        if self._unpacker.ended:
            self._source.give_back(self._unpacker.unused)
        return piece


def _read_archive(
    content: _Bytes, number: int, packing: str, wanted: Callable[[str, int], bool], budget: _Budget
) -> Iterator[Member]:
    while True:
        header = content.read(_HEADER)
        if header[:6] not in _MAGICS:
            raise BadStructureError(f"a member of an archive begins with {header[:6].hex()}")
        if not _DIGITS.fullmatch(header, 6):
            raise BadStructureError("a member of an archive has numbers that are none")
        numbers = [int(header[at : at + 8], 16) for at in range(6, _HEADER, 8)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        if not 0 < name_size <= _MAX_NAME:
            raise BadStructureError(f"a member of an archive has a name of {name_size} bytes")
        budget.pay(0 if packing else size, members=1)
        name = _clean(content.read(align_up(_HEADER + name_size, _ALIGNMENT) - _HEADER)[: name_size - 1])
        if name == _TRAILER:
            return
        padded = align_up(size, _ALIGNMENT)
        kept = size <= _MAX_NAME if stat.S_ISLNK(mode) else stat.S_ISREG(mode) and wanted(name, size)
        if kept and size <= MAX_CONTENT:
            yield Member(name, mode, size, number, packing, content.read(padded)[:size])
        else:
            content.skip(padded)
            yield Member(name, mode, size, number, packing)


def _clean(name: bytes) -> str:
    text = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    parts = [part for part in text.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise BadStructureError("a member of an archive has a name that leads out of it")
    return "/".join(parts)
