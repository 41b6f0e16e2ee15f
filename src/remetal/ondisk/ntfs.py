"""Size and use of NTFS.

Every file is a record of the master file table ($MFT), which is a file itself; what a record has to say is in its
attributes. Record 6 ($Bitmap) holds a bit for every cluster. Sources: the structures in layout.h and logfile.h of
ntfs-3g; Linux Documentation/filesystems/ntfs3.rst (little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from remetal.ondisk.bitmaps import PIECE, Ranges, UncleanError, count_bits, covers, find_ranges, merge, to_bytes
from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import KIB

_MARK = b"NTFS    "
_BLOCK = 512
"""Bytes that the update sequence of a record protects together, whatever the disk's sectors are."""

_MFT, _LOG, _VOLUME, _ROOT, _BITMAP = 0, 2, 3, 5, 6
_ATTRIBUTE_LIST, _VOLUME_NAME, _VOLUME_INFORMATION = 0x20, 0x60, 0x70
_DATA, _INDEX_ROOT, _INDEX_ALLOCATION = 0x80, 0x90, 0xA0
_LAST_ATTRIBUTE = 0xFFFFFFFF
_MAX_LIST = 256 * KIB
_MAX_RECORD = 64 * KIB
_MAX_RUNS = 1 << 16
_MAX_DEPTH = 16
_IN_USE = 0x1
_RECORD_NUMBER = (1 << 48) - 1

_DIRTY = 0x1 | 0x4000  # to be checked by chkdsk; chkdsk is at work
_NO_CLIENT, _LOG_IS_CLEAN = 0xFFFF, 0x2
_HAS_SUBNODE, _LAST_ENTRY = 0x1, 0x2
_HIBERNATION_HEADER = 4096
_MEMORY_FILES = ("hiberfil.sys", "pagefile.sys", "swapfile.sys")
_FOLDER = 0x2
_SHUT_DOWN = "Start Windows and shut it down fully (`shutdown /s /f /t 0`) for a smaller and faster backup."


@dataclass(frozen=True, slots=True)
class NtfsVolume:
    """Sizes in bytes; `size` reaches to the end of the backup boot sector. `serial` as blkid writes the UUID.

    The one of `features` is the version: `ntfs3.1`.
    """

    size: int
    used: int
    cluster_size: int
    sector_size: int
    serial: str
    label: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Boot:
    """The boot sector: sizes in bytes, `clusters` a number, `mft` where the first part of the file table lies.

    `runs` are the parts of the file table that are known so far: (first cluster, number).
    """

    read: Read
    space: int
    sector: int
    sectors: int
    cluster: int
    clusters: int
    record: int
    mft: int
    mirror: int
    serial: str
    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return min((self.sectors + 1) * self.sector, self.space)


@dataclass(frozen=True, slots=True)
class _Data:
    """The content of an attribute: in the record itself, or in runs (first cluster, number).

    It has `size` bytes, of which the first `written` are on the disk; the others read as zeros.
    """

    size: int
    written: int
    resident: bytes = b""
    runs: tuple[tuple[int, int], ...] = ()


def parse_ntfs(read: Read, size: int) -> NtfsVolume:
    """Describe the file system on a volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    boot = _open(read, size)
    name = _find(boot, _VOLUME, _VOLUME_NAME)
    major, minor, _ = _volume_information(boot)
    free = boot.clusters - count_bits(_find_used(boot))
    return NtfsVolume(
        size=boot.size,
        used=boot.size - free * boot.cluster,
        cluster_size=boot.cluster,
        sector_size=boot.sector,
        serial=boot.serial,
        label=name.resident.decode("utf-16-le", "replace").split("\0")[0] if name else "",
        features=(f"ntfs{major}.{minor}",),
    )


def read_used(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size in bytes of what is used on a volume of `size` bytes: all but free clusters, ascending.

    The backup boot sector lies behind the last cluster: right there, or in the last sector of the space. Raises
    UncleanError if Windows hibernates on the volume, was not shut down, or wants to check it; BadStructureError if
    there is no sound NTFS.
    """
    boot = _open(read, size)
    _check_rest(boot)
    end = boot.clusters * boot.cluster
    behind = [(end, boot.size - end)]
    last = (size // boot.sector - 1) * boot.sector
    if _read(boot, last, 11)[3:] == _MARK:
        behind.append((last, boot.sector))
    return merge(chain(to_bytes(_find_used(boot), 0, boot.cluster), behind))


def find_memory_files(read: Read, size: int) -> dict[str, list[tuple[int, int]]]:
    """Return where the files lie that only a running Windows has a use for: start and size in bytes, by name.

    These are the page files and the hibernation file in the root folder: Windows makes their content anew when it
    starts. None of them is told of that has another name as well, or is compressed, sparse or encrypted. Raises
    UncleanError and BadStructureError as `read_used` does.
    """
    boot = _open(read, size)
    _check_rest(boot)
    found = {}
    for name in _MEMORY_FILES:
        number = _find_in_root(boot, name.upper())
        ranges = _find_plain(boot, number) if number is not None else []
        if ranges:
            found[name] = ranges
    return found


def _find_plain(boot: _Boot, number: int) -> list[tuple[int, int]]:
    """Return where the content of a file lies, if it is plain clusters and has no other name."""
    record = _read_record(boot, number)
    links, _, flags = struct.unpack_from("<HHH", record, 18)
    parts = list(_find_parts(boot, number, _DATA, "", record))
    if links != 1 or flags & _FOLDER or any(part[12:14] != b"\0\0" for part in parts):
        return []
    data = _join(boot, parts) if parts else _Data(0, 0)
    return [(cluster * boot.cluster, count * boot.cluster) for cluster, count in data.runs]


def _open(read: Read, size: int) -> _Boot:
    """Parse the boot sector, and find all of the file table."""
    boot = _parse_boot(read, size)
    boot.runs.append((boot.mft, -(-boot.record // boot.cluster)))  # its own record, which tells the rest
    record = _read_record(boot, _MFT)
    boot.runs.clear()
    for part in _find_parts(boot, _MFT, _DATA, "", record):
        _append_runs(boot, boot.runs, part)  # at once: the next part may be told by a record in this one
    if not boot.runs or boot.runs[0][0] != boot.mft:
        raise BadStructureError("the file table of the NTFS is not where its boot sector says")
    return boot


def _parse_boot(read: Read, size: int) -> _Boot:
    if size < 4 * KIB:
        raise BadStructureError("the volume is too small for NTFS")
    data = read(0, _BLOCK)
    sector, ratio = struct.unpack_from("<HB", data, 11)
    sectors, mft, mirror, per_record = struct.unpack_from("<QQQb", data, 40)
    (serial,) = struct.unpack_from("<Q", data, 72)
    if data[3:11] != _MARK or sector not in {512, 1024, 2048, 4096}:
        raise BadStructureError("the boot sector of the NTFS is damaged")
    cluster = sector * (ratio if ratio <= 128 else 1 << 256 - ratio)
    record = per_record * cluster if per_record > 0 else 1 << -per_record
    if cluster not in {1 << bit for bit in range(9, 22)} or record not in {1 << bit for bit in range(9, 17)}:
        raise BadStructureError("the boot sector of the NTFS has impossible sizes")
    clusters = sectors * sector // cluster
    if sectors * sector > size or max(mft, mirror) >= clusters or record > cluster * (clusters - mft):
        raise BadStructureError("the boot sector of the NTFS describes another size")
    return _Boot(read, size, sector, sectors, cluster, clusters, record, mft, mirror, f"{serial:016X}")


def _volume_information(boot: _Boot) -> tuple[int, int, int]:
    """Return major and minor version and the flags of the volume."""
    found = _find(boot, _VOLUME, _VOLUME_INFORMATION)
    if found is None or len(found.resident) < 12:
        raise BadStructureError("the NTFS does not tell its version")
    major, minor, flags = struct.unpack_from("<BBH", found.resident, 8)
    return major, minor, flags


def _find_used(boot: _Boot) -> Ranges:
    """Return the clusters in use. Raises BadStructureError if $Bitmap calls free what the file system stands on."""
    bitmap = _need(boot, _BITMAP, _DATA, "$Bitmap")
    size = -(-boot.clusters // 8)
    if bitmap.written < size:
        raise BadStructureError("$Bitmap of the NTFS is too short")
    used = find_ranges(_pieces(boot, bitmap, size), boot.clusters, "little")
    log = _need(boot, _LOG, _DATA, "$LogFile")
    for first, count in [(0, 1), (boot.mirror, 1), *boot.runs, *bitmap.runs, *log.runs]:
        if not covers(used, first, count):
            raise BadStructureError("$Bitmap of the NTFS calls a cluster free that is in use")
    return used


def _check_rest(boot: _Boot) -> None:
    """Raise UncleanError if what stands on the disk may not be all that there is."""
    if _is_hibernated(boot):
        raise UncleanError("holds a hibernated Windows", hint=_SHUT_DOWN)
    if _volume_information(boot)[2] & _DIRTY:
        raise UncleanError(
            "waits to be checked by Windows (chkdsk)", hint="Start Windows once for a smaller and faster backup."
        )
    log = _need(boot, _LOG, _DATA, "$LogFile")
    if _read_data(boot, log, 0, 4) == b"\xff\xff\xff\xff":
        if any(piece.strip(b"\xff") for piece in _pieces(boot, log, log.written)):
            raise UncleanError("has a journal that makes no sense", hint="Let Windows or ntfsfix look at it.")
    elif not _is_log_clean(boot, log):
        raise UncleanError("was not unmounted cleanly", hint=_SHUT_DOWN)


def _is_log_clean(boot: _Boot, log: _Data) -> bool:
    """Whether the newer of the two restart pages says that nothing is left to do.

    Log version 2 belongs to a Windows that still holds metadata in its memory (fast startup).
    """
    (page,) = struct.unpack_from("<I", _read_data(boot, log, 0, _BLOCK), 16)
    if page not in {1 << bit for bit in range(9, 17)}:
        return False
    states: list[tuple[int, bool]] = []
    for place in (0, page):
        try:
            data = _fix(_read_data(boot, log, place, page), b"RSTR")
        except BadStructureError:
            continue
        area, _, major = struct.unpack_from("<HhH", data, 24)
        if area + 16 <= page:
            newest, _, _, client, flags = struct.unpack_from("<QHHHH", data, area)
            states.append((newest, major == 1 and (client == _NO_CLIENT or bool(flags & _LOG_IS_CLEAN))))
    newest = max((number for number, _ in states), default=0)
    return bool(states) and all(clean for number, clean in states if number == newest)


def _is_hibernated(boot: _Boot) -> bool:
    """Whether hiberfil.sys holds a sleeping Windows; one shorter than its header marks a disk that sleeps along."""
    number = _find_in_root(boot, "HIBERFIL.SYS")
    if number is None:
        return False
    data = _find(boot, number, _DATA)
    if data is None or data.size < _HIBERNATION_HEADER:
        return True
    return data.written > 0 and _read_data(boot, data, 0, 4).lower() in {b"hibr", b"rstr"}


def _find_in_root(boot: _Boot, name: str) -> int | None:
    """Return the record of the file `name` (upper case, ASCII) in the root folder, which is a sorted tree of blocks."""
    root, blocks = _need(boot, _ROOT, _INDEX_ROOT, "the root folder", "$I30"), None
    if len(root.resident) < 32:
        raise BadStructureError("the root folder of the NTFS is damaged")
    (size,) = struct.unpack_from("<I", root.resident, 8)
    if size not in {1 << bit for bit in range(9, 17)}:
        raise BadStructureError("the root folder of the NTFS has an impossible block size")
    node = root.resident[16:]
    for _ in range(_MAX_DEPTH):
        number, child = _search(node, name)
        if child is None:
            return number
        blocks = blocks or _need(boot, _ROOT, _INDEX_ALLOCATION, "the root folder", "$I30")
        place = child * (boot.cluster if boot.cluster <= size else _BLOCK)
        node = _fix(_read_data(boot, blocks, place, size), b"INDX")[24:]
    raise BadStructureError("the root folder of the NTFS is a tree without end")


def _search(node: bytes, name: str) -> tuple[int | None, int | None]:
    """Return the record that `node` has for `name`, or the child in which to look on; (None, None) if there is none."""
    (position, end) = struct.unpack_from("<II", node)
    while position + 16 <= min(end, len(node)):
        record, length, key, flags = struct.unpack_from("<QHHH", node, position)
        entry = node[position : position + length]
        if length < 16 or len(entry) < length:
            break
        order = 1 if flags & _LAST_ENTRY else _compare(entry[16 : 16 + key], name)
        if order == 0:
            return record & _RECORD_NUMBER, None
        if order > 0:
            return None, struct.unpack_from("<Q", entry, length - 8)[0] if flags & _HAS_SUBNODE else None
        position += length
    raise BadStructureError("a folder of the NTFS is damaged")


def _compare(key: bytes, name: str) -> int:
    """Compare the name in a key ($FILE_NAME) with `name` as NTFS sorts them: by the code units of capital letters."""
    if len(key) < 66 or len(key) < 66 + 2 * key[64]:
        raise BadStructureError("a folder of the NTFS is damaged")
    units = struct.unpack_from(f"<{key[64]}H", key, 66)
    found = [unit - 32 if 0x61 <= unit <= 0x7A else unit for unit in units]
    wanted = [ord(each) for each in name]
    return (found > wanted) - (found < wanted)


def _need(boot: _Boot, number: int, kind: int, what: str, name: str = "") -> _Data:
    found = _find(boot, number, kind, name)
    if found is None:
        raise BadStructureError(f"{what} of the NTFS is missing")
    return found


def _find(boot: _Boot, number: int, kind: int, name: str = "") -> _Data | None:
    """Return what the attribute of a file holds, or None if the file has none of that kind and name."""
    parts = list(_find_parts(boot, number, kind, name, _read_record(boot, number)))
    return _join(boot, parts) if parts else None


def _find_parts(boot: _Boot, number: int, kind: int, name: str, record: bytes) -> Iterator[bytes]:
    """Yield an attribute's parts in their order; those of a large file are in several records, as its list says."""
    attributes = list(_attributes(record))
    lists = [each for each in attributes if _is(each, _ATTRIBUTE_LIST, "")]
    if not lists:
        yield from (each for each in attributes if _is(each, kind, name))
        return
    listed = _join(boot, lists)
    if listed.size > _MAX_LIST:
        raise BadStructureError("a list of attributes of the NTFS is too long")
    for place, first in sorted(_parse_list(_read_data(boot, listed, 0, listed.size), kind, name), key=lambda e: e[1]):
        there = record if place == number else _read_record(boot, place)
        part = next((each for each in _attributes(there) if _is(each, kind, name) and _first_of(each) == first), None)
        if part is None:
            raise BadStructureError("a list of attributes of the NTFS names one that is not there")
        yield part


def _parse_list(data: bytes, kind: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield record and first cluster of the parts of an attribute that a list of attributes names."""
    position = 0
    while position + 26 <= len(data):
        found, length, name_size, name_at, first, record = struct.unpack_from("<IHBBQQ", data, position)
        if length < 26:
            raise BadStructureError("a list of attributes of the NTFS is damaged")
        if found == kind and data[position + name_at :][: 2 * name_size] == name.encode("utf-16-le"):
            yield record & _RECORD_NUMBER, first
        position += length


def _join(boot: _Boot, parts: list[bytes]) -> _Data:
    """Return the content of an attribute from its parts. Raises BadStructureError for one that is not all there."""
    head = parts[0]
    if not head[8]:
        size, place = struct.unpack_from("<IH", head, 16)
        if place + size > len(head):
            raise BadStructureError("an attribute of the NTFS is damaged")
        return _Data(size, size, resident=head[place : place + size])
    runs: list[tuple[int, int]] = []
    for part in parts:
        _append_runs(boot, runs, part)
    _, size, written = struct.unpack_from("<QQQ", head, 40)
    if not written <= size <= sum(count for _, count in runs) * boot.cluster:
        raise BadStructureError("an attribute of the NTFS is longer than its clusters")
    return _Data(size, written, runs=tuple(runs))


def _append_runs(boot: _Boot, runs: list[tuple[int, int]], part: bytes) -> None:
    """Add the runs of an attribute's next part. Raises BadStructureError if one is missing before it."""
    first = _first_of(part)
    if first != sum(count for _, count in runs):
        raise BadStructureError("an attribute of the NTFS is incomplete")
    runs.extend(_parse_runs(boot, part))
    if len(runs) > _MAX_RUNS:
        raise BadStructureError("a file that the NTFS stands on is in too many pieces")


def _parse_runs(boot: _Boot, part: bytes) -> Iterator[tuple[int, int]]:
    """Yield the runs of a part of an attribute. Raises BadStructureError for holes: nothing that we read has any."""
    if not part[8] or len(part) < 64:
        raise BadStructureError("an attribute of the NTFS is damaged")
    (position,) = struct.unpack_from("<H", part, 32)
    cluster = 0
    while position < len(part) and part[position]:
        for_count, for_place = part[position] & 0xF, part[position] >> 4
        middle, end = position + 1 + for_count, position + 1 + for_count + for_place
        count = int.from_bytes(part[position + 1 : middle], "little", signed=True)
        cluster += int.from_bytes(part[middle:end], "little", signed=True)
        if not for_place or end > len(part) or count <= 0 or not 0 <= cluster <= boot.clusters - count:
            raise BadStructureError("an attribute of the NTFS has an impossible run")
        yield cluster, count
        position = end


def _attributes(record: bytes) -> Iterator[bytes]:
    """Yield the attributes of a record, each as its bytes."""
    (position,) = struct.unpack_from("<H", record, 20)
    while position + 4 <= len(record):
        (kind,) = struct.unpack_from("<I", record, position)
        if kind == _LAST_ATTRIBUTE:
            return
        (length,) = struct.unpack_from("<I", record, position + 4) if position + 8 <= len(record) else (0,)
        if length < 24 or position + length > len(record):
            break
        yield record[position : position + length]
        position += length
    raise BadStructureError("a record of the NTFS is damaged")


def _is(attribute: bytes, kind: int, name: str) -> bool:
    found, _, _, size, place = struct.unpack_from("<IIBBH", attribute)
    return bool(found == kind) and attribute[place : place + 2 * size] == name.encode("utf-16-le")


def _first_of(attribute: bytes) -> int:
    """Return which of the attribute's clusters is the first in this part of it."""
    return int(struct.unpack_from("<Q", attribute, 16)[0]) if attribute[8] else 0


def _read_record(boot: _Boot, number: int) -> bytes:
    """Return a record of the file table, its update sequence undone."""
    size = sum(count for _, count in boot.runs) * boot.cluster
    table = _Data(size, size, runs=tuple(boot.runs))
    record = _fix(_read_data(boot, table, number * boot.record, boot.record), b"FILE")
    if not struct.unpack_from("<H", record, 22)[0] & _IN_USE:
        raise BadStructureError(f"record {number} of the NTFS is not in use")
    return record


def _fix(data: bytes, mark: bytes) -> bytes:
    """Return a record with the last two bytes of each block as they were before it was written.

    Raises BadStructureError if it has another mark, or was written only in part.
    """
    place, count = struct.unpack_from("<HH", data, 4)
    sequence = data[place : place + 2 * count]
    if data[:4] != mark or place < 8 or len(sequence) != 2 * (len(data) // _BLOCK + 1):
        raise BadStructureError("a record of the NTFS is damaged")
    fixed = bytearray(data)
    for index in range(1, count):
        end = index * _BLOCK
        if fixed[end - 2 : end] != sequence[:2]:
            raise BadStructureError("a record of the NTFS was written only in part")
        fixed[end - 2 : end] = sequence[2 * index : 2 * index + 2]
    return bytes(fixed)


def _read_data(boot: _Boot, data: _Data, offset: int, size: int) -> bytes:
    """Return `size` bytes of an attribute's content from byte `offset`."""
    if offset + size > data.written:
        raise BadStructureError("a file of the NTFS ends too early")
    if not data.runs:
        return data.resident[offset : offset + size]
    found = bytearray()
    for cluster, count in data.runs:
        length = count * boot.cluster
        if offset < length and len(found) < size:
            found += _read(boot, cluster * boot.cluster + offset, min(length - offset, size - len(found)))
            offset = 0
        elif not found:
            offset -= length
    return bytes(found)


def _pieces(boot: _Boot, data: _Data, size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of an attribute's content, piece by piece."""
    if not data.runs:
        yield data.resident[:size]
        return
    for cluster, count in data.runs:
        length = min(count * boot.cluster, size)
        for place in range(0, length, PIECE):
            yield _read(boot, cluster * boot.cluster + place, min(PIECE, length - place))
        size -= length


def _read(boot: _Boot, offset: int, size: int) -> bytes:
    if not 0 <= offset <= offset + size <= boot.space:
        raise BadStructureError("the NTFS leads to a place that is not there")
    return boot.read(offset, size)
