"""`remetal forget`: which snapshots need not be kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Credentials, Machine, Output, Repo, need_secret
from remetal.cli.output import print_error, print_result, reporting
from remetal.cli.tables import decided_table, snapshot_record
from remetal.errors import RemetalError, UsageError
from remetal.repository.retention import Policy
from remetal.workflows.retention import Policies, forget_by_policy, forget_named, read_policies


@Parameter(name="*")
@dataclass(frozen=True)
class Keep:
    """What to keep, of each machine."""

    last: Annotated[int, Parameter(name="--keep-last", help="Keep the newest N snapshots.", metavar="N")] = 0
    hourly: Annotated[int, Parameter(name="--keep-hourly", help="Keep the newest of each of N hours.", metavar="N")] = 0
    daily: Annotated[int, Parameter(name="--keep-daily", help="Keep the newest of each of N days.", metavar="N")] = 0
    weekly: Annotated[int, Parameter(name="--keep-weekly", help="Keep the newest of each of N weeks.", metavar="N")] = 0
    monthly: Annotated[
        int, Parameter(name="--keep-monthly", help="Keep the newest of each of N months.", metavar="N")
    ] = 0
    yearly: Annotated[int, Parameter(name="--keep-yearly", help="Keep the newest of each of N years.", metavar="N")] = 0
    tag: Annotated[
        tuple[str, ...],
        Parameter(name="--keep-tag", help="Keep every snapshot with this tag; may be repeated.", negative=""),
    ] = ()

    def policy(self) -> Policy | None:
        """Return what the options say; None if they say nothing."""
        policy = Policy(
            keep_last=self.last,
            keep_hourly=self.hourly,
            keep_daily=self.daily,
            keep_weekly=self.weekly,
            keep_monthly=self.monthly,
            keep_yearly=self.yearly,
            keep_tag=self.tag,
        )
        return policy if policy != Policy() else None


def forget(
    *snapshots: str,
    repo: Repo,
    keep: Keep = Keep(),
    policy: Annotated[
        Path | None,
        Parameter(
            help="Read the policies of machines from this TOML file: [default] and [machines.NAME] with keep-… = N.",
            metavar="FILE",
        ),
    ] = None,
    machine: Machine = None,
    even_newest: Annotated[
        bool, Parameter(negative="", help="Forget a snapshot that is named even if it is its machine's newest.")
    ] = False,
    dry_run: Annotated[bool, Parameter(name=["--dry-run", "-n"], negative="", help="Only show what would go.")] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """Forget snapshots: those that are named, or all that a policy does not keep.

    A policy keeps the newest snapshot of so many hours, days, weeks, months and years; only periods that have a
    snapshot count, so nothing goes merely because time has passed. A machine's newest snapshot is always kept. What
    was forgotten is not listed any more; its data is deleted by `remetal prune`. By a policy, what is damaged is passed
    over, and told (exit code 5).

    Parameters
    ----------
    snapshots
        Ids of snapshots to forget; none with a policy.
    """
    wished = keep.policy()
    if (bool(snapshots) + (policy is not None) + (wished is not None)) != 1:
        raise UsageError(
            "say what to forget in one way: by ids, by --keep-… options, or by --policy",
            hint="For example: remetal forget --keep-daily 7 --keep-weekly 5 --keep-monthly 12",
        )
    secret = need_secret(credentials)
    passed_over: RemetalError | None = None
    if snapshots:
        decided = forget_named(repo, secret, snapshots, machine=machine, even_newest=even_newest, dry_run=dry_run)
    else:
        policies = read_policies(policy) if policy is not None else Policies(default=wished)
        with reporting(output) as report:
            decided, passed_over = forget_by_policy(
                repo, secret, policies, machine=machine, dry_run=dry_run, report=report
            )
    going = sum(not each.reasons for each in decided)
    verb = "would be forgotten" if dry_run else "forgotten"
    record = [{**snapshot_record(each.snapshot), "kept": list(each.reasons)} for each in decided]
    summary = f"{going} snapshot{'' if going == 1 else 's'} {verb}, {len(decided) - going} kept."
    hint = "\nTheir data stays until `remetal prune`." if going and not dry_run else ""
    print_result(output, record, decided_table(decided), summary + hint)
    if passed_over is None:
        return 0
    print_error(passed_over, as_json=False)  # standard output has its JSON
    return passed_over.exit_code
