"""`remetal copy`: the same repository in another place."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Output, Repo
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.errors import DamagedError
from remetal.units import format_bytes, format_duration
from remetal.workflows.copy import copy_to


def copy(
    *,
    repo: Repo,
    to: Annotated[str, Parameter(help="Where the copy lies, or will lie.", metavar="REPOSITORY")],
    delete: Annotated[
        bool,
        Parameter(negative="", help="Also delete there what was forgotten and pruned here, and removed passphrases."),
    ] = False,
    output: Output = Output(),
) -> int:
    """Copy a repository to another place: everything that is lacking there. No passphrase is needed.

    The copy is the same repository: the same passphrases open it, and machines are restored from it. Run it again to
    bring it up to date. Damaged objects are not copied, and told (exit code 5). Back up to one of the two places only:
    what was backed up to the copy is not brought back.
    """
    began = time.monotonic()
    with reporting(output) as report:
        result = copy_to(repo, to, delete=delete, report=report)
    took = format_duration(time.monotonic() - began)
    gone = f", {result.deleted} deleted" if delete else ""
    if result.retained:
        gone += f", {result.retained} retained by the store for now"
    summary = (
        f"{result.objects} objects with {format_bytes(result.bytes)} copied in {took}, {result.there} were there{gone}."
    )
    print_result(output, asdict(result), *(f"[red]damaged:[/red] {escape(each)}" for each in result.problems), summary)
    return DamagedError.exit_code if result.problems else 0
