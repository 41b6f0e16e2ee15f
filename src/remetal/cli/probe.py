"""`remetal probe`: this machine's layout and hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec.structs
from cyclopts import Parameter

from remetal.cli.options import Output
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import inventory_lines, layout_table
from remetal.layout.disks import find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.probe import probe_layout


def probe(
    *,
    disk: Annotated[
        tuple[Path, ...],
        Parameter(
            name=["--disk", "-d"],
            help="Look at this disk or disk file only; may be repeated.",
            metavar="PATH",
            negative="",
        ),
    ] = (),
    output: Output = Output(),
) -> None:
    """Show what a machine is made of: disks, partitions, file systems, and its hardware.

    Nothing is changed. The JSON form can be saved as a record of the machine.

    Example: `remetal probe --json > web1.json`
    """
    with reporting(output) as report:
        layout = probe_layout(disk or find_disks(), report=report)
    if not disk:
        layout = msgspec.structs.replace(layout, inventory=probe_inventory())
    hardware = inventory_lines(layout.inventory) if layout.inventory is not None else ""
    print_result(output, layout, *([hardware] if hardware else []), layout_table(layout))
