"""Hardware as recorded from sysfs and procfs of machines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from remetal.layout.disks import find_disks
from remetal.layout.identity import Identity, parse_serial_page, probe_identity
from remetal.layout.inventory import parse_cpuinfo, parse_meminfo, probe_inventory
from remetal.layout.signatures import Signature, parse_signature

MACHINES = sorted((Path(__file__).parents[1] / "machines").glob("*.json"))


def rebuild(record: dict[str, Any], root: Path) -> None:
    """Make files, folders and links from a recorded tree: text, None, or ["->", target]; bytes as hexadecimal."""
    for name, value in record.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            place.mkdir(exist_ok=True)
        elif isinstance(value, list):
            place.symlink_to(value[1]) if value[0] == "->" else place.write_bytes(bytes.fromhex(value[1]))
        else:
            place.write_text(value)


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_recorded_machine(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text())
    rebuild(record["tree"], tmp_path)
    found = probe_inventory(tmp_path / "sys", tmp_path / "proc")
    expected = record["inventory"]
    assert [[d.name, d.size, d.model, d.serial, d.wwn, d.bus] for d in found.disks] == expected["disks"]
    assert [[n.name, n.mac, n.driver, n.place] for n in found.nics] == expected["nics"]
    assert [found.firmware, found.vendor, found.product, found.cpu] == expected["machine"]
    assert [found.cores, found.memory, found.kernel] == expected["numbers"]
    assert list(found.modaliases) == expected["modaliases"]


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
