"""What a restore could be written to: a disk or disk file, what is on it, and why it must not be touched."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from remetal.errors import RefusedError, RemetalError
from remetal.layout.identity import probe_disk
from remetal.layout.model import Disk, FileSystem, GptTable, Layout, MbrTable, Raw, Swap
from remetal.layout.plan import Target
from remetal.layout.probe import name_disks, probe_layout
from remetal.layout.signatures import probe_signature
from remetal.layout.uses import describe_use
from remetal.system.blockdev import Span, is_block_device, is_read_only, open_disk
from remetal.units import MIB

MEDIUM_LABEL = "REMETAL"
"""The label of the recovery medium's ISO 9660 file system."""


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
    space = os.statvfs(place.parent)
    room = space.f_bavail * space.f_frsize + (found.st_blocks * 512 if found is not None else 0)
    return Target(
        path=str(place),
        name=place.name,
        size=size or size_if_missing,
        is_file=True,
        exists=exists,
        content=_describe_content(place) if size else "",
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
    if Path("/sys/class/block", place.name, "partition").exists():
        raise RefusedError(f"{place} is a partition, and a restore needs a whole disk", hint="Name its disk.")
    name = name_disks([place], {})[place]
    uses = [str(use) for use in describe_use(place)]
    content, is_medium = "", False
    try:
        disk = probe_disk(place, name)
        if is_read_only(place):
            uses.append("the kernel holds it read-only")
        if disk.size:
            content, is_medium = _describe_content(place), _is_medium(place, disk.size)
    except RemetalError as error:  # a dying disk must not keep its neighbours from being found
        disk = Disk(name=name, size=int(Path("/sys/class/block", place.name, "size").read_text()) * 512)
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
        content=content,
        uses=tuple(uses),
        roles=("is the recovery medium",) if is_medium else (),
    )


def _describe_content(path: Path) -> str:
    """Return what is on a disk, in a few words; empty if it is blank."""
    layout = probe_layout([path])
    table = layout.layer_on(layout.disks[0].name)
    if table is None:
        return ""
    if not isinstance(table, (GptTable, MbrTable)):
        return "" if isinstance(table, Raw) and not table.type and _is_blank(path) else _describe_volume(layout)
    kind = "GPT" if isinstance(table, GptTable) else "DOS"
    count = len(table.partitions)
    inside = _describe_volume(layout)
    return f"{kind} table with {count} partition{'' if count == 1 else 's'}{f' ({inside})' if inside else ''}"


def _describe_volume(layout: Layout) -> str:
    words = []
    for volume in layout.volumes():
        match volume:
            case FileSystem():
                words.append(f"{volume.type} '{volume.label}'" if volume.label else volume.type)
            case Swap():
                words.append("swap")
            case Raw() if not volume.on.endswith(":boot"):
                words.append(volume.type or "unknown content")
    return ", ".join(f"{count} {word}" if count > 1 else word for word, count in Counter(words).items())


def _is_blank(path: Path) -> bool:
    """Whether the first and the last MiB are zero: where tables, file systems and arrays have their marks."""
    with open_disk(path) as disk:
        size = disk.size()
        edge = min(size, MIB)
        return not any(disk.read(0, edge)) and not any(disk.read(size - edge, edge))


def _is_medium(place: Path, size: int) -> bool:
    found = probe_signature(Span(place, 0, size))
    return found.type == "iso9660" and found.label.startswith(MEDIUM_LABEL)
