"""`remetal snapshots`: the restore points of a repository."""

from __future__ import annotations

from remetal.cli.options import Credentials, Machine, Output, Repo, find_secret
from remetal.cli.output import print_error, print_result
from remetal.cli.tables import snapshot_record, snapshot_table
from remetal.errors import DamagedError
from remetal.workflows.access import list_snapshots


def snapshots(
    *,
    repo: Repo,
    machine: Machine = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """List the snapshots in a repository, oldest first.

    On a machine that backs up there, its own snapshots are shown without a passphrase; with one, those of all machines.
    Ends with exit code 5 if a snapshot is missing from its chain, was rolled back, or is not signed by its machine.
    """
    listing = list_snapshots(repo, find_secret(credentials), machine)
    print_result(output, [snapshot_record(each) for each in listing.snapshots], snapshot_table(listing.snapshots))
    for problem in listing.problems:
        print_error(DamagedError(problem), as_json=False)
    return DamagedError.exit_code if listing.problems else 0
