"""`remetal plan` and `remetal restore`: what a restore would do, and doing it."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter

from remetal.cli.options import Credentials, Machine, Output, Repo, find_secret, need_secret
from remetal.cli.output import delivered, print_result, reporting, result_console
from remetal.cli.tables import plan_record, plan_view, restore_lines
from remetal.errors import RefusedError
from remetal.ids import short
from remetal.layout.plan import Plan
from remetal.workflows.restore import RestoreRequest, apply_restore, prepared_restore

SnapshotArgument = Annotated[str, Parameter(help="A snapshot id's first digits, or `latest`.", metavar="SNAPSHOT")]
Map = Annotated[
    tuple[str, ...],
    Parameter(
        name=["--map", "-m"],
        help="Restore the snapshot's disk SOURCE onto TARGET, a block device or a disk file; may be repeated. "
        "With one disk in the snapshot, TARGET alone will do.",
        metavar="SOURCE=TARGET",
        negative="",
    ),
]
KeepSizes = Annotated[
    bool,
    Parameter(name="--keep-sizes", negative="", help="Leave additional space of a larger target free; grow nothing."),
]


def plan(
    snapshot: SnapshotArgument,
    *,
    repo: Repo,
    map: Map = (),  # noqa: A002 - the option's name
    machine: Machine = None,
    keep_sizes: KeepSizes = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Show what a restore would do, and the plan's id. Nothing is touched.

    Disks that no --map names are matched by WWN and serial number; never by their kernel name alone. A plan that can be
    shown can be applied: `remetal restore SNAPSHOT --confirm PLAN_ID` with the same options.

    Example: `remetal plan latest --repo /mnt/usb/backup --map sda=/dev/nvme0n1`
    """
    request = RestoreRequest(repo, snapshot, machine, map, keep_sizes)
    with (
        reporting(output) as report,
        prepared_restore(request, find_secret(credentials), report) as prepared,
    ):
        print_result(output, plan_record(prepared), *plan_view(prepared))


def restore(
    snapshot: SnapshotArgument,
    *,
    repo: Repo,
    map: Map = (),  # noqa: A002 - the option's name
    machine: Machine = None,
    confirm: Annotated[
        str | None,
        Parameter(name="--confirm", help="Apply only if the plan still has this id.", metavar="PLAN_ID"),
    ] = None,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative="", help="Apply without asking.")] = False,
    verify: Annotated[
        bool, Parameter(name="--verify", negative="", help="Read every volume back when it is written.")
    ] = False,
    adapt: Annotated[
        bool,
        Parameter(
            name="--adapt", help="Fit boot loader, firmware entries and fstab to the target.", negative="--no-adapt"
        ),
    ] = True,
    keep_sizes: KeepSizes = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Bring a machine back onto disks.

    The plan is computed and every precondition checked before the first write. What already stands on a target is
    left as it is, so the same command goes on after an interruption (exit code 4), and a second run writes nothing.

    Example: `remetal restore latest --repo /mnt/usb/backup --map /dev/sda --confirm 4be1f03a`
    """
    request = RestoreRequest(repo, snapshot, machine, map, keep_sizes)
    secret = need_secret(credentials)
    with reporting(output) as report, prepared_restore(request, secret, report) as prepared:
        if not output.json and not output.quiet:
            with delivered("Nothing was touched. Show the plan where it can be read, or restore with --quiet."):
                for each in plan_view(prepared):
                    result_console().print(each)
        _check_confirmed(prepared.plan, confirm, yes)
        result = apply_restore(prepared, verify=verify, adapt=adapt, report=report)
    print_result(
        output,
        msgspec.to_builtins(result) | {"written": result.written},
        restore_lines(result),
        lost="The restore is complete.",
    )


def _check_confirmed(plan: Plan, confirm: str | None, yes: bool) -> None:
    """Raise RefusedError unless a person agreed to this very plan."""
    if confirm is not None:
        if len(confirm) < 8 or not plan.id.startswith(confirm.lower()):
            raise RefusedError(
                f"the plan is {short(plan.id)}, not {confirm}: the snapshot, the disks or the options have changed",
                hint="Look at the plan again with `remetal plan`, and confirm its id.",
            )
        return
    if yes:
        return
    if not sys.stdin.isatty():
        raise RefusedError(
            "a restore overwrites disks, and nobody confirmed this one",
            hint=f"Look at the plan above, then add --confirm {short(plan.id)} (or --yes).",
        )
    answer = input(f"Type 'yes' or the plan's id to overwrite the target{'s' if len(plan.targets) > 1 else ''}: ")
    if answer != "yes" and not (len(answer) >= 8 and plan.id.startswith(answer.lower())):
        raise RefusedError("not confirmed; nothing was touched")
