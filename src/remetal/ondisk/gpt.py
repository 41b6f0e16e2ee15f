"""GUID partition tables: both copies and the protective MBR.

Source of the format: UEFI specification 2.10, chapter 5; what Linux accepts: block/partitions/efi.c.
Sector addresses here are in sectors of the disk, as on disk; sizes of disks are in bytes.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Piece, Read

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_SIGNATURE = b"EFI PART"
_REVISION = 0x10000
_PROTECTIVE = 0xEE
_NAME_BYTES = 72

ENTRY_SIZE = 128
MAX_ENTRIES = 1024
MBR_SIZE = 512
BOOT_CODE_SIZE = 440


@dataclass(frozen=True, slots=True)
class GptEntry:
    """One partition: `first` and `last` are its first and last sector; GUIDs are upper case."""

    number: int
    type_guid: str
    unique_guid: str
    first: int
    last: int
    attributes: int
    name: str


@dataclass(frozen=True, slots=True)
class Gpt:
    """A table. `first_usable` is a sector; `problems` are sentences about what the parser had to overlook."""

    disk_guid: str
    entry_count: int
    first_usable: int
    entries: tuple[GptEntry, ...]
    protective_mbr: bytes
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Header:
    place: int
    alternate: int
    first_usable: int
    last_usable: int
    disk_guid: str
    entries_at: int
    entry_count: int
    entry_size: int
    entries_crc: int


def array_sectors(entry_count: int, sector: int) -> int:
    """Return how many sectors of `sector` bytes the array of `entry_count` entries takes."""
    return -(-entry_count * ENTRY_SIZE // sector)


def parse_gpt(read: Read, size: int, sector: int) -> Gpt | None:
    """Return the table of a disk of `size` bytes, or None if sector 0 does not announce one.

    A damaged primary with a sound backup is used and told in `problems`. Raises BadStructureError if a table is
    announced and neither copy is sound.
    """
    sectors = size // sector
    if sectors < 4:
        return None
    mbr = read(0, MBR_SIZE)
    if not _is_protective(mbr):
        return None
    problems = []
    backup_at = sectors - 1
    try:
        header = _parse_header(read(sector, sector), 1, sectors)
        backup_at = header.alternate
        found = _parse_entries(read, header, sector)
    except BadStructureError as error:
        problems.append(f"the primary partition table is damaged ({error.message}); its backup is used")
        header, found = _parse_backup(read, sector, sectors - 1, sectors)
    else:
        problems += _compare_backup(read, sector, backup_at, sectors, header, found)
    if header.entry_size != ENTRY_SIZE:
        problems.append(f"the table has entries of {header.entry_size} bytes; they will be written with {ENTRY_SIZE}")
    entries, renamed = _parse_partitions(found, header)
    if header.place == 1 and header.entries_at != 2:
        problems.append("the table's entries do not follow its header; they will after a restore")
    return Gpt(header.disk_guid, header.entry_count, header.first_usable, entries, mbr, (*problems, *renamed))


def encode_gpt(gpt: Gpt, size: int, sector: int) -> tuple[Piece, ...]:
    """Return protective MBR, primary and backup for a disk of `size` bytes, in the order of their places.

    The backup goes to the end of this disk. Raises BadStructureError if the partitions do not fit, overlap or
    hold values that the format cannot.
    """
    sectors = size // sector
    array = array_sectors(gpt.entry_count, sector)
    first_usable = max(gpt.first_usable, 2 + array)
    last_usable = sectors - array - 2
    if not 1 <= gpt.entry_count <= MAX_ENTRIES or last_usable < first_usable or len(gpt.protective_mbr) != MBR_SIZE:
        raise BadStructureError("the disk is too small for the partition table")
    _check_entries(gpt.entries, gpt.entry_count, first_usable, last_usable)
    entries = bytearray(gpt.entry_count * ENTRY_SIZE)
    for entry in gpt.entries:
        place = (entry.number - 1) * ENTRY_SIZE
        entries[place : place + ENTRY_SIZE] = _encode_entry(entry)
    usable = (first_usable, last_usable)
    guid = _guid_bytes(gpt.disk_guid)
    padded = bytes(entries).ljust(array * sector, b"\0")
    backup_entries = sectors - 1 - array
    return (
        Piece(0, encode_protective_mbr(gpt.protective_mbr, sectors)),
        Piece(sector, _encode_header((1, sectors - 1), usable, guid, 2, bytes(entries)).ljust(sector, b"\0")),
        Piece(2 * sector, padded),
        Piece(backup_entries * sector, padded),
        Piece(
            (sectors - 1) * sector,
            _encode_header((sectors - 1, 1), usable, guid, backup_entries, bytes(entries)).ljust(sector, b"\0"),
        ),
    )


def encode_protective_mbr(mbr: bytes, sectors: int) -> bytes:
    """Return a protective MBR fitted to a disk of `sectors` sectors.

    A hybrid one, and one whose entry has the largest possible size, stay as they are.
    """
    slots = [_MBR_ENTRY.unpack_from(mbr, 446 + 16 * index) for index in range(4)]
    used = [index for index, slot in enumerate(slots) if slot[2]]
    if len(used) != 1 or slots[used[0]][2] != _PROTECTIVE or slots[used[0]][5] == 0xFFFFFFFF:
        return mbr
    index = used[0]
    status, first_chs, kind, last_chs, start, _ = slots[index]
    fitted = _MBR_ENTRY.pack(status, first_chs, kind, last_chs, start, min(sectors - 1, 0xFFFFFFFF))
    return mbr[: 446 + 16 * index] + fitted + mbr[462 + 16 * index :]


def _is_protective(mbr: bytes) -> bool:
    return mbr[510:512] == b"\x55\xaa" and any(mbr[450 + 16 * index] == _PROTECTIVE for index in range(4))


def _parse_header(data: bytes, place: int, sectors: int) -> _Header:
    (
        signature,
        _revision,
        header_size,
        crc,
        _reserved,
        my_place,
        alternate,
        first_usable,
        last_usable,
        guid,
        entries_at,
        entry_count,
        entry_size,
        entries_crc,
    ) = _HEADER.unpack_from(data)
    if signature != _SIGNATURE:
        raise BadStructureError("its header is missing")
    if not _HEADER.size <= header_size <= len(data):
        raise BadStructureError("its header has an impossible length")
    if zlib.crc32(data[:16] + b"\0\0\0\0" + data[20:header_size]) != crc:
        raise BadStructureError("its header's checksum is wrong")
    if my_place != place or alternate < 1:
        raise BadStructureError("its header belongs to another place")
    if not 1 <= entry_count <= MAX_ENTRIES or entry_size not in {128, 256, 512, 1024, 2048, 4096}:
        raise BadStructureError("its entries have an impossible number or length")
    if not 0 < first_usable <= last_usable < sectors:
        raise BadStructureError("it describes another disk size")
    disk_guid = _guid_text(guid)
    return _Header(
        place, alternate, first_usable, last_usable, disk_guid, entries_at, entry_count, entry_size, entries_crc
    )


def _parse_entries(read: Read, header: _Header, sector: int) -> bytes:
    length = header.entry_count * header.entry_size
    first = header.entries_at
    last = first + -(-length // sector) - 1
    before = first >= 2 and last < header.first_usable
    after = header.last_usable < first and header.place == last + 1
    if not (before and header.place == 1) and not (after and header.place != 1):
        raise BadStructureError("its entries are in an impossible place")
    entries = read(first * sector, length)
    if zlib.crc32(entries) != header.entries_crc:
        raise BadStructureError("its entries' checksum is wrong")
    _parse_partitions(entries, header)
    return entries


def _parse_backup(read: Read, sector: int, place: int, sectors: int) -> tuple[_Header, bytes]:
    try:
        header = _parse_header(read(place * sector, sector), place, sectors)
        return header, _parse_entries(read, header, sector)
    except BadStructureError as error:
        raise BadStructureError(
            f"both copies of the GUID partition table are damaged; of the backup: {error.message}",
            hint="Repair the table with gdisk or testdisk.",
        ) from error


def _compare_backup(read: Read, sector: int, place: int, sectors: int, primary: _Header, entries: bytes) -> list[str]:
    if not primary.last_usable < place < sectors:
        return ["the backup of the partition table is not where it should be; a restore makes it anew"]
    try:
        backup = _parse_header(read(place * sector, sector), place, sectors)
        same = _parse_entries(read, backup, sector) == entries and backup.disk_guid == primary.disk_guid
    except BadStructureError as error:
        return [f"the backup of the partition table is damaged ({error.message}); a restore makes it anew"]
    if not same:
        return ["the backup of the partition table differs from the primary, which is used"]
    if place != sectors - 1:
        return ["the backup of the partition table is not at the end of the disk; a restore puts it there"]
    return []


def _parse_partitions(data: bytes, header: _Header) -> tuple[tuple[GptEntry, ...], list[str]]:
    entries, problems = [], []
    for index in range(header.entry_count):
        kind, unique, first, last, attributes, name = _ENTRY.unpack_from(data, index * header.entry_size)
        if kind == bytes(16):
            continue
        text, exact = _parse_name(name)
        if not exact:
            problems.append(f"the name of partition {index + 1} is not valid Unicode; it will be corrected")
        entries.append(GptEntry(index + 1, _guid_text(kind), _guid_text(unique), first, last, attributes, text))
    _check_entries(tuple(entries), header.entry_count, header.first_usable, header.last_usable)
    return tuple(entries), problems


def _check_entries(entries: tuple[GptEntry, ...], count: int, first_usable: int, last_usable: int) -> None:
    if len({entry.number for entry in entries}) != len(entries):
        raise BadStructureError("two partitions have the same number")
    free = first_usable
    for entry in sorted(entries, key=lambda entry: entry.first):
        if not 1 <= entry.number <= count:
            raise BadStructureError(f"partition {entry.number} has no place among {count} entries")
        if not free <= entry.first <= entry.last <= last_usable:
            raise BadStructureError(f"partition {entry.number} overlaps another one or leaves the usable space")
        free = entry.last + 1


def _parse_name(data: bytes) -> tuple[str, bool]:
    ends = [index for index in range(0, _NAME_BYTES, 2) if data[index : index + 2] == b"\0\0"]
    units = data[: ends[0]] if ends else data
    try:
        return units.decode("utf-16-le"), True
    except UnicodeDecodeError:
        whole = units.decode("utf-16-le", "replace")
        while len(whole.encode("utf-16-le")) > _NAME_BYTES:
            whole = whole[:-1]
        return whole, False


def _encode_entry(entry: GptEntry) -> bytes:
    try:
        name = entry.name.encode("utf-16-le")
    except UnicodeEncodeError as error:
        raise BadStructureError(f"the name of partition {entry.number} is not valid Unicode") from error
    if len(name) > _NAME_BYTES or not 0 <= entry.attributes < 1 << 64:
        raise BadStructureError(f"the name or the attributes of partition {entry.number} are too long")
    kind, unique = _guid_bytes(entry.type_guid), _guid_bytes(entry.unique_guid)
    return _ENTRY.pack(kind, unique, entry.first, entry.last, entry.attributes, name)


def _encode_header(
    places: tuple[int, int], usable: tuple[int, int], guid: bytes, entries_at: int, entries: bytes
) -> bytes:
    crc = zlib.crc32(entries)
    count = len(entries) // ENTRY_SIZE

    def packed(header_crc: int) -> bytes:
        return _HEADER.pack(
            *(_SIGNATURE, _REVISION, _HEADER.size, header_crc, 0),
            *(*places, *usable, guid, entries_at, count, ENTRY_SIZE, crc),
        )

    return packed(zlib.crc32(packed(0)))


def _guid_text(data: bytes) -> str:
    return str(uuid.UUID(bytes_le=data)).upper()


def _guid_bytes(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes_le
    except ValueError as error:
        raise BadStructureError(f"'{text}' is not a GUID") from error
