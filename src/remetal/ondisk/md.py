"""The superblocks of Linux MD arrays, versions 0.90, 1.0, 1.1 and 1.2, and the sizes that follow from them.

Sources: Linux include/uapi/linux/raid/md_p.h for the format; drivers/md/md.c for what the kernel finds sound, and
raid0.c, linear.c, raid10.c and raid5.c beside it for the sizes; mdadm(8) and md(4) for the names.

A superblock of version 0.90 lies in the last 64 to 128 KiB of its device and does not say where the device begins: one
in a partition that reaches to the end of a disk is also found when the whole disk is parsed. So ask partitions first.
Version 1.x names its own place, so it is found where it belongs only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import KIB, align_down

_SECTOR = 512
_BLOCK = 4096
_MAGIC = (0xA92B4EFC).to_bytes(4, "little")
_FOREIGN_MAGIC = _MAGIC[::-1]
_SECONDS = (1 << 40) - 1
_NEVER = (1 << 64) - 1
_LIMIT = 1 << 63
_RESHAPED = "it is being reshaped"

_RESERVED_0 = 64 * KIB
_MAX_DISKS_0 = 27
_WORDS_0 = struct.Struct("<1024I")
_CHECKSUM_AT_0, _MEMBER_AT_0 = 38, 992
_CLEAN_0, _BITMAP_0 = 1 << 0, 1 << 8
_FAULTY_0, _IN_SYNC_0, _WRITE_MOSTLY_0, _FAIL_FAST_0 = 1 << 0, 1 << 1 | 1 << 2, 1 << 9, 1 << 10

_SMALLEST_1 = 24 * _SECTOR
_LEAST_DATA_1 = 10
_HEADER_1 = struct.Struct("<4xII4x16s32sQiIQIIi28xQQQ8xI4x16sB7xQQQII32x")
_CHECKSUM_AT_1 = 216
_MAX_DISKS_1 = (_BLOCK - _HEADER_1.size) // 2
_ROLE_SPARE, _ROLE_FAULTY, _ROLE_JOURNAL = 0xFFFF, 0xFFFE, 0xFFFD
_WRITE_MOSTLY_1, _FAIL_FAST_1 = 1, 2
_HAS_BITMAP, _HAS_KNOWN = 0x1, 0x1FFF
_TROUBLE = (
    (0x4 | 0x20 | 0x40, _RESHAPED),
    (0x10, "a member is being replaced"),
    (0x100, "a cluster shares it"),
    (0x200, "it has a journal device"),
    (0x400 | 0x800, "it keeps a partial parity log"),
)

_BITMAP = struct.Struct("<4sI16s28xI")
_BITMAP_MAGIC = b"bitm"
_BITMAP_VERSIONS = (3, 4, 5)

LINEAR = -1
_LEVELS = {LINEAR: "linear", 0: "raid0", 1: "raid1", 4: "raid4", 5: "raid5", 6: "raid6", 10: "raid10"}
_PARITY = {4: 1, 5: 1, 6: 2}
_LAYOUTS_0 = {1: "original", 2: "alternate"}
_LAYOUTS_5 = {
    0: "left-asymmetric",
    1: "right-asymmetric",
    2: "left-symmetric",
    3: "right-symmetric",
    4: "parity-first",
    5: "parity-last",
}
_LAYOUTS_6 = {
    **_LAYOUTS_5,
    8: "ddf-zero-restart",
    9: "ddf-N-restart",
    10: "ddf-N-continue",
    16: "left-asymmetric-6",
    17: "right-asymmetric-6",
    18: "left-symmetric-6",
    19: "right-symmetric-6",
    20: "parity-first-6",
}
_OFFSET_10 = 1 << 16


@dataclass(frozen=True, slots=True)
class MdSuperblock:
    """What one member's superblock says; sizes and places in bytes.

    Both UUIDs as mdadm prints them; `device_uuid`, `name` (`host:name`) are empty and `preferred_minor` is set with
    version 0.90 only. `level` and `layout` are the stored numbers; `chunk` is 0 where the level has none.
    `slot` is the member's place in the array: None for a spare, a faulty member, and a journal. A member that failed
    does not know: its superblock stays as it was, with fewer `events` than the others'. `updated` is in seconds since
    1970. `clean`: it was stopped in order, and no resync is left to do.
    `data_offset` and `data_size` say where on this device there is room for data, `component_size` how much of it the
    array uses (0 for RAID 0 and linear, which use all). `bitmap_chunk` is 0 if there is no write-intent bitmap inside
    the device, or none that can be read. `problems` are phrases about what remetal cannot carry as an array.
    """

    version: str
    array_uuid: str
    device_uuid: str
    name: str
    preferred_minor: int | None
    level: int
    layout: int
    chunk: int
    raid_disks: int
    slot: int | None
    faulty: bool
    events: int
    updated: int
    clean: bool
    data_offset: int
    data_size: int
    component_size: int
    bitmap: bool
    bitmap_chunk: int
    write_mostly: bool
    fail_fast: bool
    problems: tuple[str, ...]


class _Found(NamedTuple):
    """A block that looks like a superblock, and when it says that the array was made."""

    version: str
    place: int
    data: bytes
    created: int


class _Header1(NamedTuple):
    """The fields of version 1 that matter here, in the order and the units of the disk: sectors."""

    major: int
    features: int
    array_uuid: bytes
    name: bytes
    created: int
    level: int
    layout: int
    component: int
    chunk: int
    raid_disks: int
    bitmap_offset: int
    data_offset: int
    data_size: int
    super_offset: int
    number: int
    device_uuid: bytes
    flags: int
    updated: int
    events: int
    resync: int
    checksum: int
    max_disks: int


def parse_md(read: Read, size: int) -> MdSuperblock:
    """Parse the superblock of an MD member in a device of `size` bytes.

    Where several are left over, the array that was made last counts, as for mdadm. Raises BadStructureError if there
    is none, or if that one is damaged, of a machine of the other byte order, or describes more than the device has.
    """
    found = list(_find(read, size))
    if not found:
        raise BadStructureError("there is no MD superblock")
    newest = max(found, key=lambda each: each.created)  # the first of equals, as for mdadm
    return _parse_0(newest, read, size) if newest.version == "0.90" else _parse_1(newest, read, size)


def array_size(members: Sequence[MdSuperblock]) -> int:
    """Return the size in bytes of the device that the kernel makes of these members.

    RAID 0 and linear need all members, the others any one; the one with most events counts.
    Raises BadStructureError where members are missing or the kind of array is unknown.
    """
    if not members:
        raise BadStructureError("there is no member to tell the size of the array")
    first = max(members, key=lambda member: member.events)
    if first.level in (LINEAR, 0):
        if sorted(member.slot for member in members if member.slot is not None) != list(range(first.raid_disks)):
            raise BadStructureError(f"the size of the {level_name(first.level)} array takes all its members to tell")
        return sum(_used_by_all(each) for each in members if each.slot is not None)
    if first.level == 1:
        return first.component_size
    if first.level in _PARITY:
        return align_down(first.component_size, first.chunk) * (first.raid_disks - _PARITY[first.level])
    if first.level == 10:
        near, far = first.layout & 0xFF, first.layout >> 8 & 0xFF
        return first.component_size // first.chunk // far * first.raid_disks // near * first.chunk
    raise BadStructureError(f"the size of an MD array of {level_name(first.level)} is unknown")


def level_name(level: int) -> str:
    """Return what mdadm(8) calls a level: `raid5`, `linear`; `level -4` for one that is none of Linux today."""
    return _LEVELS.get(level, f"level {level}")


def layout_name(level: int, layout: int) -> str:
    """Return what `mdadm --create --layout=` takes for a stored layout, empty where it takes none or has no name.

    For RAID 0 a layout is stored in any case, but means something only where members differ in size.
    """
    if level == 0:
        return _LAYOUTS_0.get(layout, "")
    if level == 5:
        return _LAYOUTS_5.get(layout, "")
    if level == 6:
        return _LAYOUTS_6.get(layout, "")
    if level == 10 and layout >> 17 == 0:
        near, far = layout & 0xFF, layout >> 8 & 0xFF
        if near > 1 and far == 1 and not layout & _OFFSET_10:
            return f"n{near}"
        if near == 1 and far > 1:
            return f"o{far}" if layout & _OFFSET_10 else f"f{far}"
    return ""


def _used_by_all(member: MdSuperblock) -> int:
    """Return what a member gives to a RAID 0 or linear array."""
    whole = align_down(member.data_size, member.chunk or _SECTOR)
    # The kernel's RAID 0 rounds with a mask too, although the chunk may be 12 KiB: then it shows less than it could.
    return whole & -_SECTOR & ~(member.chunk - _SECTOR) if member.level == 0 else whole


def _find(read: Read, size: int) -> Iterator[_Found]:
    """Yield what looks like a superblock at one of the four places, in the order in which mdadm asks."""
    if size >= _RESERVED_0:
        place = align_down(size, _RESERVED_0) - _RESERVED_0
        data = read(place, _BLOCK)
        major, created = struct.unpack_from("<4xI16xI", data)
        if data[:4] == _FOREIGN_MAGIC:
            yield _Found("0.90", place, data, -1)
        elif data[:4] == _MAGIC and major == 0:
            yield _Found("0.90", place, data, created)
    if size >= _SMALLEST_1:
        end = align_down(align_down(size, _SECTOR) - 8 * KIB, _BLOCK)
        for version, place in (("1.0", end), ("1.1", 0), ("1.2", _BLOCK)):
            data = read(place, _BLOCK)
            header = _Header1._make(_HEADER_1.unpack_from(data))
            if data[:4] == _MAGIC and header.major == 1 and header.super_offset * _SECTOR == place:
                yield _Found(version, place, data, header.created & _SECONDS)


def _parse_0(found: _Found, read: Read, size: int) -> MdSuperblock:
    """Parse version 0.90, whose numbers are in the byte order of the machine that wrote them."""
    if found.data[:4] == _FOREIGN_MAGIC:
        raise BadStructureError("the MD superblock is that of a machine of the other byte order")
    words = _WORDS_0.unpack(found.data)
    if _fold(_checksum((*words[:_CHECKSUM_AT_0], *words[_CHECKSUM_AT_0 + 1 :]))) != _fold(words[_CHECKSUM_AT_0]):
        raise _damage(found, "is damaged: its checksum is wrong")
    if words[2] not in (90, 91) or not 0 < words[10] <= _MAX_DISKS_0:
        raise _damage(found, "is damaged: it has impossible counts")
    level, state = words[7] - (words[7] >> 31 << 32), words[_MEMBER_AT_0 + 4]
    identity = struct.pack("<4I", words[5], *words[13:16])
    bitmap = bool(words[33] & _BITMAP_0)
    bitmap_chunk, trouble = _parse_bitmap(read, size, found.place + _BLOCK if bitmap else -1, identity)
    superblock = MdSuperblock(
        version=found.version,
        array_uuid=":".join(f"{word:08x}" for word in (words[5], *words[13:16])),
        device_uuid="",
        name="",
        preferred_minor=words[11],
        level=level,
        layout=words[64],
        chunk=words[65] if level != 1 else 0,
        raid_disks=words[10],
        slot=words[_MEMBER_AT_0 + 3] if state & (_FAULTY_0 | _IN_SYNC_0) == _IN_SYNC_0 else None,
        faulty=bool(state & _FAULTY_0),
        events=words[40] << 32 | words[39],
        updated=words[32],
        clean=bool(words[33] & _CLEAN_0),
        data_offset=0,
        data_size=found.place,
        component_size=words[8] * KIB if level not in (LINEAR, 0) else 0,
        bitmap=bitmap,
        bitmap_chunk=bitmap_chunk,
        write_mostly=bool(state & _WRITE_MOSTLY_0),
        fail_fast=bool(state & _FAIL_FAST_0),
        problems=(*([_RESHAPED] if words[2] == 91 else []), *trouble, *_find_oddities(level, words[64])),
    )
    _check(found, superblock, found.place)
    return superblock


def _parse_1(found: _Found, read: Read, size: int) -> MdSuperblock:
    header = _Header1._make(_HEADER_1.unpack_from(found.data))
    role = _parse_role(found, header)
    end = _check_places(found, header, size)
    bitmap = bool(header.features & _HAS_BITMAP)
    bitmap_at = found.place + header.bitmap_offset * _SECTOR if bitmap else -1
    bitmap_chunk, trouble = _parse_bitmap(read, size, bitmap_at, header.array_uuid)
    name = header.name.split(b"\0")[0].decode("utf-8", "replace")
    superblock = MdSuperblock(
        version=found.version,
        array_uuid=_format_uuid(header.array_uuid),
        device_uuid=_format_uuid(header.device_uuid),
        name=name,
        preferred_minor=None,
        level=header.level,
        layout=header.layout,
        chunk=header.chunk * _SECTOR if header.level != 1 else 0,
        raid_disks=header.raid_disks,
        slot=role if role < _ROLE_JOURNAL else None,
        faulty=role == _ROLE_FAULTY,
        events=header.events,
        updated=header.updated & _SECONDS,
        clean=header.resync == _NEVER,
        data_offset=header.data_offset * _SECTOR,
        data_size=header.data_size * _SECTOR,
        component_size=header.component * _SECTOR if header.level not in (LINEAR, 0) else 0,
        bitmap=bitmap,
        bitmap_chunk=bitmap_chunk,
        write_mostly=bool(header.flags & _WRITE_MOSTLY_1),
        fail_fast=bool(header.flags & _FAIL_FAST_1),
        problems=(*_find_trouble(header.features, name), *trouble, *_find_oddities(header.level, header.layout)),
    )
    _check(found, superblock, _LIMIT if role == _ROLE_JOURNAL else end)
    return superblock


def _parse_role(found: _Found, header: _Header1) -> int:
    """Return the member's role in the array, once it is sure that the whole superblock is as it was written."""
    if header.max_disks > _MAX_DISKS_1 or not 0 < header.raid_disks <= _MAX_DISKS_1:
        raise _damage(found, "is damaged: it has impossible counts")
    end = _HEADER_1.size + 2 * header.max_disks
    data = found.data[:_CHECKSUM_AT_1] + found.data[_CHECKSUM_AT_1 + 4 : end] + bytes(-end % 4)
    if _checksum(struct.unpack(f"<{len(data) // 4}I", data)) != header.checksum:
        raise _damage(found, "is damaged: its checksum is wrong")
    if header.number >= header.max_disks:
        return _ROLE_SPARE
    return int.from_bytes(found.data[_HEADER_1.size + 2 * header.number :][:2], "little")


def _check_places(found: _Found, header: _Header1, size: int) -> int:
    """Refuse what the kernel refuses: data beyond the end, or over the superblock. Return where data has to end."""
    start, length = header.data_offset * _SECTOR, header.data_size * _SECTOR
    if found.version == "1.0":
        # mdadm leaves the offset in the size; the kernel asks only that what the array uses ends before the superblock.
        first, end, fits = 0, found.place, length <= found.place
    else:
        first, end = found.place + _HEADER_1.size + 2 * header.max_disks, start + length
        fits = end <= size
    if not fits or not first <= start < end or header.data_size < _LEAST_DATA_1:
        raise _damage(found, "describes more than the device has")
    return end


def _check(found: _Found, superblock: MdSuperblock, end: int) -> None:
    """Refuse numbers that no array can have, for those who reckon with them later."""
    level, disks, chunk = superblock.level, superblock.raid_disks, superblock.chunk
    if superblock.slot is not None and superblock.slot >= disks:
        raise _damage(found, "is damaged: its member has no place in the array")
    if superblock.data_offset + superblock.component_size > end:
        raise _damage(found, "describes more than the device has")
    if level not in _LEVELS:
        return
    bent = chunk & (chunk - 1) if level in (*_PARITY, 10) else chunk % _SECTOR
    if bent or (level not in (LINEAR, 1) and chunk < _SECTOR):
        raise _damage(found, "is damaged: it has an impossible chunk size")
    copies = (superblock.layout & 0xFF) * (superblock.layout >> 8 & 0xFF) if level == 10 else 1
    if disks <= _PARITY.get(level, 0) or not 0 < copies <= disks:
        raise _damage(found, "is damaged: it has impossible counts")


def _parse_bitmap(read: Read, size: int, place: int, array_uuid: bytes) -> tuple[int, tuple[str, ...]]:
    """Return the chunk of the write-intent bitmap at `place`, 0 if there is none that can be read, and what is odd."""
    if not 0 <= place <= size - _BITMAP.size:
        return 0, ()
    magic, version, uuid, chunk = _BITMAP.unpack(read(place, _BITMAP.size))
    if magic != _BITMAP_MAGIC or uuid != array_uuid:
        return 0, ()
    return chunk, () if version in _BITMAP_VERSIONS else (f"its bitmap is of the unknown version {version}",)


def _find_trouble(features: int, name: str) -> list[str]:
    trouble = [phrase for bits, phrase in _TROUBLE if features & bits]
    if features & ~_HAS_KNOWN:
        trouble.append(f"its features {features & ~_HAS_KNOWN:#x} are unknown")
    if "\ufffd" in name or not name.isprintable():
        trouble.append("its name is not text")
    return trouble


def _find_oddities(level: int, layout: int) -> list[str]:
    if level not in _LEVELS:
        return [f"its {level_name(level)} is unknown"]
    if level in (5, 6, 10) and not layout_name(level, layout):
        return [f"its layout {layout:#x} is unknown"]
    return []


def _format_uuid(raw: bytes) -> str:
    return raw.hex(":", -4)


def _checksum(words: Sequence[int]) -> int:
    total = sum(words)
    return (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF


def _fold(checksum: int) -> int:
    """Fold to 16 bits, as the kernel does: some machines once stored the checksum of version 0.90 that way."""
    half = (checksum & 0xFFFF) + (checksum >> 16)
    return (half & 0xFFFF) + (half >> 16)


def _damage(found: _Found, what: str) -> BadStructureError:
    return BadStructureError(f"the MD superblock (version {found.version}) {what}")
