"""Disks are matched by what they are, never by what the kernel calls them; whatever is not clear is refused."""

from __future__ import annotations

import msgspec.structs
import pytest

from remetal.errors import RefusedError, UsageError
from remetal.layout.matching import (
    HOLDS_REPOSITORY,
    IS_MEDIUM,
    check_overwrite,
    find_marks,
    find_refusals,
    is_own,
    is_system_disk,
    match_targets,
)
from remetal.layout.model import EFI_SYSTEM, Disk, FileSystem, GptTable, Layout, MbrTable, Partition, Raw
from remetal.layout.plan import PlanOptions, Target, plan_restore
from remetal.layout.sameness import are_paths, is_same_disk_by_serial, is_same_disk_by_wwn, plain_serial, plain_wwn

GIB = 1 << 30
A = Disk(name="sda", size=10 * GIB, wwn="naa.50014ee2b1", serial="WD-A1", bus="ata")
B = Disk(name="sdb", size=20 * GIB, serial="WD-B1", bus="ata")


def target(name: str, size: int = 20 * GIB, **more: str | int | bool | tuple[str, ...]) -> Target:
    return Target(path=f"/dev/{name}", name=name, size=size, **more)  # type: ignore[arg-type]


def machine(*disks: Disk) -> Layout:
    return Layout(disks=disks, layers=tuple(Raw(on=disk.name, size=disk.size) for disk in disks))


def matched(layout: Layout, *candidates: Target) -> dict[str, str]:
    return {name: match.target.path for name, match in match_targets(layout, candidates).items()}


def reason(layout: Layout, *candidates: Target) -> str:
    (match,) = match_targets(layout, candidates).values()
    return match.reason


def unclear(layout: Layout, *candidates: Target) -> RefusedError:
    with pytest.raises(RefusedError, match="not clear onto which disk") as caught:
        match_targets(layout, candidates)
    for each in candidates:
        assert each.path in caught.value.message
    return caught.value


def test_world_wide_name_beats_the_kernels_name_and_the_serial_number() -> None:
    old = target("sdb", 10 * GIB, wwn="naa.50014ee2b1", content="the old system")
    assert matched(machine(A), target("sda"), old) == {"sda": "/dev/sdb"}
    assert reason(machine(A), target("sda"), old) == "same world-wide name, naa.50014ee2b1"
    behind_usb = target("sdb", 10 * GIB, wwn="0x50014EE2B1", serial="BRIDGE7", bus="usb")
    assert matched(machine(A), target("sda", 10 * GIB, serial="WD-A1", bus="scsi"), behind_usb) == {"sda": "/dev/sdb"}


def test_serial_number_where_there_is_no_world_wide_name() -> None:
    found = match_targets(
        machine(A, B), [target("sda", serial="WD-B1"), target("sdb", 10 * GIB, serial=" WD-A1 ", bus="scsi")]
    )
    assert {name: (each.target.path, each.reason) for name, each in found.items()} == {
        "sda": ("/dev/sdb", "same serial number, WD-A1"),
        "sdb": ("/dev/sda", "same serial number, WD-B1"),
    }


def test_the_names_of_a_disk_in_all_their_spellings() -> None:
    for same in ("naa.5000C500A1B2C3D4", "0x5000c500a1b2c3d4", "wwn-0x5000c500a1b2c3d4", "scsi-35000c500a1b2c3d4"):
        assert plain_wwn(same) == "5000c500a1b2c3d4"
    assert plain_wwn("dm-uuid-mpath-360060160a0b1c2d3e4f5061728394a5b") == "60060160a0b1c2d3e4f5061728394a5b"
    assert plain_wwn("eui.0025385B71B01234") == plain_wwn("20025385b71b01234") == "0025385b71b01234"
    assert plain_wwn("nvme.8086-abc-def-00000001") == "nvme.8086-abc-def-00000001"
    for nothing in ("", "eui.0000000000000000", "0x5000000000000000", "naa.0000000000000000"):
        assert plain_wwn(nothing) == ""


def test_the_serial_numbers_of_a_disk_in_all_their_spellings() -> None:
    for same in ("WD-WCC4N1234567", "     WD-WCC4N1234567", "wd-wcc4n1234567 ", "57442d57434334 4e31323334353637"):
        assert plain_serial(same) == "wd-wcc4n1234567"
    assert plain_serial("6001405c2e7e4d1a") == "6001405c2e7e4d1a"
    for nothing in ("", "0", "00000000", "QM00001", "0123456789ABCDEF", "123456789012", "None", "\0\0"):
        assert plain_serial(nothing) == ""


def test_cheap_disks_that_share_a_name_are_not_one() -> None:
    one = Disk(name="sda", size=GIB, wwn="naa.5000000000000100", serial="AA1", bus="ata")
    other = target("sdb", GIB, wwn="naa.5000000000000100", serial="AA2", bus="ata")
    assert not is_same_disk_by_wwn(one, other)
    assert is_same_disk_by_wwn(one, target("sdb", GIB, wwn="5000000000000100", serial="BRIDGE", bus="usb"))
    assert not is_same_disk_by_serial(one, target("sdb", GIB, wwn="naa.5000000000000200", serial="AA1", bus="ata"))


def test_a_serial_number_alone_does_not_do() -> None:
    """`1` of one manufacturer is not `1` of the other; but a virtual disk may have been made larger."""
    one = Disk(name="vda", size=GIB, serial="vol-1", bus="virtio")
    assert is_same_disk_by_serial(one, target("vda", 2 * GIB, serial="vol-1", bus="virtio"))
    assert not is_same_disk_by_serial(one, target("sda", 2 * GIB, serial="vol-1", bus="usb", model="Stick"))
    assert not is_same_disk_by_serial(Disk(name="a", size=GIB, serial="7"), target("b", 2 * GIB, serial="7"))


def test_paths_to_one_disk() -> None:
    one = Disk(name="sda", size=GIB, wwn="naa.60060160a0b1c2d3", bus="scsi")
    assert are_paths(one, target("sdb", GIB, wwn="naa.60060160a0b1c2d3", bus="scsi"))
    assert not are_paths(one, target("sdb", 2 * GIB, wwn="naa.60060160a0b1c2d3", bus="scsi"))
    assert not are_paths(one, target("sdb", GIB, wwn="naa.60060160a0b1c2d4", bus="scsi"))
    assert not are_paths(
        Disk(name="sda", size=GIB, wwn="naa.5001234", bus="ata"), target("sdb", GIB, wwn="naa.5001234", bus="ata")
    )


def test_identities_that_are_not_unique_do_not_count() -> None:
    twins = [target("sdc", 10 * GIB, serial="WD-A1"), target("sdd", 10 * GIB, serial="WD-A1")]
    error = unclear(machine(A), *twins)
    assert "/dev/sdc (10.0 GiB) could take it and has the identity of sda, but is not the only one" in error.message
    both = [Disk(name=name, size=GIB, serial="X7") for name in ("sda", "sdb")]
    assert "sda and sdb" in unclear(machine(*both), target("sdc", GIB, serial="X7")).message


def test_the_only_blank_one_of_the_same_size_on_the_same_bus() -> None:
    nameless = Disk(name="vda", size=10 * GIB, bus="virtio")
    larger, same = target("vdb", bus="virtio"), target("vdc", 10 * GIB, bus="virtio")
    assert reason(machine(nameless), larger, same) == (
        "the only free and blank disk of the same size, 10737418240 bytes, on the same bus, virtio"
    )
    used = target("vdd", 10 * GIB, bus="virtio", content="swap")
    assert matched(machine(nameless), larger, same, used) == {"vda": "/dev/vdc"}
    unclear(machine(nameless), same, target("vdd", 10 * GIB, bus="virtio"))
    unclear(machine(Disk(name="vda", size=10 * GIB)), larger, target("vdc", 10 * GIB))
    pair = machine(nameless, Disk(name="vdb", size=10 * GIB, bus="virtio"))
    assert "vda and vdb" in unclear(pair, same, larger).message


def test_several_disks_each_by_its_own_size() -> None:
    layout = machine(Disk(name="sda", size=10 * GIB, bus="scsi"), Disk(name="sdb", size=20 * GIB, bus="scsi"))
    found = matched(layout, target("sdx", 20 * GIB, bus="scsi"), target("sdy", 10 * GIB, bus="scsi"))
    assert found == {"sda": "/dev/sdy", "sdb": "/dev/sdx"}


def test_the_only_blank_one_that_is_large_enough() -> None:
    candidates = [
        target("sda", content="GPT table with 2 partitions"),
        target("sdb", 5 * GIB),
        target("sdc"),
        target("sdd", uses=("/dev/sdd1 is mounted read-write at /mnt",)),
        target("sde", roles=(IS_MEDIUM,)),
        target("sdf", logical_sector=4096),
        target("sdg", bus="usb"),
    ]
    (match,) = match_targets(machine(A), candidates).values()
    assert (match.target.path, match.reason) == ("/dev/sdc", "the only disk that is free, blank and large enough")
    error = unclear(machine(A), *[each for each in candidates if each.name != "sdc"])
    for words in (
        "sda: a data disk of 10.0 GiB on ata",
        "/dev/sda (20.0 GiB) holds GPT table with 2 partitions",
        "/dev/sdb (5.00 GiB) is smaller than sda, which has 10.0 GiB",
        "/dev/sdd (20.0 GiB) cannot be taken (/dev/sdd1 is mounted read-write at /mnt)",
        "/dev/sde (20.0 GiB) is the recovery medium",
        "/dev/sdf (20.0 GiB) has sectors of 4096 bytes",
        "/dev/sdg (20.0 GiB) is attached by USB, as sda was not",
    ):
        assert words in error.message
    assert "--map sda=TARGET" in error.hint


def test_two_that_fit_are_one_too_many() -> None:
    assert "could take it" in unclear(machine(A), target("sda"), target("sdb")).message
    assert "no other disk" in unclear(machine(A)).message


def test_blank_is_only_taken_for_a_single_disk() -> None:
    error = unclear(machine(A, B), target("sdx"), target("sdy", 10 * GIB))
    assert "/dev/sdx (20.0 GiB) could take sda or sdb" in error.message
    assert "/dev/sdy (10.0 GiB) could take sda and is smaller than sdb, which has 20.0 GiB" in error.message
    rest = matched(machine(A, B), target("sdx", wwn="naa.50014ee2b1"), target("sdy"))
    assert rest == {"sda": "/dev/sdx", "sdb": "/dev/sdy"}


def test_a_disk_on_a_usb_port_goes_back_to_one() -> None:
    stick = Disk(name="sdc", size=GIB, bus="usb")
    assert matched(machine(stick), target("sdx", 2 * GIB, bus="usb")) == {"sdc": "/dev/sdx"}


def test_blank_disks_and_those_that_were_mapped_need_no_target() -> None:
    layout = Layout(disks=(A, B), layers=(Raw(on="sdb", size=B.size),))
    assert matched(layout, target("sdx")) == {"sdb": "/dev/sdx"}
    assert match_targets(layout, [], mapped={"sdb": "/dev/sdy"}) == {}


def refusals(target: Target, *overwrite: str, own: bool = False) -> list[str]:
    found = list(find_refusals(target, overwrite, own=own))
    assert all(hint for _, hint in found)
    return [message for message, _ in found]


def test_data_outside_the_plan_have_to_be_named_twice() -> None:
    foreign = target("sdb", content="GPT table with 1 partition (ext4 'photos')")
    (message,) = refusals(foreign)
    assert message == ("/dev/sdb holds data that are not of this snapshot: GPT table with 1 partition (ext4 'photos')")
    assert "--overwrite /dev/sdb" in next(find_refusals(foreign, (), own=False))[1]
    assert refusals(foreign, "/dev/sda") == [message]
    assert refusals(foreign, "/dev/sdb") == []
    assert refusals(foreign, own=True) == []
    assert refusals(target("sdb")) == []


def test_the_medium_may_be_named_twice_and_the_repository_may_not() -> None:
    medium = target("sdb", content="iso9660", roles=(IS_MEDIUM,))
    assert len(refusals(medium)) == 2
    assert refusals(medium, own=True) == ["/dev/sdb must not be overwritten: it is the recovery medium"]
    assert refusals(medium, "/dev/sdb") == []
    repository = target("sdb", content="ext4", roles=(HOLDS_REPOSITORY,))
    assert refusals(repository, "/dev/sdb", own=True) == ["/dev/sdb must not be overwritten: it holds the repository"]


def test_what_is_in_use_is_refused_however_often_it_is_named() -> None:
    used = target("sdb", content="ext4", uses=("/dev/sdb1 is mounted read-only at /mnt",))
    assert refusals(used, "/dev/sdb", own=True) == [
        "/dev/sdb must not be overwritten: /dev/sdb1 is mounted read-only at /mnt"
    ]


def test_overwriting_what_is_no_target_is_a_slip() -> None:
    targets = {"sda": target("sdb")}
    check_overwrite(targets, ["/dev/sdb"])
    with pytest.raises(UsageError, match="names /dev/sdc, which is no target") as caught:
        check_overwrite(targets, ["/dev/sdb", "/dev/sdc"])
    assert "/dev/sdb" in caught.value.hint


def gpt(*numbers: int, on: str = "sda") -> GptTable:
    partitions = tuple(
        Partition(number=each, start=each << 20, size=1 << 20, type=EFI_SYSTEM, uuid=GUID[:-1] + str(each))
        for each in numbers
    )
    return GptTable(on=on, disk_guid=GUID, entry_count=128, partitions=partitions, protective_mbr=bytes(512))


def marks(layer: GptTable | MbrTable | FileSystem | Raw) -> frozenset[str]:
    return find_marks(Layout(disks=(A,), layers=(layer,)), "sda")


def test_what_a_disk_holds_is_known_by_its_marks() -> None:
    dos = MbrTable(
        on="sda",
        signature="deadbeef",
        partitions=(Partition(number=1, start=512, size=512, type="83"),),
        boot_code=bytes(440),
    )
    assert marks(gpt(1, 2)) == {GUID, GUID[:-1] + "1", GUID[:-1] + "2"}
    assert marks(dos) == {"deadbeef", "deadbeef-01"}
    assert marks(MbrTable(on="sda", signature="00000000", partitions=dos.partitions, boot_code=bytes(440))) == set()
    volume = FileSystem(on="sda", type="ext4", size=GIB, used=0, block_size=4096, uuid="u-1")
    assert marks(volume) == {"u-1"}
    assert marks(Raw(on="sda", size=GIB, type="crypto_LUKS")) == set()


def test_own_content() -> None:
    layout = Layout(disks=(A,), layers=(gpt(1, 2),))
    known, half, more = (tuple(sorted(marks(gpt(*numbers)))) for numbers in ((1, 2), (1,), (1, 2, 3)))
    assert is_own(layout, A, target("sdx", marks=known)), "what a restore left"
    assert is_own(layout, A, target("sdx", marks=half))
    assert not is_own(layout, A, target("sdx", wwn=A.wwn, marks=more)), "a partition that came later"
    assert not is_own(layout, A, target("sdx", wwn=A.wwn, marks=("another",))), "another system was installed on it"
    assert is_own(layout, A, target("sdx", wwn=A.wwn, content="unknown content")), "its table was destroyed"
    assert not is_own(layout, A, target("sdx", content="unknown content"))


def test_a_disk_without_identity_is_known_by_what_it_carries() -> None:
    """So is a new disk on which a restore broke off."""
    layout = Layout(disks=(Disk(name="vda", size=10 * GIB, bus="virtio"),), layers=(gpt(1, 2, on="vda"),))
    own = target("vdb", marks=tuple(sorted(marks(gpt(1, 2)))), content="GPT table")
    other = target("vdc", 10 * GIB, bus="virtio", content="GPT table", marks=("other",))
    assert matched(layout, target("vda", bus="virtio"), own, other) == {"vda": "/dev/vdb"}
    assert "could take it" not in unclear(layout, own, msgspec.structs.replace(own, path="/dev/vdd")).message


def test_system_and_data_disks() -> None:
    assert is_system_disk(Layout(disks=(A,), layers=(gpt(1),)), "sda")
    assert not is_system_disk(Layout(disks=(A,), layers=(gpt(),)), "sda")
    assert not is_system_disk(machine(A), "sda")
    for status, kind, expected in ((0x80, "83", True), (0, "ef", True), (0, "83", False)):
        one = Partition(number=1, start=1 << 20, size=1 << 20, type=kind, attributes=status)
        table = MbrTable(on="sda", signature="deadbeef", partitions=(one,), boot_code=bytes(440))
        assert is_system_disk(Layout(disks=(A,), layers=(table,)), "sda") is expected
        loader = Raw(on="sda:boot", size=1024)
        assert is_system_disk(Layout(disks=(A,), layers=(table, loader)), "sda")


GUID = "12345678-1234-4234-8234-1234567890AB"
TABLE = GptTable(on="sda", disk_guid=GUID, entry_count=128, partitions=(), protective_mbr=bytes(512))
LAYOUT = Layout(
    disks=(A, B), layers=(TABLE, GptTable(**{**{f: getattr(TABLE, f) for f in TABLE.__struct_fields__}, "on": "sdb"}))
)


def refused(**targets: Target) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        plan_restore(LAYOUT, {}, targets, snapshot="s", options=PlanOptions())
    return caught.value


def test_the_plan_refuses_what_cannot_be_meant() -> None:
    assert "there is no target for disk sdb" in refused(sda=target("x")).message
    assert "both go to /dev/x" in refused(sda=target("x"), sdb=target("x")).message
    tight = refused(sda=target("x", is_file=True, size=0), sdb=target("y"))
    assert "impossible size" in tight.message
    with pytest.raises(UsageError, match="no disk 'sdz'"):
        plan_restore(LAYOUT, {}, {"sdz": target("x")}, snapshot="s", options=PlanOptions())


def test_all_reasons_are_told_at_once() -> None:
    error = refused(
        sda=target("x", uses=("/dev/x1 is mounted read-only at /mnt",)),
        sdb=target("y", roles=("holds the repository",)),
    )
    assert "/dev/x must not be overwritten: /dev/x1 is mounted read-only at /mnt" in error.message
    assert "/dev/y must not be overwritten: it holds the repository" in error.message


def test_another_sector_size_is_no_matter_for_a_disk_file() -> None:
    coarse = Layout(disks=(Disk(name="sda", size=GIB, logical_sector=4096),), layers=(TABLE,))
    plan = plan_restore(coarse, {}, {"sda": target("x.img", GIB, is_file=True)}, snapshot="s", options=PlanOptions())
    assert plan.result.disks[0].logical_sector == 4096
