"""The plan for the restored fstab: what holds, what is rewritten, what is only reported."""

from __future__ import annotations

import pytest

from remetal.adapt.fstab import Entry, find_volume, parse_fstab, plan_fstab
from remetal.adapt.identity import Gone, Identities, Named
from remetal.layout.model import Disk, FileSystem, GptTable, Layout, MbrTable, Partition, Raw, Swap
from tests.adapt_identities import identify

ROOT = "6f9c3a52-6d3f-4f0a-9a35-1d2c3b4a5e6f"
HOME = "0b7c9a10-58a8-4d07-8f2e-7a6b5c4d3e2f"
SWAP = "9d8c7b6a-5948-4736-a5b4-c3d2e1f00112"
GUIDS = [f"{number:08X}-0000-4000-8000-00000000ABCD" for number in range(1, 6)]


def layout(
    name: str = "sda", *, gpt: bool = True, serial: str = "S3Z9NX0M123456", more: tuple[str, ...] = ()
) -> Layout:
    disks, layers = [], []
    for index, disk in enumerate((name, *more)):
        parts = tuple(
            Partition(
                number=number,
                start=number << 20,
                size=1 << 20,
                type="x",
                uuid=f"{index}{GUIDS[number - 1][1:]}" if gpt else "",
                name=f"part {number}",
            )
            for number in range(1, 6)
        )
        disks.append(
            Disk(
                name=disk,
                size=1 << 30,
                serial=serial if index == 0 else "OTHER999",
                wwn="0x5000c500a1b2c3d4" if index == 0 else "",
            )
        )
        layers.append(
            GptTable(on=disk, disk_guid="X", entry_count=128, partitions=parts, protective_mbr=b"")
            if gpt
            else MbrTable(on=disk, signature="deadbeef", partitions=parts, boot_code=b"")
        )
    return Layout(
        disks=tuple(disks),
        layers=(
            *layers,
            FileSystem(on=f"{name}:1", type="vfat", uuid="1234-ABCD", size=1, used=0, block_size=4096),
            FileSystem(on=f"{name}:2", type="ext4", uuid=ROOT, label="root", size=1, used=0, block_size=4096),
            FileSystem(on=f"{name}:3", type="xfs", uuid=HOME, label="my home", size=1, used=0, block_size=4096),
            Swap(on=f"{name}:4", size=1, uuid=SWAP, label="swap"),
            Raw(on=f"{name}:5", size=1),
        ),
    )


def planned(
    text: str, *, source: Layout | None = None, result: Layout | None = None, root: str = "sda:2"
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    source = source or layout()
    result = result or source
    identities = identify(source, result, root=root, fstab=text)
    plan = plan_fstab(text, source=source, result=result, identities=identities)
    assert bool(plan.changes) == (plan.text != text) == bool(plan.diff)
    return plan.text, plan.changes, plan.notes


LASTING = f"""\
# /etc/fstab: static file system information.
UUID={ROOT} /         ext4 errors=remount-ro 0 1
UUID="{HOME.upper()}"\t/home xfs defaults 0 2
LABEL=my\\040home /mnt/a xfs defaults
/dev/disk/by-label/my\\x20home /mnt/b xfs defaults
/dev/disk/by-uuid/1234-ABCD /boot/efi vfat umask=0077 0 1
PARTUUID={GUIDS[1].lower().replace("0", "0")} /mnt/c ext4
PARTLABEL=part\\0402 /mnt/d ext4
UUID={SWAP} none swap sw 0 0
tmpfs /tmp tmpfs nosuid 0 0
/swapfile none swap sw 0 0
server:/export /srv nfs defaults 0 0
//nas/share /srv2 cifs defaults 0 0
/dev/mapper/vg-lv /var ext4 defaults 0 2
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
/dev/cdrom /media/cdrom1 udf,iso9660 user,noauto 0 0

"""


def test_lasting_names_hold_and_nothing_else_is_touched() -> None:
    assert planned(LASTING) == (LASTING, (), ())


@pytest.mark.parametrize("separator", [" ", "\t", "   \t "])
def test_kernel_names_become_uuids_byte_for_byte(separator: str) -> None:
    text = (
        f"  /dev/sda2{separator}/ ext4  defaults 0 1  # old\n/dev/sda4\tnone swap sw\n# /dev/sda3 /x\n"
        "/dev/sda5 /raw auto"
    )
    new, changes, notes = planned(text)
    assert new == (
        f"  UUID={ROOT}{separator}/ ext4  defaults 0 1  # old\nUUID={SWAP}\tnone swap sw\n# /dev/sda3 /x\n"
        f"PARTUUID={GUIDS[4].lower()} /raw auto"
    )
    assert len(changes) == 3
    assert notes == ()


def test_a_second_look_changes_nothing() -> None:
    new, _, _ = planned("/dev/sda2 / ext4 defaults 0 1\n")
    assert planned(new) == (new, (), ())


def test_the_diff_is_a_unified_diff() -> None:
    text = "a\n/dev/sda2 / ext4\nb\n"
    identities = identify(layout(), root="sda:2", fstab=text)
    plan = plan_fstab(text, source=layout(), result=layout(), identities=identities)
    assert plan.diff == (
        f"--- a/etc/fstab\n+++ b/etc/fstab\n@@ -1,3 +1,3 @@\n a\n-/dev/sda2 / ext4\n+UUID={ROOT} / ext4\n b\n"
    )


def test_mbr_partitions_get_their_partuuid() -> None:
    new, _, _ = planned("PARTUUID=deadbeef-02 / ext4\n/dev/sda5 /raw auto\n", source=layout(gpt=False))
    assert new == "PARTUUID=deadbeef-02 / ext4\nPARTUUID=deadbeef-05 /raw auto\n"


def test_the_entry_of_the_root_tells_which_disk_a_kernel_name_means() -> None:
    """Captured on a medium that called the disk sdb, with another disk as sda: sda2 still means the root's disk."""
    source = layout("sdb", more=("sda",))
    new, _, notes = planned("/dev/sda2 / ext4\n/dev/sda3 /home xfs\n", source=source, root="sdb:2")
    assert new == f"UUID={ROOT} / ext4\nUUID={HOME} /home xfs\n"
    assert notes == ()


def test_a_disk_file_has_no_kernel_name() -> None:
    new, _, _ = planned("/dev/vda2 / ext4\n/dev/vda3 /home xfs\n", source=layout("m.img"), root="m.img:2")
    assert new == f"UUID={ROOT} / ext4\nUUID={HOME} /home xfs\n"
    new, _, _ = planned("/dev/nvme0n1p2 / ext4\n/dev/nvme0n1p3 /h xfs\n", source=layout("m.img"), root="m.img:2")
    assert new == f"UUID={ROOT} / ext4\nUUID={HOME} /h xfs\n"


def test_a_name_without_evidence_may_mean_a_disk_that_was_never_captured() -> None:
    text = f"UUID={ROOT} / ext4\n/dev/sdb3 /data xfs\n"
    for name in ("m.img", "sda"):
        new, changes, notes = planned(text, source=layout(name), root=f"{name}:2")
        assert (new, changes) == (text, ())
        assert len(notes) == 1


def test_a_kernel_name_of_another_disk_or_type_is_left_and_reported() -> None:
    text = f"UUID={ROOT} / ext4\n/dev/sdb1 /data ext4 defaults\n/dev/sda3 /home ext4\n/dev/sdc1 /c ext4 nofail\n"
    new, changes, notes = planned(text)
    assert (new, changes) == (text, ())
    assert [note for note in notes if "/dev/sdb1 (/data)" in note and "nofail" in note]
    assert [note for note in notes if "/dev/sda3 (/home)" in note]
    assert len(notes) == 2


def test_a_root_entry_that_contradicts_is_not_believed() -> None:
    text = "/dev/sda3 / ext4\n/dev/sda4 none swap sw\n"
    assert planned(text)[0] == text


def test_names_made_of_hardware_become_uuids() -> None:
    text = (
        "/dev/disk/by-id/ata-Samsung_SSD_860_S3Z9NX0M123456-part2 / ext4\n"
        "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4-part3 /home xfs\n"
        "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part5 /raw auto\n"
        "/dev/disk/by-id/usb-Stick_4711-part1 /stick vfat\n"
    )
    new, changes, notes = planned(text)
    assert new.splitlines()[:2] == [f"UUID={ROOT} / ext4", f"UUID={HOME} /home xfs"]
    assert new.splitlines()[2:] == text.splitlines()[2:]
    assert (len(changes), len(notes)) == (2, 2)
    by_path, _, _ = planned(
        "/dev/disk/by-path/pci-1-ata-1-part2 / ext4\n/dev/disk/by-path/pci-1-ata-1-part4 none swap sw\n"
    )
    assert by_path == f"UUID={ROOT} / ext4\nUUID={SWAP} none swap sw\n"


def test_a_lasting_name_that_was_not_restored_is_reported_unless_it_is_optional() -> None:
    other = "ffffffff-0000-4000-8000-000000000000"
    text = f"UUID={other} /data ext4 defaults\nUUID={other} /b ext4 defaults,nofail\nLABEL=x /c ext4 noauto\n"
    new, _, notes = planned(text)
    assert new == text
    assert len(notes) == 1
    assert "nofail" in notes[0]
    opaque = layout()
    lvm = Raw(on="sda:5", size=1, type="LVM2_member")
    result = Layout(disks=opaque.disks, layers=(*opaque.layers[:-1], lvm))
    assert "LVM2_member" in planned(text, source=result)[2][0]


def test_the_result_decides_what_a_volume_is_called() -> None:
    source = layout()
    volumes = [each for each in source.layers if getattr(each, "on", "") != "sda:2"]
    grown = FileSystem(on="sda:2", type="ext4", uuid=ROOT, size=99, used=0, block_size=4096)
    new, _, _ = planned(
        "/dev/sda2 / ext4\n", source=source, result=Layout(disks=source.disks, layers=(*volumes, grown))
    )
    assert new == f"UUID={ROOT} / ext4\n"


def test_identities_tell_what_the_layouts_do_not() -> None:
    """An array that was dissolved, a UUID that changed, a volume group under another name, a volume that is gone."""
    old, gone = "11111111-0000-4000-8000-000000000000", "22222222-0000-4000-8000-000000000000"
    identities = Identities(
        (
            Named(space="sda:3", kind="filesystem", uuid=HOME, names=("/dev/md0",), lasting=(f"UUID={HOME}",)),
            Named(space="sda:2", kind="filesystem", uuid=old, new_uuid=ROOT, lasting=(f"UUID={ROOT}",)),
            Named(
                space="vg/a", kind="filesystem", names=("/dev/vg/a", "/dev/vg/b"), lasting=("/dev/new/a", "/dev/vg/b")
            ),
        ),
        (Gone(space="sdb:1", kind="filesystem", uuid=gone, why="sdb was left out", names=("/dev/vg/c",)),),
    )
    text = (
        f"UUID={old} / ext4\n/dev/md0 /home xfs\n/dev/vg/a /a xfs\n/dev/vg/b /b xfs\n"
        f"UUID={gone} /c ext4\n/dev/vg/c /d ext4\nUUID={gone} /e ext4 nofail\n"
    )
    plan = plan_fstab(text, source=layout(), result=layout(), identities=identities)
    expected = text.replace(old, ROOT).replace("/dev/md0", f"UUID={HOME}").replace("/dev/vg/a", "/dev/new/a")
    assert (plan.text, len(plan.changes)) == (expected, 3)
    assert len(plan.notes) == 2
    assert all("sdb was left out" in note for note in plan.notes)


def test_escapes_and_short_lines() -> None:
    text = "UUID=1 /a\\040b\\011c auto a,b\n/dev/x /m\\303\\244\nonlyone\n\n   # c\nx y"
    assert parse_fstab(text) == [
        Entry(0, "UUID=1", "/a b\tc", "auto", ("a", "b")),
        Entry(1, "/dev/x", "/mä", "", ("",)),
        Entry(5, "x", "y", "", ("",)),
    ]


def test_find_volume_by_every_lasting_name() -> None:
    it = layout()
    for spec, space in {
        f"UUID={ROOT.upper()}": "sda:2",
        "LABEL=my home": "sda:3",
        "LABEL=MY HOME": None,
        "LABEL=": None,
        f"PARTUUID={GUIDS[3].lower()}": "sda:4",
        "PARTLABEL=part 5": "sda:5",
        "/dev/disk/by-partlabel/part\\x205": "sda:5",
        "/dev/sdb2": None,
        "UUID=": None,
    }.items():
        found = find_volume(Entry(0, spec, "/x", "auto", ()), it, identify(it, root="sda:2"))
        assert (found.space if found is not None else None) == space, spec
