"""A machine as `remetal probe` records it, and what could be restored onto a machine that is only known by its record.

A plan onto a record is the plan onto the machine itself, with the same id, as long as the hardware stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec.structs

from remetal.errors import UsageError
from remetal.events import Report, silent
from remetal.layout.disks import find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.matching import find_marks
from remetal.layout.model import Layout
from remetal.layout.plan import Target
from remetal.layout.probe import probe_layout
from remetal.layout.record import ImpossibleLayoutError, decode_layout
from remetal.layout.targets import describe_content, find_table, looks_blank


def probe_machine(report: Report = silent) -> Layout:
    """Describe this machine: its disks, all that can be told of them without opening containers, and its hardware.

    A disk on which nothing is recognised, and whose first and last MiB are zero, is shown as empty. Raises
    RefusedError if a disk cannot be opened.
    """
    paths = find_disks()
    layout = probe_layout(paths, report=report)
    pairs = zip(layout.disks, paths, strict=True)
    blank = {layout.layer_on(disk.name) for disk, path in pairs if looks_blank(layout, disk.name, path)}
    layers = tuple(layer for layer in layout.layers if layer not in blank)
    return msgspec.structs.replace(layout, layers=layers, inventory=probe_inventory())


def read_machine(path: Path) -> Layout:
    """Read what `remetal probe --json` said of a machine or of disk files. Raises UsageError for anything else."""
    try:
        return decode_layout(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"cannot read the record of a machine, {path}: {os.strerror(error.errno or 0)}", hint=_HOW
        ) from error
    except ImpossibleLayoutError as error:
        raise UsageError(f"{path} is not the record of a machine: {error.message}", hint=_HOW) from error


_HOW = "Make one on that machine: remetal probe --json > FILE."


def targets_of_machine(layout: Layout) -> tuple[Target, ...]:
    """Return the disks of a recorded machine as targets, with what was on them. Pure.

    A record does not say what is mounted: nobody restores onto a machine that runs from the disks in question. Disk
    files have no inventory.
    """
    is_file = layout.inventory is None
    return tuple(
        Target(
            path=disk.name if is_file else f"/dev/{disk.name}",
            name=disk.name,
            size=disk.size,
            logical_sector=disk.logical_sector,
            physical_sector=disk.physical_sector,
            is_file=is_file,
            model=disk.model,
            serial=disk.serial,
            wwn=disk.wwn,
            bus=disk.bus,
            content=describe_content(layout, disk.name),
            marks=tuple(sorted(find_marks(layout, disk.name))),
            table=find_table(layout, disk.name),
        )
        for disk in layout.disks
    )


def select_target(targets: Sequence[Target], word: str) -> Target:
    """Return the disk of a recorded machine that a person names by its path or its name.

    Raises UsageError, which lists the disks, if there is none.
    """
    for target in targets:
        if word in {target.path, target.name}:
            return target
    raise UsageError(
        f"the recorded machine has no disk {word}", hint=f"Its disks: {', '.join(each.path for each in targets)}."
    )
