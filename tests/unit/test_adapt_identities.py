"""Who is who on whole stacks: what has which names, what they mean after a restore, and what is there no more."""

from __future__ import annotations

import msgspec.structs
import pytest

from remetal.adapt.crypttab import plan_crypttab
from remetal.adapt.evidence import find_nodes, mapper_node, parse_node, partition_node
from remetal.adapt.fstab import plan_fstab
from remetal.adapt.identities import Known
from remetal.adapt.identity import Gone, Identities, Kind, Named, Place, find_named, find_uuid, plan_name
from remetal.adapt.mdadm_conf import plan_mdadm_conf
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
    SpaceId,
    Swap,
    VolumeGroup,
)
from remetal.layout.reshape import reshape
from remetal.layout.signatures import Signature
from remetal.units import GIB, MIB
from tests.adapt_identities import identify

BOOT, ROOT, SWAP, DATA = (f"{number}0b7c9a1-58a8-4d07-8f2e-7a6b5c4d3e2f" for number in range(1, 5))
LUKS = "b1f0e2d3-c4b5-4a69-8778-695a4b3c2d1e"
BOOT_ARRAY = "3aaa0122:29827cfa:5331ad66:ca767371"
CRYPT_ARRAY = "4bbb0122:29827cfa:5331ad66:ca767371"
PV, PV2, VG, LV, LV2 = (f"{letter}BcDeF-0123-4567-89ab-cDeF-0123-456789" for letter in "ABCDE")
RAID = "A19D880F-05FC-4D3B-A006-743F0F84911E"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def guid(disk: str, number: int) -> str:
    return f"{number:08X}-0000-4000-8000-0000000000{ord(disk[-1]):02X}"


def gpt(disk: SpaceId, *types: str) -> GptTable:
    """Return a table with partitions of 1 GiB."""
    partitions = tuple(
        Partition(
            number=number,
            start=(number - 1) * GIB + MIB,
            size=GIB,
            type=kind,
            uuid=guid(disk, number),
            name=f"{disk} {number}",
        )
        for number, kind in enumerate(types, 1)
    )
    return GptTable(
        on=disk, disk_guid=guid(disk, 99), entry_count=128, partitions=partitions, protective_mbr=bytes(512)
    )


def mirror(name: str, uuid: str, number: int, *, disks: str = "ab") -> MdArray:
    return MdArray(
        device=f"md/{name}",
        size=GIB - MIB,
        members=tuple(
            ArrayMember(space=f"sd{letter}:{number}", slot=slot, data_offset=MIB, data_size=GIB - MIB)
            for slot, letter in enumerate(disks)
        ),
        uuid=uuid,
        level="raid1",
        metadata="1.2",
        slots=len(disks),
        component_size=GIB - MIB,
        name=f"web:{name}",
    )


def ext4(space: SpaceId, uuid: str, label: str = "") -> FileSystem:
    return FileSystem(on=space, type="ext4", size=64 * MIB, used=MIB, block_size=4096, uuid=uuid, label=label)


def disk(name: str, serial: str = "", wwn: str = "") -> Disk:
    return Disk(name=name, size=8 * GIB, serial=serial, wwn=wwn, model="Disk")


def group(*members: SpaceId, name: str = "vg0", volumes: tuple[str, ...] = ("root", "swap")) -> VolumeGroup:
    return VolumeGroup(
        name=name,
        uuid=VG,
        extent_size=4 * MIB,
        members=tuple(
            PhysicalVolume(space=space, name=f"pv{index}", uuid=uuid, data_start=MIB, extents=64)
            for index, (space, uuid) in enumerate(zip(members, (PV, PV2), strict=False))
        ),
        volumes=tuple(
            LogicalVolume(name=each, uuid=uuid, size=64 * MIB, kind="linear")
            for each, uuid in zip(volumes, (LV, LV2), strict=False)
        ),
        metadata="",
    )


def luks(space: SpaceId) -> Luks:
    return Luks(
        on=space, version=2, uuid=LUKS, header_size=16 * MIB, size=GIB - 32 * MIB, key_size=64, cipher="aes-xts-plain64"
    )


def server() -> Layout:
    """Two disks: /boot and, in LUKS, a group with root and swap on mirrors; a plain partition on sda."""
    layers: tuple[Layer, ...] = (
        gpt("sda", RAID, RAID, LINUX),
        gpt("sdb", RAID, RAID, LINUX),
        ext4("sda:3", DATA, "data"),
        Raw(on="sdb:3", size=GIB),
        mirror("boot", BOOT_ARRAY, 1),
        mirror("0", CRYPT_ARRAY, 2),
        ext4("md/boot", BOOT),
        luks("md/0"),
        group("md/0:luks"),
        ext4("vg0/root", ROOT),
        Swap(on="vg0/swap", size=64 * MIB, uuid=SWAP),
    )
    return Layout(disks=(disk("sda", "S1"), disk("sdb", "S2")), layers=layers)


def one(identities: Identities, kind: Kind, space: SpaceId) -> Named:
    (found,) = [each for each in identities.volumes if (each.kind, each.space) == (kind, space)]
    return found


def gone(identities: Identities, kind: Kind, space: SpaceId) -> Gone:
    (found,) = [each for each in identities.gone if (each.kind, each.space) == (kind, space)]
    return found


def test_everything_on_a_stack_has_its_names() -> None:
    it = identify(server(), root="vg0/root")
    assert [(each.kind, each.space) for each in it.volumes] == [
        *(("disk", name) for name in ("sda", "sdb")),
        *(("partition", f"{name}:{number}") for name in ("sda", "sdb") for number in (1, 2, 3)),
        ("filesystem", "sda:3"),
        *(("md", "md/boot"), ("member", "sda:1"), ("member", "sdb:1")),
        *(("md", "md/0"), ("member", "sda:2"), ("member", "sdb:2")),
        ("filesystem", "md/boot"),
        ("luks", "md/0"),
        *(("vg", "vg0"), ("pv", "md/0:luks"), ("lv", "vg0/root"), ("lv", "vg0/swap")),
        *(("filesystem", "vg0/root"), ("swap", "vg0/swap")),
    ]
    assert it.gone == ()
    root = one(it, "filesystem", "vg0/root")
    assert root.lasting[:3] == (f"UUID={ROOT}", "/dev/mapper/vg0-root", "/dev/vg0/root")
    assert (root.moved, root.place, root.partuuid, root.space_now) == (False, None, "", "vg0/root")
    crypt = one(it, "md", "md/0")
    assert crypt.lasting[:2] == ("/dev/md/0", "/dev/md0")
    assert one(it, "luks", "md/0").lasting[0] == f"UUID={LUKS}"
    member = one(it, "member", "sdb:2")
    assert (member.uuid, member.label, member.names) == (CRYPT_ARRAY, "web:0", ("/dev/sdb2",))
    assert member.lasting == (f"PARTUUID={guid('sdb', 2).lower()}",)
    assert one(it, "partition", "sda:3").partlabel == "sda 3"


def test_every_name_of_a_stack_holds_where_nothing_changes() -> None:
    it = identify(server(), root="vg0/root")
    for spec in (
        f"UUID={ROOT}",
        "/dev/vg0/root",
        "/dev/mapper/vg0-root",
        "/dev/disk/by-id/dm-name-vg0-root",
        "/dev/md/boot",
        "/dev/disk/by-id/md-name-web:boot",
        f"/dev/disk/by-id/md-uuid-{BOOT_ARRAY}",
        "LABEL=data",
        "PARTLABEL=sda 3",
        f"PARTUUID={guid('sda', 3)}",
        "/dev/vg0/swap",
    ):
        found = find_named(spec, it, ("filesystem", "swap"))
        assert isinstance(found, Named), spec
        assert plan_name(spec, found) == spec
    found = find_named("/dev/sda3", it, ("filesystem",))
    assert isinstance(found, Named)
    assert plan_name("/dev/sda3", found) == f"UUID={DATA}"


def dissolved() -> tuple[Layout, Identities]:
    """Return the server as it stands on sda alone, without its mirrors."""
    layers: tuple[Layer, ...] = (
        gpt("sda", LINUX, LINUX, LINUX),
        ext4("sda:3", DATA, "data"),
        ext4("sda:1", BOOT),
        luks("sda:2"),
        group("sda:2:luks"),
        ext4("vg0/root", ROOT),
        Swap(on="vg0/swap", size=64 * MIB, uuid=SWAP),
    )
    result = Layout(disks=(disk("sda", "S1"),), layers=layers)
    moved = {"md/boot": "sda:1", "md/0": "sda:2"}
    conf = f"ARRAY /dev/md7 UUID={BOOT_ARRAY}\n"
    fstab = "/dev/vg0/root / ext4\n"
    return result, identify(server(), result, root="vg0/root", fstab=fstab, mdadm_conf=conf, moved=moved)


def test_what_stood_on_a_dissolved_array_is_found_by_the_arrays_names() -> None:
    result, it = dissolved()
    boot = one(it, "filesystem", "md/boot")
    assert (boot.space_now, boot.moved) == ("sda:1", True)
    assert boot.new_partuuid == guid("sda", 1).lower()
    assert {"/dev/md/boot", "/dev/md7"} <= set(boot.names)
    assert boot.lasting == (f"UUID={BOOT}", f"PARTUUID={guid('sda', 1).lower()}")
    assert gone(it, "md", "md/0").why == "the array was dissolved; its content stands on sda:2"
    assert gone(it, "member", "sda:2").why == gone(it, "md", "md/0").why
    assert gone(it, "partition", "sdb:1").why == "the disk sdb was left out"
    assert gone(it, "disk", "sdb").names == ("/dev/sdb",)
    container = one(it, "luks", "md/0")
    assert (container.space_now, container.lasting[0]) == ("sda:2", f"UUID={LUKS}")
    assert not {"/dev/md/0", "/dev/md0"} & set(container.lasting)
    pv = one(it, "pv", "md/0:luks")
    assert (pv.space_now, pv.moved) == ("sda:2:luks", False)
    assert one(it, "lv", "vg0/root").lasting[0] == "/dev/mapper/vg0-root"
    fstab = "/dev/md7 /boot ext4\n/dev/vg0/root / ext4\n/dev/sdb3 /raw auto\n"
    plan = plan_fstab(fstab, source=server(), result=result, identities=it)
    assert plan.text == fstab.replace("/dev/md7", f"UUID={BOOT}")
    assert ["the disk sdb was left out" in note for note in plan.notes] == [True]
    assert plan_crypttab("x /dev/md0 none luks\n", it).text == f"x UUID={LUKS} none luks\n"
    assert plan_mdadm_conf(f"ARRAY /dev/md7 UUID={BOOT_ARRAY}\n", it).text.splitlines()[1].startswith("# ARRAY")


def test_a_degraded_array_stays_and_its_lost_member_is_told() -> None:
    shaped = reshape(server(), without=["sdb"], dissolve=[])
    it = identify(server(), shaped.layout, root="vg0/root")
    assert one(it, "md", "md/0").lasting[0] == "/dev/md/0"
    assert one(it, "member", "sda:2").uuid == CRYPT_ARRAY
    assert gone(it, "member", "sdb:2").why == "the disk sdb was left out"
    assert find_uuid(BOOT_ARRAY, it, ("md",)) == one(it, "md", "md/boot")


def test_a_group_that_was_left_out_takes_its_volumes_along() -> None:
    source = Layout(
        disks=(disk("sda"), disk("sdb")),
        layers=(gpt("sda", LINUX), ext4("sda:1", ROOT), group("sdb", volumes=("home",)), ext4("vg0/home", DATA)),
    )
    shaped = reshape(source, without=["sdb"], dissolve=[])
    it = identify(source, shaped.layout, root="sda:1")
    assert {each.kind for each in it.gone} == {"disk", "vg", "pv", "lv", "filesystem"}
    assert {each.why for each in it.gone} == {"the disk sdb was left out"}
    text = "/dev/mapper/vg0-home /home ext4\n/dev/vg0/home /h ext4 nofail\nUUID=" + DATA + " /c ext4\n"
    plan = plan_fstab(text, source=source, result=shaped.layout, identities=it)
    assert (plan.text, len(plan.notes)) == (text, 2)


def test_a_group_that_was_packed_lost_a_physical_volume() -> None:
    source = Layout(disks=(disk("sda"), disk("sdb")), layers=(group("sda", "sdb"), ext4("vg0/root", ROOT)))
    shaped = reshape(source, without=["sdb"], dissolve=[])
    it = identify(source, shaped.layout, root="vg0/root")
    assert one(it, "pv", "sda").uuid == PV
    assert gone(it, "pv", "sdb").uuid == PV2
    assert isinstance(one(it, "vg", "vg0"), Named)


def test_an_array_with_partitions_on_whole_disks() -> None:
    array = msgspec.structs.replace(
        mirror("d", BOOT_ARRAY, 0),
        members=tuple(
            ArrayMember(space=name, slot=slot, data_offset=MIB, data_size=7 * GIB)
            for slot, name in enumerate(("sda", "sdb"))
        ),
        size=7 * GIB,
    )
    source = Layout(disks=(disk("sda"), disk("sdb")), layers=(array, gpt("md/d", LINUX), ext4("md/d:1", ROOT)))
    kept = identify(source, root="md/d:1", fstab="/dev/md127p1 / ext4\n")
    root = one(kept, "filesystem", "md/d:1")
    assert {"/dev/md127p1", "/dev/md/d1"} <= set(root.names)
    assert root.lasting[:2] == (f"UUID={ROOT}", "/dev/md/d1")
    assert plan_name("/dev/md127p1", root) == f"UUID={ROOT}"
    shaped = reshape(source, without=["sdb"], dissolve=["md/d"])
    it = identify(source, shaped.layout, root="md/d:1", moved=shaped.moved)
    root = one(it, "filesystem", "md/d:1")
    assert (root.space_now, root.moved, root.new_partuuid) == ("sda:1", True, None)
    assert root.lasting == (f"UUID={ROOT}", f"PARTUUID={guid('md/d', 1).lower()}")


def test_a_file_system_of_several_devices_is_known_by_all_of_them() -> None:
    parts = (Part(space="sda:1", number=1, size=GIB), Part(space="sdb:1", number=2, size=GIB))
    volume = FileSystem(on="sda:1", type="btrfs", size=2 * GIB, used=1, block_size=4096, uuid=ROOT, parts=parts)
    source = Layout(disks=(disk("sda"), disk("sdb")), layers=(gpt("sda", LINUX), gpt("sdb", LINUX), volume))
    it = identify(source, root="sda:1")
    found = find_named("/dev/sdb1", it, ("filesystem",))
    assert isinstance(found, Named)
    assert plan_name("/dev/sdb1", found) == f"UUID={ROOT}"


def test_content_that_was_carried_whole_is_known_by_its_marks() -> None:
    layers = (
        gpt("sda", LINUX, LINUX, LINUX, LINUX),
        ext4("sda:1", ROOT),
        Raw(on="sda:2", size=GIB, type="crypto_LUKS"),
        Raw(on="sda:3", size=GIB, type="linux_raid_member"),
        Raw(on="sda:4", size=GIB, type="jfs"),
    )
    known = Known(
        signatures={
            "sda:2": Signature(type="crypto_LUKS", uuid=LUKS),
            "sda:3": Signature(type="linux_raid_member", uuid="3aaa0122-2982-7cfa-5331-ad66ca767371", label="web:0"),
            "sda:4": Signature(type="jfs", uuid=DATA),
        }
    )
    source = Layout(disks=(disk("sda"),), layers=layers)
    it = identify(source, root="sda:1", known=known)
    assert plan_crypttab(f"data UUID={LUKS} /key luks\n", it).notes == ()
    assert plan_crypttab("data /dev/sda2 /key luks\n", it).text == f"data UUID={LUKS} /key luks\n"
    assert find_uuid(BOOT_ARRAY, it, ("md",)) is not None
    plan = plan_fstab(f"/dev/sda4 /jfs jfs\nUUID={DATA} /x jfs\n", source=source, result=source, identities=it)
    assert plan.text == f"UUID={DATA} /jfs jfs\nUUID={DATA} /x jfs\n"
    assert plan.notes == ()


def test_where_things_stand_on_this_machine() -> None:
    source = server()
    same = identify(source, root="vg0/root")
    assert not one(same, "partition", "sda:3").moved
    others = tuple(msgspec.structs.replace(each, serial=f"X{each.serial}") for each in source.disks)
    place = Place(devices=("/dev/nvme0n1p3",), part=3)
    known = Known(places={"sda:3": place})
    it = identify(source, msgspec.structs.replace(source, disks=others), root="vg0/root", known=known)
    data = one(it, "filesystem", "sda:3")
    assert (data.moved, data.place) == (True, place)
    assert not one(it, "filesystem", "md/boot").moved


def test_nodes_by_what_a_systems_files_show() -> None:
    source = Layout(
        disks=(disk("sdb", "S3Z9NX0M123456", "naa.5000c500a1b2c3d4"), disk("sda", "OTHER999")),
        layers=(gpt("sdb", LINUX, LINUX), gpt("sda", LINUX), ext4("sdb:2", ROOT)),
    )
    text = (
        "x /dev/disk/by-id/wwn-0x5000c500a1b2c3d4-part1:y\n/dev/disk/by-id/nvme-Disk_S3Z9NX0M123456_1-part2"
        " /dev/disk/by-id/usb-Disk_OTHER999-0:0-part1\n"
    )
    nodes = {node: name for name, node in find_nodes(source, "sdb:2", "/dev/sda2", [text]).hardware}
    assert nodes == {
        "/dev/sda": "sdb",
        "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4": "sdb",
        "/dev/disk/by-id/nvme-Disk_S3Z9NX0M123456_1": "sdb",
        "/dev/disk/by-id/usb-Disk_OTHER999-0:0": "sda",
    }
    assert find_nodes(source, "sdb:2", "/dev/sda1", []).hardware == ()


@pytest.mark.parametrize(
    ("node", "parsed", "again"),
    [
        ("/dev/sda12", ("/dev/sda", "12"), True),
        ("/dev/nvme0n1p3", ("/dev/nvme0n1", "3"), True),
        ("/dev/md127p1", ("/dev/md127", "1"), True),
        ("/dev/md127", ("/dev/md127", ""), False),
        ("/dev/disk/by-id/ata-X-part1", ("/dev/disk/by-id/ata-X", "1"), True),
        ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", ""), False),
        ("/dev/mapper/a-b", None, False),
        ("/dev/sr0", None, False),
    ],
)
def test_nodes_and_their_partitions(node: str, parsed: tuple[str, str] | None, again: bool) -> None:
    assert parse_node(node) == parsed
    if again and parsed is not None:
        assert partition_node(*parsed) == node


def test_names_of_the_device_mapper() -> None:
    assert mapper_node("my-vg", "a-b") == "/dev/mapper/my--vg-a--b"


def test_logical_partitions_and_their_ids() -> None:
    partitions = (
        Partition(number=1, start=MIB, size=4 * GIB, type="05"),
        Partition(number=5, start=2 * MIB, size=GIB, type="83", record=MIB),
    )
    table = MbrTable(on="sda", signature="deadbeef", partitions=partitions, boot_code=b"")
    it = identify(Layout(disks=(disk("sda"),), layers=(table, ext4("sda:5", ROOT))), root="sda:5")
    assert [each.space for each in it.volumes if each.kind == "partition"] == ["sda:5"]
    assert one(it, "filesystem", "sda:5").partuuid == "deadbeef-05"
