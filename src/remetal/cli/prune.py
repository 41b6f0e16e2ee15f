"""`remetal prune`: deleting what no snapshot needs any more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Credentials, Machine, Output, Repo, need_secret
from remetal.cli.output import print_error, print_result, reporting
from remetal.cli.tables import pruned_table
from remetal.errors import UsageError
from remetal.repository.prune import DEFAULT_GRACE, DEFAULT_UNUSED
from remetal.units import parse_duration
from remetal.workflows.retention import prune_repository


def prune(
    *,
    repo: Repo,
    machine: Machine = None,
    grace: Annotated[
        str,
        Parameter(
            help=f"How long to wait before deleting: a number with m, h, d or w. "
            f"{DEFAULT_GRACE / 86400:.0f}d if not given.",
            metavar="TIME",
        ),
    ] = f"{DEFAULT_GRACE:.0f}",
    max_unused: Annotated[
        float,
        Parameter(
            help="How much of what is kept may be of no use before packs are written anew, in percent. "
            f"{100 * DEFAULT_UNUSED:.0f} if not given.",
            metavar="PERCENT",
        ),
    ] = 100 * DEFAULT_UNUSED,
    reseal: Annotated[
        bool,
        Parameter(
            negative="",
            help="Write anew all packs that are sealed to other recipients than those that count now.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, Parameter(name=["--dry-run", "-n"], negative="", help="Change nothing; only show what would go.")
    ] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """Delete what no snapshot needs any more, in two phases.

    What nothing needs is condemned first: no backup relies on it any more, and it is deleted by the first prune after
    the grace period, so that a restore that is under way can go on reading. Run it regularly, such as once a day. With
    `--grace 0` it is deleted at once: only if no restore is under way.

    After `remetal key add-recipient` and `key accept`, or `key remove-recipient`, `--reseal` makes the old data follow.

    Nothing is deleted of a machine whose record, secrets, history or index is damaged (exit code 5), or that is being
    backed up (6); the others are pruned all the same.
    """
    if not 0 <= max_unused <= 100:
        raise UsageError(f"--max-unused {max_unused:g} is no part of a hundred")
    seconds = parse_duration(grace)
    secret = need_secret(credentials)
    with reporting(output) as report:
        results, worst = prune_repository(
            repo,
            secret,
            machine=machine,
            grace=seconds,
            max_unused=max_unused / 100,
            reseal=reseal,
            dry_run=dry_run,
            report=report,
        )
    print_result(output, [asdict(each) for each in results], pruned_table(results, dry_run=dry_run))
    if worst is None:
        return 0
    print_error(worst, as_json=False)  # standard output has its JSON
    return worst.exit_code
