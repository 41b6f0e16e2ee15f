"""What a kernel needs before it finds its root: drivers for the devices on the way, modules for the storage on them.

Pure. Sources: Linux drivers/md/Kconfig, fs/*/super.c (aliases `fs-…`), crypto/api.c (aliases `crypto-…`),
Documentation/admin-guide/device-mapper; the PCI class codes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from remetal.layout.model import (
    Container,
    FileSystem,
    Inventory,
    Layout,
    Luks,
    MdArray,
    Route,
    SpaceId,
    VolumeGroup,
    spaces_of,
)

_LEVELS = {
    "linear": "linear",
    "raid0": "raid0",
    "raid1": "raid1",
    "raid10": "raid10",
    **dict.fromkeys(("raid4", "raid5", "raid6"), "raid456"),
}
_SEGMENTS = {
    "thin": "dm_thin_pool",
    "snapshot": "dm_snapshot",
    "mirror": "dm_mirror",
    "cache": "dm_cache",
    "writecache": "dm_writecache",
    "integrity": "dm_integrity",
    "vdo": "dm_vdo",
}
_NEVER_BUILT_IN = ("bc01", "bc02", "bc0C03", "bc0c03")
"""Marks of PCI devices that no kernel drives without saying so: mass storage, network, USB."""
_STORAGE = (
    r"^pci:.*bc01",  # mass storage
    r"^pci:.*bc08sc05",  # SD host controller
    r"^virtio:d0000000[28]",  # block device, SCSI host (Virtual I/O Device specification 1.2, 5)
    r"^vmbus:(d96361baa104294db60572e2ffb1dc7f|32264132cb86a2449b5c50d1417354f5|4acc9b2f6900f34ab76b6fd0be528cda)",
    r"^xen:vbd$",
    r"^scsi:t-0x00",  # a disk on whatever SCSI host
)
"""Devices that disks hang on."""


@dataclass(frozen=True, slots=True)
class Need:
    """Something that has to be driven before the root is found.

    `what` is what it is for. A device has its `modalias`, and in `seen` the driver or the module that drove it on
    another kernel; if it is not `certain`, it may be one that needs no driver. The storage has `names` of modules, or
    of aliases that any one module may provide.
    """

    what: str
    modalias: str = ""
    seen: str = ""
    certain: bool = True
    names: tuple[str, ...] = ()


def plan_hardware(inventory: Inventory, disks: Collection[str] = (), *, keyboard: bool = False) -> tuple[Need, ...]:
    """Return what it takes to reach these disks of a machine, by default all that are built in, and a keyboard.

    Of a machine whose record does not say how its disks are reached, all its storage controllers count.
    """
    chosen = disks or _built_in(inventory)
    routes = [each for each in inventory.routes if each.kind == "disk" and each.name in chosen]
    needs = [need for route in routes for need in _hardware(route)] or list(_controllers(inventory))
    for route in inventory.routes:
        if route.kind == "keyboard" and keyboard:
            needs += _hardware(route)
    return tuple(dict.fromkeys(needs))


def plan_network(inventory: Inventory) -> tuple[Need, ...]:
    """Return what it takes to drive the network cards of a machine."""
    return tuple(
        dict.fromkeys(need for route in inventory.routes if route.kind == "network" for need in _hardware(route))
    )


def plan_storage(layout: Layout, spaces: Collection[SpaceId]) -> tuple[Need, ...]:
    """Return what it takes to mount what stands on these spaces, and to open all that it stands on."""
    return tuple(dict.fromkeys(need for space in spaces for need in _storage(layout, space)))


def _built_in(inventory: Inventory) -> set[str]:
    every = {each.name for each in inventory.disks}
    return {each.name for each in inventory.disks if each.bus != "usb"} or every


def _hardware(route: Route) -> Iterator[Need]:
    what = {"disk": "the disk", "keyboard": "the keyboard", "network": "the network card"}.get(route.kind, route.kind)
    for link in route.links:
        known = bool(link.module) or any(mark in link.modalias for mark in _NEVER_BUILT_IN)
        certain = known and route.kind != "keyboard"
        yield Need(f"{what} {route.name} ({link.driver})", link.modalias, link.module or link.driver, certain)


def _controllers(inventory: Inventory) -> Iterator[Need]:
    found = [each for each in inventory.modaliases if any(re.search(mark, each) for mark in _STORAGE)]
    for modalias in found:
        yield Need("a storage controller", modalias, certain=len(found) == 1)


def _storage(layout: Layout, space: SpaceId) -> Iterator[Need]:
    layer = layout.layer_on(space)
    if isinstance(layer, FileSystem):
        yield Need(f"the {layer.type} on {space}", names=(f"fs-{layer.type}",))
    for each in spaces_of(layer) if isinstance(layer, FileSystem) else (space,):
        device = layout.place(each)[0].name
        provider = layout.provider_of(device)
        if provider is not None:
            yield Need(_describe(provider), names=tuple(_modules_of(provider, device)))
            for below in spaces_of(provider):
                yield from _storage(layout, below)


def _describe(container: Container) -> str:
    match container:
        case MdArray():
            return f"the array {container.device} ({container.level})"
        case VolumeGroup():
            return f"the volume group {container.name}"
        case Luks():
            return f"the LUKS container on {container.on}"


def _modules_of(container: Container, device: SpaceId) -> Iterator[str]:
    match container:
        case MdArray():
            yield _LEVELS.get(container.level, container.level)
        case VolumeGroup():
            kind = container.volume(device.removeprefix(f"{container.name}/")).kind
            yield "dm_mod"
            if kind.startswith("raid"):
                yield "dm_raid"
            elif kind in _SEGMENTS:
                yield _SEGMENTS[kind]
        case Luks():
            yield "dm_crypt"
            cipher, mode, *_ = [*container.cipher.split("-"), ""]
            yield from (f"crypto-{name}" for name in (cipher, mode) if name)
