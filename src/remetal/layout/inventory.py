"""A machine's hardware, from sysfs and procfs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from remetal.layout.disks import find_disk_names
from remetal.layout.identity import SYS, describe_disk
from remetal.layout.model import Disk, Inventory, Nic
from remetal.layout.routes import probe_routes
from remetal.system.ethtool import read_permanent_address

PROC = Path("/proc")
UDEV = Path("/run/udev/data")

_NAMING = re.compile(r"ID_NET_(?:NAME|LABEL)_")
_UP = 1
"""IFF_UP (netdevice(7))."""
_INFINIBAND = "32"
"""ARPHRD_INFINIBAND."""


def probe_inventory(sys: Path = SYS, proc: Path = PROC) -> Inventory:
    """Describe the machine that we run on. `sys` and `proc` are where sysfs and procfs are mounted."""
    cpu, cores = parse_cpuinfo(_text(proc / "cpuinfo"))
    own = os.uname()
    return Inventory(
        firmware="uefi" if (sys / "firmware/efi").is_dir() else "bios",
        architecture=own.machine,
        vendor=_text(sys / "class/dmi/id/sys_vendor"),
        product=_text(sys / "class/dmi/id/product_name"),
        serial=_text(sys / "class/dmi/id/product_serial"),
        cpu=cpu,
        cores=cores,
        memory=parse_meminfo(_text(proc / "meminfo")),
        kernel=_text(proc / "sys/kernel/osrelease"),
        disks=probe_disks(sys),
        nics=probe_nics(sys),
        modaliases=probe_modaliases(sys),
        routes=probe_routes(sys, proc),
    )


def probe_disks(sys: Path = SYS) -> tuple[Disk, ...]:
    """Describe all real disks of this machine, without opening them."""
    return tuple(describe_disk(name, sys) for name in find_disk_names(sys))


def probe_nics(sys: Path = SYS, udev: Path = UDEV) -> tuple[Nic, ...]:
    """Describe the network interfaces that are hardware, in the order of their names.

    `udev` is udev's database. Sources: Linux Documentation/ABI/testing/sysfs-class-net, systemd.net-naming-scheme(7).
    """
    folders = (each for each in sorted((sys / "class/net").glob("*")) if (each / "device").exists())
    return tuple(_probe_nic(folder, sys, udev) for folder in folders)


def _probe_nic(folder: Path, sys: Path, udev: Path) -> Nic:
    device = folder / "device"
    driver = device / "driver"
    index, assigned, flags = (_text(folder / name) for name in ("ifindex", "addr_assign_type", "flags"))
    told = parse_udev_data(_text(udev / f"n{index}")) if index.isdecimal() else {}
    return Nic(
        name=folder.name,
        mac=_text(folder / "address"),
        driver=driver.resolve().name if driver.exists() else "",
        place=device.resolve().name,
        permanent=read_permanent_address(folder.name) if sys == SYS else "",
        assigned=int(assigned) if assigned.isdecimal() else -1,
        kind=_probe_kind(folder),
        path=told.get("ID_PATH", ""),
        properties=tuple(f"{name}={told[name]}" for name in sorted(told) if _NAMING.match(name)),
        up=bool(int(flags, 16) & _UP) if flags.startswith("0x") else False,
        carrier=_text(folder / "carrier") == "1",
        virtual=(device / "physfn").exists(),
    )


def _probe_kind(folder: Path) -> str:
    if (folder / "phy80211").exists() or (folder / "wireless").exists():
        return "wlan"
    if "DEVTYPE=wwan" in _text(folder / "uevent").splitlines():
        return "wwan"
    return "infiniband" if _text(folder / "type") == _INFINIBAND else ""


def parse_udev_data(text: str) -> dict[str, str]:
    """Return the properties in a device's record in udev's database, whose lines are `E:NAME=VALUE`."""
    lines = (line[2:].partition("=") for line in text.splitlines() if line.startswith("E:"))
    return {name: value for name, equals, value in lines if equals}


def probe_modaliases(sys: Path = SYS) -> tuple[str, ...]:
    """Return what every device of the machine calls itself towards modprobe(8), each once, in order."""
    found = set()
    for folder, _, files in os.walk(sys / "devices"):
        if "modalias" in files:
            found.add(_text(Path(folder) / "modalias"))
    return tuple(sorted(found - {""}))


def parse_cpuinfo(text: str) -> tuple[str, int]:
    """Return the processor's name and the number of logical processors from the text of /proc/cpuinfo."""
    names = re.findall(r"^(?:model name|Model|cpu model)\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return (names[0] if names else ""), len(re.findall(r"^processor\s*:", text, re.MULTILINE))


def parse_meminfo(text: str) -> int:
    """Return the memory in bytes from the text of /proc/meminfo; 0 if it does not say."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
