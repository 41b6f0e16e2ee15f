"""`remetal export`: one disk of a snapshot as a disk file for a virtual machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Credentials, Machine, Output, Repo, need_secret
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.units import format_bytes, format_duration
from remetal.workflows.export import ExportRequest, export_disk


def export(
    snapshot: Annotated[str, Parameter(help="An id's first digits, or `latest`.", metavar="SNAPSHOT")],
    disk: Annotated[str, Parameter(help="The disk's name in the snapshot, such as sda.", metavar="DISK")],
    *,
    repo: Repo,
    output_file: Annotated[
        Path,
        Parameter(
            name=["--output", "-o"],
            help="The file to write; its ending says the format: .raw, .img or .qcow2.",
            metavar="FILE",
        ),
    ],
    machine: Machine = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Write one disk of a snapshot, as it was captured, to a new disk file.

    An interrupted export leaves FILE.partial; running the same command again goes on with it.

    Example: `remetal export latest sda --repo /mnt/usb/backup --output web1.qcow2`
    """
    request = ExportRequest(repo, snapshot, disk, output_file, machine)
    secret = need_secret(credentials)
    with reporting(output) as report:
        result = export_disk(request, secret, report)
    record = {"output": str(output_file), "size": result.size, "seconds": round(result.seconds, 3)}
    print_result(
        output,
        record,
        f"Wrote {escape(str(output_file))}: "
        f"a disk of {format_bytes(result.size)} in {format_duration(result.seconds)}.",
    )
