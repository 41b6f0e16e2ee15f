"""The layout as it is stored, and what a stored one must keep to: nothing in a checked layout can leave its place.

A layout comes from a repository that somebody may have tampered with, and its names and numbers reach programs that
run as root.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from remetal.errors import RefusedError
from remetal.layout.layers import SPANNING, lvm_extents, md_sizes
from remetal.layout.making import is_possible_making
from remetal.layout.model import (
    Container,
    Device,
    Disk,
    FileSystem,
    GptTable,
    Inventory,
    Layer,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Partition,
    Raw,
    SpaceId,
    Swap,
    Table,
    Volume,
    VolumeGroup,
    boot_area,
    device_names,
    is_extended,
    provided,
    spaces_of,
    table_end,
)
from remetal.ondisk.md import layout_name

MAX_DISK = 1 << 63
MAX_DISKS = 1024
MAX_PARTITIONS = 1024
MAX_LAYERS = 65536
MAX_TEXT = 4096
"""Letters of a text about hardware."""
MAX_RECORD = 16 << 20
"""Bytes of a record: far above what any machine needs."""
MAX_HEADER = 256 << 20
"""Bytes of a LUKS header with its key slots; at restore it is read into memory."""
MAX_PATHS = 1 << 17
"""Ways from all volumes and containers down to the disks: what a walk through the layers has to go."""
MAX_DEPTH = 32
"""Containers that stand on one another."""

SWAP_PAGES = frozenset({4096, 8192, 16384, 32768, 65536})

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:@-]{0,254}")
_GUID = re.compile(r"[0-9A-F]{8}-(?:[0-9A-F]{4}-){3}[0-9A-F]{12}")
_HEX_BYTE = re.compile(r"[0-9a-f]{2}")
_SIGNATURE = re.compile(r"[0-9a-f]{8}")
_KIND = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_IDENTITY = re.compile(r"(?:[0-9A-Za-z][0-9A-Za-z-]{0,63})?")
_ARRAY = re.compile(r"md/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,60}")
_ARRAY_UUID = re.compile(r"[0-9a-f]{8}(?::[0-9a-f]{8}){3}")
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_.:+-]{0,32}")
_COPIES = re.compile(r"[nfo][0-9]{1,3}")
_LVM_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,126}")
_LVM_UUID = re.compile(r"[A-Za-z0-9!#]{6}-(?:[A-Za-z0-9!#]{4}-){5}[A-Za-z0-9!#]{6}")
_CIPHER = re.compile(r"[A-Za-z0-9_:.()-]{1,80}")
_LAYOUTS = {
    "linear": {""},
    "raid0": {"", "original", "alternate"},
    "raid1": {""},
    "raid4": {""},
    "raid5": {layout_name(5, number) for number in range(32)} - {""},
    "raid6": {layout_name(6, number) for number in range(32)} - {""},
}
"""Of RAID 10 it is the number and kind of the copies."""
_LEAST_SLOTS = {"raid4": 2, "raid5": 2, "raid6": 3}
_METADATA = {"0.90", "1.0", "1.1", "1.2"}
_KEY_SLOTS = 32
_POWERS = {1 << bit for bit in range(64)}
_FEATURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_FEATURES = 256
_HINT = "Nothing was touched. Was it changed by hand, or by an attacker? Choose another snapshot."


class ImpossibleLayoutError(RefusedError):
    """A layout that no machine can have, or that would reach beyond what it describes: nothing is done with it."""


_ENCODER = msgspec.json.Encoder(order="deterministic")
_DECODER = msgspec.json.Decoder(Layout)


def encode_layout(layout: Layout) -> bytes:
    """Return the layout as JSON, the same bytes for the same layout."""
    return _ENCODER.encode(layout)


def decode_layout(data: bytes) -> Layout:
    """Parse and check a stored layout. Raises ImpossibleLayoutError for what remetal would not have written."""
    if len(data) > MAX_RECORD:
        raise _impossible(f"has {len(data)} bytes, which is more than any machine needs")
    try:
        layout = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ImpossibleLayoutError(f"the layout record is not valid: {error}", hint=_HINT) from error
    check_layout(layout)
    return layout


def check_layout(layout: Layout) -> None:
    """Raise ImpossibleLayoutError for hostile names or numbers: nothing in a checked layout can leave its place.

    Layers come after those that they stand on, so none can stand on itself.
    """
    if layout.version != 1:
        raise _impossible(f"is of version {layout.version}, which this remetal does not know")
    if len(layout.disks) > MAX_DISKS or len(layout.layers) > MAX_LAYERS:
        raise _impossible(f"has {len(layout.disks)} disks and {len(layout.layers)} layers")
    _Checker(layout).check()
    if layout.inventory is not None:
        _check_inventory(layout.inventory)


class _Checker:
    """Walks a layout in its order and knows which devices and spaces there are so far."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.devices: dict[SpaceId, Device] = {}
        self.spaces: dict[SpaceId, tuple[Device, int, int]] = {}
        self.taken: set[SpaceId] = set()
        self.paths: dict[SpaceId, tuple[int, int]] = {}
        """How many ways lead from a device to the disks, and over how many containers the longest of them."""
        self.steps = 0

    def check(self) -> None:
        for disk in self.layout.disks:
            _check_disk(disk)
            self._add_device(Device(name=disk.name, size=disk.size, logical_sector=disk.logical_sector), 1, 0)
        groups = [layer.name for layer in self.layout.layers if isinstance(layer, VolumeGroup)]
        if len(set(groups)) != len(groups):
            raise _impossible("has two volume groups of one name")
        for layer in self.layout.layers:
            self._take_spaces(layer)
            match layer:
                case GptTable() | MbrTable():
                    self._check_table(layer)
                case MdArray() | VolumeGroup() | Luks():
                    self._check_container(layer)
                case _:
                    self._check_volume(layer)

    def _add_device(self, device: Device, paths: int, depth: int) -> None:
        if device.name in self.devices or device.name in self.spaces:
            raise _impossible(f"has two devices named {device.name!r}")
        self.devices[device.name] = device
        self.spaces[device.name] = (device, 0, device.size)
        self.paths[device.name] = (paths, depth)
        self.steps += paths
        if self.steps > MAX_PATHS or depth > MAX_DEPTH:
            raise _impossible(f"stacks more layers up to {device.name!r} than any machine")

    def _take_spaces(self, layer: Layer) -> None:
        spaces = spaces_of(layer)
        for space in spaces:
            if space in self.taken:
                raise _impossible(f"has two layers on {space!r}")
            if space not in self.spaces:
                raise _impossible(f"has a layer on {space!r}, which is nowhere")
            self.taken.add(space)
        if not spaces:
            raise _impossible("has a layer that stands on nothing")

    def _check_table(self, table: Table) -> None:
        device = self.devices.get(table.on)
        if device is None:
            raise _impossible(f"has a partition table on {table.on!r}, which is no disk")
        _check_table(table, device)
        for each in table.partitions:
            if not is_extended(table, each):
                self.spaces[f"{table.on}:{each.number}"] = (device, each.start, each.size)
        start, end = boot_area(table, device.logical_sector)
        self.spaces[f"{table.on}:boot"] = (device, start, end - start)

    def _check_container(self, layer: Container) -> None:
        place = spaces_of(layer)[0]
        problem = _find_problem(layer, {space: self.spaces[space][2] for space in spaces_of(layer)})
        if problem:
            raise _impossible(f"describes what stands on {place!r} in an impossible way: {problem}")
        names = device_names(layer)
        if len(set(names)) != len(names):
            raise _impossible(f"gives two volumes on {place!r} one name")
        below = [self.paths[self.spaces[space][0].name] for space in spaces_of(layer)]
        paths, depth = sum(each for each, _ in below), max(each for _, each in below) + 1
        for device in provided(layer, self.devices):
            if not 0 < device.size < MAX_DISK or device.size % 512:
                raise _impossible(f"gives {device.name!r} the impossible size {device.size}")
            self._add_device(device, paths, depth)

    def _check_volume(self, volume: Volume) -> None:
        if isinstance(volume, FileSystem) and volume.spaces[0] != volume.on:
            raise _impossible(f"describes the devices of the volume on {volume.on!r} in an impossible way")
        if volume.on not in spaces_of(volume):
            raise _impossible(f"says of a volume that it is on {volume.on!r}, and that it is not")
        device, start, space = self.spaces[volume.on]
        if not isinstance(volume, FileSystem) or not volume.parts:
            if not 0 < volume.size <= space:
                raise _impossible(f"has a volume of {volume.size} bytes on {volume.on!r}, which has {space}")
        elif not self._are_possible_parts(volume):
            raise _impossible(f"describes the devices of the volume on {volume.on!r} in an impossible way")
        if not _is_possible(volume) or start % device.logical_sector:
            raise _impossible(f"describes the volume on {volume.on!r} in an impossible way")

    def _are_possible_parts(self, volume: FileSystem) -> bool:
        numbers = {each.number for each in volume.parts}
        sizes = all(0 <= each.allocated <= each.size <= self.spaces[each.space][2] for each in volume.parts)
        sizes = sizes and all(each.size for each in volume.parts)
        known = volume.type in SPANNING and all(0 < number < 1 << 64 for number in numbers)
        whole = volume.parts[0].space == volume.on and volume.size == sum(each.size for each in volume.parts)
        return known and whole and sizes and len(numbers) == len(volume.parts)


def _check_inventory(inventory: Inventory) -> None:
    """Hardware reaches no program, so its texts may be any; but nobody has so much of it."""
    parts = (*inventory.disks, *inventory.nics)
    links = [link for route in inventory.routes for link in route.links]
    every = (inventory, *parts, *inventory.routes, *links)
    texts = [getattr(each, name) for each in every for name in each.__struct_fields__]
    told = [each for nic in inventory.nics for each in nic.properties]
    longest = max(len(each) for each in (*texts, *told, *inventory.modaliases) if isinstance(each, str))
    many = max(len(inventory.modaliases), len(inventory.routes), len(links), len(told))
    if len(parts) > MAX_DISKS or many > MAX_LAYERS or longest > MAX_TEXT:
        raise _impossible("describes more hardware than any machine has")


def _find_problem(layer: Container, sizes: dict[SpaceId, int]) -> str:
    """Return what cannot be as a container's record says, or nothing; `sizes` are those of its spaces."""
    match layer:
        case MdArray():
            return _find_array_problem(layer, sizes)
        case VolumeGroup():
            return _find_group_problem(layer, sizes)
        case Luks():
            return _find_luks_problem(layer, sizes[layer.on])


def _find_array_problem(array: MdArray, sizes: dict[SpaceId, int]) -> str:
    if not _has_possible_names(array):
        return "its names"
    if array.level not in _LAYOUTS and array.level != "raid10":
        return "its level"
    if not _has_possible_geometry(array):
        return "its layout or chunks"
    if not _has_possible_members(array):
        return "the places of its members"
    for each in array.members:
        data = max(each.data_size, array.component_size)
        if each.space and not 0 <= each.data_offset < each.data_offset + data <= sizes[each.space]:
            return f"its data reach beyond {each.space!r}"
        if each.space and not max(array.component_size, 1) <= each.data_size:
            return f"{each.space!r} has less room than its data take"
    return "" if array.size == md_sizes.array_size(array) else "its size is not that of its members"


def _has_possible_names(array: MdArray) -> bool:
    words = _matches(_ARRAY, array.device) and _matches(_ARRAY_UUID, array.uuid) and _matches(_ARRAY_NAME, array.name)
    if array.metadata == "0.90":
        return words and array.name == "" and 0 <= array.minor < 1 << 20
    return words and array.metadata in _METADATA and array.minor == -1


def _has_possible_members(array: MdArray) -> bool:
    """Whether every slot is there once, in order, be its member missing or not, and the array works with what is."""
    if len(array.members) > 2 * MAX_DISKS:
        return False
    slots = [each.slot for each in array.members if each.slot >= 0]
    spares = all(each.space and each.slot == -1 for each in array.members if each.slot < 0)
    there = {each.slot for each in array.members if each.slot >= 0 and each.space}
    works = md_sizes.is_startable(array.level, array.layout, array.slots, there)
    return slots == list(range(array.slots)) and spares and works


def _has_possible_geometry(array: MdArray) -> bool:
    chunk, bitmap = array.chunk, array.bitmap_chunk
    if not 0 <= chunk < 1 << 40 or chunk % 1024 or not 0 <= bitmap < 1 << 40 or not 0 < array.slots <= MAX_DISKS:
        return False
    if array.level in md_sizes.STRIPED:
        striped = chunk > 0 or array.level == "linear"
        return striped and array.layout in _LAYOUTS[array.level] and array.component_size == 0 and not array.bitmap
    marked = bitmap == 0 or (array.bitmap and bitmap in _POWERS and bitmap >= 1024)
    good = marked and array.component_size > 0 and array.component_size % 1024 == 0
    good = good and array.slots >= _LEAST_SLOTS.get(array.level, 1)
    if array.level == "raid1":
        return good and chunk == 0 and array.layout == ""
    if array.level == "raid10":
        copies = int(array.layout[1:]) if _matches(_COPIES, array.layout) else 0
        return good and chunk in _POWERS and 2 <= copies <= array.slots
    return good and chunk in _POWERS and array.layout in _LAYOUTS[array.level]


def _find_group_problem(group: VolumeGroup, sizes: dict[SpaceId, int]) -> str:
    extent, names = group.extent_size, [group.name, *(each.name for each in group.volumes)]
    if len(group.volumes) > MAX_LAYERS or len(group.members) > MAX_LAYERS:
        return "it has more volumes than any"
    if group.name == "md" or not all(_matches(_LVM_NAME, name) and name not in {".", ".."} for name in names):
        return "its names"
    if not all(_matches(_KIND, each.kind) for each in group.volumes):
        return "the kinds of its volumes"
    uuids = [group.uuid, *(each.uuid for each in group.members), *(each.uuid for each in group.volumes)]
    if not all(_matches(_LVM_UUID, each) for each in uuids) or len(set(uuids)) < len(uuids):
        return "its identities"
    if not 0 < extent < MAX_DISK or extent % 512:
        return "its extents"
    for each in group.members:
        if not each.space:
            return "it lacks a physical volume"
        if min(each.data_start, each.extents) < 0 or each.data_start + each.extents * extent > sizes[each.space]:
            return f"its extents reach beyond {each.space!r}"
        if not 0 <= each.metadata_copies <= 2:
            return f"the copies of its metadata on {each.space!r}"
    if not any(each.metadata_copies for each in group.members):
        return "it keeps no metadata"
    return lvm_extents.find_disagreement(group)


def _find_luks_problem(luks: Luks, space: int) -> str:
    if not _matches(_IDENTITY, luks.uuid) or not _matches(_CIPHER, luks.cipher) or not _is_label(luks.label):
        return "its names"
    if luks.version not in {1, 2} or luks.sector_size not in {512, 1024, 2048, 4096} or not 0 < luks.key_size <= 1024:
        return "its cipher or its key"
    if not 0 < luks.header_size <= MAX_HEADER or luks.header_size % 512 or luks.size % luks.sector_size:
        return "its header or its sectors"
    if luks.size <= 0 or luks.header_size + luks.size > space:
        return "its size"
    slots = all(0 <= each < _KEY_SLOTS for each in luks.key_slots) and len(set(luks.key_slots)) == len(luks.key_slots)
    tokens = len(luks.tokens) <= _KEY_SLOTS and all(len(each) <= 64 and each.isprintable() for each in luks.tokens)
    return "" if slots and tokens else "its key slots or tokens"


def _is_label(text: str) -> bool:
    return "\0" not in text and len(text) <= 255


def _check_disk(disk: Disk) -> None:
    if not _NAME.fullmatch(disk.name) or ":" in disk.name:
        raise _impossible(f"has a disk with the impossible name {disk.name!r}")
    good_sector = disk.logical_sector in {512, 1024, 2048, 4096}
    if not good_sector or not 0 < disk.size < MAX_DISK or disk.size % disk.logical_sector:
        raise _impossible(f"gives disk '{disk.name}' the impossible size {disk.size}")


def _is_possible(volume: Volume) -> bool:
    good_sector = isinstance(volume, Swap) or volume.sector == 0 or volume.sector in _POWERS
    if isinstance(volume, Raw):
        return good_sector and _matches(_IDENTITY, volume.uuid) and (not volume.type or _matches(_KIND, volume.type))
    if not _matches(_IDENTITY, volume.uuid) or not _is_label(volume.label):
        return False
    if isinstance(volume, Swap):
        page = volume.page_size
        return page in SWAP_PAGES and volume.size >= 10 * page and len(volume.label.encode()) <= 16
    used, block = 0 <= volume.used <= volume.size, 512 <= volume.block_size <= volume.size
    sectors = block and volume.block_size in _POWERS and good_sector
    features = len(volume.features) <= _MAX_FEATURES and all(_matches(_FEATURE, each) for each in volume.features)
    made = volume.making is None or is_possible_making(volume.making)
    return used and sectors and features and made and _matches(_KIND, volume.type)


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None


def check_table(table: Table, device: Device) -> None:
    """Raise ImpossibleLayoutError for a partition table that could not lie on this device as it says."""
    if not 0 < device.size < MAX_DISK:
        raise _impossible(f"gives '{device.name}' the impossible size {device.size}")
    _check_table(table, device)


def _check_table(table: Table, disk: Device) -> None:
    numbers = {partition.number for partition in table.partitions}
    if len(table.partitions) > MAX_PARTITIONS or len(numbers) != len(table.partitions):
        raise _impossible(f"gives the partitions of '{disk.name}' impossible numbers")
    if isinstance(table, GptTable):
        _check_gpt(table, disk)
    else:
        _check_mbr(table, disk)


def _check_gpt(table: GptTable, disk: Device) -> None:
    if not 1 <= table.entry_count <= MAX_PARTITIONS or len(table.protective_mbr) != 512:
        raise _impossible(f"describes the partition table of '{disk.name}' in an impossible way")
    start, end = boot_area(table, disk.logical_sector)[0], table_end(table, disk)
    good = _matches(_GUID, table.disk_guid) and 0 <= table.first_usable <= end
    if not good or table.first_usable % disk.logical_sector or end <= start:
        raise _impossible(f"describes the partition table of '{disk.name}' in an impossible way")
    for each in table.partitions:
        good = _matches(_GUID, each.type) and _matches(_GUID, each.uuid) and "\0" not in each.name
        good = good and len(each.name.encode("utf-16-le")) <= 72 and 0 <= each.attributes < 1 << 64
        if not good or not 1 <= each.number <= table.entry_count or each.record:
            raise _impossible(f"describes partition {each.number} of '{disk.name}' in an impossible way")
    _check_apart(table.partitions, disk, max(start, table.first_usable), end)


def _check_mbr(table: MbrTable, disk: Device) -> None:
    if not _matches(_SIGNATURE, table.signature) or len(table.boot_code) != 440:
        raise _impossible(f"describes the partition table of '{disk.name}' in an impossible way")
    for each in table.partitions:
        good = _matches(_HEX_BYTE, each.type) and each.type != "00" and 0 <= each.attributes < 256
        if not good or each.number < 1 or each.uuid or each.name or (each.record != 0) != (each.number > 4):
            raise _impossible(f"describes partition {each.number} of '{disk.name}' in an impossible way")
    primary = [each for each in table.partitions if each.number <= 4]
    logical = sorted((each for each in table.partitions if each.number > 4), key=lambda each: each.number)
    containers = [each for each in primary if is_extended(table, each)]
    _check_apart(primary, disk, disk.logical_sector, table_end(table, disk))
    if len(containers) > 1 or (logical and not containers):
        raise _impossible(f"gives '{disk.name}' an impossible extended partition")
    if logical:
        if [each.number for each in logical] != list(range(5, 5 + len(logical))):
            raise _impossible(f"gives the partitions of '{disk.name}' impossible numbers")
        _check_logical(logical, disk, containers[0])


def _check_logical(logical: list[Partition], disk: Device, container: Partition) -> None:
    places = [each.record for each in logical]
    if len(set(places)) != len(places) or container.start in places[1:]:
        raise _impossible(f"gives two logical partitions of '{disk.name}' one record")
    if any(each.record > each.start or each.type in {"05", "0f", "85"} for each in logical):
        raise _impossible(f"gives a logical partition of '{disk.name}' an impossible record")
    records = [
        Partition(number=0, start=place, size=disk.logical_sector, type="")
        for place in sorted({*places, container.start})
    ]
    _check_apart([*logical, *records], disk, container.start, container.start + container.size)


def _check_apart(partitions: Iterable[Partition], disk: Device, start: int, end: int) -> None:
    free = start
    for each in sorted(partitions, key=lambda each: each.start):
        whole = each.start % disk.logical_sector == 0 and each.size % disk.logical_sector == 0
        if not whole or not free <= each.start < each.start + each.size <= end:
            raise _impossible(f"lets partition {each.number} of '{disk.name}' overlap another or leave its space")
        free = each.start + each.size


def _impossible(what: str) -> ImpossibleLayoutError:
    return ImpossibleLayoutError(f"the layout record {what}", hint=_HINT)
