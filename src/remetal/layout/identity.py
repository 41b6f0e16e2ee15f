"""Who a disk is: model, serial number, world-wide name and bus, from sysfs.

Sources: Linux Documentation/ABI (sysfs-block, sysfs-class-nvme), SPC-4 (vital product data page 80h).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from remetal.layout.model import Disk
from remetal.system.blockdev import is_block_device, probe_geometry
from remetal.units import align_down

SYS = Path("/sys")

_WORLD_WIDE = re.compile(r"(?:naa|eui|uuid|nvme)\.(\S+)")
_BUSES = (
    ("/usb", "usb"),
    ("/nvme", "nvme"),
    ("/mmc", "mmc"),
    ("/ata", "ata"),
    ("/host", "scsi"),
    ("/virtio", "virtio"),
    ("/uml-blkdev", "uml"),
    ("/xen", "xen"),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a disk says of itself; every part may be empty."""

    model: str = ""
    serial: str = ""
    wwn: str = ""
    bus: str = ""


def probe_identity(name: str, sys: Path = SYS) -> Identity:
    """Read the identity of the disk with this kernel name. `sys` is where sysfs is mounted."""
    block = sys / "block" / name
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


def probe_disk(path: Path, name: str) -> Disk:
    """Describe a block device or a disk file under the given name; sizes are in whole sectors.

    Raises RefusedError if there is no such disk.
    """
    geometry = probe_geometry(path)
    identity = probe_identity(path.resolve().name) if is_block_device(path) else Identity()
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
