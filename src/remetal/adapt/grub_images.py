"""GRUB's images on a BIOS disk, as bytes: the boot sector, the core image, and how they point at one another. Pure.

The firmware loads the *boot sector*; it holds the number of the sector where the *core image* begins. The core's
first sector holds a list of runs of sectors where the rest lies. The rest is a decompressor, an LZMA stream with
the kernel and its modules, and, where there was room, Reed-Solomon parity. The modules end with the prefix (where
GRUB's own folder is) and often a few commands that search for it.

Source: GNU GRUB 2, `include/grub/i386/pc/boot.h`, `include/grub/offsets.h`, `include/grub/kernel.h` (module
headers) and the manual's chapter on images. All numbers are little-endian; sectors are of 512 bytes and counted
from the start of the whole disk.
"""

from __future__ import annotations

import lzma
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SECTOR = 512

_JUMP = b"\xeb\x63"
_BOOT_TEXT = b"GRUB \0Geom\0Hard Disk\0Read\0 Error"
_CORE_TEXT = b"loading\0.\0\r\n\0Geom\0Read\0 Error"
_SIGNATURE = b"\x55\xaa"
_KERNEL_SECTOR = 0x5C
_DRIVE_CHECK = 0x66
_NO_DRIVE_CHECK = b"\x90\x90"
_BPB = slice(0x03, 0x5A)
_TABLE = slice(0x1B8, 0x1FE)

_RUN = struct.Struct("<QHH")
_RUNS_MAX = 12
_FIRST_SEGMENT = 0x820
_PARAGRAPHS = SECTOR // 16

_HEADER = struct.Struct("<II I H")
_HEADER_AT = SECTOR + 0x08
_CORE_MAX = 4 << 20
_KERNEL_MAX = 16 << 20
_LZMA = ({"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 2},)

_MODULES = b"mimg"
_CONFIG, _PREFIX = 2, 3
_SEARCH = re.compile(r"\bsearch(?:\.fs_uuid|[^\n]*?(?:--fs-uuid|-u)\b[^\n]*?)\s+([0-9A-Fa-f][0-9A-Fa-f-]{7,35})\b")
_PARTITION = re.compile(r"\([^,()]*,(?:gpt|msdos)?(\d+)\)")


class CoreImageError(ValueError):
    """The bytes are not a core image that we can read."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` sectors from sector `start` of the disk, loaded at real-mode segment `segment`."""

    start: int
    count: int
    segment: int


@dataclass(frozen=True, slots=True)
class Core:
    """What a core image says about itself: where GRUB's folder is, and the commands that find it."""

    prefix: str
    config: str

    @property
    def partition(self) -> int | None:
        """The partition number that the prefix names, or None if it names none."""
        match = _PARTITION.match(self.prefix)
        return int(match[1]) if match else None

    @property
    def uuids(self) -> tuple[str, ...]:
        """The file-system UUIDs that the commands search for, lower-case."""
        return tuple(found.lower() for found in _SEARCH.findall(self.config))


def find_core_sector(sector: bytes) -> int | None:
    """Return the core image's first sector as GRUB's boot sector has it, or None if this is no GRUB boot sector."""
    if len(sector) < SECTOR or sector[510:512] != _SIGNATURE or not sector.startswith(_JUMP):
        return None
    if _BOOT_TEXT not in sector[:440]:
        return None
    return int.from_bytes(sector[_KERNEL_SECTOR : _KERNEL_SECTOR + 8], "little")


def is_core_start(sector: bytes) -> bool:
    """Whether this is the first sector of a core image."""
    return len(sector) >= SECTOR and _CORE_TEXT in sector[:SECTOR]


def parse_runs(sector: bytes) -> tuple[Run, ...]:
    """Return where the rest of the core lies, from its first sector.

    Raises CoreImageError if this is no core image or the list is impossible.
    """
    if not is_core_start(sector):
        raise CoreImageError("there is no core image")
    runs: list[Run] = []
    total = 0
    for run in _runs(sector):
        total += run.count
        if run.start == 0 or total * SECTOR > _CORE_MAX:
            raise CoreImageError("the list of the core image's sectors is impossible")
        runs.append(run)
    if not runs:
        raise CoreImageError("the list of the core image's sectors is empty")
    return tuple(runs)


def parse_core(data: bytes) -> Core:
    """Decompress a core image (all its sectors, the first one included) and read what it says about itself.

    Damage nearly always breaks the stream or the list of modules at its end, so a core that reads well is whole.
    Raises CoreImageError otherwise.
    """
    if not is_core_start(data):
        raise CoreImageError("there is no core image")
    if len(data) < _HEADER_AT + _HEADER.size:
        raise CoreImageError("the core image is cut short")
    packed, plain, parity, _ = _HEADER.unpack_from(data, _HEADER_AT)
    if not 0 < packed <= len(data) or not 0 < plain <= _KERNEL_MAX or parity > len(data):
        raise CoreImageError("the core image's header is damaged")
    end = len(data) - parity
    for padding in range(SECTOR):
        start = end - padding - packed
        if start < _HEADER_AT:
            break
        if data[start] == 0:
            kernel = _unpack(data[start : start + packed], plain)
            core = _find_core(kernel) if kernel is not None else None
            if core is not None:
                return core
    raise CoreImageError("the core image does not decompress")


def patch_core_sector(sector: bytes, core_sector: int) -> bytes:
    """Return a GRUB boot sector that points at another core image."""
    return sector[:_KERNEL_SECTOR] + core_sector.to_bytes(8, "little") + sector[_KERNEL_SECTOR + 8 :]


def patch_runs(sector: bytes, runs: Sequence[Run]) -> bytes:
    """Return a core's first sector with another list of runs. Parity does not cover this sector."""
    if not 0 < len(runs) <= _RUNS_MAX:
        raise CoreImageError(f"a core image cannot lie in {len(runs)} pieces")
    room = (max(len(runs), sum(1 for _ in _runs(sector))) + 1) * _RUN.size
    packed = b"".join(_RUN.pack(run.start, run.count, run.segment) for run in reversed(runs))
    return sector[: SECTOR - room] + packed.rjust(room, b"\0") + sector[SECTOR:]


def plan_boot_sector(boot_image: bytes, standing: bytes, core_sector: int) -> bytes:
    """Return the boot sector to write: GRUB's code, with the parameter block and the table that stand there now.

    The check of the drive number is left out, as on every hard disk that GRUB's own installer writes.
    """
    if find_core_sector(boot_image) is None:
        raise CoreImageError("boot.img is not GRUB's boot image")
    sector = bytearray(patch_core_sector(boot_image[:SECTOR], core_sector))
    sector[_BPB] = standing[_BPB]
    sector[_TABLE] = standing[_TABLE]
    sector[_DRIVE_CHECK : _DRIVE_CHECK + 2] = _NO_DRIVE_CHECK
    return bytes(sector)


def plan_core(core_image: bytes, first_sector: int) -> bytes:
    """Return the bytes to write at `first_sector` (whole sectors) so that this core image boots from there."""
    parse_core(core_image)
    padded = core_image + bytes(-len(core_image) % SECTOR)
    count = len(padded) // SECTOR - 1
    return patch_runs(padded, [Run(first_sector + 1, count, _FIRST_SEGMENT)])


def move_runs(runs: Sequence[Run], moved: Sequence[int]) -> tuple[Run, ...]:
    """Return the runs that cover the sectors `moved`, which stand in the order of the old runs' sectors."""
    found: list[Run] = []
    segment = runs[0].segment
    for sector in moved:
        last = found[-1] if found else None
        if last is not None and last.start + last.count == sector:
            found[-1] = Run(last.start, last.count + 1, last.segment)
        else:
            found.append(Run(sector, 1, segment))
        segment += _PARAGRAPHS
    return tuple(found)


def sectors_of(runs: Sequence[Run]) -> Iterator[int]:
    """Yield every sector of the runs in loading order."""
    for run in runs:
        yield from range(run.start, run.start + run.count)


def _runs(sector: bytes) -> Iterator[Run]:
    """Yield the runs; the list grows downwards from the sector's end and ends with a run of no sectors."""
    for index in range(1, _RUNS_MAX + 1):
        run = Run(*_RUN.unpack_from(sector, SECTOR - index * _RUN.size))
        if run.count == 0:
            return
        yield run


def _unpack(stream: bytes, size: int) -> bytes | None:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        kernel = decompressor.decompress(stream, size)
    except lzma.LZMAError:
        return None
    return kernel if len(kernel) == size else None


def _find_core(kernel: bytes) -> Core | None:
    """Find the list of modules at the end of the kernel, and the prefix and commands in it."""
    at = kernel.find(_MODULES)
    while at >= 0:
        if at + 12 <= len(kernel):
            offset, size = struct.unpack_from("<II", kernel, at + 4)
            parts = _parse_modules(kernel[at + offset : at + size]) if offset <= size <= len(kernel) - at else None
            if parts is not None and _PREFIX in parts:
                return Core(prefix=parts[_PREFIX], config=parts.get(_CONFIG, ""))
        at = kernel.find(_MODULES, at + 1)
    return None


def _parse_modules(data: bytes) -> dict[int, str] | None:
    """Return the texts among the module headers, by type; None if the headers do not fill the data."""
    found: dict[int, str] = {}
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if size < 8 or at + size > len(data):
            return None
        if kind in {_CONFIG, _PREFIX}:
            found[kind] = data[at + 8 : at + size].split(b"\0", 1)[0].decode("utf-8", "replace")
        at += size
    return found if at == len(data) else None
