"""Hardware as recorded from sysfs and procfs of machines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remetal.layout.disks import find_covered, find_disk_names, find_disks
from remetal.layout.identity import Identity, find_own_name, find_parts, parse_serial_page, probe_identity
from remetal.layout.inventory import parse_cpuinfo, parse_meminfo, probe_inventory
from remetal.layout.signatures import Signature, parse_signature
from tests.machines.record import rebuild

RAW = Path(__file__).parents[1] / "machines/raw"


@pytest.mark.parametrize("path", sorted(RAW.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_sysfs(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text())
    rebuild(record["tree"], tmp_path)
    found = probe_inventory(tmp_path / "sys", tmp_path / "proc")
    expected = record["inventory"]
    assert [[d.name, d.size, d.model, d.serial, d.wwn, d.bus] for d in found.disks] == expected["disks"]
    assert [[n.name, n.mac, n.driver, n.place] for n in found.nics] == expected["nics"]
    assert [found.firmware, found.vendor, found.product, found.cpu] == expected["machine"]
    assert [found.cores, found.memory, found.kernel] == expected["numbers"]
    assert list(found.modaliases) == expected["modaliases"]


def recorded(name: str, folder: Path) -> Path:
    """Rebuild a recorded tree and return its sysfs."""
    rebuild(json.loads((RAW / f"{name}.json").read_text())["tree"], folder)
    return folder / "sys"


def test_a_multipath_device_stands_for_its_paths(tmp_path: Path) -> None:
    """Recorded: dm-multipath over two paths, and kpartx's mapping of a partition on it."""
    sys = recorded("uml-multipath", tmp_path)
    assert find_disks(sys) == [Path("/dev/dm-0"), Path("/dev/ubdc")]
    assert find_covered(sys) == {"ubda": "dm-0", "ubdb": "dm-0"}
    assert (find_parts("dm-0", sys), find_parts("dm-1", sys)) == (("ubda", "ubdb"), ())
    assert find_own_name("dm-0", sys) == "mpatha"
    assert probe_identity("dm-0", sys).wwn == "naa.60060160a0b1c2d3e4f5061728394a5b"


@pytest.mark.parametrize(("name", "model"), [("uml-imsm", "Intel RAID volume"), ("uml-ddf", "DDF RAID volume")])
def test_volumes_of_a_firmware_raid_stand_for_their_members(name: str, model: str, tmp_path: Path) -> None:
    """Recorded: two volumes on the same two members, made by mdadm in its container."""
    sys = recorded(name, tmp_path)
    assert find_disk_names(sys) == ["ubdc", "md125", "md126"]
    assert find_covered(sys).keys() == {"ubda", "ubdb"}
    assert probe_identity("md126", sys) == Identity(model=f"{model}, raid1", bus="md")
    assert find_parts("md127", sys) == ()


def test_this_machine() -> None:
    found = probe_inventory()
    assert found.cores == os.cpu_count()
    assert found.memory > 1 << 20
    assert found.architecture == os.uname().machine
    assert found.kernel == os.uname().release
    assert [disk.name for disk in found.disks] == [path.name for path in find_disks()]


def test_cpuinfo_and_meminfo() -> None:
    text = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)  CPU \nprocessor\t: 1\nmodel name\t: Intel\n"
    assert parse_cpuinfo(text) == ("Intel(R) Xeon(R)  CPU", 2)
    assert parse_cpuinfo("") == ("", 0)
    assert parse_meminfo("MemTotal:       24683900 kB\nMemFree: 1 kB\n") == 24683900 * 1024
    assert parse_meminfo("nothing") == 0


def test_serial_page() -> None:
    assert parse_serial_page(b"\x00\x80\x00\x08 QM00001rest") == "QM00001"
    assert parse_serial_page(b"\x00\x80\xff\xffABC\0\0") == "ABC"
    assert parse_serial_page(b"\x00\x83\x00\x03ABC") == ""
    assert parse_serial_page(b"") == ""


def test_unknown_disk_has_no_identity(tmp_path: Path) -> None:
    assert probe_identity("sdz", tmp_path) == Identity()


def test_blkid_output() -> None:
    text = b"ID_FS_LABEL=two_words\nID_FS_LABEL_ENC=two\\x20w\\xc3\\xb6rds\nID_FS_UUID=AB\nID_FS_TYPE=ext4\n"
    assert parse_signature(text) == Signature("ext4", "AB", "two wörds")
    assert parse_signature(b"ID_PART_TABLE_TYPE=gpt\n") == Signature(table="gpt")
    assert parse_signature(b"ID_FS_AMBIVALENT=other:btrfs:1 other:ext4:1\n").ambiguous


BLKID = {
    "blank": Signature(),
    "mkfs.ext4 -L 'zwei Wörter'": Signature("ext4", "68f4b70d-cdaa-46ff-9042-0250000088b3", "zwei Wörter"),
    "mkfs.ext2": Signature("ext2", "eca5d324-4b05-4be6-b2f9-80ea1ae238a3"),
    "mkfs.xfs -L data": Signature("xfs", "750e9fd4-d66a-4020-94a3-1e3eab32daa5", "data"),
    "mkfs.vfat -F 32 -n 'EFI SYSTEM'": Signature("vfat", "9657-EF96", "EFI SYSTEM"),
    "mkfs.ntfs -Q -L Windows": Signature("ntfs", "62DE71157D628FD6", "Windows"),
    "mkfs.exfat -L CARD": Signature("exfat", "6B1F-E969", "CARD", table="dos"),
    "mkfs.f2fs -l phone": Signature("f2fs", "ec6605ad-3426-4c6c-93dd-069b3f9d43d2", "phone"),
    "mkfs.btrfs -L pool": Signature("btrfs", "1e88b65e-c3bb-4ba0-9fed-184029a339a7", "pool"),
    "mkswap -L swap": Signature("swap", "2e21c4d8-5e2a-4ab1-945b-c17089223925", "swap"),
    "cryptsetup luksFormat --type luks1": Signature("crypto_LUKS", "e9c2dc49-e1da-4866-bdff-9af5bb831053"),
    "cryptsetup luksFormat --type luks2 --label crypt": Signature(
        "crypto_LUKS", "27635c4e-9518-43ce-91b1-fe8b465c973c", "crypt"
    ),
    "pvcreate": Signature("LVM2_member", "RP5MbI-P3yc-uRZJ-yWsc-3jkV-X7vt-V0Ntoe"),
    "mdadm --create --metadata=0.90": Signature("linux_raid_member", "e2f00e2e-b7e9-33ae-3d18-6b3c53958f34"),
    "mdadm --create --metadata=1.2": Signature(
        "linux_raid_member", "1f5bf00c-f88f-4409-eef1-d94bc2b3aa6f", "web1:root"
    ),
    "mdadm --create --metadata=imsm": Signature("isw_raid_member"),
    "mdadm --create --metadata=ddf": Signature("ddf_raid_member", "Linux-MD\u07ad__"),
    "make-bcache -B": Signature("bcache", "f488e9ed-84f2-4e5a-a681-eec834c32631"),
    "integritysetup format": Signature("DM_integrity"),
    "sfdisk: label gpt": Signature(table="gpt"),
    "sfdisk: label dos": Signature(table="dos"),
    "mksquashfs": Signature("squashfs"),
    "xorriso -as mkisofs -V REMETAL": Signature("iso9660", "2026-11-26-08-11-14-00", "REMETAL"),
    "mkfs.ext4 over mkfs.btrfs": Signature(ambiguous=True),
    "bitlocker (header made by hand)": Signature("BitLocker", table="dos"),
    "apfs (header made by hand)": Signature("apfs", "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"),
    "drbd (header made by hand)": Signature("drbd", "1122334455667788"),
    "zfs (header made by hand)": Signature("zfs_member"),
    "vmfs (header made by hand)": Signature("VMFS_volume_member"),
}


def test_what_blkid_prints_of_every_content() -> None:
    parts = (RAW / "blkid.txt").read_text().split("@@ ")[1:]
    outputs = {name: text.encode() for name, _, text in (part.partition("\n") for part in parts)}
    assert {name: parse_signature(text) for name, text in outputs.items()} == BLKID


@given(st.binary(max_size=200))
def test_whatever_blkid_prints_is_parsed(output: bytes) -> None:
    assert isinstance(parse_signature(b"ID_FS_TYPE=ext4\n" + output), Signature)
    assert isinstance(parse_serial_page(output), str)
