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
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import msgspec

from remetal.errors import DamagedError

SpaceId: TypeAlias = str

MAX_DISK = 1 << 63
MAX_PARTITIONS = 1024
EFI_SYSTEM = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
PREP_BOOT = "9E1A2D38-C612-4316-AA26-8B49521E5A8B"
SWAP_PAGES = frozenset({4096, 8192, 16384, 32768, 65536})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:@-]{0,254}")
_GUID = re.compile(r"[0-9A-F]{8}-(?:[0-9A-F]{4}-){3}[0-9A-F]{12}")
_HEX_BYTE = re.compile(r"[0-9a-f]{2}")
_SIGNATURE = re.compile(r"[0-9a-f]{8}")
_KIND = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_IDENTITY = re.compile(r"[0-9A-Za-z-]{0,64}")


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
    Numbers from 5 are logical partitions, which lie inside the extended one; `record` is the byte at which such a
    partition's own extended boot record stands.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str = ""
    name: str = ""
    attributes: int = 0
    record: int = 0


class GptTable(Struct, frozen=True, kw_only=True, tag_field="layer", tag="gpt"):
    """A GUID partition table (UEFI specification 2.10, chapter 5)."""

    on: SpaceId
    disk_guid: str
    entry_count: int
    partitions: tuple[Partition, ...]
    first_usable: int = 0
    """The first byte that the table offers to partitions; 0: right behind its entries."""
    protective_mbr: bytes
    """The first 512 bytes of the disk: boot code, disk signature, and the protective (or hybrid) MBR entries."""


class MbrTable(Struct, frozen=True, kw_only=True, tag_field="layer", tag="mbr"):
    """A DOS partition table, logical partitions included."""

    on: SpaceId
    signature: str
    """The 32-bit disk signature, eight lower-case hexadecimal digits."""
    partitions: tuple[Partition, ...]
    boot_code: bytes
    """The first 440 bytes of the disk."""


class FileSystem(Struct, frozen=True, kw_only=True, tag_field="layer", tag="filesystem"):
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


class Swap(Struct, frozen=True, kw_only=True, tag_field="layer", tag="swap"):
    """Swap space: made anew with the same identity, never copied."""

    on: SpaceId
    size: int
    page_size: int = 4096
    uuid: str = ""
    label: str = ""


class Raw(Struct, frozen=True, kw_only=True, tag_field="layer", tag="raw"):
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
    if layout.version != 1:
        raise _damaged(f"is of version {layout.version}, which this remetal does not know")
    names = [disk.name for disk in layout.disks]
    if len(set(names)) != len(names):
        raise _damaged("names a disk twice")
    for disk in layout.disks:
        _check_disk(disk)
    seen: set[SpaceId] = set()
    for layer in layout.layers:
        if layer.on in seen:
            raise _damaged(f"has two layers on {layer.on!r}")
        seen.add(layer.on)
        if isinstance(layer, (GptTable, MbrTable)):
            if layer.on not in names:
                raise _damaged(f"has a partition table on {layer.on!r}, which is no disk")
            _check_table(layer, layout.disk(layer.on))
        else:
            _check_volume(layer, layout)


def is_container(table: Table, partition: Partition) -> bool:
    """Whether a partition only holds others: the extended partition of a DOS table. It carries no layer."""
    return isinstance(table, MbrTable) and partition.number <= 4 and partition.type in {"05", "0f", "85"}


def table_end(table: Table, disk: Disk) -> int:
    """Return the first byte behind the space that a table can give to partitions of this disk."""
    if isinstance(table, GptTable):
        backup = disk.logical_sector + -(-table.entry_count * 128 // disk.logical_sector) * disk.logical_sector
        return disk.size - disk.size % disk.logical_sector - backup
    return min(disk.size, (1 << 32) * disk.logical_sector)


def _damaged(what: str) -> DamagedError:
    return DamagedError(f"the layout record {what}", hint=_TAMPERED)


def _check_disk(disk: Disk) -> None:
    if not _NAME.fullmatch(disk.name) or ":" in disk.name:
        raise _damaged(f"has a disk with the impossible name {disk.name!r}")
    good_sector = disk.logical_sector in {512, 1024, 2048, 4096}
    if not good_sector or not 0 < disk.size < MAX_DISK or disk.size % disk.logical_sector:
        raise _damaged(f"gives disk '{disk.name}' the impossible size {disk.size}")


def _check_volume(volume: Volume, layout: Layout) -> None:
    try:
        disk, start, space = layout.place(volume.on)
    except KeyError as error:
        raise _damaged(f"has a layer on {volume.on!r}, which is nowhere") from error
    if not 0 < volume.size <= space:
        raise _damaged(f"has a volume of {volume.size} bytes on '{volume.on}', which has {space}")
    table = layout.layer_on(disk.name)
    containers = (
        [f"{disk.name}:{each.number}" for each in table.partitions if is_container(table, each)]
        if isinstance(table, MbrTable)
        else []
    )
    if volume.on in containers or not _is_possible(volume) or start % disk.logical_sector:
        raise _damaged(f"describes the volume on '{volume.on}' in an impossible way")


def _is_possible(volume: Volume) -> bool:
    if isinstance(volume, Raw):
        return volume.type == "" or _matches(_KIND, volume.type)
    if not _matches(_IDENTITY, volume.uuid) or "\0" in volume.label or len(volume.label) > 255:
        return False
    if isinstance(volume, Swap):
        page = volume.page_size
        return page in SWAP_PAGES and volume.size >= 10 * page and len(volume.label.encode()) <= 16
    used, block = 0 <= volume.used <= volume.size, 0 < volume.block_size <= volume.size
    return used and block and _matches(_KIND, volume.type)


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None


def _check_table(table: Table, disk: Disk) -> None:
    numbers = {partition.number for partition in table.partitions}
    if len(table.partitions) > MAX_PARTITIONS or len(numbers) != len(table.partitions):
        raise _damaged(f"gives the partitions of '{disk.name}' impossible numbers")
    if isinstance(table, GptTable):
        _check_gpt(table, disk)
    else:
        _check_mbr(table, disk)


def _check_gpt(table: GptTable, disk: Disk) -> None:
    if not 1 <= table.entry_count <= MAX_PARTITIONS or len(table.protective_mbr) != 512:
        raise _damaged(f"describes the partition table of '{disk.name}' in an impossible way")
    start, end = boot_area(table, disk.logical_sector)[0], table_end(table, disk)
    good = _matches(_GUID, table.disk_guid) and 0 <= table.first_usable <= end
    if not good or table.first_usable % disk.logical_sector or end <= start:
        raise _damaged(f"describes the partition table of '{disk.name}' in an impossible way")
    for each in table.partitions:
        good = _matches(_GUID, each.type) and _matches(_GUID, each.uuid) and "\0" not in each.name
        good = good and len(each.name.encode("utf-16-le")) <= 72 and 0 <= each.attributes < 1 << 64
        if not good or not 1 <= each.number <= table.entry_count or each.record:
            raise _damaged(f"describes partition {each.number} of '{disk.name}' in an impossible way")
    _check_apart(table.partitions, disk, max(start, table.first_usable), end)


def _check_mbr(table: MbrTable, disk: Disk) -> None:
    if not _matches(_SIGNATURE, table.signature) or len(table.boot_code) != 440:
        raise _damaged(f"describes the partition table of '{disk.name}' in an impossible way")
    for each in table.partitions:
        good = _matches(_HEX_BYTE, each.type) and each.type != "00" and 0 <= each.attributes < 256
        if not good or each.number < 1 or each.uuid or each.name or (each.record != 0) != (each.number > 4):
            raise _damaged(f"describes partition {each.number} of '{disk.name}' in an impossible way")
    primary = [each for each in table.partitions if each.number <= 4]
    logical = sorted((each for each in table.partitions if each.number > 4), key=lambda each: each.number)
    containers = [each for each in primary if is_container(table, each)]
    _check_apart(primary, disk, disk.logical_sector, table_end(table, disk))
    if len(containers) > 1 or (logical and not containers):
        raise _damaged(f"gives '{disk.name}' an impossible extended partition")
    if logical:
        if [each.number for each in logical] != list(range(5, 5 + len(logical))):
            raise _damaged(f"gives the partitions of '{disk.name}' impossible numbers")
        _check_logical(logical, disk, containers[0])


def _check_logical(logical: list[Partition], disk: Disk, container: Partition) -> None:
    places = [each.record for each in logical]
    if len(set(places)) != len(places) or container.start in places[1:]:
        raise _damaged(f"gives two logical partitions of '{disk.name}' one record")
    if any(each.record > each.start or each.type in {"05", "0f", "85"} for each in logical):
        raise _damaged(f"gives a logical partition of '{disk.name}' an impossible record")
    records = [
        Partition(number=0, start=place, size=disk.logical_sector, type="")
        for place in sorted({*places, container.start})
    ]
    _check_apart([*logical, *records], disk, container.start, container.start + container.size)


def _check_apart(partitions: Iterable[Partition], disk: Disk, start: int, end: int) -> None:
    free = start
    for each in sorted(partitions, key=lambda each: each.start):
        whole = each.start % disk.logical_sector == 0 and each.size % disk.logical_sector == 0
        if not whole or not free <= each.start < each.start + each.size <= end:
            raise _damaged(f"lets partition {each.number} of '{disk.name}' overlap another or leave its space")
        free = each.start + each.size
