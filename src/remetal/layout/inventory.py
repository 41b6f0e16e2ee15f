"""A machine's hardware, from sysfs and procfs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from remetal.layout.disks import find_disk_names
from remetal.layout.identity import SYS, describe_disk
from remetal.layout.model import Disk, Inventory, Nic
from remetal.layout.routes import probe_routes

PROC = Path("/proc")


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


def probe_nics(sys: Path = SYS) -> tuple[Nic, ...]:
    """Describe the network interfaces that are hardware, in the order of their names."""
    nics = []
    for folder in sorted((sys / "class/net").glob("*")):
        device = folder / "device"
        if device.exists():
            driver = device / "driver"
            nics.append(
                Nic(
                    name=folder.name,
                    mac=_text(folder / "address"),
                    driver=driver.resolve().name if driver.exists() else "",
                    place=device.resolve().name,
                )
            )
    return tuple(nics)


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
