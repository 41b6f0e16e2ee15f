"""Random stacks of layers for property tests: tables, arrays, volume groups, LUKS and file systems in one another.

What is drawn is what the parsers could have found on real disks: arrays have the geometry that mdadm gives them, volume
groups the metadata that LVM writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec.structs
from hypothesis import strategies as st

from remetal.layout.making import BtrfsMaking, ExtMaking, FatMaking, Making, XfsMaking
from remetal.layout.model import (
    EFI_SYSTEM,
    ArrayMember,
    Device,
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    LogicalVolume,
    Luks,
    MbrTable,
    MdArray,
    Part,
    Partition,
    PhysicalVolume,
    Raw,
    Swap,
    VolumeGroup,
    boot_area,
    provided,
    table_end,
)
from remetal.ondisk.lvm_config import Entry, Section, format_config
from remetal.units import KIB, MIB, align_down

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
LINUX_RAID = "A19D880F-05FC-4D3B-A006-743F0F84911E"
GUID = "12345678-1234-4234-8234-1234567890AB"
FS_UUID = "12345678-1234-4234-8234-1234567890ab"
DEEPEST = 3

LEVELS = {"linear": 1, "raid0": 2, "raid1": 2, "raid4": 2, "raid5": 3, "raid6": 4, "raid10": 2}
"""How many devices an array of that level has at least here."""


@dataclass(frozen=True)
class Space:
    """A place where a layer can be put: its id, bytes, and how many containers are below it."""

    id: str
    size: int
    depth: int
    is_device: bool


def room_of(metadata: str, size: int, offset: int) -> int:
    """Return how many bytes of data mdadm finds room for on a member of `size` bytes."""
    match metadata:
        case "0.90":
            return align_down(size, 64 * KIB) - 64 * KIB
        case "1.0":
            return align_down(size - 8 * KIB, 4 * KIB) - 4 * KIB
        case _:
            return size - offset


def lvm_id(number: int) -> str:
    """Return an identity in LVM's way of writing it."""
    text = f"{number:032d}"
    return "-".join([text[:6], *(text[place : place + 4] for place in range(6, 26, 4)), text[26:]])


class Builder:
    """Puts layers onto spaces until none is free."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.disks: list[Disk] = []
        self.layers: list[Layer] = []
        self.devices: dict[str, Device] = {}
        self.free: list[Space] = []
        self.members: dict[str, list[Space]] = {"md": [], "lvm": [], "btrfs": []}
        self.count = 0

    def build(self) -> Layout:
        """Draw a whole layout."""
        for name in ["sda", "sdb", "sdc", "sdd"][: self.draw(st.integers(1, 4))]:
            self.add_disk(name)
        while self.free or any(self.members.values()):
            while self.free:
                self.fill(self.free.pop(0))
            self.group()
        return Layout(disks=tuple(self.disks), layers=tuple(self.layers))

    def number(self) -> int:
        """Return a number that was not there before."""
        self.count += 1
        return self.count

    def choose(self, *words: str) -> str:
        """Draw one of these words."""
        return self.draw(st.sampled_from(words))

    def add_disk(self, name: str) -> None:
        sector = self.draw(st.sampled_from([512, 512, 512, 4096]))
        size = self.draw(st.integers(20, 3000)) * MIB + self.draw(st.sampled_from([0, 0, 0, 1, 7, 100, 255])) * sector
        self.disks.append(Disk(name=name, size=size, logical_sector=sector))
        self.devices[name] = Device(name=name, size=size, logical_sector=sector)
        self.free.append(Space(name, size, 0, True))

    def fill(self, space: Space) -> None:
        words = ["volume"]
        if space.depth < DEEPEST and space.size >= 8 * MIB:
            words += ["luks", "md", "md", "md", "lvm", "lvm", "btrfs"]
            words += ["gpt", "gpt", "gpt", "gpt", "mbr"] if space.is_device else []
        if space.depth == 0 and space.is_device:
            words = [word for word in words if word != "volume"] + ["blank"]
        match self.choose(*words):
            case "gpt":
                self.add_gpt(space)
            case "mbr":
                self.add_mbr(space)
            case "luks":
                self.add_luks(space)
            case "volume":
                self.layers.append(self.volume(space))
            case "blank":
                pass
            case group:
                self.members[group].append(space)

    def cuts(self, first: int, last: int, unit: int) -> Iterator[tuple[int, int]]:
        """Draw up to five ranges between two bytes, mostly of whole MiB."""
        step = self.draw(st.sampled_from([MIB, MIB, MIB, unit]))
        lowest, highest = -(-first // step), last // step
        if lowest < highest:
            places = sorted(self.draw(st.sets(st.integers(lowest, highest), min_size=2, max_size=8)))
            for start, end in zip(places[::2], places[1::2], strict=False):
                yield start * step, end * step

    def add_gpt(self, space: Space) -> None:
        device = self.devices[space.id]
        empty = GptTable(
            on=space.id,
            disk_guid=GUID,
            entry_count=128,
            partitions=(),
            protective_mbr=bytes(510) + b"\x55\xaa",
        )
        ranges = list(self.cuts(boot_area(empty, device.logical_sector)[0], table_end(empty, device), MIB))
        kinds = st.sampled_from([LINUX, LINUX_RAID, EFI_SYSTEM])
        partitions = tuple(
            Partition(number=index + 1, start=start, size=end - start, type=self.draw(kinds), uuid=GUID)
            for index, (start, end) in enumerate(ranges)
        )
        self.layers.append(msgspec.structs.replace(empty, partitions=partitions))
        self.free += [Space(f"{space.id}:{each.number}", each.size, space.depth, False) for each in partitions]

    def add_mbr(self, space: Space) -> None:
        device = self.devices[space.id]
        unit = device.logical_sector
        ranges = list(self.cuts(MIB, align_down(device.size, unit), unit))
        partitions = [
            Partition(number=index + 1, start=start, size=end - start, type="83")
            for index, (start, end) in enumerate(ranges)
        ]
        if bool(partitions) and self.draw(st.booleans()):
            outer = partitions[-1] = msgspec.structs.replace(partitions[-1], type="05")
            partitions += self._logical(outer, unit)
        table = MbrTable(on=space.id, signature="0badcafe", partitions=tuple(partitions), boot_code=bytes(440))
        self.layers.append(table)
        start, end = boot_area(table, unit)
        if end > start and self.draw(st.booleans()):
            self.layers.append(Raw(on=f"{space.id}:boot", size=end - start))
        plain = [each for each in partitions if each.type != "05"]
        self.free += [Space(f"{space.id}:{each.number}", each.size, space.depth, False) for each in plain]

    def _logical(self, outer: Partition, unit: int) -> Iterator[Partition]:
        place, gap = outer.start, self.draw(st.sampled_from([unit, 63 * unit, MIB]))
        for number in range(5, 5 + self.draw(st.integers(0, 3))):
            size = align_down((outer.end - place) // self.draw(st.integers(1, 3)), unit) - gap
            if size < unit:
                return
            yield Partition(number=number, start=place + gap, size=size, type="83", record=place)
            place += gap + size

    def add_luks(self, space: Space) -> None:
        header = self.draw(st.sampled_from([MIB, 2 * MIB, 4 * MIB, MIB + 512]))
        sector = self.draw(st.sampled_from([512, 4096]))
        size = align_down(space.size - header, sector)
        fixed = self.draw(st.sampled_from([0, 0, 0, MIB]))
        luks = Luks(
            on=space.id,
            version=2,
            uuid=FS_UUID,
            header_size=header,
            size=size - fixed,
            fixed=bool(fixed),
            sector_size=sector,
            key_size=64,
            cipher="aes-xts-plain64",
            key_slots=(0, 1),
            escrowed=self.draw(st.booleans()),
        )
        self.open(luks, space.depth)

    def open(self, container: MdArray | VolumeGroup | Luks, depth: int) -> None:
        """Add a container; what it provides is free."""
        self.layers.append(container)
        for device in provided(container, self.devices):
            self.devices[device.name] = device
            self.free.append(Space(device.name, device.size, depth + 1, True))

    def group(self) -> None:
        """Make arrays, groups and file systems of the members that were set aside."""
        arrays, self.members["md"] = self.members["md"], []
        while arrays:
            arrays = self.add_array(arrays)
        volumes, self.members["lvm"] = self.members["lvm"], []
        while volumes:
            count = self.draw(st.integers(1, len(volumes)))
            self.add_group(volumes[:count])
            volumes = volumes[count:]
        parts, self.members["btrfs"] = self.members["btrfs"], []
        while parts:
            count = self.draw(st.integers(1, len(parts)))
            self.layers.append(self.btrfs(parts[:count]))
            parts = parts[count:]

    def btrfs(self, spaces: Sequence[Space]) -> FileSystem:
        parts = tuple(
            Part(space=space.id, number=index + 1, size=size, allocated=self.draw(st.sampled_from([size // 9, size])))
            for index, space in enumerate(spaces)
            for size in [align_down(space.size, 4096)]
        )
        chunks = ("data raid0", "metadata raid1", self.choose("system raid1", "system dup"))
        size = sum(each.size for each in parts)
        used = self.draw(st.integers(0, size))
        return FileSystem(
            on=parts[0].space,
            type="btrfs",
            size=size,
            used=used,
            block_size=4096,
            uuid=FS_UUID,
            parts=parts,
            making=self.draw(st.sampled_from([None, BtrfsMaking(chunks=chunks), BtrfsMaking(chunks=chunks)])),
        )

    def volume(self, space: Space) -> FileSystem | Swap | Raw:
        kinds = ["raw"]
        if space.size >= 64 * KIB:
            kinds += ["swap", "ext4", "ext4", "xfs", "vfat", "ntfs", "f2fs"]
        kind = self.choose(*kinds)
        if kind == "raw":
            return Raw(on=space.id, size=space.size)
        if kind == "swap":
            return Swap(on=space.id, size=align_down(space.size, 4096), uuid=FS_UUID)
        block = self.draw(st.sampled_from([512, 4096])) if kind == "vfat" else 4096
        size = align_down(space.size, block) - self.draw(st.sampled_from([0, 0, block]))
        used = self.draw(st.integers(0, size))
        return FileSystem(
            on=space.id,
            type=kind,
            size=size,
            used=used,
            block_size=block,
            uuid=FS_UUID,
            sector=512 if kind == "vfat" else 0,
            making=_making(kind, used) if self.draw(st.booleans()) else None,
        )

    def add_array(self, spaces: list[Space]) -> list[Space]:
        """Make an array of the first members and return those that are left."""
        most = max(len(spaces), 2)
        level = self.choose(*(name for name, least in LEVELS.items() if least <= most and least <= len(spaces) + 1))
        if LEVELS[level] > len(spaces) and level in {"raid0", "raid6"}:
            level = "raid1"
        metadata = self.choose("1.0", "1.1", "1.2", *(["0.90"] if level != "raid0" else []))
        slots = self.draw(st.integers(LEVELS[level], max(LEVELS[level], len(spaces))))
        taken, rest = spaces[:slots], spaces[slots:]
        chunk = 0 if level == "raid1" else self.draw(st.sampled_from([4 * KIB, 64 * KIB, 512 * KIB]))
        if level == "linear":
            chunk = self.draw(st.sampled_from([0, 64 * KIB]))
        offset = self.draw(st.sampled_from([64 * KIB, MIB, 2 * MIB])) if metadata in {"1.1", "1.2"} else 0
        members = [
            ArrayMember(space=space.id, slot=slot, data_offset=offset, data_size=room_of(metadata, space.size, offset))
            for slot, space in enumerate(taken)
        ]
        members += [ArrayMember(space="", slot=slot) for slot in range(len(taken), slots)]
        component = 0 if level in {"raid0", "linear"} else self._component(members, chunk)
        if component and rest and room_of(metadata, rest[0].size, offset) >= component and self.draw(st.booleans()):
            spare, *rest = rest
            room = room_of(metadata, spare.size, offset)
            members.append(ArrayMember(space=spare.id, data_offset=offset, data_size=room))
        array = MdArray(
            device=f"md/{self.number()}",
            size=0,
            members=tuple(members),
            uuid="00000000:11111111:22222222:33333333",
            level=level,
            metadata=metadata,
            slots=slots,
            component_size=component,
            layout={"raid5": "left-symmetric", "raid6": "left-symmetric"}.get(level, ""),
            chunk=chunk,
            minor=7 if metadata == "0.90" else -1,
            name="" if metadata == "0.90" else "host:name",
        )
        if level == "raid10":
            array = msgspec.structs.replace(array, layout=self.choose("n2", "f2", "o2"))
        self.open(msgspec.structs.replace(array, size=size_of(array)), max(space.depth for space in taken))
        return rest

    def _component(self, members: Sequence[ArrayMember], chunk: int) -> int:
        step = chunk or 64 * KIB
        most = align_down(min(each.data_size for each in members if each.space), step)
        return max(most - self.draw(st.sampled_from([0, 0, 0, 1, 9])) * step, step)

    def add_group(self, spaces: Sequence[Space]) -> None:
        extent = self.draw(st.sampled_from([64 * KIB, MIB, 4 * MIB]))
        copies = self.draw(st.sampled_from([1, 1, 1, 2]))
        members = []
        for index, space in enumerate(spaces):
            extents = (space.size - MIB - (copies - 1) * MIB) // extent
            members.append(
                PhysicalVolume(
                    space=space.id,
                    name=f"pv{index}",
                    uuid=lvm_id(self.number()),
                    data_start=MIB,
                    extents=max(extents - self.draw(st.sampled_from([0, 0, 0, 1])), 0),
                    metadata_copies=copies,
                )
            )
        group = Volumes(self, f"vg{self.number()}", extent, members).build()
        self.open(group, max(space.depth for space in spaces))


class Volumes:
    """Draws the volumes of a group."""

    def __init__(self, builder: Builder, name: str, extent: int, members: Sequence[PhysicalVolume]) -> None:
        self.builder = builder
        self.name = name
        self.extent = extent
        self.members = members
        self.next = {each.name: 0 for each in members}
        self.left = {each.name: each.extents for each in members}
        self.entries: list[tuple[str, Entry]] = []
        self.shown: list[LogicalVolume] = []

    def build(self) -> VolumeGroup:
        for _ in range(self.builder.draw(st.integers(0, 4))):
            self.add(
                self.builder.choose("linear", "linear", "linear", "scattered", "striped", "raid1", "thin", "hidden")
            )
        uuid = lvm_id(self.builder.number())
        return VolumeGroup(
            name=self.name,
            uuid=uuid,
            extent_size=self.extent,
            members=tuple(self.members),
            volumes=tuple(self.shown),
            metadata=format_config(self._config(uuid)),
        )

    def add(self, kind: str) -> None:
        roomy = [name for name, left in self.left.items() if left > 0]
        name = f"lv{len(self.entries)}"
        if not roomy:
            return
        pv = self.builder.draw(st.sampled_from(roomy))
        if kind in {"linear", "hidden"}:
            self.put(name, [self.stretch(pv, self.some(pv))], shown=kind == "linear")
        elif kind == "scattered":
            stretches = [self.stretch(each, self.some(each)) for each in roomy for _ in range(2) if self.left[each]]
            self.put(name, stretches)
        elif kind == "striped" and len(roomy) > 1:
            count = min(self.some(each) for each in roomy[:2])
            first, second = (self.stretch(each, count) for each in roomy[:2])
            stripes = ("stripes", (first[0], first[1], second[0], second[1]))
            self.define(name, [self.segment(0, 2 * count, "striped", ("stripe_count", 2), stripes)], "striped")
        elif kind == "raid1" and len(roomy) > 1 and all(self.left[each] > 2 for each in roomy[:2]):
            self._add_mirror(name, roomy[:2])
        elif kind == "thin" and self.left[pv] > 4:
            self._add_thin(name, pv)

    def _add_mirror(self, name: str, pvs: Sequence[str]) -> None:
        count = min(self.some(each, spare=1) for each in pvs)
        raids: list[str] = []
        for index, pv in enumerate(pvs):
            raids += [f"{name}_rmeta_{index}", f"{name}_rimage_{index}"]
            self.put(raids[-2], [self.stretch(pv, 1)], shown=False)
            self.put(raids[-1], [self.stretch(pv, count)], shown=False)
        legs = (("device_count", 2), ("region_size", 1024), ("raids", tuple(raids)))
        self.define(name, [self.segment(0, count, "raid1", *legs)], "raid1")

    def _add_thin(self, name: str, pv: str) -> None:
        count = self.some(pv, spare=1)
        self.put(f"{name}_tmeta", [self.stretch(pv, 1)], shown=False)
        self.put(f"{name}_tdata", [self.stretch(pv, count)], shown=False)
        halves = (("metadata", f"{name}_tmeta"), ("pool", f"{name}_tdata"), ("chunk_size", 128))
        self.define(name, [self.segment(0, count, "thin-pool", *halves)], "thin-pool")
        origin = ""
        for number in range(self.builder.draw(st.integers(0, 3))):
            about: list[tuple[str, Entry]] = [("thin_pool", name), ("transaction_id", 0), ("device_id", number + 1)]
            if origin and self.builder.draw(st.booleans()):
                about.append(("origin", origin))
            else:
                origin = ""
            thin = f"{name}.{number}"
            size = self.builder.draw(st.integers(1, 2 * count))
            self.define(thin, [self.segment(0, size, "thin", *about)], "thin", pool=name, origin=origin)
            origin = thin

    def some(self, pv: str, *, spare: int = 0) -> int:
        """Draw how many extents of a physical volume are taken."""
        left = self.left[pv] - spare
        return self.builder.draw(st.sampled_from([max(left // 2, 1), left, 1]))

    def stretch(self, pv: str, count: int) -> tuple[str, int, int]:
        first = self.next[pv]
        self.next[pv] += count
        self.left[pv] -= count
        return pv, first, count

    def segment(self, start: int, count: int, kind: str, *about: tuple[str, Entry]) -> Section:
        return Section((("start_extent", start), ("extent_count", count), ("type", kind), *about))

    def put(self, name: str, stretches: Sequence[tuple[str, int, int]], *, shown: bool = True) -> None:
        """Add a linear volume."""
        start, segments = 0, []
        for pv, first, count in stretches:
            stripes = (("stripe_count", 1), ("stripes", (pv, first)))
            segments.append(self.segment(start, count, "striped", *stripes))
            start += count
        self.define(name, segments, "linear", shown=shown)

    def define(
        self, name: str, segments: Sequence[Section], kind: str, *, shown: bool = True, pool: str = "", origin: str = ""
    ) -> None:
        uuid = lvm_id(self.builder.number())
        status = ("READ", "WRITE", "VISIBLE") if shown else ("READ", "WRITE")
        numbered = ((f"segment{index + 1}", each) for index, each in enumerate(segments))
        about = (("id", uuid), ("status", status), ("segment_count", len(segments)))
        self.entries.append((name, Section((*about, *numbered))))
        if shown:
            count = sum(value for each in segments for key, value in each.entries if key == "extent_count")  # type: ignore[misc]
            self.shown.append(
                LogicalVolume(
                    name=name,
                    uuid=uuid,
                    size=int(count) * self.extent,
                    kind=kind,
                    pool=pool,
                    origin=origin,
                    captured=kind != "thin-pool",
                )
            )

    def _config(self, uuid: str) -> Section:
        pvs = tuple(
            (
                each.name,
                Section(
                    (
                        ("id", each.uuid),
                        ("device", "/dev/sda"),
                        ("status", ("ALLOCATABLE",)),
                        ("flags", ()),
                        ("dev_size", (each.data_start + each.extents * self.extent) // 512),
                        ("pe_start", each.data_start // 512),
                        ("pe_count", each.extents),
                    )
                ),
            )
            for each in self.members
        )
        group = Section(
            (
                ("id", uuid),
                ("seqno", 3),
                ("format", "lvm2"),
                ("status", ("RESIZEABLE", "READ", "WRITE")),
                ("flags", ()),
                ("extent_size", self.extent // 512),
                ("physical_volumes", Section(pvs)),
                ("logical_volumes", Section(tuple(self.entries))),
            )
        )
        return Section(((self.name, group), ("contents", "Text Format Volume Group"), ("version", 1)))


def size_of(array: MdArray) -> int:
    """Return how large the kernel makes an array; written from its sources a second time, to hold ours against it."""
    active = [each for each in array.members if each.slot >= 0]
    component, chunk = array.component_size, array.chunk
    match array.level:
        case "linear" | "raid0":
            return sum(align_down(each.data_size, chunk or 512) for each in active)
        case "raid1":
            return component
        case "raid10":
            far = 2 if array.layout[0] in "fo" else 1
            near = 2 if array.layout[0] == "n" else 1
            return component // chunk // far * array.slots // near * chunk
        case level:
            return component // chunk * chunk * (array.slots - (2 if level == "raid6" else 1))


def _making(kind: str, used: int) -> Making | None:
    if kind == "ext4":
        return ExtMaking(
            clean=True,
            inodes=4096,
            inodes_used=min(used // 4096, 4000),
            inode_size=256,
            reserved=0,
            reserved_user=0,
            reserved_group=0,
            journal=4 * MIB,
            external_journal=False,
            flex_groups=16,
            errors="continue",
            max_mounts=-1,
            check_interval=0,
            mount_options=(),
            mount_text="",
            hash_algorithm="half_md4",
        )
    if kind == "vfat":
        return FatMaking(chains=used // 65536, root_entries=512)
    if kind == "xfs":
        return XfsMaking(
            sector_size=512,
            inode_size=512,
            inodes=4096,
            inodes_used=64,
            inode_percent=25,
            directory_block=4096,
            log=16 * MIB,
            groups=4,
            group_size=64 * MIB,
            file_types=True,
            ignores_case=False,
            shared=0,
        )
    return None


@st.composite
def stacked_layouts(draw: st.DrawFn) -> Layout:
    """Layouts of one to four disks with up to three containers on one another."""
    return Builder(draw).build()
