"""`remetal bootability`: whether a snapshot would boot on some hardware, and what it lacks for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import RenderableType

from remetal.adapt.kernels.bootability import Outcome
from remetal.cli.layouts import inventory_lines, predictions_record, predictions_view
from remetal.cli.options import Credentials, Drivers, Machine, Output, Repo, need_secret
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape, moment
from remetal.errors import RefusedError
from remetal.ids import short
from remetal.workflows.bootability import Bootability, BootabilityRequest, predict_snapshot


def bootability(
    snapshot: Annotated[
        str, Parameter(help="A snapshot id's first digits, or `latest`.", metavar="SNAPSHOT")
    ] = "latest",
    *,
    repo: Repo,
    inventory: Annotated[
        Path | None,
        Parameter(
            name="--inventory",
            help="The record of another machine (`remetal probe --json`). Default: the machine that this runs on.",
            metavar="FILE",
        ),
    ] = None,
    drivers: Drivers = None,
    machine: Machine = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """Say of each kernel in a snapshot whether it would boot on a machine, and if not, why. Nothing is touched.

    The drivers that the machine's disks need are looked for in each kernel and its initramfs: what is built in, what
    the initramfs holds, what can be added to it, and what no kernel of the snapshot has. Ends with exit code 3 if a
    system has no kernel that would boot, even after adaptation.

    Example: `remetal bootability latest --repo /mnt/usb/backup --inventory spare.json`
    """
    request = BootabilityRequest(repo, snapshot, machine, inventory, drivers)
    with reporting(output) as report:
        found = predict_snapshot(request, need_secret(credentials), report)
    print_result(output, _record(found), *_view(found))
    return 0 if all(each.outcome not in {None, Outcome.CANNOT} for each in found.systems) else RefusedError.exit_code


def _record(found: Bootability) -> dict[str, object]:
    return {
        "snapshot": found.snapshot.id,
        "hardware": msgspec.to_builtins(found.hardware),
        "systems": predictions_record(found.systems),
    }


def _view(found: Bootability) -> Iterator[RenderableType]:
    snapshot = found.snapshot
    yield f"Snapshot {short(snapshot.id)} of {escape(snapshot.machine)}, taken {moment(snapshot.time)} UTC, on"
    yield inventory_lines(found.hardware)
    if not found.systems:
        yield "It holds no installed system that could be looked into."
        return
    yield from predictions_view(found.systems)
