"""`remetal check`: is everything in the repository as it was written?"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Credentials, Output, Repo, find_secret, need_secret
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.errors import DamagedError
from remetal.units import format_bytes, format_duration
from remetal.workflows.check import check_all


def check(
    *,
    repo: Repo,
    read_data: Annotated[
        bool,
        Parameter(name="--read-data", negative="", help="Also decrypt and decode every chunk; needs the passphrase."),
    ] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """Check a repository: every object's name against its bytes, and every snapshot against what it needs.

    Without any key the bytes of all objects are compared with their names. With this machine's keys or the passphrase,
    the chain of snapshots and the presence of every chunk are checked as well. Ends with exit code 5 if anything is
    damaged or missing.
    """
    secret = need_secret(credentials) if read_data else find_secret(credentials)
    with reporting(output) as report:
        result = check_all(repo, secret, read_data=read_data, report=report)
    count = len(result.problems)
    verdict = f"{count} problem{'' if count == 1 else 's'}" if count else "no problem found"
    summary = (
        f"{result.objects} objects with {format_bytes(result.bytes)} and {result.snapshots} snapshots checked "
        f"in {format_duration(result.seconds)}, {result.depth}: {verdict}."
    )
    if result.repairable:
        summary += f" Damaged or missing packs that `remetal repair` rebuilds from parity: {result.repairable}."
    print_result(output, result, *(f"[red]damaged:[/red] {escape(problem)}" for problem in result.problems), summary)
    return DamagedError.exit_code if count else 0
