"""The layout of a machine's storage, frozen and typed. It is stored in every snapshot.

A *space* is a range of bytes that a layer can stand on; each has an id. A *device* is a space with a path of its
own: a disk (`sda`, `m.img`), or what a container provides when it is opened: an array (`md/root`), a logical volume
(`vg0/home`), the plain side of a LUKS container (`sda:3:luks`). A partition table on a device provides ranges of it:
`sda:1`, `md/root:1`, … and `sda:boot` (the sectors between the table and the first partition, where boot loaders live).

A *layer* stands on one space or on several. It is a table, a container, or a volume: a leaf with content.

Sizes and positions are in bytes. A layout comes from a repository that somebody may have tampered with:
`record.check_layout` refuses whatever the rest of remetal would not expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TypeAlias

import msgspec

from remetal.layout.making import Making

SpaceId: TypeAlias = str

EFI_SYSTEM = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
PREP_BOOT = "9E1A2D38-C612-4316-AA26-8B49521E5A8B"


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


class Device(Struct, frozen=True, kw_only=True):
    """A space with a path of its own: a disk, or what a container provides. `name` is its space's id."""

    name: SpaceId
    size: int
    logical_sector: int = 512


class Partition(Struct, frozen=True, kw_only=True):
    """One entry of a partition table; `start` and `size` are in bytes from the device's start.

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

    @property
    def end(self) -> int:
        """The first byte behind the partition."""
        return self.start + self.size


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


class ArrayMember(Struct, frozen=True, kw_only=True):
    """A place in an array: the space that takes it ("" where it was missing) and its slot (-1: a spare).

    Its data begin at byte `data_offset` of the space and may take up `data_size` bytes.
    """

    space: SpaceId
    slot: int = -1
    data_offset: int = 0
    data_size: int = 0
    write_mostly: bool = False
    fail_fast: bool = False


class MdArray(Struct, frozen=True, kw_only=True, tag_field="layer", tag="md"):
    """A Linux MD array (md(4)). It provides the device `device`, such as `md/root`."""

    device: SpaceId
    size: int
    members: tuple[ArrayMember, ...]
    uuid: str
    """As mdadm prints it: four groups of eight hexadecimal digits, with colons."""
    level: str
    """`raid0`, `raid1`, `raid4`, `raid5`, `raid6`, `raid10` or `linear`."""
    metadata: str
    """`0.90`, `1.0`, `1.1` or `1.2`."""
    slots: int
    """How many devices the array has when it is complete, spares aside."""
    component_size: int = 0
    """Bytes of each member that hold data; 0 where members may differ (raid0, linear)."""
    layout: str = ""
    """As mdadm(8) takes it: `left-symmetric`, `n2`, …; empty where the level has none."""
    chunk: int = 0
    bitmap: bool = False
    bitmap_chunk: int = 0
    name: str = ""
    """As stored, `host:name`; metadata 0.90 has none."""
    minor: int = -1
    """The number that metadata 0.90 prefers: /dev/md0, …; -1 for others."""

    @property
    def spaces(self) -> tuple[SpaceId, ...]:
        """The members that were there."""
        return tuple(each.space for each in self.members if each.space)


class PhysicalVolume(Struct, frozen=True, kw_only=True):
    """A physical volume of a volume group; `space` is "" where it was missing.

    `name` is the group's own for it (`pv0`); extents begin at byte `data_start` of the space. `metadata_copies` is how
    many areas for the group's description it has: 0, 1 or 2.
    """

    space: SpaceId
    name: str
    uuid: str
    data_start: int
    extents: int
    metadata_copies: int = 1


class LogicalVolume(Struct, frozen=True, kw_only=True):
    """A logical volume that the group shows. `kind` is its first segment's type: `striped`, `raid1`, `thin`, …

    `pool` is the thin pool that a thin volume draws from, `origin` the volume that a snapshot was taken of;
    `stripes` is how many extents of its physical volumes one of its own takes, in thousandths. `captured` is False
    for what provides no content of its own: thin pools, and snapshots that are not carried.
    """

    name: str
    uuid: str
    size: int
    kind: str
    pool: str = ""
    origin: str = ""
    captured: bool = True


class VolumeGroup(Struct, frozen=True, kw_only=True, tag_field="layer", tag="lvm"):
    """An LVM volume group. It provides a device `NAME/VOLUME` for every captured logical volume."""

    name: str
    uuid: str
    extent_size: int
    members: tuple[PhysicalVolume, ...]
    volumes: tuple[LogicalVolume, ...]
    metadata: str
    """The group's own description, as LVM keeps it (vgcfgbackup(8))."""

    @property
    def spaces(self) -> tuple[SpaceId, ...]:
        """The physical volumes that were there."""
        return tuple(each.space for each in self.members if each.space)

    def volume(self, name: str) -> LogicalVolume:
        """Return the logical volume of that name; KeyError if there is none."""
        for each in self.volumes:
            if each.name == name:
                return each
        raise KeyError(name)


class Luks(Struct, frozen=True, kw_only=True, tag_field="layer", tag="luks"):
    """A LUKS container that was opened when it was captured. It provides the device `SPACE:luks`.

    Its header, key slots and all, is captured as the volume `SPACE:header`; where the volume key was put into escrow,
    as `SPACE:key`. Content is captured as it stands inside, and encrypted again when it is written.
    """

    on: SpaceId
    version: int
    uuid: str
    header_size: int
    size: int
    """Bytes of the plain side."""
    fixed: bool = False
    """Whether the header itself limits the size: else the plain side reaches to the end of the space."""
    sector_size: int = 512
    key_size: int
    cipher: str
    label: str = ""
    key_slots: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    escrowed: bool = False

    @property
    def spaces(self) -> tuple[SpaceId, ...]:
        """The one space that it stands on."""
        return (self.on,)

    @property
    def device(self) -> SpaceId:
        """The plain side."""
        return f"{self.on}:luks"

    @property
    def header(self) -> SpaceId:
        """The area of the header and its key slots."""
        return f"{self.on}:header"

    @property
    def key(self) -> SpaceId:
        """The volume that holds the volume key, where it is in escrow."""
        return f"{self.on}:key"


class Part(Struct, frozen=True, kw_only=True):
    """One device of a file system that may span several: the space, its id there, and how many bytes of it count.

    `allocated` of them are set aside for content, be they in use or not; 0 if that is not known.
    """

    space: SpaceId
    number: int
    size: int
    allocated: int = 0


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
    parts: tuple[Part, ...] = ()
    """All devices of one that spans several, the one named by `on` first; each has an image of its own."""
    sector: int = 0
    """The least that it reads and writes at once, where that is not a block."""
    making: Making | None = None
    """What it takes to make the like of it; None where remetal cannot, or an earlier one did not ask."""

    @property
    def spaces(self) -> tuple[SpaceId, ...]:
        """The spaces that it stands on."""
        return tuple(each.space for each in self.parts) or (self.on,)

    @property
    def needed_sector(self) -> int:
        """The largest sector of a disk that it can lie on."""
        return self.sector or self.block_size


class Swap(Struct, frozen=True, kw_only=True, tag_field="layer", tag="swap"):
    """Swap space: made anew with the same identity, never copied."""

    on: SpaceId
    size: int
    page_size: int = 4096
    uuid: str = ""
    label: str = ""


class Raw(Struct, frozen=True, kw_only=True, tag_field="layer", tag="raw"):
    """Content that remetal does not know, or need not know: copied whole. `type` and `uuid` are what blkid calls it.

    `sector` is the largest sector of a disk that its own system opens it on, in bytes; 0 if that is not known.
    """

    on: SpaceId
    size: int
    type: str = ""
    uuid: str = ""
    sector: int = 0


Table: TypeAlias = GptTable | MbrTable
Container: TypeAlias = MdArray | VolumeGroup | Luks
Volume: TypeAlias = FileSystem | Swap | Raw
Layer: TypeAlias = GptTable | MbrTable | MdArray | VolumeGroup | Luks | FileSystem | Swap | Raw


class Captured(Struct, frozen=True, kw_only=True):
    """Something that has an image of its own: the image's name, which is a space, and at least how long it is.

    `type` is blkid's name of a file system whose used blocks are captured; empty for all bytes.
    """

    volume: SpaceId
    size: int
    type: str = ""


class Nic(Struct, frozen=True, kw_only=True):
    """A network interface that is hardware: kernel name, MAC address of the moment, driver, and its place on the bus.

    `path` is its place as udev knows it (ID_PATH, `pci-0000:00:03.0`), `properties` what udev tells of its names, as
    `ID_NET_NAME_PATH=enp0s3`. All but name and address are empty where nobody could tell.
    """

    name: str
    mac: str
    driver: str = ""
    place: str = ""
    permanent: str = ""
    """The address that the card itself has, which a bond or a person may have covered with another one."""
    assigned: int = -1
    """How it came by its address: 0 by its hardware, 1 at random, 2 from another, 3 set by somebody; -1: not known."""
    kind: str = ""
    """`wlan`, `wwan`, `infiniband`; empty for Ethernet, and where nobody could tell."""
    path: str = ""
    properties: tuple[str, ...] = ()
    up: bool = False
    """Whether the system had switched it on."""
    carrier: bool = False
    """Whether it has a link. One that is not switched on does not know."""
    virtual: bool = False
    """Whether it is a virtual function of another card (SR-IOV)."""

    @property
    def address(self) -> str:
        """The address that the card is known by: its own one where that is known, else the one of the moment."""
        return self.permanent or self.mac


class Link(Struct, frozen=True, kw_only=True):
    """A device that a driver was bound to: how it calls itself towards modprobe(8), the driver, and the module of that.

    `module` is empty if the driver was built into the kernel that ran.
    """

    modalias: str
    driver: str
    module: str = ""


class Route(Struct, frozen=True, kw_only=True):
    """How a kernel reaches a device: those on the way that drivers were bound to, the bus first.

    `kind` is `disk`, `keyboard` or `network`; `name` is what a layout or an inventory calls it. A disk that is
    reached in several ways has several.
    """

    kind: str
    name: str
    links: tuple[Link, ...]


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
    routes: tuple[Route, ...] = ()


class Layout(Struct, frozen=True, kw_only=True, dict=True):
    """Disks and the layers on them, parents before children. `inventory` is None for disk files."""

    disks: tuple[Disk, ...]
    layers: tuple[Layer, ...]
    inventory: Inventory | None = None
    version: int = 1

    @cached_property
    def devices(self) -> Mapping[SpaceId, Device]:
        """All disks and all devices that containers provide, by name."""
        found: dict[SpaceId, Device] = {
            disk.name: Device(name=disk.name, size=disk.size, logical_sector=disk.logical_sector) for disk in self.disks
        }
        for layer in self.layers:
            if isinstance(layer, (MdArray, VolumeGroup, Luks)):
                for device in provided(layer, found):
                    found[device.name] = device
        return found

    @cached_property
    def _by_space(self) -> Mapping[SpaceId, Layer]:
        return {space: layer for layer in reversed(self.layers) for space in spaces_of(layer)}

    @cached_property
    def _partitions(self) -> Mapping[SpaceId, tuple[SpaceId, int, int]]:
        return {
            f"{layer.on}:{each.number}": (layer.on, each.start, each.size)
            for layer in self.layers
            if isinstance(layer, (GptTable, MbrTable))
            for each in layer.partitions
        }

    def disk(self, name: str) -> Disk:
        """Return the disk of that name; KeyError if there is none."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        raise KeyError(name)

    def layer_on(self, space: SpaceId) -> Layer | None:
        """Return the layer that stands on a space, or None for an empty one."""
        return self._by_space.get(space)

    def volumes(self) -> Iterator[Volume]:
        """Yield the leaves, in the order in which they lie."""
        for layer in self.layers:
            if isinstance(layer, (FileSystem, Swap, Raw)):
                yield layer

    def captured(self) -> Iterator[Captured]:
        """Yield everything that has an image, parents first: volumes except swap, and headers of LUKS containers."""
        for layer in self.layers:
            match layer:
                case Raw():
                    yield Captured(volume=layer.on, size=layer.size)
                case FileSystem(parts=()):
                    yield Captured(volume=layer.on, size=layer.size, type=layer.type)
                case FileSystem():
                    for part in layer.parts:
                        yield Captured(volume=part.space, size=part.size, type=layer.type)
                case Luks():
                    yield Captured(volume=layer.header, size=layer.header_size)
                    if layer.escrowed:
                        yield Captured(volume=layer.key, size=layer.key_size)
                case _:
                    pass

    def place(self, space: SpaceId) -> tuple[Device, int, int]:
        """Return the device, first byte and size in bytes of a space; KeyError if there is no such space."""
        device = self.devices.get(space)
        if device is not None:
            return device, 0, device.size
        if space in self._partitions:
            name, start, size = self._partitions[space]
            return self.devices[name], start, size
        below, _, part = space.rpartition(":")
        layer = self.layer_on(below) if below else None
        if part == "boot" and isinstance(layer, (GptTable, MbrTable)):
            device = self.devices[below]
            start, end = boot_area(layer, device.logical_sector)
            return device, start, end - start
        if part == "header" and isinstance(layer, Luks):
            device, start, _ = self.place(below)
            return device, start, layer.header_size
        raise KeyError(space)

    def disks_under(self, space: SpaceId) -> frozenset[str]:
        """Return the names of the disks that a space's bytes lie on; KeyError if there is no such space."""
        name = self.place(space)[0].name
        below = self._providers.get(name)
        if below is None:
            return frozenset((name,))
        return frozenset(disk for each in spaces_of(below) for disk in self.disks_under(each))

    def provider_of(self, device: SpaceId) -> Container | None:
        """Return the container that provides a device; None for a disk."""
        return self._providers.get(device)

    @cached_property
    def _providers(self) -> Mapping[SpaceId, Container]:
        return {
            name: layer
            for layer in self.layers
            if isinstance(layer, (MdArray, VolumeGroup, Luks))
            for name in device_names(layer)
        }


def spaces_of(layer: Layer) -> tuple[SpaceId, ...]:
    """Return the spaces that a layer stands on."""
    match layer:
        case GptTable() | MbrTable() | Swap() | Raw():
            return (layer.on,)
        case _:
            return layer.spaces


def device_names(container: Container) -> tuple[SpaceId, ...]:
    """Return the names of the devices that a container provides."""
    match container:
        case VolumeGroup():
            return tuple(f"{container.name}/{each.name}" for each in container.volumes if each.captured)
        case MdArray() | Luks():
            return (container.device,)


def provided(container: Container, devices: Mapping[SpaceId, Device]) -> Iterator[Device]:
    """Yield the devices that a container provides; `devices` are those below it, as far as they are known."""
    bases = [each for space in spaces_of(container) if (each := _device_under(space, devices)) is not None]
    sector = max((each.logical_sector for each in bases), default=512)
    match container:
        case MdArray():
            yield Device(name=container.device, size=container.size, logical_sector=sector)
        case Luks():
            yield Device(name=container.device, size=container.size, logical_sector=max(sector, container.sector_size))
        case VolumeGroup():
            for volume in container.volumes:
                if volume.captured:
                    yield Device(name=f"{container.name}/{volume.name}", size=volume.size, logical_sector=sector)


def _device_under(space: SpaceId, devices: Mapping[SpaceId, Device]) -> Device | None:
    return devices.get(space) or devices.get(space.rpartition(":")[0])


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


def is_extended(table: Table, partition: Partition) -> bool:
    """Whether a partition only holds others: the extended partition of a DOS table. It carries no layer."""
    return isinstance(table, MbrTable) and partition.number <= 4 and partition.type in {"05", "0f", "85"}


def table_end(table: Table, device: Disk | Device) -> int:
    """Return the first byte behind the space that a table can give to partitions of this device."""
    sector = device.logical_sector
    if isinstance(table, GptTable):
        backup = sector + -(-table.entry_count * 128 // sector) * sector
        return device.size - device.size % sector - backup
    return min(device.size, (1 << 32) * sector)
