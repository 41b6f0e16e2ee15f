"""The layout of a machine's storage, frozen and typed. It is stored in every snapshot.

A *space* is a range of bytes that a layer can stand on; each has an id. A disk's space is named like the
disk (`sda`, `m.img`); a partition table provides `sda:1`, `sda:2`, … and `sda:boot` (the sectors between the
table and the first partition, where boot loaders live). A *layer* stands on one space (arrays and volume groups:
on several) and is either a table, which provides further spaces, or a volume: a leaf with content.

Sizes and positions are in bytes. A layout comes from a repository that somebody may have tampered with, so
`check_layout` refuses whatever the rest of remetal would not expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from remetal.errors import DamagedError

SpaceId: TypeAlias = str

MAX_DISK = 1 << 63
MAX_PARTITIONS = 1024
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:@-]{0,254}")


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records here: immutable, by keyword, strict about unknown fields."""


class Disk(Struct, frozen=True, kw_only=True):
    """A whole block device, or a regular file that stands for one. `name` is its space's id."""

    name: str
    size: int
    logical_sector: int = 512
    physical_sector: int = 512
    model: str = ""
    serial: str = ""
    wwn: str = ""
    bus: str = ""


class Partition(Struct, frozen=True, kw_only=True):
    """One entry of a partition table; `start` and `size` are in bytes from the disk's start.

    GPT: `type` and `uuid` are upper-case GUIDs, `attributes` the 64-bit field, `name` up to 36 UTF-16 units.
    MBR: `type` is two lower-case hexadecimal digits, `attributes` the status byte (0x80: active), the rest empty.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str = ""
    name: str = ""
    attributes: int = 0


class GptTable(Struct, frozen=True, kw_only=True, tag="gpt"):
    """A GUID partition table (UEFI specification 2.10, chapter 5)."""

    on: SpaceId
    disk_guid: str
    entry_count: int
    partitions: tuple[Partition, ...]
    protective_mbr: bytes
    """The first 512 bytes of the disk: boot code, disk signature, and the protective (or hybrid) MBR entries."""


class MbrTable(Struct, frozen=True, kw_only=True, tag="mbr"):
    """A DOS partition table, logical partitions included."""

    on: SpaceId
    signature: str
    """The 32-bit disk signature, eight lower-case hexadecimal digits."""
    partitions: tuple[Partition, ...]
    boot_code: bytes
    """The first 440 bytes of the disk."""


class FileSystem(Struct, frozen=True, kw_only=True, tag="filesystem"):
    """A file system whose used blocks are captured."""

    on: SpaceId
    type: str
    """As blkid names it: ext2, ext3, ext4, vfat, xfs, …"""
    size: int
    """What the file system itself spans, which may be less than its space."""
    used: int
    block_size: int
    uuid: str = ""
    label: str = ""
    features: tuple[str, ...] = ()


class Swap(Struct, frozen=True, kw_only=True, tag="swap"):
    """Swap space: made anew with the same identity, never copied."""

    on: SpaceId
    size: int
    page_size: int = 4096
    uuid: str = ""
    label: str = ""


class Raw(Struct, frozen=True, kw_only=True, tag="raw"):
    """Content that remetal does not know, or need not know: copied whole. `type` is blkid's name, or empty."""

    on: SpaceId
    size: int
    type: str = ""


Table: TypeAlias = GptTable | MbrTable
Volume: TypeAlias = FileSystem | Swap | Raw
Layer: TypeAlias = GptTable | MbrTable | FileSystem | Swap | Raw


class Nic(Struct, frozen=True, kw_only=True):
    """A network interface: kernel name, MAC address, driver, and its place on the bus."""

    name: str
    mac: str
    driver: str = ""
    place: str = ""


class Inventory(Struct, frozen=True, kw_only=True):
    """A machine's hardware, as far as a recovery needs it."""

    firmware: str
    """`bios` or `uefi`."""
    architecture: str
    vendor: str = ""
    product: str = ""
    serial: str = ""
    cpu: str = ""
    cores: int = 0
    memory: int = 0
    kernel: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    modaliases: tuple[str, ...] = ()


class Layout(Struct, frozen=True, kw_only=True):
    """Disks and the layers on them, parents before children. `inventory` is None for disk files."""

    disks: tuple[Disk, ...]
    layers: tuple[Layer, ...]
    inventory: Inventory | None = None
    version: int = 1

    def disk(self, name: str) -> Disk:
        """Return the disk of that name; KeyError if there is none."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        raise KeyError(name)

    def layer_on(self, space: SpaceId) -> Layer | None:
        """Return the layer that stands on a space, or None for an empty one."""
        return next((layer for layer in self.layers if layer.on == space), None)

    def volumes(self) -> Iterator[Volume]:
        """Yield the leaves, in the order in which they lie."""
        for layer in self.layers:
            if isinstance(layer, (FileSystem, Swap, Raw)):
                yield layer

    def captured(self) -> Iterator[FileSystem | Raw]:
        """Yield the volumes whose content is in images: all but swap."""
        for volume in self.volumes():
            if not isinstance(volume, Swap):
                yield volume

    def place(self, space: SpaceId) -> tuple[Disk, int, int]:
        """Return the disk, first byte and size in bytes of a space; KeyError if there is no such space."""
        name, _, part = space.rpartition(":") if ":" in space else (space, "", "")
        disk = self.disk(name)
        if not part:
            return disk, 0, disk.size
        table = self.layer_on(name)
        if not isinstance(table, (GptTable, MbrTable)):
            raise KeyError(space)
        if part == "boot":
            start, end = boot_area(table, disk.logical_sector)
            return disk, start, end - start
        for partition in table.partitions:
            if str(partition.number) == part:
                return disk, partition.start, partition.size
        raise KeyError(space)


def boot_area(table: Table, sector: int) -> tuple[int, int]:
    """Return first and last+1 byte of the gap between a table and its first partition, at most 1 MiB long.

    Empty (start == end) where a partition follows at once. Boot loaders embed themselves there on MBR disks.
    """
    if isinstance(table, GptTable):
        start = 2 * sector + -(-table.entry_count * 128 // sector) * sector
    else:
        start = sector
    first = min((partition.start for partition in table.partitions), default=start)
    return start, max(start, min(first, 1 << 20))


_ENCODER = msgspec.json.Encoder(order="deterministic")
_DECODER = msgspec.json.Decoder(Layout)


def encode_layout(layout: Layout) -> bytes:
    """Return the layout as JSON, the same bytes for the same layout."""
    return _ENCODER.encode(layout)


def decode_layout(data: bytes) -> Layout:
    """Parse and check a stored layout. Raises DamagedError for anything that remetal would not have written."""
    try:
        layout = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise DamagedError(f"the layout record is not valid: {error}", hint=_TAMPERED) from error
    check_layout(layout)
    return layout


_TAMPERED = "The repository was damaged or tampered with; try another snapshot."


def check_layout(layout: Layout) -> None:
    """Raise DamagedError for hostile names or numbers: nothing in a checked layout can leave its disk."""
    names = [disk.name for disk in layout.disks]
    if len(set(names)) != len(names):
        raise DamagedError("the layout record names a disk twice", hint=_TAMPERED)
    for disk in layout.disks:
        _check_disk(disk)
    seen: set[SpaceId] = set()
    for layer in layout.layers:
        if layer.on in seen:
            raise DamagedError(f"the layout record has two layers on '{layer.on}'", hint=_TAMPERED)
        seen.add(layer.on)
        try:
            _, _, space_size = layout.place(layer.on)
        except KeyError as error:
            raise DamagedError(
                f"the layout record has a layer on '{layer.on}', which is nowhere", hint=_TAMPERED
            ) from error
        if isinstance(layer, (GptTable, MbrTable)):
            _check_table(layer, layout.disk(layer.on))
        elif not 0 <= layer.size <= space_size:
            raise DamagedError(
                f"the layout record has a volume of {layer.size} bytes on '{layer.on}', which has {space_size}",
                hint=_TAMPERED,
            )


def _check_disk(disk: Disk) -> None:
    if not _NAME.fullmatch(disk.name) or ":" in disk.name:
        raise DamagedError(f"the layout record has a disk with the impossible name {disk.name!r}", hint=_TAMPERED)
    good_sector = disk.logical_sector in {512, 1024, 2048, 4096}
    if not good_sector or not 0 < disk.size < MAX_DISK or disk.size % disk.logical_sector:
        raise DamagedError(
            f"the layout record gives disk '{disk.name}' the impossible size {disk.size}", hint=_TAMPERED
        )


def _check_table(table: Table, disk: Disk) -> None:
    partitions = sorted(table.partitions, key=lambda partition: partition.start)
    if len(partitions) > MAX_PARTITIONS or len({each.number for each in partitions}) != len(partitions):
        raise DamagedError(f"the partition table of '{disk.name}' has impossible numbers", hint=_TAMPERED)
    end = disk.logical_sector
    for partition in partitions:
        inside = end <= partition.start and partition.size > 0 and partition.start + partition.size <= disk.size
        if not inside or partition.number < 1 or partition.start % disk.logical_sector:
            raise DamagedError(
                f"partition {partition.number} of '{disk.name}' overlaps another or leaves the disk", hint=_TAMPERED
            )
        end = partition.start + partition.size
