"""All stacks that the lab builds. Sizes are in MiB and small: what counts is the nesting, and sparse files cost little.

They follow what installers and administrators make: one family a block, the plain ones first. A stack with `quick`
is in the share that `make test` runs; together those hold every layer once.
"""

from __future__ import annotations

import json

from lab.stacks.arrays import MISSING, Array
from lab.stacks.containers import Luks
from lab.stacks.contents import Bcache, Bytes, Integrity, Mark, MultipathMember, Swap
from lab.stacks.filesystems import Btrfs, FileSystem
from lab.stacks.model import LARGER, SAME, SECTORS, SMALLER, VARIANTS, Disk, Stack, Variant
from lab.stacks.tables import Table
from lab.stacks.volumes import ClassicSnapshot, Group, Logical, ThinPool

_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_MSR = "E3C9E316-0B5C-4DB8-817D-F92DF00215AE"
_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
_WINRE = "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC"

_TPM_TOKEN = json.dumps({"type": "lab-tpm2", "keyslots": ["2"], "tpm2-pcrs": [7], "tpm2-blob": "AAECAwQ="})
_KEYRING_TOKEN = json.dumps({"type": "luks2-keyring", "keyslots": ["0"], "key_description": "lab:key"})


def _gpt(on: str, *rows: str) -> Table:
    return Table(on, "\n".join(rows) + "\n")


def _mbr(on: str, *rows: str) -> Table:
    return Table(on, "\n".join(rows) + "\n", label="dos")


def _one(on: str) -> Table:
    """A table with one partition over everything."""
    return _gpt(on, "type=linux")


def _disks(count: int, size: int, sector: int = 512) -> tuple[Disk, ...]:
    return (Disk(size, sector),) * count


_TABLES = (
    Stack(
        "gpt-uefi",
        "GPT: an ESP, ext4 with a name and attributes, swap",
        _disks(1, 256),
        (
            _gpt(
                "a",
                "size=40MiB, type=uefi, name=ESP",
                'size=120MiB, type=linux, name="root ü", attrs="LegacyBIOSBootable GUID:60"',
                "size=16MiB, type=swap",
                "type=linux, name=home",
            ),
            FileSystem("a:1", "vfat", "ESP"),
            FileSystem("a:2", "ext4", "root"),
            Swap("a:3", "swap"),
            FileSystem("a:4", "ext4", "home"),
        ),
        grows=("a:4",),
        quick=LARGER,
    ),
    Stack(
        "gpt-bios",
        "GPT: BIOS boot partition with bytes in it, ext3, partitions out of order and with gaps",
        _disks(1, 256),
        (
            _gpt(
                "a",
                f"2: start=2048, size=1MiB, type={_BIOS_BOOT}",
                "7: start=200MiB, size=16MiB, type=swap",
                "1: start=20MiB, size=100MiB, type=linux",
            ),
            Bytes("a:2", 1),
            FileSystem("a:1", "ext3", "root"),
            Swap("a:7"),
        ),
    ),
    Stack(
        "mbr-logical",
        "MBR: an active primary partition, an extended one with three logical ones",
        _disks(1, 320),
        (
            _mbr(
                "a",
                "size=80MiB, type=83, bootable",
                "size=30MiB, type=c",
                "type=5",
                "size=60MiB, type=83",
                "size=20MiB, type=82",
                "type=83",
            ),
            FileSystem("a:1", "ext2", "boot", options=("-b", "1024"), files="plain"),
            FileSystem("a:2", "vfat", "DOS", options=("-F", "16")),
            FileSystem("a:5", "ext3", "root"),
            Swap("a:6", "swap"),
            FileSystem("a:7", "ext4", "home"),
        ),
        grows=("a:7",),
        quick=SAME,
    ),
    Stack(
        "whole-disk-ext4",
        "A file system on the bare disk, no partition table",
        _disks(1, 128),
        (FileSystem("a", "ext4", "whole"),),
        grows=("a",),
        quick=SMALLER,
    ),
    Stack(
        "whole-disk-vfat",
        "A USB stick of the old kind: FAT on the bare disk",
        _disks(1, 64),
        (FileSystem("a", "vfat", "STICK", options=("-I",)),),
    ),
    Stack(
        "raw",
        "Content that nobody knows, on a partition and on a whole disk",
        (Disk(96), Disk(64)),
        (
            _gpt("a", "size=20MiB, type=linux", "size=40MiB, type=linux"),
            Bytes("a:1", 4),
            FileSystem("a:2", "ext4"),
            Bytes("b", 8),
        ),
        larger=(Disk(144), Disk(64)),
        smaller=(Disk(80), Disk(48)),
        refusals={SMALLER: "too small"},
        quick=SAME,
    ),
    Stack(
        "4kn-gpt",
        "A disk with 4096-byte sectors: ESP, ext4, swap",
        _disks(1, 256, 4096),
        (
            _gpt("a", "size=70MiB, type=uefi", "size=120MiB, type=linux", "type=swap"),
            FileSystem("a:1", "vfat", "ESP"),
            FileSystem("a:2", "ext4", "root"),
            Swap("a:3", "swap"),
        ),
        quick=SECTORS,
    ),
)

_FILE_SYSTEMS = (
    Stack(
        "xfs",
        "XFS on a GPT partition",
        _disks(1, 480),
        (_one("a"), FileSystem("a:1", "xfs", "data")),
        grows=("a:1",),
    ),
    Stack(
        "ext2-ext3-ext4",
        "The ext family with blocks of 1 KiB, without hashed folders, with clusters and files in inodes",
        _disks(1, 320),
        (
            _gpt("a", "size=60MiB, type=linux", "size=100MiB, type=linux", "type=linux"),
            FileSystem("a:1", "ext2", "two", options=("-b", "1024"), files="plain"),
            FileSystem("a:2", "ext3", "three", options=("-O", "^dir_index", "-m", "0")),
            FileSystem("a:3", "ext4", "four", options=("-O", "bigalloc,inline_data,^metadata_csum")),
        ),
    ),
    Stack(
        "fat",
        "FAT12, FAT16 and FAT32",
        _disks(1, 200),
        (
            _gpt("a", f"size=12MiB, type={_DATA}", f"size=60MiB, type={_DATA}", f"type={_DATA}"),
            FileSystem("a:1", "vfat", "TWELVE", options=("-F", "12")),
            FileSystem("a:2", "vfat", "SIXTEEN", options=("-F", "16")),
            FileSystem("a:3", "vfat", "THIRTYTWO", options=("-F", "32", "-s", "1")),
        ),
    ),
    Stack(
        "exfat",
        "exFAT on an MBR partition, as memory cards have it",
        _disks(1, 128),
        (_mbr("a", "type=7"), FileSystem("a:1", "exfat", "CARD")),
    ),
    Stack(
        "ntfs",
        "A Windows machine: ESP, reserved partition, NTFS, recovery partition",
        _disks(1, 256),
        (
            _gpt(
                "a",
                "size=40MiB, type=uefi",
                f"size=16MiB, type={_MSR}",
                f"size=120MiB, type={_DATA}, name=Windows",
                f'size=32MiB, type={_WINRE}, attrs="RequiredPartition GUID:63"',
            ),
            FileSystem("a:1", "vfat", "SYSTEM"),
            Bytes("a:2", 1),
            FileSystem("a:3", "ntfs", "Windows"),
            FileSystem("a:4", "ntfs", "Recovery"),
        ),
        refusals={SECTORS: "cannot be made anew"},
    ),
    Stack(
        "foreign",
        "What other systems and devices use: exFAT, NTFS and f2fs on one disk",
        _disks(1, 256),
        (
            _gpt("a", f"size=48MiB, type={_DATA}", f"size=64MiB, type={_DATA}", "type=linux"),
            FileSystem("a:1", "exfat", "CARD"),
            FileSystem("a:2", "ntfs", "Windows"),
            FileSystem("a:3", "f2fs", "flash"),
        ),
        refusals={SECTORS: "cannot be made anew"},
        quick=SAME,
        grows=("a:3",),
    ),
    Stack(
        "f2fs",
        "f2fs, as on flash disks",
        _disks(1, 256),
        (_one("a"), FileSystem("a:1", "f2fs", "flash", options=("-O", "extra_attr,inode_checksum,sb_checksum"))),
        grows=("a:1",),
    ),
    Stack(
        "swap",
        "Swap on a partition and on a whole disk",
        (Disk(64), Disk(32)),
        (
            _gpt("a", "size=20MiB, type=swap", "type=linux"),
            Swap("a:1", "one"),
            FileSystem("a:2", "ext4"),
            Swap("b", "two"),
        ),
    ),
)

# A btrfs shrinks where one more chunk of each kind would fit, of which each takes a tenth of a small file system.
_BTRFS = (
    Stack(
        "btrfs-single",
        "btrfs on a partition: subvolumes, snapshots, a default subvolume; metadata twice",
        _disks(1, 1280),
        (_gpt("a", "size=40MiB, type=uefi", "type=linux"), FileSystem("a:1", "vfat", "ESP"), Btrfs(("a:2",), "root")),
        grows=("a:2",),
        quick=LARGER,
    ),
    Stack(
        "btrfs-dup",
        "btrfs on the bare disk, data and metadata twice, checksums by xxhash",
        _disks(1, 4096),
        (Btrfs(("a",), "whole", "dup", "dup", ("--csum=xxhash",)),),
        grows=("a",),
    ),
    Stack("btrfs-raid0", "btrfs RAID0 on two disks", _disks(2, 1024), (Btrfs(("a", "b"), "zero", "raid0", "raid1"),)),
    Stack(
        "btrfs-raid1",
        "btrfs RAID1 on partitions of two disks",
        _disks(2, 1280),
        (_one("a"), _one("b"), Btrfs(("a:1", "b:1"), "one", "raid1", "raid1")),
        grows=("a:1",),
        quick=SAME,
        more=(Variant("swapped disks", _disks(2, 1280), order=(1, 0)),),
    ),
    Stack(
        "btrfs-raid1c3",
        "btrfs RAID1C3: three copies of everything",
        _disks(3, 4096),
        (Btrfs(("a", "b", "c"), "three", "raid1c3", "raid1c3"),),
    ),
    Stack(
        "btrfs-raid10",
        "btrfs RAID10 on four disks",
        _disks(4, 2560),
        (Btrfs(("a", "b", "c", "d"), "ten", "raid10", "raid10"),),
    ),
    Stack(
        "btrfs-raid5",
        "btrfs RAID5 data, RAID1 metadata",
        _disks(3, 2560),
        (Btrfs(("a", "b", "c"), "five", "raid5", "raid1"),),
    ),
    Stack(
        "btrfs-raid6",
        "btrfs RAID6 data, RAID1C3 metadata",
        _disks(4, 2560),
        (Btrfs(("a", "b", "c", "d"), "six", "raid6", "raid1c3"),),
    ),
    Stack(
        "btrfs-mixed",
        "btrfs over disks of different sizes: single data, RAID1 metadata",
        (Disk(4096), Disk(5120), Disk(6144)),
        (_one("b"), Btrfs(("a", "b:1", "c"), "mixed", "single", "raid1")),
    ),
)

_MD = (
    Stack(
        "md-raid0",
        "MD RAID0 of two whole disks",
        _disks(2, 128),
        (Array("stripe", "0", ("a", "b")), FileSystem("md/stripe", "ext4", "stripe")),
        grows=("md/stripe",),
    ),
    Stack(
        "md-raid1-0.90",
        "MD RAID1 with metadata 0.90 at the end of partitions, as old boot loaders need it",
        _disks(2, 160),
        (
            _mbr("a", "size=100MiB, type=fd, bootable", "type=fd"),
            _mbr("b", "size=100MiB, type=fd, bootable", "type=fd"),
            Array("0", "1", ("a:1", "b:1"), metadata="0.90"),
            Array("1", "1", ("a:2", "b:2"), metadata="0.90"),
            FileSystem("md/0", "ext3", "boot"),
            Swap("md/1", "swap"),
        ),
    ),
    Stack(
        "md-raid1-1.0",
        "MD RAID1 with metadata 1.0: an ESP that firmware reads from either disk; internal bitmap on the second",
        _disks(2, 224),
        (
            _gpt("a", "size=64MiB, type=uefi", "type=raid"),
            _gpt("b", "size=64MiB, type=uefi", "type=raid"),
            Array("esp", "1", ("a:1", "b:1"), metadata="1.0"),
            Array("root", "1", ("a:2", "b:2"), bitmap="internal"),
            FileSystem("md/esp", "vfat", "ESP"),
            FileSystem("md/root", "ext4", "root"),
        ),
        grows=("md/root",),
    ),
    Stack(
        "md-raid4",
        "MD RAID4 with metadata 1.1",
        _disks(3, 128),
        (Array("four", "4", ("a", "b", "c"), metadata="1.1"), FileSystem("md/four", "ext4", "four")),
        grows=("md/four",),
    ),
    Stack(
        "md-raid5",
        "MD RAID5 on partitions, with a spare and a bitmap, XFS",
        _disks(4, 256),
        (
            *(_one(each) for each in "abcd"),
            Array("five", "5", ("a:1", "b:1", "c:1"), spares=("d:1",), bitmap="internal"),
            FileSystem("md/five", "xfs", "five"),
        ),
        grows=("md/five",),
    ),
    Stack(
        "md-raid6",
        "MD RAID6 of four disks, chunks of 512 KiB",
        _disks(4, 128),
        (Array("six", "6", ("a", "b", "c", "d"), chunk=512), FileSystem("md/six", "ext4", "six")),
        grows=("md/six",),
    ),
    Stack(
        "md-raid10",
        "MD RAID10 of four disks, far copies",
        _disks(4, 128),
        (Array("ten", "10", ("a", "b", "c", "d"), layout="f2"), FileSystem("md/ten", "ext4", "ten")),
    ),
    Stack(
        "md-raid10-three",
        "MD RAID10 of three disks, copies at an offset",
        _disks(3, 128),
        (Array("odd", "10", ("a", "b", "c"), layout="o2"), FileSystem("md/odd", "ext4", "odd")),
    ),
    Stack(
        "md-raid1-degraded",
        "MD RAID1 captured while its second disk is missing",
        _disks(1, 160),
        (_one("a"), Array("half", "1", ("a:1", MISSING), bitmap="internal"), FileSystem("md/half", "ext4", "half")),
        grows=("md/half",),
    ),
    Stack(
        "md-raid5-degraded",
        "MD RAID5 captured while one of three disks is missing",
        _disks(2, 128),
        (Array("five", "5", ("a", MISSING, "b")), FileSystem("md/five", "ext4", "five")),
        grows=("md/five",),
        quick=SAME,
    ),
    Stack(
        "md-levels",
        "Arrays of every level on the partitions of four disks, with every kind of metadata",
        _disks(4, 330),
        (
            *(_gpt(each, *("size=64MiB, type=raid",) * 4, "type=raid") for each in "abcd"),
            Array("zero", "0", ("a:1", "b:1"), metadata="1.0"),
            Array("1", "1", ("c:1", "d:1"), metadata="0.90", bitmap="internal"),
            Array("four", "4", ("a:2", "b:2", "c:2"), metadata="1.1"),
            Array("five", "5", ("b:3", "c:3", "d:3"), spares=("a:3",)),
            Array("six", "6", ("a:4", "b:4", "c:4", "d:4")),
            Array("ten", "10", ("d:5", "c:5", "b:5", "a:5")),
            FileSystem("md/zero", "ext4", "zero", files="plain"),
            FileSystem("md/1", "ext4", "one", files="plain"),
            FileSystem("md/four", "ext4", "four", files="plain"),
            FileSystem("md/five", "ext4", "five", files="plain"),
            FileSystem("md/six", "ext4", "six", files="plain"),
            FileSystem("md/ten", "ext4", "ten", files="plain"),
        ),
        grows=("md/ten",),
        quick=LARGER,
    ),
    Stack(
        "md-partitioned",
        "A GPT inside an MD array of two whole disks",
        _disks(2, 256),
        (
            Array("disk", "1", ("a", "b"), metadata="1.0"),
            _gpt("md/disk", "size=40MiB, type=uefi", "size=20MiB, type=swap", "type=linux"),
            FileSystem("md/disk:1", "vfat", "ESP"),
            Swap("md/disk:2", "swap"),
            FileSystem("md/disk:3", "ext4", "root"),
        ),
        grows=("md/disk:3",),
        quick=LARGER,
    ),
)

_MIRROR_ROWS = ("size=120MiB, type=raid", "type=raid")
_MIRROR = Stack(
    "md-mirror",
    "A machine whose root and swap are mirrored on two disks",
    _disks(2, 192),
    (
        _gpt("a", *_MIRROR_ROWS),
        _gpt("b", *_MIRROR_ROWS),
        Array("root", "1", ("a:1", "b:1"), bitmap="internal"),
        Array("swap", "1", ("a:2", "b:2")),
        FileSystem("md/root", "ext4", "root"),
        Swap("md/swap", "swap"),
    ),
    grows=("md/root",),
    more=(
        Variant("swapped disks", _disks(2, 192), order=(1, 0)),
        Variant(
            "one disk, degraded",
            _disks(1, 192),
            lacking="b",
            options=("--without", "b"),
            layers=(
                _gpt("a", *_MIRROR_ROWS),
                Array("root", "1", ("a:1", MISSING), bitmap="internal"),
                Array("swap", "1", ("a:2", MISSING)),
                FileSystem("md/root", "ext4", "root"),
                Swap("md/swap", "swap"),
            ),
            changes=("b", "array root Active", "array root Working", "array swap Active", "array swap Working"),
        ),
        Variant(
            "one disk, dissolved",
            _disks(1, 192),
            lacking="b",
            options=("--without", "b", "--dissolve", "md/root", "--dissolve", "md/swap"),
            layers=(_gpt("a", *_MIRROR_ROWS), FileSystem("a:1", "ext4", "root"), Swap("a:2", "swap")),
            moved={"md/root": "a:1", "md/swap": "a:2"},
            changes=("b", "array", "a:1 entry", "a:2 entry"),
        ),
    ),
)

_LVM = (
    Stack(
        "lvm-linear",
        "LVM on a partition and a whole disk: linear volumes over both, tags, free space",
        (Disk(224), Disk(160)),
        (
            _gpt("a", "size=60MiB, type=linux", "type=lvm"),
            FileSystem("a:1", "ext2", "boot"),
            Group("vg0", ("a:2", "b"), tags=("lab", "backup/daily")),
            Logical("vg0", "root", ("--size=96M",)),
            Logical("vg0", "swap", ("--size=16M",)),
            Logical("vg0", "home", ("--size=120M",), tags=("files",)),
            FileSystem("vg0/root", "ext4", "root"),
            Swap("vg0/swap", "swap"),
            FileSystem("vg0/home", "ext4", "home"),
        ),
        grows=("vg0/home",),
        more=(
            Variant(
                "larger, another grows",
                (Disk(336), Disk(240)),
                options=("--grow", "vg0/root"),
                grown=("vg0/root",),
            ),
            Variant(
                "one disk",
                (Disk(400),),
                lacking="b",
                options=("--without", "b"),
                layers=(
                    _gpt("a", "size=60MiB, type=linux", "type=lvm"),
                    FileSystem("a:1", "ext2", "boot"),
                    Group("vg0", ("a:2",), tags=("lab", "backup/daily")),
                    Logical("vg0", "root", ()),
                    Logical("vg0", "swap", ()),
                    Logical("vg0", "home", ()),
                    FileSystem("vg0/root", "ext4", "root"),
                    Swap("vg0/swap", "swap"),
                    FileSystem("vg0/home", "ext4", "home"),
                ),
                changes=("b ", "vg0 pv_count"),
            ),
        ),
    ),
    Stack(
        "lvm-striped",
        "LVM striped over three whole disks",
        _disks(3, 96),
        (
            Group("fast", ("a", "b", "c"), options=("--physicalextentsize=1M",)),
            Logical("fast", "data", ("--stripes=3", "--stripesize=64k", "--extents=100%FREE")),
            FileSystem("fast/data", "ext4", "data"),
        ),
        grows=("fast/data",),
    ),
    Stack(
        "lvm-mirror",
        "LVM's old mirror, with its log on disk",
        _disks(3, 96),
        (
            Group("old", ("a", "b", "c")),
            Logical("old", "data", ("--type=mirror", "--mirrors=1", "--mirrorlog=disk", "--nosync", "--size=64M")),
            FileSystem("old/data", "ext4", "data"),
        ),
        grows=("old/data",),
    ),
    Stack(
        "lvm-raid1",
        "LVM RAID1",
        _disks(2, 192),
        (
            _one("a"),
            _one("b"),
            Group("vg", ("a:1", "b:1")),
            Logical("vg", "root", ("--type=raid1", "--mirrors=1", "--size=80M")),
            FileSystem("vg/root", "ext4", "root"),
        ),
        grows=("vg/root",),
    ),
    Stack(
        "lvm-raid5",
        "LVM RAID5",
        _disks(3, 128),
        (
            Group("vg", ("a", "b", "c")),
            Logical("vg", "data", ("--type=raid5", "--stripes=2", "--size=96M")),
            FileSystem("vg/data", "ext4", "data"),
        ),
        grows=("vg/data",),
    ),
    Stack(
        "lvm-raid10",
        "LVM RAID10",
        _disks(4, 96),
        (
            Group("vg", ("a", "b", "c", "d")),
            Logical("vg", "data", ("--type=raid10", "--stripes=2", "--mirrors=1", "--size=80M")),
            FileSystem("vg/data", "ext4", "data"),
        ),
        grows=("vg/data",),
    ),
    Stack(
        "lvm-thin",
        "LVM thin pool with two thin volumes and a thin snapshot",
        _disks(1, 320),
        (
            _one("a"),
            Group("vg", ("a:1",)),
            ThinPool("vg", "pool", ("--type=thin-pool", "--size=200M", "--poolmetadatasize=8M", "--chunksize=64k")),
            Logical("vg", "root", ("--type=thin", "--virtualsize=400M", "--thinpool=vg/pool"), tags=("thin",)),
            Logical("vg", "data", ("--type=thin", "--virtualsize=120M", "--thinpool=vg/pool")),
            FileSystem("vg/root", "ext4", "root"),
            FileSystem("vg/data", "ext4", "data"),
            Logical("vg", "before", ("--snapshot", "vg/root")),
            FileSystem("vg/before", "ext4", snapshot=True),
        ),
    ),
    Stack(
        "lvm-kinds",
        "Logical volumes of every kind in one group of three disks",
        _disks(3, 320),
        (
            _one("a"),
            _one("b"),
            Group("vg", ("a:1", "b:1", "c"), tags=("lab",)),
            Logical("vg", "linear", ("--size=48M",)),
            Logical("vg", "striped", ("--stripes=2", "--size=48M"), tags=("fast", "backup/daily")),
            Logical("vg", "mirror", ("--type=mirror", "--mirrors=1", "--mirrorlog=core", "--nosync", "--size=48M")),
            Logical("vg", "raid1", ("--type=raid1", "--mirrors=1", "--size=48M")),
            Logical("vg", "raid5", ("--type=raid5", "--stripes=2", "--size=48M")),
            ThinPool("vg", "pool", ("--type=thin-pool", "--size=96M", "--poolmetadatasize=4M")),
            Logical("vg", "thin", ("--type=thin", "--virtualsize=200M", "--thinpool=vg/pool")),
            *(
                FileSystem(f"vg/{each}", "ext4", each, files="plain")
                for each in ("linear", "striped", "mirror", "raid1", "raid5", "thin")
            ),
            Logical("vg", "before", ("--snapshot", "vg/thin")),
            FileSystem("vg/before", "ext4", snapshot=True),
        ),
        quick=SAME,
    ),
    Stack(
        "lvm-snapshot",
        "LVM classic snapshot beside its origin",
        _disks(1, 256),
        (
            Group("vg", ("a",)),
            Logical("vg", "root", ("--size=80M",)),
            FileSystem("vg/root", "ext4", "root"),
            ClassicSnapshot("vg", "before", "root", 40),
        ),
        refusals={SMALLER: "too small"},
    ),
    Stack(
        "guest-in-volume",
        "A virtual machine's disk, with its own GPT, in a logical volume",
        _disks(1, 256),
        (
            Group("vms", ("a",)),
            Logical("vms", "guest", ("--size=160M",)),
            _gpt("vms/guest", "size=40MiB, type=uefi", "type=linux"),
            FileSystem("vms/guest:1", "vfat", "ESP"),
            FileSystem("vms/guest:2", "ext4", "root"),
        ),
    ),
)

_LUKS = (
    Stack(
        "luks1",
        "LUKS1 with three slots",
        _disks(1, 160),
        (
            _one("a"),
            Luks("a:1", 1, slots={0: "first", 3: "second", 7: "third"}),
            FileSystem("a:1:luks", "ext4", "secret"),
        ),
        grows=("a:1:luks",),
    ),
    Stack(
        "luks2",
        "LUKS2 with several slots by Argon2id, two tokens, a label, persistent flags",
        _disks(1, 192),
        (
            _one("a"),
            Luks(
                "a:1",
                slots={0: "first", 2: "second", 5: "third"},
                tokens={0: _KEYRING_TOKEN, 3: _TPM_TOKEN},
                options=("--label=vault", "--subsystem=lab"),
                argon=True,
            ),
            FileSystem("a:1:luks", "ext4", "secret"),
        ),
        grows=("a:1:luks",),
    ),
    Stack(
        "luks-kinds",
        "LUKS1 and LUKS2 beside each other, several slots, a token",
        _disks(1, 256),
        (
            _gpt("a", "size=96MiB, type=linux", "type=linux"),
            Luks("a:1", 1, slots={0: "first", 5: "second"}),
            Luks("a:2", slots={0: "first", 2: "second", 7: "third"}, tokens={1: _TPM_TOKEN}, argon=True),
            FileSystem("a:1:luks", "ext4", "one"),
            FileSystem("a:2:luks", "ext4", "two"),
        ),
        grows=("a:2:luks",),
        quick=LARGER,
    ),
    Stack(
        "luks2-key-file",
        "LUKS2 on the bare disk with sectors of 4096 bytes, opened by a key file",
        _disks(1, 400),
        (Luks("a", options=("--sector-size=4096",)), FileSystem("a:luks", "xfs", "secret")),
        larger=_disks(1, 500),
        smaller=_disks(1, 360),
        opened="key file",
        grows=("a:luks",),
    ),
    Stack(
        "luks2-escrow",
        "LUKS2 whose volume key was put into escrow: the restore needs no passphrase",
        _disks(1, 160),
        (_one("a"), Luks("a:1", slots={1: "first"}), FileSystem("a:1:luks", "ext4", "secret")),
        opened="escrow",
        grows=("a:1:luks",),
    ),
    Stack(
        "luks2-closed",
        "LUKS2 that nobody can open: carried as it is",
        _disks(1, 96),
        (_one("a"), Luks("a:1"), FileSystem("a:1:luks", "ext4", "secret")),
        refusals={SMALLER: "too small"},
        opened="nobody",
    ),
)

_NESTED = (
    Stack(
        "debian-crypt",
        "Debian's encrypted installation: ESP, /boot, LUKS2, LVM in it",
        _disks(1, 320),
        (
            _gpt("a", "size=40MiB, type=uefi", "size=60MiB, type=linux", "type=linux"),
            FileSystem("a:1", "vfat", "ESP"),
            FileSystem("a:2", "ext2", "boot"),
            Luks("a:3", slots={0: "first", 1: "second"}),
            Group("debian-vg", ("a:3:luks",)),
            Logical("debian-vg", "root", ("--size=100M",)),
            Logical("debian-vg", "swap_1", ("--extents=100%FREE",)),
            FileSystem("debian-vg/root", "ext4", "root"),
            Swap("debian-vg/swap_1"),
        ),
        grows=("debian-vg/root",),
    ),
    Stack(
        "luks-on-lvm",
        "Single logical volumes encrypted, one with LUKS1 and one with LUKS2",
        _disks(1, 320),
        (
            _one("a"),
            Group("vg", ("a:1",)),
            Logical("vg", "home", ("--size=120M",)),
            Logical("vg", "mail", ("--size=100M",)),
            Luks("vg/home"),
            Luks("vg/mail", 1, slots={2: "second"}),
            FileSystem("vg/home:luks", "ext4", "home"),
            FileSystem("vg/mail:luks", "ext4", "mail"),
        ),
        grows=("vg/home:luks",),
    ),
    Stack(
        "luks-on-lvm-on-md",
        "LUKS on a logical volume on MD RAID1",
        _disks(2, 256),
        (
            _one("a"),
            _one("b"),
            Array("pv", "1", ("a:1", "b:1")),
            Group("vg", ("md/pv",)),
            Logical("vg", "secret", ("--size=120M",)),
            Luks("vg/secret", slots={0: "first", 4: "second"}),
            FileSystem("vg/secret:luks", "ext4", "secret"),
        ),
        grows=("vg/secret:luks",),
    ),
    Stack(
        "lvm-in-luks-on-md",
        "LVM in LUKS on MD RAID5 on partitions",
        _disks(3, 320),
        (
            *(_one(each) for each in "abc"),
            Array("crypt", "5", ("a:1", "b:1", "c:1"), bitmap="internal"),
            Luks("md/crypt"),
            Group("vg", ("md/crypt:luks",)),
            Logical("vg", "root", ("--size=340M",)),
            Logical("vg", "srv", ("--size=100M",)),
            Logical("vg", "swap", ("--size=32M",)),
            FileSystem("vg/root", "xfs", "root"),
            FileSystem("vg/srv", "ext4", "srv"),
            Swap("vg/swap", "swap"),
        ),
        quick=LARGER,
        grows=("vg/root",),
    ),
    Stack(
        "md-on-lvm",
        "MD RAID1 of logical volumes of two groups",
        _disks(2, 192),
        (
            Group("left", ("a",)),
            Group("right", ("b",)),
            Logical("left", "leg", ("--size=128M",)),
            Logical("right", "leg", ("--size=128M",)),
            Array("pair", "1", ("left/leg", "right/leg")),
            FileSystem("md/pair", "ext4", "pair"),
        ),
        grows=("md/pair",),
    ),
    Stack(
        "md-on-md",
        "MD RAID0 of two RAID1 pairs",
        _disks(4, 96),
        (
            Array("p1", "1", ("a", "b")),
            Array("p2", "1", ("c", "d")),
            Array("top", "0", ("md/p1", "md/p2")),
            FileSystem("md/top", "ext4", "top"),
        ),
        grows=("md/top",),
    ),
    Stack(
        "btrfs-on-luks",
        "btrfs RAID1 on two LUKS containers",
        _disks(2, 1280),
        (
            _one("a"),
            _one("b"),
            Luks("a:1"),
            Luks("b:1", slots={0: "second"}),
            Btrfs(("a:1:luks", "b:1:luks"), "vault", "raid1", "raid1"),
        ),
        grows=("a:1:luks",),
    ),
    Stack(
        "btrfs-on-lvm-on-md",
        "btrfs on a logical volume on MD RAID1",
        _disks(2, 1280),
        (
            Array("pv", "1", ("a", "b")),
            Group("vg", ("md/pv",)),
            Logical("vg", "root", ("--extents=100%FREE",)),
            Btrfs(("vg/root",), "root"),
        ),
    ),
    Stack(
        "thin-on-luks",
        "A thin pool in LUKS, as some desktops have it",
        _disks(1, 320),
        (
            _gpt("a", "size=60MiB, type=linux", "type=linux"),
            FileSystem("a:1", "ext4", "boot"),
            Luks("a:2"),
            Group("qubes", ("a:2:luks",)),
            ThinPool("qubes", "pool", ("--type=thin-pool", "--size=160M", "--poolmetadatasize=4M")),
            Logical("qubes", "root", ("--type=thin", "--virtualsize=256M", "--thinpool=qubes/pool")),
            FileSystem("qubes/root", "ext4", "root"),
        ),
    ),
    Stack(
        "server",
        "A server of three disks: ESP on each, RAID1 boot, RAID5 with LVM, swap on RAID1",
        _disks(3, 320),
        (
            *(
                _gpt(each, "size=36MiB, type=uefi", "size=60MiB, type=raid", "size=20MiB, type=raid", "type=raid")
                for each in "abc"
            ),
            *(FileSystem(f"{each}:1", "vfat", f"ESP-{each.upper()}") for each in "abc"),
            Array("boot", "1", ("a:2", "b:2", "c:2"), metadata="1.0"),
            Array("swap", "1", ("a:3", "b:3", "c:3")),
            Array("data", "5", ("a:4", "b:4", "c:4"), bitmap="internal"),
            FileSystem("md/boot", "ext2", "boot"),
            Swap("md/swap", "swap"),
            Group("vg0", ("md/data",)),
            Logical("vg0", "root", ("--size=120M",)),
            Logical("vg0", "var", ("--size=120M",), tags=("logs",)),
            FileSystem("vg0/root", "ext4", "root"),
            FileSystem("vg0/var", "ext4", "var"),
        ),
        more=(Variant("reversed disks", _disks(3, 320), order=(2, 1, 0)),),
        grows=("vg0/root",),
    ),
    Stack(
        "4kn-lvm-luks",
        "Disks with 4096-byte sectors: LVM on both, LUKS2 on a volume",
        _disks(2, 192, 4096),
        (
            Group("vg", ("a", "b")),
            Logical("vg", "root", ("--size=96M",)),
            Logical("vg", "secret", ("--size=120M",)),
            Luks("vg/secret"),
            FileSystem("vg/root", "ext4", "root"),
            FileSystem("vg/secret:luks", "ext4", "secret"),
        ),
    ),
    Stack(
        "4kn-md",
        "MD RAID1 of disks with 4096-byte sectors",
        _disks(2, 160, 4096),
        (_one("a"), _one("b"), Array("root", "1", ("a:1", "b:1")), FileSystem("md/root", "ext4", "root")),
        grows=("md/root",),
    ),
)


def _marked(name: str, about: str, mark: Mark, **refusals: str) -> Stack:
    """Return a stack that is nothing but what its type is known by: nobody can make the real one here."""
    return Stack(name, about, _disks(1, 96), (_one("a"), mark), refusals={SMALLER: "too small", **refusals})


_RECOGNISED = (
    Stack(
        "bcache",
        "bcache: a backing disk and its cache",
        (Disk(160), Disk(96)),
        (Bcache("a", "b"), FileSystem("bcache0", "ext4", "cached")),
        refusals={SMALLER: "too small", SECTORS: "sectors of 4096"},
    ),
    Stack(
        "dm-integrity",
        "dm-integrity by itself",
        _disks(1, 96),
        (_one("a"), Integrity("a:1"), FileSystem("a:1:integrity", "ext4", "summed")),
        refusals={SMALLER: "too small"},
    ),
    Stack(
        "multipath",
        "A disk that is a path of a multipath device",
        _disks(1, 64),
        (MultipathMember("a"),),
        refusals={"backup": "multipath"},
        without=VARIANTS,
    ),
    _marked("zfs", "The label of a ZFS pool's disk", Mark("a:1", "zfs_member")),
    _marked("drbd", "The metadata of DRBD", Mark("a:1", "drbd")),
    _marked("bitlocker", "A BitLocker volume", Mark("a:1", "BitLocker"), sectors="sectors of 4096"),
)

STACKS = {
    stack.name: stack
    for family in (_TABLES, _FILE_SYSTEMS, _BTRFS, _MD, (_MIRROR,), _LVM, _LUKS, _NESTED, _RECOGNISED)
    for stack in family
}
"""All stacks by name, in the order in which they are shown."""
