"""Reading the layout of disks and disk files, without the kernel's help for partitions: they are spans.

What stands on a disk is read from its own structures, which works for disk files on any kernel. Looking *inside* an
array, a volume group or an encrypted container needs the kernel: `opened_layout` opens them for the length of a block,
`probe_layout` does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec.structs

from remetal.errors import RefusedError
from remetal.events import Note, Report, Warn, silent
from remetal.layout.identity import find_kernel_name, find_own_name, probe_disk
from remetal.layout.keys import Key
from remetal.layout.layers import GROUPS, TABLES, VOLUMES, foreign, probe_volume, raw
from remetal.layout.layers.contract import CannotOpenError, Content, Found
from remetal.layout.model import (
    BIOS_BOOT,
    Container,
    Device,
    Disk,
    FileSystem,
    Layer,
    Layout,
    MdArray,
    Partition,
    Raw,
    SpaceId,
    Table,
    Volume,
    boot_area,
    device_names,
    is_extended,
)
from remetal.layout.opened import open_container
from remetal.layout.record import ImpossibleLayoutError, check_layout, check_table
from remetal.layout.signatures import Signature, probe_signature
from remetal.layout.uses import is_same_disk
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import DiskIO, Span, flush_cache, is_block_device, open_disk

_FOREIGN_ARRAY = re.compile(r"(?!linux_).*_raid_member")


@dataclass(frozen=True, slots=True)
class Probed:
    """A layout and the paths of its disks and open devices, by name.

    `problems` are sentences, each with a hint, about containers that lack members: they are described as raw bytes.
    """

    layout: Layout
    devices: Mapping[SpaceId, Path]
    problems: tuple[tuple[str, str], ...] = ()


def probe_layout(paths: Sequence[Path], *, names: Mapping[Path, str] | None = None, report: Report = silent) -> Layout:
    """Describe the disks at `paths`, in their order, and all layers on them that can be told without opening any.

    Disks are named after the kernel's or the file's name, or as `names` says. Members of containers, and what remetal
    does not know, are described as raw bytes, which are carried whole, and reported. Raises RefusedError if a disk
    cannot be opened or is empty.
    """
    with ExitStack() as stack:
        return _Walk(stack, report).probe(name_disks(paths, names or {}), opening=None).layout


@contextmanager
def opened_layout(
    paths: Sequence[Path],
    *,
    keys: Sequence[Key] = (),
    names: Mapping[Path, str] | None = None,
    report: Report = silent,
) -> Iterator[Probed]:
    """Describe disks and everything on them, inside containers too, which stay open for the length of the block.

    `keys` open encrypted containers. What cannot be opened is described as raw bytes and reported. Nothing on a disk
    is changed. Raises RefusedError if a disk cannot be opened or is empty.
    """
    with ExitStack() as stack:
        yield _Walk(stack, report).probe(name_disks(paths, names or {}), opening=keys)


def name_disks(paths: Sequence[Path], names: Mapping[Path, str]) -> dict[Path, str]:
    """Return a valid and unique name for every disk: kernel names, file names, or what `names` prescribes.

    Raises RefusedError if a disk is named twice.
    """
    for first, second in combinations(paths, 2):
        if is_same_disk(first, second):
            raise RefusedError(
                f"a disk is named twice: {first} and {second} are the same", hint="Name every disk once."
            )
    found: dict[Path, str] = {}
    for path in paths:
        known = find_own_name(find_kernel_name(path)) if is_block_device(path) else path.name
        plain = re.sub(r"[^A-Za-z0-9_.+@-]", "_", names.get(path, known))[:200].lstrip(".+@-") or "disk"
        name, count = plain, 1
        while name in found.values():
            count += 1
            name = f"{plain}-{count}"
        found[path] = name
    return found


class _Walk:
    """Goes from the disks upwards, opening one container after the other until nothing new appears."""

    def __init__(self, stack: ExitStack, report: Report) -> None:
        self.stack = stack
        self.report = report
        self.disks: list[Disk] = []
        self.layers: list[Layer] = []
        self.devices: dict[SpaceId, Path] = {}
        self.members: list[Content] = []
        self.problems: list[tuple[str, str]] = []

    def probe(self, disks: Mapping[Path, str], *, opening: Sequence[Key] | None) -> Probed:
        """Describe the disks; containers are opened with the keys in `opening`, or not at all if that is None."""
        for path, name in disks.items():
            disk = probe_disk(path, name)
            if disk.size == 0:
                raise RefusedError(f"{path} is empty: it has no sectors", hint="Name a whole disk or a disk file.")
            self._look_at(disk, path)
        if opening is not None:
            while self._open_next(opening):
                pass
        for member in self.members:
            self.layers.append(_probe_raw(member, self.report))
        check_layout(self._layout())
        return Probed(self._layout(), self.devices, tuple(self.problems))

    def _layout(self) -> Layout:
        return Layout(disks=tuple(self.disks), layers=tuple(self.layers))

    def _look_at(self, device: Disk | Device, path: Path) -> None:
        """Describe what is on a disk or an opened device."""
        flush_cache(path)
        io = self.stack.enter_context(open_disk(path))
        fitted, found = _probe_device(io, device, self.report)
        if isinstance(fitted, Disk):
            self.disks.append(fitted)
        self.devices[device.name] = path
        for each in found:
            if isinstance(each, Content):
                self.members.append(each)
            else:
                self.layers.append(each)

    def _open_next(self, keys: Sequence[Key]) -> bool:
        """Take one layer that the members form: a complete one, or else one that works without what is missing.

        Returns False if there is none.
        """
        found = [each for kind in GROUPS for each in kind.probe_groups(self._members_of(kind.TYPES))]
        chosen = next((each for each in found if each.layer is not None and each.complete), None)
        chosen = chosen or next((each for each in found if each.layer is not None), None)
        if chosen is not None:
            self._take(chosen, keys)
            return True
        for each in found:
            if each.lacks_members:
                self.problems.append((each.problem, each.hint))
            if each.problem:
                self.report(Warn(each.problem, hint=each.hint))
        return False

    def _members_of(self, types: Sequence[str]) -> list[Content]:
        return [member for member in self.members if member.type in types]

    def _take(self, found: Found, keys: Sequence[Key]) -> None:
        """Describe what members form, and look at the devices that it provides."""
        taken = [member for member in self.members if member.space in found.spaces]
        self.members = [member for member in self.members if member not in taken]
        layer = found.layer
        assert layer is not None
        if found.problem:
            self.report(Warn(found.problem, hint=found.hint))
        if isinstance(layer, FileSystem):
            self.layers.append(layer)
            return
        layer = self._with_own_name(layer)
        try:
            check_layout(Layout(disks=tuple(self.disks), layers=(*self.layers, layer)))
            opened = self.stack.enter_context(open_container(layer, self._with(layer), self.devices, keys=keys))
        except (CannotOpenError, ImpossibleLayoutError) as error:
            self.report(Warn(f"{error.message}; it is captured whole, as it is", hint=error.hint))
            self.layers += [raw.probe_volume(member) for member in taken]
            return
        self.layers.append(layer)
        known = self._layout().devices
        for name, path in opened.items():
            self._look_at(known[name], path)

    def _with(self, layer: Container) -> Layout:
        return Layout(disks=tuple(self.disks), layers=(*self.layers, layer))

    def _with_own_name(self, layer: Container) -> Container:
        """Return an array under a name that no other has; volume groups and the rest have names of their own."""
        name, count = device_names(layer)[0] if device_names(layer) else "", 1
        while isinstance(layer, MdArray) and layer.device in self.devices:
            count += 1
            layer = msgspec.structs.replace(layer, device=f"{name}-{count}")
        return layer


def _probe_device(io: DiskIO, device: Disk | Device, report: Report) -> tuple[Disk | Device, list[Layer | Content]]:
    """Return the device, whose sector size may turn out otherwise in a disk file, and what is on it."""
    whole = Span(io.path, 0, device.size)
    signature = probe_signature(whole)
    if _FOREIGN_ARRAY.fullmatch(signature.type):
        return device, [_probe_raw(_content(io, whole, device.name, signature), report)]
    try:
        found = None if signature.is_content else _probe_table(io, device)
    except BadStructureError as error:
        report(
            Warn(
                f"{device.name} is captured whole, with its free space: {error.message}",
                hint="Repair the partition table (gdisk, sfdisk) for a smaller backup.",
            )
        )
        return device, [Raw(on=device.name, size=device.size, type=signature.table)]
    if found is not None and not found[1].partitions and _is_boot_sector(io.read(0, 512)):
        report(
            Warn(
                f"{device.name} is captured whole: its first sector is that of a file system, which is damaged",
                hint="Check it with its own tools.",
            )
        )
        return device, [Raw(on=device.name, size=device.size)]
    if found is not None:
        device, table, problems = found
        if table.partitions or not signature.type:
            for problem in problems:
                report(Warn(f"{device.name}: {problem}"))
            return device, [table, *_probe_spaces(io, device, table, report)]
    if not signature.type and not signature.ambiguous and _has_no_data(io):
        return device, []
    return device, [_probe_content(io, whole, device.name, signature, report)]


def _is_boot_sector(sector: bytes) -> bool:
    """Whether a sector without partitions begins as those of FAT, NTFS and exFAT do: a jump over their parameters."""
    return sector[0] == 0xE9 or (sector[0] == 0xEB and sector[2] == 0x90)


def _probe_table(io: DiskIO, device: Disk | Device) -> tuple[Disk | Device, Table, tuple[str, ...]] | None:
    """Return the device's table; that of a disk file is looked for with sectors of 512 and of 4096 bytes.

    Raises BadStructureError if there is one that cannot be trusted.
    """
    sectors = [device.logical_sector] if is_block_device(io.path) else [512, 4096]
    failure: BadStructureError | None = None
    for kind in TABLES:
        for sector in sectors:
            size = device.size - device.size % sector
            fitted = msgspec.structs.replace(device, logical_sector=sector, size=size)
            try:
                found = kind.probe_table(io.read, size, sector, device.name)
                if found is not None:
                    check_table(found[0], Device(name=device.name, size=size, logical_sector=sector))
                    return fitted, *found
            except BadStructureError as error:
                failure = failure or error
            except ImpossibleLayoutError as error:
                failure = failure or BadStructureError(f"its partition table is unusual: {error.message}")
        if failure is not None:
            raise failure
    return None


def _probe_spaces(io: DiskIO, disk: Disk | Device, table: Table, report: Report) -> Iterator[Volume | Content]:
    start, end = boot_area(table, disk.logical_sector)
    if any(io.read(start, end - start)):
        yield Raw(on=f"{disk.name}:boot", size=end - start)
    for partition in sorted(table.partitions, key=lambda each: each.start):
        if not is_extended(table, partition):
            yield _probe_partition(io, disk, partition, report)


def _probe_partition(io: DiskIO, disk: Disk | Device, partition: Partition, report: Report) -> Volume | Content:
    space, span = f"{disk.name}:{partition.number}", Span(io.path, partition.start, partition.size)
    if partition.type == BIOS_BOOT:
        return Raw(on=space, size=span.size)
    return _probe_content(io, span, space, probe_signature(span), report)


def _probe_content(io: DiskIO, span: Span, space: str, signature: Signature, report: Report) -> Volume | Content:
    """Describe what is on a space: a volume, or a member of a group; what is unknown or damaged as raw bytes."""
    if signature.ambiguous:
        report(Warn(f"{space} carries the marks of several contents and is captured whole"))
        return Raw(on=space, size=span.size)
    content = _content(io, span, space, signature)
    if any(signature.type in kind.TYPES for kind in GROUPS):
        return content
    if signature.type not in VOLUMES:
        return _probe_raw(content, report)
    try:
        volume = probe_volume(content)
        if volume.size > span.size:
            raise BadStructureError(f"its {signature.type} file system is larger than its space")
    except BadStructureError as error:
        report(
            Warn(
                f"{space} ({signature.type}) is captured whole, with its free space: {error.message}",
                hint="Check it with its own tools.",
            )
        )
        return raw.probe_volume(content)
    if signature.type == "swsuspend":
        report(
            Warn(
                f"{space} holds the memory of a hibernated system, which is not captured",
                hint="Start the system and shut it down for a clean backup.",
            )
        )
    return volume


def _content(io: DiskIO, span: Span, space: str, signature: Signature) -> Content:
    return Content(space, span, io.reader(span.start), signature.type, signature.label, signature.uuid)


def _probe_raw(content: Content, report: Report) -> Raw:
    what = f"{content.type or 'unknown content'}, which is captured whole{foreign.describe(content.type)}"
    report(Note(f"{content.space} holds {what}"))
    return raw.probe_volume(content)


def _has_no_data(io: DiskIO) -> bool:
    """Whether a disk file is one single hole. Of a block device nobody knows without reading all of it."""
    if is_block_device(io.path):
        return False
    with suppress(OSError):
        os.lseek(io.fd, 0, os.SEEK_DATA)
        return False
    return True
