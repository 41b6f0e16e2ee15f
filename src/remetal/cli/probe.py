"""`remetal probe`: this machine's layout and hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.layouts import inventory_lines, layout_table
from remetal.cli.options import Output
from remetal.cli.output import print_result, reporting
from remetal.layout.machine import probe_machine
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

    Nothing is changed. The JSON form can be saved as a record of the machine, and a restore be planned onto it
    elsewhere: `remetal plan SNAPSHOT --onto web1.json`.

    Example: `remetal probe --json > web1.json`
    """
    with reporting(output) as report:
        layout = probe_layout(disk, report=report) if disk else probe_machine(report)
    hardware = inventory_lines(layout.inventory) if layout.inventory is not None else ""
    print_result(output, layout, *([hardware] if hardware else []), layout_table(layout))
