"""Where a partition or a disk stands on this machine, as LVM and mdadm will see it: device nodes and hardware names.

Source: Linux Documentation/ABI (sysfs-block: wwid; sysfs-bus-scsi, sysfs-class-nvme: serial), udev(7).
"""

from __future__ import annotations

from pathlib import Path

from remetal.adapt.identity import Place
from remetal.layout.identity import SYS, find_kernel_name
from remetal.system.blockdev import is_block_device

_LINKS = (Path("/dev/disk/by-id"), Path("/dev/disk/by-path"))


def probe_place(disk: Path, part: int = 0, sys: Path = SYS) -> Place | None:
    """Return where partition `part` of a disk stands (0: the disk itself); None for a disk file, which is nowhere yet.

    The partition need not be known to the kernel yet: its node's name follows from the disk's.
    """
    if not is_block_device(disk):
        return None
    name = find_kernel_name(disk)
    node = name if not part else f"{name}p{part}" if name[-1:].isdigit() else f"{name}{part}"
    block = sys / "block" / name
    return Place(
        devices=(f"/dev/{node}", *_links(name, part)),
        wwid=_text(block / "device/wwid") or _text(block / "wwid"),
        serial=_text(block / "device/serial"),
        part=part,
    )


def _links(name: str, part: int) -> list[str]:
    """Return the links that udev has made for a disk of that kernel name, or will make for its partition."""
    suffix = f"-part{part}" if part else ""
    links = [link for folder in _LINKS for link in sorted(folder.glob("*"))]
    return [f"{link}{suffix}" for link in links if link.resolve().name == name]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip(" \n\0")
    except OSError:
        return ""
