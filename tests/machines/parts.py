"""What recorded machines are put together from: drives, partition tables and what is in the partitions.

Every id is derived from the machine's and the space's name, so a machine is the same whenever it is made.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Inventory,
    Layer,
    Layout,
    MbrTable,
    Nic,
    Partition,
    Raw,
    Swap,
    Volume,
    table_end,
)
from remetal.units import GIB, MIB, align_down

REST = 0
"""As the size of a partition: all that is left."""

TYPES = {
    "apfs": "7C3457EF-0000-11AA-AA11-00306543ECAC",
    "bios": "21686148-6449-6E6F-744E-656564454649",
    "chrome-firmware": "CAB6E88E-ABF3-4102-A07A-D4BB9BE3C1D3",
    "chrome-kernel": "FE3A2A5D-4F32-41A7-B725-ACCC3285A309",
    "chrome-reserved": "2E0A753D-9E48-43B0-8337-B15192CB1B5E",
    "chrome-root": "3CB8E202-3B7E-47DD-8A3C-7FF2A13CFCEC",
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "linux": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "lvm": "E6D6D379-F507-44C2-A23C-238F2A3DF928",
    "msr": "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
    "raid": "A19D880F-05FC-4D3B-A006-743F0F84911E",
    "recovery": "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC",
    "root": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "solaris-reserved": "6A945A3B-1DD2-11B2-99A6-080020736631",
    "swap": "0657FD6D-A4AB-43C4-84E5-0933C4B0F41D",
    "vmfs": "AA31E02A-400F-11DB-9590-000C2911D1B8",
    "vmkcore": "9D275380-40AD-11DB-BF97-000C2911D1B8",
    "windows": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
    "zfs": "6A898CC3-1DD2-11B2-99A6-080020736631",
}
"""GPT partition types (the Discoverable Partitions Specification, Microsoft's and Apple's documentation)."""

_FEATURES = {
    "ext2": ("ext_attr", "filetype", "sparse_super"),
    "ext3": ("ext_attr", "filetype", "has_journal", "sparse_super"),
    "ext4": ("64bit", "extent", "filetype", "flex_bg", "has_journal", "metadata_csum"),
    "vfat": ("fat32",),
    "xfs": ("bigtime", "crc", "finobt", "ftype", "reflink", "rmapbt"),
}
_BLOCKS = {"vfat": 4096, "ntfs": 4096, "exfat": 131072}
_GRUB_MBR = b"\xeb\x63\x90"
_WINDOWS_MBR = b"\x33\xc0\x8e\xd0\xbc\x00\x7c"


@dataclass(frozen=True)
class Content:
    """What a space holds: a file system, `swap`, or something by blkid's name that is carried whole."""

    type: str
    label: str = ""
    used: float = 0.4
    whole: bool = False


def fs(type: str, label: str = "", used: float = 0.4) -> Content:  # noqa: A002 - blkid's word
    """A file system that is `used` to this share."""
    return Content(type, label, used)


def swap(label: str = "") -> Content:
    """Swap space."""
    return Content("swap", label)


def raw(type: str = "") -> Content:  # noqa: A002 - blkid's word
    """What is carried whole; without a type nobody knows it."""
    return Content(type, whole=True)


@dataclass(frozen=True)
class Part:
    """One partition. `type` is a key of TYPES, or two hexadecimal digits of a DOS table; `gap` is left before it."""

    size: int
    type: str
    content: Content | None
    name: str = ""
    number: int = 0
    attributes: int = 0
    gap: int = 0


@dataclass(frozen=True)
class Table:
    """A partition table. `logical` partitions lie in an extended one behind the others; `loader` is the boot code's."""

    kind: str
    parts: tuple[Part, ...]
    logical: tuple[Part, ...] = ()
    start: int = MIB
    loader: str = ""


def gpt(*parts: Part, start: int = MIB) -> Table:
    """A GPT; its first partition begins at byte `start`."""
    return Table("gpt", parts, start=start)


def mbr(*parts: Part, logical: Sequence[Part] = (), start: int = MIB, loader: str = "grub") -> Table:
    """A DOS table; `loader` is `grub`, which also fills the gap before the first partition, `windows` or empty."""
    return Table("mbr", parts, tuple(logical), start, loader)


@dataclass(frozen=True)
class Drive:
    """A disk as its controller shows it. `via` is a way in tests/machines/sysfs.py; sizes are in bytes.

    `parts` are the disks that it is reached by (multipath) or made of (firmware RAID).
    """

    name: str
    size: int
    via: str
    model: str = ""
    serial: str = ""
    wwn: str = ""
    holds: Table | Content | None = None
    logical: int = 512
    physical: int = 512
    parts: tuple[Drive, ...] = ()

    @property
    def bus(self) -> str:
        """What the layout calls the bus."""
        if self.via == "multipath":
            return self.parts[0].bus
        return {"vmbus": "scsi", "sas": "scsi", "raid": "scsi", "fc": "scsi", "imsm": "md"}.get(self.via, self.via)

    @property
    def disk(self) -> Disk:
        """The disk as the layout describes it."""
        return Disk(
            name=self.name,
            size=self.size,
            logical_sector=self.logical,
            physical_sector=self.physical,
            model=self.model,
            serial=self.serial,
            wwn=self.wwn,
            bus=self.bus,
        )


@dataclass(frozen=True)
class Machine:
    """A whole machine; `about` is its line in the README, `others` are block devices that are no disks."""

    name: str
    about: str
    drives: tuple[Drive, ...]
    firmware: str = "uefi"
    architecture: str = "x86_64"
    vendor: str = ""
    product: str = ""
    cpu: str = ""
    cores: int = 4
    memory: int = 16 * GIB
    kernel: str = "6.1.0-28-amd64"
    nics: tuple[Nic, ...] = ()
    modaliases: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=("loop0", "ram0"))

    def layout(self) -> Layout:
        """Return what `remetal probe` says of the machine."""
        layers = tuple(layer for drive in self.drives for layer in _lay(drive, self.name))
        disks = tuple(drive.disk for drive in self.drives)
        inventory = Inventory(
            firmware=self.firmware,
            architecture=self.architecture,
            vendor=self.vendor,
            product=self.product,
            serial=f"SN-{self.name}".upper() if self.vendor else "",
            cpu=self.cpu,
            cores=self.cores,
            memory=self.memory,
            kernel=self.kernel,
            disks=disks,
            nics=self.nics,
            modaliases=self.modaliases,
        )
        return Layout(disks=disks, layers=layers, inventory=inventory)


def _id(*words: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("remetal", *words)))


def _lay(drive: Drive, machine: str) -> Iterator[Layer]:
    if isinstance(drive.holds, Content):
        yield _fill(drive.name, drive.size, drive.holds, machine)
    elif drive.holds is not None:
        table, contents = _partition(drive, drive.holds, machine)
        yield table
        if isinstance(table, MbrTable) and drive.holds.loader == "grub":
            yield Raw(on=f"{drive.name}:boot", size=min(part.start for part in table.partitions) - drive.logical)
        for part in sorted(table.partitions, key=lambda part: part.start):
            content = contents.get(part.number)
            if content is not None:
                yield _fill(f"{drive.name}:{part.number}", part.size, content, machine)


def _fill(space: str, size: int, content: Content, machine: str) -> Volume:
    if content.whole:
        return Raw(on=space, size=size, type=content.type)
    plain = str(_id(machine, space))
    if content.type == "swap":
        return Swap(on=space, size=align_down(size, 4096), uuid=plain, label=content.label)
    if content.type in {"vfat", "exfat"}:
        plain = f"{plain[:4]}-{plain[4:8]}".upper()
    if content.type == "ntfs":
        plain, size = plain.replace("-", "")[:16].upper(), size - 512
    block = _BLOCKS.get(content.type, 4096)
    return FileSystem(
        on=space,
        type=content.type,
        size=align_down(size, 512 if content.type == "ntfs" else block),
        used=align_down(int(size * content.used), block),
        block_size=block,
        uuid=plain,
        label=content.label,
        features=_FEATURES.get(content.type, ()),
    )


def _partition(drive: Drive, table: Table, machine: str) -> tuple[GptTable | MbrTable, dict[int, Content | None]]:
    guid = str(_id(machine, drive.name, "table"))
    if table.kind == "gpt":
        empty = GptTable(
            on=drive.name,
            disk_guid=guid.upper(),
            entry_count=128,
            partitions=(),
            first_usable=2 * drive.logical + 128 * 128,
            protective_mbr=_protective(drive),
        )
        placed = _place(table.parts, table.start, align_down(table_end(empty, drive.disk), MIB))
        partitions = tuple(
            Partition(
                number=part.number or index,
                start=start,
                size=size,
                type=TYPES[part.type],
                uuid=str(_id(machine, drive.name, str(part.number or index))).upper(),
                name=part.name,
                attributes=part.attributes,
            )
            for index, (part, start, size) in enumerate(placed, 1)
        )
        contents = {part.number or index: part.content for index, part in enumerate(table.parts, 1)}
        found = GptTable(
            **{**{name: getattr(empty, name) for name in empty.__struct_fields__}, "partitions": partitions}
        )
        return found, contents
    return _dos(drive, table, guid[:8])


def _dos(drive: Drive, table: Table, signature: str) -> tuple[MbrTable, dict[int, Content | None]]:
    """Lay out primary partitions, then one extended one with the logical ones, each behind its own record."""
    end = align_down(min(drive.size, 2 << 40), table.start)
    placed = _place(table.parts, table.start, end)
    partitions = [
        Partition(number=index, start=start, size=size, type=part.type, attributes=part.attributes)
        for index, (part, start, size) in enumerate(placed, 1)
    ]
    contents = {index: part.content for index, part in enumerate(table.parts, 1)}
    if table.logical:
        begin = partitions[-1].end
        kind = "0f" if table.loader == "windows" else "05"
        partitions.append(Partition(number=len(partitions) + 1, start=begin, size=end - begin, type=kind))
        gaps = [Part(part.size, part.type, part.content, gap=table.start) for part in table.logical]
        for number, (part, start, size) in enumerate(_place(gaps, begin, end), 5):
            record = start - table.start
            partitions.append(Partition(number=number, start=start, size=size, type=part.type, record=record))
            contents[number] = part.content
    code = {"grub": _GRUB_MBR, "windows": _WINDOWS_MBR}.get(table.loader, b"").ljust(440, b"\0")
    return MbrTable(on=drive.name, signature=signature, partitions=tuple(partitions), boot_code=code), contents


def _place(parts: Sequence[Part], start: int, end: int) -> Iterator[tuple[Part, int, int]]:
    for index, part in enumerate(parts):
        start += part.gap
        behind = sum(each.size + each.gap for each in parts[index + 1 :])
        size = part.size or align_down(end - start - behind, MIB)
        yield part, start, size
        start += size


def _protective(drive: Drive) -> bytes:
    """Return sector 0 of a GPT disk: one entry of type EE over all of it (UEFI 2.10, 5.2.3)."""
    sectors = min(drive.size // drive.logical - 1, 0xFFFFFFFF)
    entry = bytes.fromhex("00000200eeffffff01000000") + sectors.to_bytes(4, "little")
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"
