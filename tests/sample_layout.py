"""A layout with one of everything, and the images that go with it."""

from __future__ import annotations

from remetal.layout.making import ExtMaking
from remetal.layout.model import (
    ArrayMember,
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
)
from remetal.layout.plan import ImageFacts

MIB = 1 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GUID = "12345678-1234-4234-8234-1234567890AB"


def sample() -> Layout:
    """A layout with one of everything."""
    gpt = GptTable(
        on="sda",
        disk_guid=GUID,
        entry_count=128,
        first_usable=MIB,
        partitions=(
            Partition(number=1, start=MIB, size=10 * MIB, type=LINUX, uuid=GUID, name="root"),
            Partition(number=2, start=11 * MIB, size=MIB, type=LINUX, uuid=GUID),
        ),
        protective_mbr=bytes(512),
    )
    mbr = MbrTable(
        on="m.img",
        signature="0badcafe",
        partitions=(
            Partition(number=1, start=MIB, size=2 * MIB, type="83", attributes=0x80),
            Partition(number=2, start=4 * MIB, size=8 * MIB, type="05"),
            Partition(number=5, start=5 * MIB, size=MIB, type="83", record=4 * MIB),
            Partition(number=6, start=8 * MIB, size=MIB, type="83", record=7 * MIB),
        ),
        boot_code=bytes(440),
    )
    return Layout(
        disks=(
            Disk(name="sda", size=16 * MIB),
            Disk(name="m.img", size=16 * MIB),
            Disk(name="sdb", size=512 * MIB),
            Disk(name="sdc", size=512 * MIB),
        ),
        layers=(
            gpt,
            Raw(on="sda:boot", size=MIB - 34 * 512),
            FileSystem(on="sda:1", type="ext4", size=9 * MIB, used=MIB, block_size=4096, uuid=GUID.lower(), label="r"),
            Swap(on="sda:2", size=MIB, uuid=GUID.lower(), label="s"),
            mbr,
            Raw(on="m.img:5", size=MIB, type="LVM2_member"),
            *stacked(),
        ),
    )


def stacked() -> tuple[Layer, ...]:
    """An array with LUKS in it, a volume group and a btrfs, all on two disks."""
    luks = Luks(
        on="md/root",
        version=2,
        uuid=GUID.lower(),
        header_size=2 * MIB,
        size=60 * MIB,
        sector_size=4096,
        key_size=64,
        cipher="aes-xts-plain64",
        label="crypt",
        key_slots=(0, 3),
        tokens=("systemd-tpm2",),
        escrowed=True,
    )
    parts = (Part(space="sdb:3", number=1, size=120 * MIB), Part(space="sdc:3", number=2, size=110 * MIB))
    btrfs = FileSystem(
        on="sdb:3",
        type="btrfs",
        size=230 * MIB,
        used=MIB,
        block_size=4096,
        uuid=GUID.lower(),
        features=("skinny_metadata",),
        parts=parts,
    )
    inside = FileSystem(
        on="md/root:luks", type="ext4", size=60 * MIB, used=MIB, block_size=4096, uuid=GUID.lower(), making=EXT
    )
    return (
        table_of_three("sdb"),
        table_of_three("sdc"),
        ARRAY,
        luks,
        inside,
        GROUP,
        FileSystem(on="vg0/root", type="xfs", size=96 * MIB, used=MIB, block_size=4096, uuid=GUID.lower()),
        Swap(on="vg0/thin.1", size=MIB, uuid=GUID.lower()),
        btrfs,
    )


def table_of_three(name: str) -> GptTable:
    places = ((MIB, 64 * MIB), (65 * MIB, 128 * MIB), (193 * MIB, 120 * MIB))
    return GptTable(
        on=name,
        disk_guid=GUID,
        entry_count=128,
        partitions=tuple(
            Partition(number=index + 1, start=start, size=size, type=LINUX, uuid=GUID)
            for index, (start, size) in enumerate(places)
        ),
        protective_mbr=bytes(512),
    )


EXT = ExtMaking(
    clean=True,
    inodes=4096,
    inodes_used=40,
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
    mount_options=("user_xattr",),
    mount_text="",
    hash_algorithm="half_md4",
)
ARRAY = MdArray(
    device="md/root",
    size=62 * MIB,
    members=(
        ArrayMember(space="sdb:1", slot=0, data_offset=MIB, data_size=63 * MIB),
        ArrayMember(space="sdc:1", slot=1, data_offset=MIB, data_size=63 * MIB, write_mostly=True),
    ),
    uuid="00112233:44556677:8899aabb:ccddeeff",
    level="raid1",
    metadata="1.2",
    slots=2,
    component_size=62 * MIB,
    bitmap=True,
    bitmap_chunk=64 * MIB,
    name="host:root",
)
METADATA = """
contents = "Text Format Volume Group"
version = 1

vg0 {
id = "vvvvvv-vvvv-vvvv-vvvv-vvvv-vvvv-vvvvvv"
seqno = 7
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 8192
max_lv = 0
max_pv = 0
metadata_copies = 0

physical_volumes {
pv0 {
id = "pppppp-pppp-pppp-pppp-pppp-pppp-pppppp"
device = "/dev/sdb2"
status = ["ALLOCATABLE"]
flags = []
dev_size = 262144
pe_start = 2048
pe_count = 31
}
pv1 {
id = "qqqqqq-qqqq-qqqq-qqqq-qqqq-qqqq-qqqqqq"
device = "/dev/sdc2"
status = ["ALLOCATABLE"]
flags = []
dev_size = 262144
pe_start = 2048
pe_count = 31
}
}

logical_volumes {
root {
id = "rrrrrr-rrrr-rrrr-rrrr-rrrr-rrrr-rrrrrr"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 2
segment1 {
start_extent = 0
extent_count = 20
type = "striped"
stripe_count = 1
stripes = [ "pv0", 0 ]
}
segment2 {
start_extent = 20
extent_count = 4
type = "striped"
stripe_count = 1
stripes = [ "pv1", 0 ]
}
}
pool {
id = "tttttt-tttt-tttt-tttt-tttt-tttt-tttttt"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 1
segment1 {
start_extent = 0
extent_count = 5
type = "thin-pool"
metadata = "pool_tmeta"
pool = "pool_tdata"
transaction_id = 1
chunk_size = 128
}
}
thin.1 {
id = "uuuuuu-uuuu-uuuu-uuuu-uuuu-uuuu-uuuuuu"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 1
segment1 {
start_extent = 0
extent_count = 3
type = "thin"
thin_pool = "pool"
transaction_id = 0
device_id = 1
}
}
pool_tmeta {
id = "wwwwww-wwww-wwww-wwww-wwww-wwww-wwwwww"
status = ["READ", "WRITE"]
flags = []
segment_count = 1
segment1 {
start_extent = 0
extent_count = 1
type = "striped"
stripe_count = 1
stripes = [ "pv1", 4 ]
}
}
pool_tdata {
id = "xxxxxx-xxxx-xxxx-xxxx-xxxx-xxxx-xxxxxx"
status = ["READ", "WRITE"]
flags = []
segment_count = 1
segment1 {
start_extent = 0
extent_count = 5
type = "striped"
stripe_count = 1
stripes = [ "pv1", 5 ]
}
}
}
}
"""
GROUP = VolumeGroup(
    name="vg0",
    uuid="vvvvvv-vvvv-vvvv-vvvv-vvvv-vvvv-vvvvvv",
    extent_size=4 * MIB,
    members=(
        PhysicalVolume(
            space="sdb:2",
            name="pv0",
            uuid="pppppp-pppp-pppp-pppp-pppp-pppp-pppppp",
            data_start=MIB,
            extents=31,
        ),
        PhysicalVolume(
            space="sdc:2",
            name="pv1",
            uuid="qqqqqq-qqqq-qqqq-qqqq-qqqq-qqqq-qqqqqq",
            data_start=MIB,
            extents=31,
        ),
    ),
    volumes=(
        LogicalVolume(name="root", uuid="rrrrrr-rrrr-rrrr-rrrr-rrrr-rrrr-rrrrrr", size=96 * MIB, kind="linear"),
        LogicalVolume(
            name="pool",
            uuid="tttttt-tttt-tttt-tttt-tttt-tttt-tttttt",
            size=20 * MIB,
            kind="thin-pool",
            captured=False,
        ),
        LogicalVolume(
            name="thin.1", uuid="uuuuuu-uuuu-uuuu-uuuu-uuuu-uuuu-uuuuuu", size=12 * MIB, kind="thin", pool="pool"
        ),
    ),
    metadata=METADATA,
)


def images_of(layout: Layout) -> dict[str, ImageFacts]:
    """Return an image for everything that is captured; keys lie in no space."""
    sizes = {
        each.volume: each.size if each.volume.endswith(":key") else layout.place(each.volume)[2]
        for each in layout.captured()
    }
    return {volume: ImageFacts(size=size, used=0, digest="d") for volume, size in sizes.items()}
