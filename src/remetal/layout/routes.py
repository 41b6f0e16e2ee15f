"""How the kernel reaches disks, keyboards and network cards: the devices on the way, and the drivers bound to them.

These are what another kernel needs drivers for before it finds its root, anybody can type a passphrase, or the network
answers.

Sources: Linux Documentation/ABI (sysfs-devices, sysfs-class-nvme, sysfs-bus), Documentation/input/input.rst
(/proc/bus/input/devices), include/uapi/linux/input-event-codes.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from remetal.layout.disks import find_disk_names
from remetal.layout.identity import SYS, find_own_name, find_parts
from remetal.layout.model import Link, Route

_REPEATS = 1 << 20
"""EV_REP: what has keys that repeat is a keyboard, and no button."""


def probe_routes(sys: Path = SYS, proc: Path = Path("/proc")) -> tuple[Route, ...]:
    """Return how each real disk of this machine is reached, each keyboard, and each network card."""
    found = [
        Route(kind="disk", name=find_own_name(name, sys), links=links)
        for name in find_disk_names(sys)
        for part in find_parts(name, sys) or (name,)
        for place in _places(sys / "block" / part)
        if (links := tuple(_links(place, sys)))
    ]
    found += [
        Route(kind="keyboard", name=name, links=links)
        for name, place in parse_keyboards(_text(proc / "bus/input/devices"))
        if (links := tuple(_links(sys / place, sys)))
    ]
    found += [
        Route(kind="network", name=folder.name, links=links)
        for folder in sorted((sys / "class/net").glob("*"))
        if (folder / "device").exists() and (links := tuple(_links((folder / "device").resolve(), sys)))
    ]
    return tuple(dict.fromkeys(found))


def parse_keyboards(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and place in sysfs of each keyboard, from the text of /proc/bus/input/devices."""
    for block in text.split("\n\n"):
        events = re.search(r"^B: EV=([0-9a-f]+)$", block, re.MULTILINE)
        handlers = re.search(r"^H: Handlers=.*\bkbd\b", block, re.MULTILINE)
        name, place = (
            re.search(pattern, block, re.MULTILINE) for pattern in (r'^N: Name="(.*)"$', r"^S: Sysfs=/(.+)$")
        )
        if events and handlers and name and place and int(events[1], 16) & _REPEATS:
            yield name[1], place[1]


def _places(block: Path) -> Iterator[Path]:
    """Yield where a disk is in sysfs; one that several NVMe controllers lead to stands below none of them."""
    place = block.resolve()
    subsystem = next((each for each in place.parents if each.parent.name == "nvme-subsystem"), None)
    if subsystem is None:
        yield (block / "device").resolve() if (block / "device").exists() else place
        return
    for controller in sorted(subsystem.glob("nvme[0-9]*")):
        if controller.is_symlink():
            yield controller.resolve()


def _links(place: Path, sys: Path) -> Iterator[Link]:
    """Yield the devices with a driver from the bus to a place; without those that do not say what they are."""
    top = (sys / "devices").resolve()
    for folder in reversed((place, *place.parents)):
        driver = folder / "driver"
        if folder.is_relative_to(top) and driver.exists():
            module = driver / "module"
            modalias = _text(folder / "modalias") or _uevent(folder)
            if modalias:
                yield Link(
                    modalias=modalias,
                    driver=driver.resolve().name,
                    module=module.resolve().name if module.exists() else "",
                )


def _uevent(folder: Path) -> str:
    """Return the modalias of a device whose bus tells it only when it comes and goes, as MMC's does."""
    found = re.search(r"^MODALIAS=(.+)$", _text(folder / "uevent"), re.MULTILINE)
    return found[1] if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\n")
    except OSError:
        return ""
