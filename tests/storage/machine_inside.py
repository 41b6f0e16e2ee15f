"""What the storage ring runs inside its own kernel: disks with several paths, a firmware RAID, and a blank disk."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from remetal.layout.disks import find_disks
from remetal.layout.machine import probe_machine, targets_of_machine
from remetal.layout.model import FileSystem, GptTable, Raw
from remetal.layout.record import decode_layout, encode_layout
from remetal.layout.targets import probe_target
from tests.storage.layout_inside import program

FIRST, SECOND, LEFT, RIGHT, BLANK = (Path(f"/dev/ubd{letter}") for letter in "abcde")
MULTIPATH = Path("/dev/mapper/mpatha")
PARTITIONS = "label: gpt\nsize=16MiB, type=uefi\nsize=40MiB, type=linux, name=root\n"


def join_paths() -> None:
    """Make a multipath device, whose second path is only used when the first one fails."""
    program("modprobe", "-a", "dm-multipath", "dm-round-robin")
    size = program("blockdev", "--getsz", FIRST).strip()
    paths = f"2 1 round-robin 0 1 1 {FIRST} 1 round-robin 0 1 1 {SECOND} 1"
    table = f"0 {size} multipath 0 0 {paths}"
    program("dmsetup", "create", "mpatha", "--uuid", "mpath-360060160a0b1c2d3e4f5061728394a5b", "--table", table)
    program("udevadm", "settle")
    subprocess.run(["sfdisk", "--quiet", "--no-reread", MULTIPATH], input=PARTITIONS, text=True, check=True)
    program("mkfs.ext4", "-q", "-L", "root", "-E", f"offset={17 << 20}", MULTIPATH, "40M")


def a_multipath_disk_is_one_disk() -> None:
    """Its paths are no disks, and must not be written to; everything else goes through the device that joins them."""
    join_paths()
    assert find_disks() == [Path("/dev/dm-0"), LEFT, RIGHT, BLANK]
    layout = probe_machine()
    assert decode_layout(encode_layout(layout)) == layout
    assert layout.inventory is not None
    assert [disk.name for disk in layout.inventory.disks] == [disk.name for disk in layout.disks]
    assert layout.disks[0].name == "mpatha"
    assert layout.disks[0].wwn == "naa.60060160a0b1c2d3e4f5061728394a5b"
    assert isinstance(layout.layer_on("mpatha"), GptTable)
    root = layout.layer_on("mpatha:2")
    assert isinstance(root, FileSystem)
    assert root.label == "root"
    for path in (FIRST, SECOND):
        assert (
            "it is a path of the multipath device /dev/dm-0, which is to be named in its place"
            in probe_target(path, size_if_missing=0).uses
        )
    whole = probe_target(MULTIPATH, size_if_missing=0)
    assert (whole.name, whole.uses, whole.content) == (
        "mpatha",
        (),
        "GPT table with 2 partitions (unknown content, ext4 'root')",
    )
    assert whole.wwn == layout.disks[0].wwn


def a_node_of_its_own_does_as_well() -> None:
    """Without udev, what stands in /dev/mapper is no link to the kernel's name."""
    node = Path("/run/mpatha")
    number = MULTIPATH.stat().st_rdev
    program("mknod", node, "b", str(os.major(number)), str(os.minor(number)))
    found = probe_target(node, size_if_missing=0)
    assert (found.name, found.wwn) == ("mpatha", "naa.60060160a0b1c2d3e4f5061728394a5b")


def a_blank_disk_is_shown_as_empty() -> None:
    """A recorded machine has to say which of its disks are free."""
    layout = probe_machine()
    assert layout.layer_on(BLANK.name) is None
    (blank,) = (target for target in targets_of_machine(layout) if target.name == BLANK.name)
    assert blank == probe_target(BLANK, size_if_missing=0)
    assert blank.content == ""


def a_firmware_raid_is_one_disk() -> None:
    """The volume is the disk; where nothing assembles it, the members say what they are."""
    os.environ |= {"IMSM_NO_PLATFORM": "1", "IMSM_DEVNAME_AS_SERIAL": "1"}
    program("modprobe", "raid1")
    program("mdadm", "--create", "/dev/md/fw", "--metadata=imsm", "--raid-devices=2", LEFT, RIGHT, "--run")
    program("mdadm", "--create", "/dev/md/vol", "--level=1", "--raid-devices=2", "/dev/md/fw", "--run")
    program("udevadm", "settle")
    volume = Path("/dev/md126")
    program("mkfs.ext4", "-q", "-L", "data", volume)
    assert find_disks() == [Path("/dev/dm-0"), BLANK, volume]
    layout = probe_machine()
    (disk,) = (disk for disk in layout.disks if disk.name == "md126")
    assert (disk.model, disk.bus) == ("Intel RAID volume, raid1", "md")
    data = layout.layer_on("md126")
    assert isinstance(data, FileSystem)
    assert data.label == "data"
    assert (
        probe_target(LEFT, size_if_missing=0)
        .uses[0]
        .startswith("it is a member of the firmware RAID volume /dev/md126")
    )
    assert probe_target(volume, size_if_missing=0).uses == ()
    for each in ("/dev/md126", "/dev/md127"):
        program("mdadm", "--stop", each)
    program("udevadm", "settle")
    assert find_disks() == [Path("/dev/dm-0"), LEFT, RIGHT, BLANK]
    member = probe_machine().layer_on(LEFT.name)
    assert isinstance(member, Raw)
    assert member.type == "isw_raid_member"
    assert probe_target(LEFT, size_if_missing=0).content == "Intel RAID member"
