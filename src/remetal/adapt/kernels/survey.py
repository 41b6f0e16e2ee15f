"""Looking at the kernels of an installed system: what becomes of each on some hardware.

Nothing is written, and no program of the system is run. It works before a restore, on what images show, and after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from remetal.adapt.kernels.boot_files import find_boot_folders
from remetal.adapt.kernels.bootability import Outcome, Verdict, judge
from remetal.adapt.kernels.drivers import NONE, Drivers
from remetal.adapt.kernels.initramfs import Initramfs, probe_initramfs
from remetal.adapt.kernels.installed import Kernel, find_kernels
from remetal.adapt.kernels.modules import Modules, list_versions, read_modules
from remetal.adapt.kernels.needs import Need, plan_hardware, plan_network, plan_storage
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import find_inside, read_inside
from remetal.adapt.roots import System
from remetal.layout.model import Inventory, Layout, Luks, SpaceId, spaces_of
from remetal.ondisk.packed import unpack_whole
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB

INNER = ("/usr", "/boot", "/lib", "/etc", "/var")
"""Where the files of a system lie that its kernels and their generators need."""
LARGEST_MODULE = 256 * MIB
_NAMED_FIRMWARE = re.compile(rb"\0firmware=([\x21-\x7e]+)\0")
_NEEDED_EARLY = ("/", "/usr")
"""What an initramfs mounts."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a system is to run on: a machine, and which of its disks the disks of a layout are.

    `disks` are the kernel's names there, by those of the layout. It is empty where nobody has chosen yet: then all
    disks that are built in count.
    """

    inventory: Inventory
    disks: Mapping[SpaceId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Examined:
    """A kernel of an installed system, what was read of it, and what becomes of it."""

    kernel: Kernel
    modules: Modules | None
    initramfs: Initramfs | None
    verdict: Verdict


def examine_kernels(
    system: System, restored: Restored, root: Path, hardware: Hardware | None, drivers: Drivers = NONE
) -> tuple[Examined, ...]:
    """Return all kernels of a system whose root is mounted at `root`, newest first; with `drivers` as if it had them.

    Where nothing is known of the hardware, nothing is missing. Raises RemetalError if the disks cannot be read.
    """
    kernels = find_kernels(find_boot_folders(system, restored, root), list_versions(root))
    needs = _find_needs(system, restored.result, hardware) if hardware is not None else ()
    wishes = plan_network(hardware.inventory) if hardware is not None else ()
    known: dict[str, Modules | None] = {}
    found = []
    for kernel in kernels:
        if kernel.version not in known:
            modules = read_modules(root, kernel.version)
            known[kernel.version] = drivers.add_to(modules) if modules is not None else None
        found.append(_examine(kernel, known[kernel.version], needs, wishes))
    return tuple(found)


def find_firmware(root: Path, modules: Modules, names: Collection[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the firmware files that modules name: those that the system has, by their names, and those that it lacks.

    Their names are below lib/firmware, with the ending of the file that is there. Raises RemetalError.
    """
    there: dict[str, Path] = {}
    lacking: dict[str, None] = {}
    for name in names:
        data = read_module(root, modules, name) or b""
        for wanted in dict.fromkeys(found.decode("ascii") for found in _NAMED_FIRMWARE.findall(data)):
            for end in ("", ".xz", ".zst"):
                place = find_inside(root, f"/lib/firmware/{wanted}{end}")
                if place is not None and place.is_file():
                    there[wanted + end] = place
                    break
            else:
                lacking[wanted] = None
    return there, tuple(lacking)


def read_module(root: Path, modules: Modules, name: str) -> bytes | None:
    """Return the unpacked file of a module; None if it is only in the lists. Raises BadStructureError."""
    path = f"/lib/modules/{modules.version}/{modules.files[name]}"
    data = read_inside(root, path, limit=LARGEST_MODULE)
    return unpack_whole(data, limit=LARGEST_MODULE) if data is not None else None


def _find_needs(system: System, layout: Layout, hardware: Hardware) -> tuple[Need, ...]:
    spaces = [system.mounts[point] for point in _NEEDED_EARLY if point in system.mounts]
    under = {disk for space in spaces for disk in layout.disks_under(space)}
    disks = {hardware.disks[disk] for disk in under if disk in hardware.disks}
    keyboard = any(isinstance(each, Luks) for space in spaces for each in _layers_under(layout, space))
    return (*plan_hardware(hardware.inventory, disks, keyboard=keyboard), *plan_storage(layout, spaces))


def _layers_under(layout: Layout, space: SpaceId) -> list[object]:
    layer = layout.layer_on(space)
    found: list[object] = [layer]
    for each in spaces_of(layer) if layer is not None else (space,):
        provider = layout.provider_of(layout.place(each)[0].name)
        if provider is not None:
            found.append(provider)
            for below in spaces_of(provider):
                found += _layers_under(layout, below)
    return found


def _examine(kernel: Kernel, modules: Modules | None, needs: tuple[Need, ...], wishes: tuple[Need, ...]) -> Examined:
    if modules is None:
        reason = f"its modules are not there: /lib/modules/{kernel.version} has no list of them"
        return Examined(kernel, None, None, Verdict(kernel.version, Outcome.CANNOT, reasons=(reason,)))
    initramfs = None
    try:
        if kernel.initramfs:
            with ExitStack() as stack:
                initramfs = probe_initramfs(*(stack.enter_context(each.open()) for each in kernel.initramfs))
    except BadStructureError as error:
        shown = ", ".join(each.shown for each in kernel.initramfs)
        reason = f"its initramfs {shown} cannot be read: {error.message}"
        return Examined(kernel, modules, None, Verdict(kernel.version, Outcome.CANNOT, reasons=(reason,)))
    verdict = judge(modules, initramfs, needs, wishes)
    return Examined(kernel, modules, initramfs, verdict)
