"""What a restore could be written to: a disk or disk file, what is on it, and why it must not be touched."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError, RemetalError
from remetal.layout.disks import describe_stand_in
from remetal.layout.identity import find_kernel_name, probe_disk
from remetal.layout.matching import IS_MEDIUM, find_marks
from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Raw,
    SpaceId,
    Swap,
    Table,
    VolumeGroup,
)
from remetal.layout.plan import Target
from remetal.layout.probe import name_disks, probe_layout
from remetal.layout.signatures import probe_signature
from remetal.layout.uses import describe_use
from remetal.system.blockdev import Span, is_block_device, is_read_only, open_disk
from remetal.units import MIB

MEDIUM_LABEL = "REMETAL"
"""The label of the recovery medium's ISO 9660 file system."""

_WORDS = {
    "BitLocker": "BitLocker volume",
    "DM_integrity": "dm-integrity device",
    "DM_verity_hash": "dm-verity hash tree",
    "LVM1_member": "LVM physical volume",
    "LVM2_member": "LVM physical volume",
    "VMFS_volume_member": "VMware datastore",
    "apfs": "Apple APFS container",
    "bcache": "bcache device",
    "cs_fvault2": "Apple FileVault volume",
    "crypto_LUKS": "LUKS container",
    "ddf_raid_member": "DDF RAID member",
    "drbd": "DRBD device",
    "hpt37x_raid_member": "HighPoint RAID member",
    "hpt45x_raid_member": "HighPoint RAID member",
    "isw_raid_member": "Intel RAID member",
    "jmicron_raid_member": "JMicron RAID member",
    "linux_raid_member": "Linux RAID member",
    "lsi_mega_raid_member": "LSI MegaRAID member",
    "nvidia_raid_member": "NVIDIA RAID member",
    "promise_fasttrack_raid_member": "Promise RAID member",
    "silicon_medley_raid_member": "Silicon Image RAID member",
    "via_raid_member": "VIA RAID member",
    "zfs_member": "ZFS pool member",
}
"""How people call what blkid(8) recognises, where its own word does not say it."""


def probe_target(path: Path, *, size_if_missing: int) -> Target:
    """Describe a disk or a disk file; one that is missing, or empty, is planned with `size_if_missing` bytes.

    Raises RefusedError if `path` can be neither: a folder, a partition, a missing device, a missing folder.
    """
    try:
        return _probe_place(path, size_if_missing)
    except OSError as error:  # no right to look, a loop of links, too long a name
        raise RefusedError(
            f"cannot look at the target {path}: {os.strerror(error.errno or 0)}",
            hint="remetal needs to run as root." if os.geteuid() else "Name a disk or a disk file.",
        ) from error


def _probe_place(path: Path, size_if_missing: int) -> Target:
    place = path.resolve()
    if not _is_text(str(place)):
        raise RefusedError(
            f"the name of the target {path} is not UTF-8, so no plan can hold it", hint="Give the file another name."
        )
    if is_block_device(place):
        return _probe_device(place)
    if place.exists() and not place.is_file():
        raise RefusedError(f"{path} is neither a block device nor a regular file", hint="List disks: `remetal probe`.")
    if place.is_relative_to("/dev"):
        raise RefusedError(f"there is no disk {path}", hint="List disks: `remetal probe`.")
    if not place.parent.is_dir():
        raise RefusedError(f"there is no folder {place.parent} for the disk file {path}", hint="Make the folder.")
    exists = place.exists()
    found = place.stat() if exists else None
    size = found.st_size if found is not None else 0
    content = _probe_content(place) if size else _Content()
    space = os.statvfs(place.parent)
    room = space.f_bavail * space.f_frsize + (found.st_blocks * 512 if found is not None else 0)
    return Target(
        path=str(place),
        name=place.name,
        size=size or size_if_missing,
        is_file=True,
        exists=exists,
        content=content.words,
        marks=content.marks,
        table=content.table,
        uses=(*map(str, describe_use(place)), *_find_bars(place)),
        room=room,
    )


def _find_bars(place: Path) -> Iterator[str]:
    """Yield why a disk file cannot be written, or made, at all: rights, a read-only file system, attributes."""
    if place.exists():
        if not os.access(place, os.R_OK | os.W_OK):
            yield "it may not be read and written (owner and mode, read-only file system, chattr +i)"
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        yield f"no file may be made in {place.parent} (owner and mode, or a read-only file system)"


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _probe_device(place: Path) -> Target:
    kernel_name = find_kernel_name(place)
    if Path("/sys/class/block", kernel_name, "partition").exists():
        raise RefusedError(f"{place} is a partition, and a restore needs a whole disk", hint="Name its disk.")
    name = name_disks([place], {})[place]
    stand_in = describe_stand_in(place)
    uses = [*([stand_in] if stand_in else []), *map(str, describe_use(place))]
    content, is_medium = _Content(), False
    try:
        disk = probe_disk(place, name)
        if is_read_only(place):
            uses.append("the kernel holds it read-only")
        if disk.size:
            content, is_medium = _probe_content(place), _is_medium(place, disk.size)
    except RemetalError as error:  # a dying disk must not keep its neighbours from being found
        disk = Disk(name=name, size=int(Path("/sys/class/block", kernel_name, "size").read_text()) * 512)
        uses.append(error.message)
    return Target(
        path=str(place),
        name=disk.name,
        size=disk.size,
        logical_sector=disk.logical_sector,
        physical_sector=disk.physical_sector,
        model=disk.model,
        serial=disk.serial,
        wwn=disk.wwn,
        bus=disk.bus,
        content=content.words,
        marks=content.marks,
        table=content.table,
        uses=tuple(uses),
        roles=(IS_MEDIUM,) if is_medium else (),
    )


@dataclass(frozen=True, slots=True)
class _Content:
    """What is on a disk: in a few words, by its marks, and its partition table; nothing if it is blank."""

    words: str = ""
    marks: tuple[str, ...] = ()
    table: Table | None = None


def _probe_content(path: Path) -> _Content:
    layout = probe_layout([path])
    name = layout.disks[0].name
    if looks_blank(layout, name, path):
        return _Content()
    marks = tuple(sorted(find_marks(layout, name)))
    return _Content(describe_content(layout, name), marks, find_table(layout, name))


def find_table(layout: Layout, name: SpaceId) -> Table | None:
    """Return the partition table of a disk, or None."""
    table = layout.layer_on(name)
    return table if isinstance(table, (GptTable, MbrTable)) else None


def describe_content(layout: Layout, name: SpaceId) -> str:
    """Return what is on a disk of a layout, in a few words; empty if nothing is. Pure."""
    table = layout.layer_on(name)
    if table is None:
        return ""
    if not isinstance(table, (GptTable, MbrTable)):
        return _name_layer(table)
    kind = "GPT" if isinstance(table, GptTable) else "DOS"
    count = len(table.partitions)
    layers = [
        layout.layer_on(f"{name}:{each.number}") for each in sorted(table.partitions, key=lambda each: each.start)
    ]
    words = Counter(_name_layer(layer) for layer in layers if layer is not None)
    inside = ", ".join(f"{count} {word}" if count > 1 else word for word, count in words.items())
    return f"{kind} table with {count} partition{'' if count == 1 else 's'}{f' ({inside})' if inside else ''}"


def _name_layer(layer: Layer) -> str:
    match layer:
        case FileSystem():
            return f"{layer.type} '{layer.label}'" if layer.label else layer.type
        case Swap():
            return "swap"
        case Raw():
            return _WORDS.get(layer.type, layer.type) or "unknown content"
        case MdArray():
            return f"member of the array {layer.device}"
        case VolumeGroup():
            return f"LVM physical volume of {layer.name}"
        case Luks():
            return "LUKS container"
        case GptTable() | MbrTable():
            return "partition table"


def looks_blank(layout: Layout, name: SpaceId, path: Path) -> bool:
    """Whether nothing is recognised on a disk, and its first and last MiB, where everything has its mark, are zero."""
    layer = layout.layer_on(name)
    return layer is None or (isinstance(layer, Raw) and not layer.type and _is_blank(path))


def _is_blank(path: Path) -> bool:
    """Whether the first and the last MiB are zero: where tables, file systems and arrays have their marks."""
    with open_disk(path) as disk:
        size = disk.size()
        edge = min(size, MIB)
        return not any(disk.read(0, edge)) and not any(disk.read(size - edge, edge))


def _is_medium(place: Path, size: int) -> bool:
    found = probe_signature(Span(place, 0, size))
    return found.type == "iso9660" and found.label.startswith(MEDIUM_LABEL)
