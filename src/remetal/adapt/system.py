"""Fitting a restored system to the disks and the firmware that it stands on now.

Everything is looked at first, read-only; what already fits is not written. So a repeated restore changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.efi import adapt_efi
from remetal.adapt.grub_bios import adapt_grub_bios
from remetal.adapt.rooted import find_inside
from remetal.adapt.roots import System, find_systems, open_root
from remetal.errors import RemetalError
from remetal.events import Note, Report, Step, silent
from remetal.layout.model import Layout
from remetal.system.blockdev import flush_cache

_NO_SYSTEM = "no installed system was found on the restored volumes; nothing was adapted inside them"
_INITRAMFS = "the initramfs was left as it is: it holds the drivers of the hardware that it was made on"


def adapt_system(
    source: Layout,
    result: Layout,
    targets: Mapping[str, Path],
    *,
    firmware: str | None,
    report: Report = silent,
) -> Adaptation:
    """Make the restored system boot where it stands now, and say what was changed.

    `source` is the layout as captured; `result` as it stands on the targets, with the same disk names and volume
    ids; `targets` maps disk names to block devices or disk files. `firmware` is `bios` or `uefi` of the machine
    that we run on if the targets are its own disks, None for disk files: their NVRAM is elsewhere.

    Raises RemetalError if a disk or a file system fails; running it again goes on.
    """
    report(Step("Looking for installed systems"))
    systems = find_systems(source, result, targets, report)
    done = Adaptation()
    for system in systems:
        report(Note(f"{system.root} holds {system.name}"))
        done += _adapt_fstab(system, result, targets)
    done += adapt_grub_bios(source, result, targets, systems, firmware=firmware, report=report)
    done += adapt_efi(result, targets, systems, firmware=firmware, report=report)
    return done + Adaptation(notes=(_INITRAMFS if systems else _NO_SYSTEM,))


def _adapt_fstab(system: System, result: Layout, targets: Mapping[str, Path]) -> Adaptation:
    plan = system.fstab
    if not plan.changes:
        return Adaptation(notes=plan.notes)
    data = plan.text.encode("utf-8", "surrogateescape")
    with open_root(system, result, targets, writable=True) as root:
        place = find_inside(root, "/etc/fstab")
        if place is None:
            raise RemetalError(f"/etc/fstab of {system.name} on {system.root} vanished while it was being adapted")
        _overwrite(place, data)
    for path in targets.values():
        flush_cache(path)
    return Adaptation((Change("/etc/fstab", "; ".join(plan.changes), plan.diff),), plan.notes, len(data))


def _overwrite(path: Path, data: bytes) -> None:
    """Replace a file's content and keep the file: its owner, mode, ACLs and labels stay. Durable on return."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
