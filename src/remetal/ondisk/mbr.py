"""DOS partition tables with their chain of extended boot records.

Source of the format: what the Linux kernel accepts (block/partitions/msdos.c) and sfdisk(8) writes. Sector
addresses are in sectors of the disk; every record is 512 bytes at the start of its sector.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Piece, Read

_SLOT = struct.Struct("<B3sB3sII")
_SLOTS = 446
_MAGIC = b"\x55\xaa"
_LIMIT = 1 << 32
_HEADS, _TRACK = 255, 63

RECORD_SIZE = 512
BOOT_CODE_SIZE = 440
EXTENDED = frozenset({0x05, 0x0F, 0x85})
MAX_LOGICAL = 1000


@dataclass(frozen=True, slots=True)
class MbrEntry:
    """One partition: `start` and `sectors` in sectors. `record` is a logical partition's own record, else 0."""

    number: int
    start: int
    sectors: int
    type: int
    status: int
    record: int = 0


@dataclass(frozen=True, slots=True)
class Mbr:
    """A table: disk signature, 440 bytes of boot code, primary and extended (1-4) and logical (from 5) entries."""

    signature: int
    boot_code: bytes
    entries: tuple[MbrEntry, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    status: int
    type: int
    start: int
    sectors: int

    @property
    def used(self) -> bool:
        return self.type != 0 and self.sectors != 0


def parse_mbr(read: Read, size: int, sector: int) -> Mbr | None:
    """Return the table of a disk of `size` bytes, or None if sector 0 holds none; a table may be empty.

    Raises BadStructureError for partitions that overlap or leave the disk, and for chains of extended records
    that loop or lead astray.
    """
    if size < 2 * sector:
        return None
    data = read(0, RECORD_SIZE)
    slots = _parse_slots(data)
    if data[510:512] != _MAGIC or any(slot.status not in {0, 0x80} for slot in slots):
        return None
    entries = [
        MbrEntry(index + 1, slot.start, slot.sectors, slot.type, slot.status)
        for index, slot in enumerate(slots)
        if slot.used
    ]
    _check_apart(entries, 1, min(size // sector, _LIMIT))
    for container in _containers(entries):
        entries += _parse_chain(read, container, sector)
    table = Mbr(struct.unpack_from("<I", data, 440)[0], data[:BOOT_CODE_SIZE], tuple(entries))
    _check_table(table, size // sector)
    return table


def encode_mbr(mbr: Mbr, size: int, sector: int) -> tuple[Piece, ...]:
    """Return sector 0 (512 bytes) and every extended boot record for a disk of `size` bytes.

    Raises BadStructureError if the partitions overlap or leave the disk.
    """
    _check_table(mbr, size // sector)
    slots = [bytes(16)] * 4
    for entry in mbr.entries:
        if entry.number <= 4:
            slots[entry.number - 1] = _encode_slot(entry.status, entry.type, entry.start, entry.sectors, entry.start)
    head = mbr.boot_code + struct.pack("<IH", mbr.signature, 0) + b"".join(slots) + _MAGIC
    pieces = [Piece(0, head)]
    logical = sorted((entry for entry in mbr.entries if entry.number > 4), key=lambda entry: entry.number)
    for container in _containers(mbr.entries):
        pieces += _encode_chain(container, logical, sector)
    return tuple(pieces)


def _parse_slots(data: bytes) -> list[_Slot]:
    slots = []
    for index in range(4):
        status, _, kind, _, start, sectors = _SLOT.unpack_from(data, _SLOTS + 16 * index)
        slots.append(_Slot(status, kind, start, sectors))
    return slots


def _parse_chain(read: Read, container: MbrEntry, sector: int) -> list[MbrEntry]:
    entries: list[MbrEntry] = []
    end = container.start + container.sectors
    place, seen = container.start, set[int]()
    while True:
        if place in seen or len(seen) > MAX_LOGICAL:
            raise BadStructureError("the chain of extended boot records does not end")
        if not container.start <= place < end:
            raise BadStructureError("the chain of extended boot records leaves the extended partition")
        seen.add(place)
        data = read(place * sector, RECORD_SIZE)
        if data[510:512] != _MAGIC:
            if len(seen) == 1:
                return []
            raise BadStructureError("the chain of extended boot records leads to something else")
        used = [slot for slot in _parse_slots(data) if slot.used]
        data_slots = [slot for slot in used if slot.type not in EXTENDED]
        links = [slot for slot in used if slot.type in EXTENDED]
        if len(data_slots) > 1 or len(links) > 1:
            raise BadStructureError("an extended boot record describes several partitions")
        for slot in data_slots:
            start = place + slot.start
            entries.append(MbrEntry(5 + len(entries), start, slot.sectors, slot.type, slot.status, place))
        if not links:
            return entries
        place = container.start + links[0].start


def _encode_chain(container: MbrEntry, logical: list[MbrEntry], sector: int) -> list[Piece]:
    """Return the records in the order of the chain; the first stands at the start of the extended partition."""
    places = [entry.record for entry in logical]
    if not logical or places[0] != container.start:
        places.insert(0, container.start)
    of_place = {entry.record: entry for entry in logical}
    pieces = []
    for index, place in enumerate(places):
        entry = of_place.get(place)
        slots = bytes(16)
        if entry is not None:
            slots = _encode_slot(entry.status, entry.type, entry.start - place, entry.sectors, entry.start)
        if index + 1 < len(places):
            target = places[index + 1]
            following = of_place[target]
            length = following.start + following.sectors - target if following.start > target else 1
            slots += _encode_slot(0, 0x05, target - container.start, length, target)
        pieces.append(Piece(place * sector, bytes(_SLOTS) + slots.ljust(64, b"\0") + _MAGIC))
    return pieces


def _containers(entries: list[MbrEntry] | tuple[MbrEntry, ...]) -> list[MbrEntry]:
    found = [entry for entry in entries if entry.number <= 4 and entry.type in EXTENDED]
    if len(found) > 1:
        raise BadStructureError("the table has several extended partitions")
    return found


def _check_table(mbr: Mbr, sectors: int) -> None:
    limit = min(sectors, _LIMIT)
    if len({entry.number for entry in mbr.entries}) != len(mbr.entries):
        raise BadStructureError("two partitions have the same number")
    if len(mbr.boot_code) != BOOT_CODE_SIZE or not 0 <= mbr.signature < _LIMIT:
        raise BadStructureError("the boot code or the signature has the wrong length")
    for entry in mbr.entries:
        if not (0 < entry.type < 256 and 0 <= entry.status < 256 and entry.number > 0):
            raise BadStructureError(f"partition {entry.number} has an impossible type or status")
    primary = [entry for entry in mbr.entries if entry.number <= 4]
    logical = [entry for entry in mbr.entries if entry.number > 4]
    _check_apart(primary, 1, limit)
    containers = _containers(primary)
    if not logical:
        return
    if not containers or any(entry.type in EXTENDED for entry in logical):
        raise BadStructureError("there are logical partitions without an extended one")
    if sorted(entry.number for entry in logical) != list(range(5, 5 + len(logical))) or len(logical) > MAX_LOGICAL:
        raise BadStructureError("the numbers of the logical partitions have gaps")
    container = containers[0]
    records = {entry.record for entry in logical} | {container.start}
    own = [entry.record for entry in sorted(logical, key=lambda entry: entry.number)]
    if len(set(own)) != len(own) or container.start in own[1:]:
        raise BadStructureError("two logical partitions share a record")
    _check_apart(
        [*logical, *(MbrEntry(0, place, 1, 0, 0) for place in records)],
        container.start,
        container.start + container.sectors,
    )
    if any(entry.record > entry.start for entry in logical):
        raise BadStructureError("a logical partition lies before its own record")


def _check_apart(entries: list[MbrEntry], first: int, limit: int) -> None:
    free = first
    for entry in sorted(entries, key=lambda entry: entry.start):
        if not (free <= entry.start and entry.sectors > 0 and entry.start + entry.sectors <= limit):
            name = f"partition {entry.number}" if entry.number else "an extended boot record"
            raise BadStructureError(f"{name} overlaps another partition or leaves its space")
        free = entry.start + entry.sectors


def _encode_slot(status: int, kind: int, start: int, sectors: int, place: int) -> bytes:
    """Return one slot; `start` is relative to the record, `place` is the same sector from the disk's start."""
    return _SLOT.pack(status, _chs(place), kind, _chs(place + sectors - 1), start, sectors)


def _chs(place: int) -> bytes:
    """Return cylinder, head and sector in the geometry of 255 heads and 63 sectors that all PCs assume."""
    cylinder, rest = divmod(place, _HEADS * _TRACK)
    head, sector = divmod(rest, _TRACK)
    if cylinder > 1023:
        cylinder, head, sector = 1023, 254, 62
    return bytes((head, (sector + 1) | cylinder >> 2 & 0xC0, cylinder & 0xFF))
