"""The restored system's fstab: every entry that names a restored volume must find it again. Pure.

Entries by UUID, label or partition GUID hold, since those survive a restore. Kernel names (`/dev/sda2`) and names
made of the old hardware (`/dev/disk/by-id/…`, `by-path/…`) may mean another disk tomorrow: they become `UUID=`.
Everything else stays byte for byte. Source: fstab(5), getmntent(3), udev's persistent-storage rules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from remetal.layout.model import Disk, FileSystem, GptTable, Layer, Layout, MbrTable, Partition, Raw, SpaceId, Swap

_OCTAL = re.compile(rb"\\([0-7]{3})")
_HEX = re.compile(rb"\\x([0-9A-Fa-f]{2})")
_LINE = re.compile(r"([ \t]*)([^ \t\n#][^ \t\n]*)([ \t]+)([^ \t\n]+)(?:[ \t]+([^ \t\n]+))?(?:[ \t]+([^ \t\n]+))?.*")
_KERNEL_NAME = re.compile(r"/dev/((?:[shv]d|xvd)[a-z]+|(?:nvme\d+n|mmcblk|pmem)\d+(?=p\d|$))(?:p?(\d+))?")
_BY_NAME = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel|id|path)/(.+)")
_PART_SUFFIX = re.compile(r"(.+)-part(\d+)")
_OPAQUE = {"LVM2_member", "crypto_LUKS", "linux_raid_member", "btrfs", "bcache", "zfs_member", "drbd", "VDO"}
_ANY_KIND = {"auto", "none", ""}
_EXT = {"ext2", "ext3", "ext4"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount of an fstab, unescaped; `line` counts from 0."""

    line: int
    spec: str
    target: str
    kind: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FstabPlan:
    """The new text (the old one if nothing has to change), one sentence per change, notes, and a unified diff."""

    text: str
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    diff: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """A space of the layout with what stands on it."""

    space: SpaceId
    disk: Disk
    layer: Layer | None
    partition: Partition | None
    partuuid: str


def parse_fstab(text: str) -> list[Entry]:
    """Return the entries of an fstab; comments and lines with fewer than two fields are passed over."""
    entries = []
    for number, line in enumerate(text.split("\n")):
        match = _LINE.fullmatch(line)
        if match:
            _, spec, _, target, kind, options = match.groups()
            entries.append(
                Entry(number, _unescape(spec), _unescape(target), kind or "", tuple((options or "").split(",")))
            )
    return entries


def find_volume(spec: str, layout: Layout) -> SpaceId | None:
    """Return the space that a lasting name (UUID=, LABEL=, PARTUUID=, PARTLABEL= or their links) means, or None.

    Kernel names are not lasting; an ambiguous label finds its first volume, as it does when the system boots.
    """
    tag = _parse_tag(spec)
    if tag is None:
        return None
    kind, value = tag
    for place in _places(layout):
        if kind == "label" or kind == "partlabel":
            same = value == (_label(place.layer) if kind == "label" else place.partition and place.partition.name)
        else:
            same = value.lower() == (_uuid(place.layer) if kind == "uuid" else place.partuuid).lower()
        if same and value:
            return place.space
    return None


def plan_fstab(text: str, *, source: Layout, result: Layout, root: SpaceId) -> FstabPlan:
    """Check every entry against the restored layout and return the fstab that finds its volumes there.

    `root` is the space whose file system holds this fstab. Nothing is raised: what cannot be decided is a note.
    """
    entries = parse_fstab(text)
    bases = _map_disks(entries, source, root)
    lines = text.split("\n")
    changes: list[str] = []
    notes: list[str] = []
    for entry in entries:
        if not _is_device(entry.spec):
            continue
        if _parse_tag(entry.spec) is not None:
            if find_volume(entry.spec, result) is None and not _is_optional(entry):
                notes.append(_missing_note(entry, result))
            continue
        place = _find_by_hardware(entry, source, bases)
        lasting = _lasting_name(place.space, result) if place is not None else None
        if lasting is None:
            if _parse_hardware_name(entry.spec) is not None and not _is_optional(entry):
                notes.append(_unknown_note(entry))
            continue
        match = _LINE.fullmatch(lines[entry.line])
        assert match is not None
        lines[entry.line] = lines[entry.line][: match.start(2)] + lasting + lines[entry.line][match.end(2) :]
        changes.append(f"{entry.target} is mounted from {lasting} instead of {entry.spec}")
    return FstabPlan("\n".join(lines), tuple(changes), tuple(notes), _diff(text, "\n".join(lines)))


def _map_disks(entries: list[Entry], source: Layout, root: SpaceId) -> dict[str, str]:
    """Return the disk part of a hardware name, as this fstab uses it → disk of the layout, where there is evidence.

    The kernel names of the day of the capture may differ from those of the installed system, and a disk file has
    none. So the entry for `/` is asked first: it tells where its own disk is, and whether equal kernel names mean
    equal disks at all. A name that is left over may well mean a disk that was never captured.
    """
    disks = {disk.name for disk in source.disks}
    names = {name[0] for entry in entries if (name := _parse_hardware_name(entry.spec)) is not None}
    found = {name: disk for name in names if (disk := _disk_by_id(name, source)) is not None}
    evidence = next((_parse_hardware_name(entry.spec) for entry in entries if entry.target == "/"), None)
    root_disk, _, root_part = root.partition(":")
    if evidence is None or evidence[0] in {root_disk, *found} or evidence[0].startswith("path/"):
        found |= {name: name for name in names & disks}
    if evidence is not None:
        found.pop(evidence[0], None)
        if evidence[1] == root_part:
            found[evidence[0]] = root_disk
    return found


def _find_by_hardware(entry: Entry, source: Layout, bases: dict[str, str]) -> _Place | None:
    """Return where an entry by a hardware name points in the source, if its type fits too."""
    name = _parse_hardware_name(entry.spec)
    if name is None or name[0] not in bases:
        return None
    disk, part = bases[name[0]], name[1]
    space = f"{disk}:{part}" if part else disk
    place = next((each for each in _places(source) if each.space == space), None)
    return place if place is not None and _kind_fits(entry.kind, place.layer) else None


def _parse_hardware_name(spec: str) -> tuple[str, str] | None:
    """Return disk and partition number ("" for the whole disk) of a kernel name or a by-id or by-path link."""
    if match := _KERNEL_NAME.fullmatch(spec):
        return match[1], match[2] or ""
    if (match := _BY_NAME.fullmatch(spec)) and match[1] in {"id", "path"}:
        name = f"{match[1]}/{match[2]}"
        suffix = _PART_SUFFIX.fullmatch(name)
        return (suffix[1], suffix[2]) if suffix else (name, "")
    return None


def _disk_by_id(name: str, layout: Layout) -> str | None:
    """Return the disk whose serial number or WWN ends a by-id name (`id/ata-MODEL_SERIAL`, `id/wwn-0x…`)."""
    for disk in layout.disks if name.startswith("id/") else ():
        marks = [mark for mark in (disk.serial.replace(" ", "_"), disk.wwn.removeprefix("0x")) if len(mark) >= 4]
        if any(name.endswith(mark) for mark in marks):
            return disk.name
    return None


def _kind_fits(kind: str, layer: Layer | None) -> bool:
    if isinstance(layer, Swap):
        return kind in {"swap", *_ANY_KIND}
    if isinstance(layer, (FileSystem, Raw)):
        family = _EXT if layer.type in _EXT else {layer.type}
        return kind in _ANY_KIND or bool(family & set(kind.split(",")))
    return False


def _lasting_name(space: SpaceId, result: Layout) -> str | None:
    place = next((each for each in _places(result) if each.space == space), None)
    if place is None:
        return None
    if uuid := _uuid(place.layer):
        return f"UUID={uuid}"
    return f"PARTUUID={place.partuuid.lower()}" if place.partuuid else None


def _places(layout: Layout) -> Iterator[_Place]:
    """Yield every disk and partition with its layer and its PARTUUID as udev writes it."""
    for disk in layout.disks:
        table = layout.layer_on(disk.name)
        if not isinstance(table, (GptTable, MbrTable)):
            yield _Place(disk.name, disk, table, None, "")
            continue
        for each in table.partitions:
            partuuid = each.uuid if isinstance(table, GptTable) else f"{table.signature}-{each.number:02x}"
            space = f"{disk.name}:{each.number}"
            yield _Place(space, disk, layout.layer_on(space), each, partuuid)


def _uuid(layer: Layer | None) -> str:
    return layer.uuid if isinstance(layer, (FileSystem, Swap)) else ""


def _label(layer: Layer | None) -> str:
    return layer.label if isinstance(layer, (FileSystem, Swap)) else ""


def _parse_tag(spec: str) -> tuple[str, str] | None:
    """Return a lasting name's kind and value: ("uuid", …), ("label", …), ("partuuid", …), ("partlabel", …)."""
    if match := _BY_NAME.fullmatch(spec):
        if match[1] in {"id", "path"}:
            return None
        return match[1], _decode(match[2], _HEX, 16)
    name, equals, value = spec.partition("=")
    if equals and name in {"UUID", "LABEL", "PARTUUID", "PARTLABEL"}:
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        return name.lower(), value[1:-1] if quoted else value
    return None


def _is_device(spec: str) -> bool:
    return spec.startswith("/dev/") or _parse_tag(spec) is not None


def _is_optional(entry: Entry) -> bool:
    return bool({"nofail", "noauto"} & set(entry.options)) or (entry.target == "none" and entry.kind != "swap")


def _missing_note(entry: Entry, result: Layout) -> str:
    opaque = sorted({each.type for each in result.volumes() if isinstance(each, Raw) and each.type in _OPAQUE})
    if opaque:
        return (
            f"fstab: {entry.spec} ({entry.target}) is on none of the restored file systems; "
            f"it may lie inside a volume that was carried whole ({', '.join(opaque)})"
        )
    return (
        f"fstab: {entry.spec} ({entry.target}) is not among what was restored; the system waits for it when it "
        f"boots. Attach that disk, or add the option nofail to its line"
    )


def _unknown_note(entry: Entry) -> str:
    return (
        f"fstab: {entry.spec} ({entry.target}) names no disk that was restored, or one of another type; it was "
        f"left as it is. If that disk is not in this machine, add the option nofail to its line"
    )


def _diff(old: str, new: str) -> str:
    if old == new:
        return ""
    lines = difflib.unified_diff(old.split("\n"), new.split("\n"), "a/etc/fstab", "b/etc/fstab", n=1, lineterm="")
    return "\n".join(lines) + "\n"


def _unescape(field: str) -> str:
    return _decode(field, _OCTAL, 8)


def _decode(field: str, escape: re.Pattern[bytes], base: int) -> str:
    """Replace the escapes by the bytes that they stand for; several may make up one character."""
    plain = escape.sub(lambda match: bytes([int(match[1], base) & 0xFF]), field.encode("utf-8", "surrogateescape"))
    return plain.decode("utf-8", "surrogateescape")
