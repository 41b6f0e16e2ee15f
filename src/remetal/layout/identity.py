"""Who a disk is: model, serial number, world-wide name and bus, from sysfs.

A disk that several paths lead to (multipath) and a volume that the firmware makes of several disks (Intel and DDF
RAID) are each one disk here: the device that the kernel shows for it, never what it is made of.

Sources: Linux Documentation/ABI (sysfs-block, sysfs-block-dm, sysfs-class-nvme), Documentation/admin-guide/md.rst,
sysfs-devices-removable, SPC-4 (vital product data page 80h), multipath(8).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from remetal.layout.model import Disk
from remetal.system.blockdev import is_block_device, probe_geometry
from remetal.units import align_down

SYS = Path("/sys")

_WORLD_WIDE = re.compile(r"(?:naa|eui|uuid|nvme)\.(\S+)")
_MULTIPATH = re.compile(r"mpath-(?:3([2356][0-9a-f]{15}|6[0-9a-f]{31})|\S+)")
_VOLUME = re.compile(r"external:[/-]([^/]+)/.+")
_CONTAINER = re.compile(r"external:([a-z]+)")
_FIRMWARE_RAID = {"imsm": "Intel RAID volume", "ddf": "DDF RAID volume"}
_BUSES = (
    ("/usb", "usb"),
    ("/nvme", "nvme"),
    ("/mmc", "mmc"),
    ("/ata", "ata"),
    ("/host", "scsi"),
    ("/virtio", "virtio"),
    ("/uml-blkdev", "uml"),
    ("/xen", "xen"),
    ("/vbd-", "xen"),
    ("/ndbus", "nvdimm"),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a disk says of itself; every part may be empty."""

    model: str = ""
    serial: str = ""
    wwn: str = ""
    bus: str = ""


def probe_identity(name: str, sys: Path = SYS) -> Identity:
    """Read the identity of the disk with this kernel name. `sys` is where sysfs is mounted.

    A multipath device has the identity of its paths.
    """
    block = sys / "block" / name
    joined = _MULTIPATH.fullmatch(_text(block / "dm/uuid"))
    if joined:
        path = next((probe_identity(each, sys) for each in find_parts(name, sys)), Identity())
        return replace(path, wwn=path.wwn or f"naa.{joined[1]}") if joined[1] else path
    container = _find_container(block)
    if container:
        kind = _CONTAINER.fullmatch(_text(sys / "block" / container / "md/metadata_version"))
        words = _FIRMWARE_RAID.get(kind[1] if kind else "", "firmware RAID volume")
        return Identity(model=f"{words}, {_text(block / 'md/level')}", bus="md")
    place = str(block.resolve()).removeprefix(str(sys.resolve()))
    device = block / "device"
    wwid = _text(device / "wwid") or _text(block / "wwid")
    world_wide = _WORLD_WIDE.fullmatch(wwid)
    return Identity(
        model=_text(device / "model") or _text(device / "name"),
        serial=parse_serial_page(_bytes(device / "vpd_pg80"))
        or _text(device / "serial")
        or _text(block / "serial")
        or _usb_serial(block.resolve()),
        wwn=world_wide[0].lower() if world_wide else "",
        bus=next((bus for part, bus in _BUSES if part in place), ""),
    )


def find_parts(name: str, sys: Path = SYS) -> tuple[str, ...]:
    """Return the kernel names of the disks that a disk is reached by or made of: nothing for an ordinary one.

    They are the paths of a multipath device, or the members of a RAID volume that the firmware defines. The
    container of such volumes is no disk, and has none.
    """
    block = sys / "block" / name
    if _MULTIPATH.fullmatch(_text(block / "dm/uuid")) or _find_container(block):
        return tuple(sorted(each.name for each in (block / "slaves").glob("*")))
    return ()


def find_kernel_name(path: Path) -> str:
    """Return the kernel's name of a block device, whatever node or link `path` is; else the path's last part."""
    if is_block_device(path):
        number = path.stat().st_rdev
        place = SYS / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
        if place.exists():
            return place.resolve().name
    return path.resolve().name


def is_fixed(name: str, sys: Path = SYS) -> bool:
    """Whether the disk with this kernel name is built in and can be written to: no USB disk, card, or other medium."""
    block = sys / "block" / name
    place = block.resolve()
    comes_and_goes = _text(block / "removable") == "1" or _text(block / "device/type") == "SD"
    outside = any(_text(folder / "removable") == "removable" for folder in place.parents)
    return not (comes_and_goes or outside or _text(block / "ro") == "1" or probe_identity(name, sys).bus == "usb")


def find_own_name(name: str, sys: Path = SYS) -> str:
    """Return what a layout calls the disk with this kernel name: `mpatha` for dm-0, `cciss_c0d0` for cciss!c0d0."""
    return re.sub(r"[^A-Za-z0-9_.+@-]", "_", _text(sys / "block" / name / "dm/name") or name)


def describe_disk(name: str, sys: Path = SYS) -> Disk:
    """Describe the disk with this kernel name from sysfs alone, without opening it; sizes are in whole sectors."""
    identity = probe_identity(name, sys)
    folder = sys / "block" / name
    logical = int(_text(folder / "queue/logical_block_size") or 512)
    return Disk(
        name=find_own_name(name, sys),
        size=align_down(int(_text(folder / "size") or 0) * 512, logical),
        logical_sector=logical,
        physical_sector=int(_text(folder / "queue/physical_block_size") or logical),
        model=identity.model,
        serial=identity.serial,
        wwn=identity.wwn,
        bus=identity.bus,
    )


def probe_disk(path: Path, name: str) -> Disk:
    """Describe a block device or a disk file under the given name; sizes are in whole sectors.

    Raises RefusedError if there is no such disk.
    """
    geometry = probe_geometry(path)
    identity = probe_identity(find_kernel_name(path)) if is_block_device(path) else Identity()
    return Disk(
        name=name,
        size=align_down(geometry.size, geometry.logical_sector),
        logical_sector=geometry.logical_sector,
        physical_sector=geometry.physical_sector,
        model=identity.model,
        serial=identity.serial,
        wwn=identity.wwn,
        bus=identity.bus,
    )


def parse_serial_page(data: bytes) -> str:
    """Return the serial number in a vital product data page 80h, or an empty text."""
    if len(data) < 4 or data[1] != 0x80:
        return ""
    length = int.from_bytes(data[2:4], "big")
    return data[4 : 4 + length].decode("ascii", "replace").strip(" \0")


def _find_container(block: Path) -> str:
    """Return the container of a RAID volume whose metadata belong to the firmware; empty for anything else."""
    found = _VOLUME.fullmatch(_text(block / "md/metadata_version"))
    return found[1] if found else ""


def _usb_serial(place: Path) -> str:
    """Return the serial number of the USB device that a disk belongs to."""
    for folder in place.parents:
        if (folder / "idVendor").exists():
            return _text(folder / "serial")
    return ""


def _text(path: Path) -> str:
    return " ".join(_bytes(path).decode("utf-8", "replace").replace("\0", " ").split())


def _bytes(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)
