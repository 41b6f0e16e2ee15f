"""LVM2 on disk: the label of a physical volume, its metadata areas, and the volume group that their text describes.

Source of the format: LVM2's lib/label/label.h, lib/format_text/layout.h and import_vsn1.c; lvmsystemid(7),
lvmthin(7), lvmraid(7). On disk sizes are in sectors of 512 bytes, whatever the disk's sectors are; here places and
sizes are in bytes, extents are counts.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from remetal.ondisk.lvm_config import MAX_TEXT, Section, find_entry, parse_config
from remetal.ondisk.regions import BadStructureError, Read

_SECTOR = 512
_LABEL_SECTORS = 4
_LABEL = struct.Struct("<8sQII8s")
_PV_HEADER = struct.Struct("<32sQ")
_AREA = struct.Struct("<QQ")
_EXTENSION = struct.Struct("<II")
_AREA_HEADER = struct.Struct("<I16sIQQQQII")
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_CRC_START = 0xF597A6CF
_IGNORED = 1
_USED = 1

_UUID = re.compile(r"[0-9A-Za-z!#]{6}(?:-[0-9A-Za-z!#]{4}){5}-[0-9A-Za-z!#]{6}")
_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,127}")
_MOST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Area:
    """A range of bytes of the physical volume."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class PvLabel:
    """What the label tells: `used` if the volume belongs to a group, even one whose metadata lies elsewhere.

    `device_size` is what the device had when the label was written; `boot_area` is room that pvcreate(8) left for
    a boot loader. `problems` are sentences about what the parser had to overlook.
    """

    uuid: str
    device_size: int
    data_start: int
    used: bool
    metadata_areas: tuple[Area, ...]
    boot_area: Area | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """`id` is its name in the text, such as `pv0`; `data_start` is where its first extent lies."""

    id: str
    uuid: str
    device_size: int
    data_start: int
    extents: int
    tags: tuple[str, ...]
    status: tuple[str, ...]
    flags: tuple[str, ...]
    boot_area: Area | None = None

    @property
    def allocatable(self) -> bool:
        """Whether new volumes may be put on it."""
        return "ALLOCATABLE" in self.status

    @property
    def missing(self) -> bool:
        """Whether LVM has noted that it was absent while the group was changed."""
        return "MISSING" in self.flags


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of extents of a logical volume, and what it is made of.

    `stripes` are names of physical or logical volumes with the first extent there; of a RAID they are the images,
    and `raid_metadata` the volumes that hold each image's superblock and bitmap. `pool` is that of a thin or cached
    volume, `metadata` and `data` are the two halves of a pool, `log` belongs to a mirror, `cow` to a snapshot.
    What a segment does not have is "" or 0. All that stands in the text is in `config`.
    """

    start_extent: int
    extents: int
    type: str
    type_flags: tuple[str, ...]
    stripes: tuple[tuple[str, int], ...]
    raid_metadata: tuple[str, ...]
    stripe_size: int
    region_size: int
    chunk_size: int
    pool: str
    metadata: str
    data: str
    log: str
    origin: str
    external_origin: str
    cow: str
    device_id: int
    transaction_id: int
    config: Section

    @property
    def volumes(self) -> tuple[str, ...]:
        """The names of all volumes that the segment needs."""
        single = (self.pool, self.metadata, self.data, self.log, self.origin, self.external_origin, self.cow)
        return (*(name for name, _ in self.stripes), *self.raid_metadata, *(name for name in single if name))


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """`visible` if lvs(8) shows it without -a. `size` is what it takes up; see `volume_size` for snapshots."""

    name: str
    uuid: str
    visible: bool
    status: tuple[str, ...]
    flags: tuple[str, ...]
    tags: tuple[str, ...]
    segments: tuple[Segment, ...]
    extents: int
    size: int

    @property
    def type(self) -> str:
        """The type of its segments, such as `striped` (linear, too), `raid1`, `thin` or `thin-pool`."""
        return self.segments[0].type


@dataclass(frozen=True, slots=True)
class VolumeGroup:
    """A volume group; `system_id` is the machine that owns it, `lock_type` that of a group shared by machines."""

    name: str
    uuid: str
    seqno: int
    extent_size: int
    status: tuple[str, ...]
    flags: tuple[str, ...]
    tags: tuple[str, ...]
    max_lv: int
    max_pv: int
    system_id: str
    lock_type: str
    pvs: tuple[PhysicalVolume, ...]
    lvs: tuple[LogicalVolume, ...]
    config: Section


@dataclass(frozen=True, slots=True)
class PhysicalRange:
    """`size` bytes from byte `offset` of the physical volume that the text calls `pv`."""

    pv: str
    offset: int
    size: int


def parse_label(read: Read, size: int) -> PvLabel:
    """Parse the label of a physical volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    label = _parse_label(read, size)
    problems = list(label.problems)
    for area in label.metadata_areas:
        try:
            _parse_area(read, area)
        except BadStructureError as error:
            problems.append(f"the metadata area at byte {area.start} is damaged: {error.message}")
    if label.device_size > size:
        problems.append(f"the physical volume was made for {label.device_size} bytes and has {size}")
    return replace(label, problems=tuple(problems))


def read_metadata(read: Read, size: int) -> str | None:
    """Return the newest committed text in the metadata areas of a physical volume of `size` bytes.

    None if it has no metadata areas, does not use them, or is in no group: see `PvLabel.used`. Raises
    BadStructureError if there is no sound label, or if areas are damaged and none holds a sound text.
    """
    texts, errors = [], []
    for area in _parse_label(read, size).metadata_areas:
        try:
            text = _parse_area(read, area)
        except BadStructureError as error:
            errors.append(error)
        else:
            texts += [] if text is None else [text]
    if errors and not texts:
        raise errors[0]
    if len(set(texts)) > 1:
        return max(texts, key=_sequence_number)
    return texts[0] if texts else None


def parse_volume_group(text: str) -> VolumeGroup:
    """Parse metadata from disk, or a file that vgcfgbackup(8) wrote.

    Every volume that is referred to is there, none contains itself, and every extent exists and is used once.
    Raises BadStructureError for anything else.
    """
    config = parse_config(text)
    if _text(config, "contents") != "Text Format Volume Group" or _count(config, "version") != 1:
        raise BadStructureError("this is not the metadata of an LVM volume group")
    groups = [(name, entry) for name, entry in config.entries if isinstance(entry, Section)]
    if len(groups) != 1:
        raise BadStructureError("the metadata describes no volume group, or several")
    (name, section), *_ = groups
    extent_size = _sectors(section, "extent_size")
    if not 0 < extent_size < 1 << 42:
        raise BadStructureError("the volume group has an impossible extent size")
    pvs = tuple(_parse_pv(pv, inner) for pv, inner in _sections(section, "physical_volumes"))
    lvs = tuple(_parse_lv(lv, inner, extent_size) for lv, inner in _sections(section, "logical_volumes"))
    group = VolumeGroup(
        name=_checked_name(name),
        uuid=_uuid(section),
        seqno=_count(section, "seqno"),
        extent_size=extent_size,
        status=_words(section, "status"),
        flags=_words(section, "flags"),
        tags=_words(section, "tags"),
        max_lv=_count(section, "max_lv", 0),
        max_pv=_count(section, "max_pv", 0),
        system_id=_text(section, "system_id"),
        lock_type=_text(section, "lock_type"),
        pvs=pvs,
        lvs=_show_snapshots(lvs),
        config=config,
    )
    _check_group(group)
    return group


def find_volume(group: VolumeGroup, name: str) -> LogicalVolume | None:
    """Return the logical volume of this name, visible or not."""
    return next((volume for volume in group.lvs if volume.name == name), None)


def visible_volumes(group: VolumeGroup) -> tuple[LogicalVolume, ...]:
    """Return the logical volumes that a user sees, pools included, as lvs(8) does."""
    return tuple(volume for volume in group.lvs if volume.visible)


def volume_size(group: VolumeGroup, name: str) -> int:
    """Return how many bytes the device of this logical volume has: of a snapshot, those of its origin.

    Raises BadStructureError if there is no such volume.
    """
    volume = _volume(group, name)
    origins = [lv.segments[0].origin for lv in group.lvs if lv.type == "snapshot" and lv.segments[0].cow == name]
    return _volume(group, origins[0]).size if origins else volume.size


def physical_ranges(group: VolumeGroup, name: str) -> tuple[PhysicalRange, ...]:
    """Return where a linear or striped logical volume lies, in the order of its extents.

    Of a striped segment it is one range for each stripe. Raises BadStructureError if there is no such volume, or
    if it is of another type or lies on other logical volumes.
    """
    pvs = {pv.id: pv for pv in group.pvs}
    ranges = []
    for segment in _volume(group, name).segments:
        if segment.type != "striped" or any(pv not in pvs for pv, _ in segment.stripes):
            raise BadStructureError(f"logical volume {group.name}/{name} does not lie on physical volumes directly")
        size = _stripe_extents(segment) * group.extent_size
        ranges += [
            PhysicalRange(pv, pvs[pv].data_start + first * group.extent_size, size) for pv, first in segment.stripes
        ]
    return tuple(ranges)


def _parse_label(read: Read, size: int) -> PvLabel:
    """Return the first sound label; `problems` do not yet tell of the metadata areas."""
    problems: list[str] = []
    for number in range(min(_LABEL_SECTORS, size // _SECTOR)):
        data = read(number * _SECTOR, _SECTOR)
        magic, place, crc, offset, kind = _LABEL.unpack_from(data)
        if magic != b"LABELONE" or kind != b"LVM2 001":
            continue
        if place == number and _crc(data[20:]) == crc and _LABEL.size <= offset <= _SECTOR - _PV_HEADER.size:
            return _parse_pv_header(data[offset:], size, problems)
        problems.append(f"the label in sector {number} is damaged")
    raise BadStructureError(problems[0] if problems else "there is no label of an LVM physical volume")


def _parse_pv_header(data: bytes, size: int, problems: list[str]) -> PvLabel:
    uuid, device_size = _PV_HEADER.unpack_from(data)
    data_areas, place = _parse_areas(data, _PV_HEADER.size)
    metadata_areas, place = _parse_areas(data, place)
    used = False
    boot_areas: list[Area] = []
    if place + _EXTENSION.size <= len(data):
        version, flags = _EXTENSION.unpack_from(data, place)
        if version >= 1:
            used = bool(flags & _USED)
            boot_areas, _ = _parse_areas(data, place + _EXTENSION.size)
    inside = tuple(area for area in metadata_areas if area.start >= _SECTOR and area.start + area.size <= size)
    if len(inside) != len(metadata_areas):
        problems = [*problems, "a metadata area lies outside of the physical volume"]
    return PvLabel(
        uuid=_format_uuid(uuid),
        device_size=device_size,
        data_start=data_areas[0].start if data_areas else 0,
        used=used,
        metadata_areas=inside,
        boot_area=boot_areas[0] if boot_areas else None,
        problems=tuple(problems),
    )


def _parse_areas(data: bytes, place: int) -> tuple[list[Area], int]:
    """Return the list of areas at `place`, which ends with an offset of zero, and where the next one begins."""
    areas: list[Area] = []
    while place + _AREA.size <= len(data):
        start, size = _AREA.unpack_from(data, place)
        place += _AREA.size
        if start == 0:
            return areas, place
        areas.append(Area(start, size))
    raise BadStructureError("the label has a list of areas without an end")


def _parse_area(read: Read, area: Area) -> str | None:
    """Return the committed text of a metadata area, which lies inside of the volume; None if it holds none."""
    if area.size < 2 * _SECTOR:
        raise BadStructureError("it is too small")
    data = read(area.start, _SECTOR)
    crc, magic, version, start, size, offset, length, text_crc, flags = _AREA_HEADER.unpack_from(data)
    if _crc(data[4:]) != crc or magic != _AREA_MAGIC or version != 1:
        raise BadStructureError("its header is damaged")
    if start != area.start or not 2 * _SECTOR <= size <= area.size:
        raise BadStructureError("its header belongs to another place")
    if offset == 0 or flags & _IGNORED:
        return None
    if not _SECTOR <= offset < size or not 0 < length <= min(size - _SECTOR, MAX_TEXT):
        raise BadStructureError("its text is in an impossible place")
    # The room behind the header is a ring.
    first = min(length, size - offset)
    text = read(start + offset, first) + read(start + _SECTOR, length - first)
    if _crc(text) != text_crc:
        raise BadStructureError("its text's checksum is wrong")
    return text.split(b"\0")[0].decode("utf-8", "replace")


def _sequence_number(text: str) -> int:
    try:
        return parse_volume_group(text).seqno
    except BadStructureError:
        return -1


def _crc(data: bytes) -> int:
    """Return LVM's checksum: CRC-32 with another start, and not inverted."""
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _format_uuid(raw: bytes) -> str:
    text = raw.decode("ascii", "replace")
    return _checked_uuid("-".join(text[start:end] for start, end in pairwise((0, 6, 10, 14, 18, 22, 26, 32))))


def _checked_uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise BadStructureError(f"'{text[:40]}' is not an identity of LVM")
    return text


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise BadStructureError(f"'{text[:40]}' cannot be the name of an LVM volume")
    return text


def _parse_pv(name: str, section: Section) -> PhysicalVolume:
    boot_size = _sectors(section, "ba_size", 0)
    return PhysicalVolume(
        id=_checked_name(name),
        uuid=_uuid(section),
        device_size=_sectors(section, "dev_size", 0),
        data_start=_sectors(section, "pe_start"),
        extents=_count(section, "pe_count"),
        tags=_words(section, "tags"),
        status=_words(section, "status"),
        flags=_words(section, "flags"),
        boot_area=Area(_sectors(section, "ba_start"), boot_size) if boot_size else None,
    )


def _parse_lv(name: str, section: Section, extent_size: int) -> LogicalVolume:
    segments = [_parse_segment(inner) for _, inner in section.entries if isinstance(inner, Section)]
    segments.sort(key=lambda segment: segment.start_extent)
    extents = 0
    for segment in segments:
        if segment.start_extent != extents or segment.extents == 0:
            raise BadStructureError(f"the segments of logical volume '{name[:40]}' have gaps or overlap")
        extents += segment.extents
    if not segments:
        raise BadStructureError(f"logical volume '{name[:40]}' has no segments")
    status = _words(section, "status")
    return LogicalVolume(
        name=_checked_name(name),
        uuid=_uuid(section),
        visible="VISIBLE" in status,
        status=status,
        flags=_words(section, "flags"),
        tags=_words(section, "tags"),
        segments=tuple(segments),
        extents=extents,
        size=extents * extent_size,
    )


def _parse_segment(section: Section) -> Segment:
    kind, *type_flags = _text(section, "type", "striped").split("+")
    raids = _words(section, "raids")
    images = raids[1::2] or _words(section, "raid0_lvs")
    if len(raids) % 2:
        raise BadStructureError("'raids' in the LVM metadata is not a list of pairs")
    stripes = tuple((image, 0) for image in images) or _pairs(section, "stripes") or _pairs(section, "mirrors")
    extents = _count(section, "extent_count")
    if kind == "striped" and (not stripes or extents % len(stripes)):
        raise BadStructureError("a segment in the LVM metadata does not go up into its stripes")
    is_cache = find_entry(section, "cache_pool") is not None
    return Segment(
        start_extent=_count(section, "start_extent"),
        extents=extents,
        type=kind,
        type_flags=tuple(type_flags),
        stripes=stripes,
        raid_metadata=raids[::2],
        stripe_size=_sectors(section, "stripe_size", 0),
        region_size=_sectors(section, "region_size", 0),
        chunk_size=_sectors(section, "chunk_size", 0),
        pool=_text(section, "cache_pool" if is_cache else "thin_pool") or _text(section, "writecache"),
        metadata=_text(section, "metadata"),
        # A thin pool calls its data "pool", a cache pool "data".
        data=_text(section, "data") or _text(section, "pool"),
        log=_text(section, "mirror_log"),
        origin=_text(section, "origin"),
        external_origin=_text(section, "external_origin"),
        cow=_text(section, "cow_store"),
        device_id=_count(section, "device_id", 0),
        transaction_id=_count(section, "transaction_id", 0),
        config=section,
    )


def _show_snapshots(volumes: tuple[LogicalVolume, ...]) -> tuple[LogicalVolume, ...]:
    """Return the volumes with visibility turned round for snapshots.

    In the text a nameless volume of type snapshot is visible and the one that holds the changes is hidden; users see
    the latter, under the snapshot's name.
    """
    shown = {volume.segments[0].cow for volume in volumes if volume.type == "snapshot"}
    return tuple(
        replace(volume, visible=volume.name in shown or (volume.visible and volume.type != "snapshot"))
        for volume in volumes
    )


def _check_group(group: VolumeGroup) -> None:
    pvs = {pv.id for pv in group.pvs}
    known = pvs | {volume.name for volume in group.lvs}
    for kind in (group.pvs, group.lvs):
        if len({volume.uuid for volume in kind}) != len(kind):
            raise BadStructureError(f"two volumes of group {group.name} have the same identity")
    needs = {volume.name: {name for each in volume.segments for name in each.volumes} for volume in group.lvs}
    for name, needed in needs.items():
        if needed - known:
            raise BadStructureError(
                f"{group.name}/{name} needs volume '{min(needed - known)[:40]}', which is not there"
            )
    try:
        TopologicalSorter({name: needed - pvs for name, needed in needs.items()}).prepare()
    except CycleError:
        raise BadStructureError(f"a logical volume of group {group.name} contains itself") from None
    _check_extents(group)


def _check_extents(group: VolumeGroup) -> None:
    """Raise BadStructureError unless every extent exists and is used once."""
    used: dict[str, list[tuple[int, int]]] = {pv.id: [] for pv in group.pvs}
    for segment in (segment for volume in group.lvs for segment in volume.segments):
        for name, first in segment.stripes:
            if name in used:
                used[name].append((first, first + _stripe_extents(segment)))
    for pv in group.pvs:
        end = 0
        for first, behind in sorted(used[pv.id]):
            if first < end:
                raise BadStructureError(f"two logical volumes of group {group.name} use extent {first} of {pv.id}")
            end = behind
        if end > pv.extents:
            raise BadStructureError(f"the logical volumes of group {group.name} reach beyond {pv.id}")


def _stripe_extents(segment: Segment) -> int:
    """Return how many extents of a segment lie on each of its stripes."""
    return segment.extents // len(segment.stripes) if segment.type == "striped" else segment.extents


def _volume(group: VolumeGroup, name: str) -> LogicalVolume:
    volume = find_volume(group, name)
    if volume is None:
        raise BadStructureError(f"volume group {group.name} has no logical volume '{name}'")
    return volume


def _sections(section: Section, name: str) -> list[tuple[str, Section]]:
    """Return the sections inside the section of this name; none if it is not there."""
    found = find_entry(section, name) or Section()
    inner = found.entries if isinstance(found, Section) else (("", found),)
    sections = [(key, entry) for key, entry in inner if isinstance(entry, Section)]
    if len(sections) != len(inner):
        raise BadStructureError(f"'{name}' of the volume group is damaged")
    return sections


def _uuid(section: Section) -> str:
    return _checked_uuid(_text(section, "id"))


def _text(section: Section, name: str, default: str = "") -> str:
    found = find_entry(section, name)
    if found is None:
        return default
    if not isinstance(found, str):
        raise BadStructureError(f"'{name}' in the LVM metadata is not a text")
    return found


def _count(section: Section, name: str, default: int | None = None, most: int = _MOST) -> int:
    found = find_entry(section, name)
    if found is None and default is not None:
        return default
    if not isinstance(found, int) or not 0 <= found <= most:
        raise BadStructureError(f"'{name}' in the LVM metadata is not a count")
    return found


def _sectors(section: Section, name: str, default: int | None = None) -> int:
    return _count(section, name, default, _MOST // _SECTOR) * _SECTOR


def _items(section: Section, name: str) -> tuple[int | float | str, ...]:
    found = find_entry(section, name)
    if isinstance(found, Section):
        raise BadStructureError(f"'{name}' in the LVM metadata is not a list")
    return () if found is None else found if isinstance(found, tuple) else (found,)


def _words(section: Section, name: str) -> tuple[str, ...]:
    items = _items(section, name)
    words = tuple(item for item in items if isinstance(item, str))
    if len(words) != len(items):
        raise BadStructureError(f"'{name}' in the LVM metadata is not a list of texts")
    return words


def _pairs(section: Section, name: str) -> tuple[tuple[str, int], ...]:
    items = _items(section, name)
    pairs = tuple(
        (volume, first)
        for volume, first in zip(items[::2], items[1::2], strict=False)
        if isinstance(volume, str) and isinstance(first, int) and 0 <= first <= _MOST
    )
    if 2 * len(pairs) != len(items):
        raise BadStructureError(f"'{name}' in the LVM metadata is not a list of volumes and extents")
    return pairs
