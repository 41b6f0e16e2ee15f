"""`remetal show`: everything about one snapshot."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cyclopts import Parameter

from remetal.cli.layouts import inventory_lines, layout_table
from remetal.cli.options import Credentials, Machine, Output, Repo, find_secret
from remetal.cli.output import print_result
from remetal.cli.tables import escape, snapshot_lines, snapshot_record
from remetal.layout.record import decode_layout
from remetal.repository.snapshots import describe_left_out
from remetal.workflows.access import find_snapshot


def show(
    snapshot: Annotated[str, Parameter(help="An id's first digits, or `latest`.", metavar="SNAPSHOT")],
    *,
    repo: Repo,
    machine: Machine = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Show one snapshot: when, of what machine, its disks and layers, every image's size, and what was left out."""
    found = find_snapshot(repo, find_secret(credentials), snapshot, machine)
    layout = decode_layout(found.layout)
    record = snapshot_record(found) | {"layout": msgspec.to_builtins(layout)}
    hardware = [inventory_lines(layout.inventory)] if layout.inventory is not None else []
    left_out = [escape("\n".join(["", *describe_left_out(found.left_out)]))] if found.left_out else []
    print_result(output, record, snapshot_lines(found), *hardware, layout_table(layout, found.images), *left_out)
