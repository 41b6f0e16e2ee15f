"""`remetal plan` and `remetal restore`: what a restore would do, and doing it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from remetal.cli.layouts import plan_record, plan_view, restore_lines
from remetal.cli.luks_options import LuksKeyFiles, LuksPassphrases, find_asker, read_luks_keys
from remetal.cli.options import Credentials, Drivers, Machine, Output, Repo, find_secret, need_secret
from remetal.cli.output import delivered, print_result, reporting, result_console
from remetal.errors import RefusedError
from remetal.ids import short
from remetal.layout.plan import Plan
from remetal.workflows.restore import RestoreRequest, apply_restore, prepared_restore

SnapshotArgument = Annotated[str, Parameter(help="A snapshot id's first digits, or `latest`.", metavar="SNAPSHOT")]


@Parameter(name="*")
@dataclass(frozen=True)
class Choices:
    """What a restore lets its user choose."""

    map: Annotated[
        tuple[str, ...],
        Parameter(
            name=["--map", "-m"],
            help="Restore the snapshot's disk SOURCE onto TARGET, a block device or a disk file; may be repeated. "
            "With one disk in the snapshot, TARGET alone will do.",
            metavar="SOURCE=TARGET",
            negative="",
        ),
    ] = ()
    machine: Machine = None
    keep_sizes: Annotated[
        bool,
        Parameter(
            name="--keep-sizes", negative="", help="Leave additional space of a larger target free; grow nothing."
        ),
    ] = False
    grow: Annotated[
        tuple[str, ...],
        Parameter(
            name="--grow",
            help="Let only the file system on this space (such as sda:2 or vg0/home) take additional space; may be "
            "repeated. Default: the last one that can grow on each disk, and the largest in a volume group.",
            metavar="SPACE",
            negative="",
        ),
    ] = ()
    without: Annotated[
        tuple[str, ...],
        Parameter(
            name="--without",
            help="Leave this disk of the snapshot out; may be repeated. Arrays then run without it, and volume groups "
            "are packed onto the disks that are left.",
            metavar="DISK",
            negative="",
        ),
    ] = ()
    dissolve: Annotated[
        tuple[str, ...],
        Parameter(
            name="--dissolve",
            help="Restore what this array (such as md/root) holds onto its first disk alone, without an array; may be "
            "repeated.",
            metavar="ARRAY",
            negative="",
        ),
    ] = ()
    only: Annotated[
        tuple[str, ...],
        Parameter(
            name="--only",
            help="Restore this disk or volume of the snapshot (such as sda or sda:2) alone; may be repeated. A volume "
            "goes into the partition that is there.",
            metavar="DISK|VOLUME",
            negative="",
        ),
    ] = ()
    keep: Annotated[
        tuple[str, ...],
        Parameter(
            name="--keep",
            help="Leave what is in this partition of the target (such as sda:4) as it is; may be repeated.",
            metavar="PARTITION",
            negative="",
        ),
    ] = ()
    protect: Annotated[
        tuple[str, ...],
        Parameter(
            name="--protect",
            help="Never write to this disk of the machine, whatever else is said; may be repeated.",
            metavar="TARGET",
            negative="",
        ),
    ] = ()
    overwrite: Annotated[
        tuple[str, ...],
        Parameter(
            name="--overwrite",
            help="Name a target a second time: what is on it now, and is not of this snapshot, may be lost; may be "
            "repeated.",
            metavar="TARGET",
            negative="",
        ),
    ] = ()
    inventory: Annotated[
        Path | None,
        Parameter(
            name="--inventory",
            help="Fit the system to the machine of this record (`remetal probe --json`), which the disk files are for.",
            metavar="FILE",
        ),
    ] = None
    drivers: Drivers = None
    regenerate: Annotated[
        bool,
        Parameter(
            name="--regenerate",
            negative="",
            help="Have the restored system's own programs make every initramfs anew at once, which takes minutes. "
            "Default: put what is missing behind it, and let the system do that when it runs.",
        ),
    ] = False
    nic: Annotated[
        tuple[str, ...],
        Parameter(
            name="--nic",
            help="Let the target's network card NEW be what OLD was on the captured machine, each by its name or its "
            "address; NEW may be `none`. May be repeated. Default: by address, by slot and driver, by what is left.",
            metavar="OLD=NEW",
            negative="",
        ),
    ] = ()
    luks_passphrase_file: LuksPassphrases = ()
    luks_key_file: LuksKeyFiles = ()

    def request(self, repo: str, snapshot: str, *, onto: str | None = None) -> RestoreRequest:
        """Return what these choices ask for. Raises UsageError if a file cannot be read."""
        return RestoreRequest(
            repo,
            snapshot,
            self.machine,
            self.map,
            self.keep_sizes,
            grow=self.grow,
            without=self.without,
            dissolve=self.dissolve,
            only=self.only,
            keep=self.keep,
            protect=self.protect,
            overwrite=self.overwrite,
            keys=read_luks_keys(self.luks_passphrase_file, self.luks_key_file),
            onto=onto,
            inventory=self.inventory,
            drivers=self.drivers,
            regenerate=self.regenerate,
            nics=self.nic,
        )


def plan(
    snapshot: SnapshotArgument,
    *,
    repo: Repo,
    choices: Choices = Choices(),
    onto: Annotated[
        str | None,
        Parameter(
            name="--onto",
            help="Plan onto another machine, of which this is the record (`remetal probe --json`).",
            metavar="FILE",
        ),
    ] = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Show what a restore would do, and the plan's id. Nothing is touched.

    Disks that no --map names are matched by WWN, by serial number, and where neither is known by size and bus; never by
    their kernel name alone. What is not clear is refused, with the candidates. A plan that can be shown can be applied:
    `remetal restore SNAPSHOT --confirm PLAN_ID` with the same options. One that was made with --onto has the same id
    on the recorded machine itself.

    Example: `remetal plan latest --repo /mnt/usb/backup --map sda=/dev/nvme0n1`
    """
    request = choices.request(repo, snapshot, onto=onto)
    with (
        reporting(output) as report,
        prepared_restore(request, find_secret(credentials), report) as prepared,
    ):
        print_result(output, plan_record(prepared), *plan_view(prepared))


def restore(
    snapshot: SnapshotArgument,
    *,
    repo: Repo,
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
            name="--adapt",
            help="Fit drivers, boot loader, firmware entries, fstab and network to the target.",
            negative="--no-adapt",
        ),
    ] = True,
    even_unbootable: Annotated[
        bool,
        Parameter(
            name="--even-unbootable", negative="", help="Restore even where no kernel of the snapshot would boot."
        ),
    ] = False,
    choices: Choices = Choices(),
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Bring a machine back onto disks.

    The plan is computed and every precondition checked before the first write. What already stands on a target is
    left as it is, so the same command goes on after an interruption (exit code 4), and a second run writes nothing.

    Example: `remetal restore latest --repo /mnt/usb/backup --map /dev/sda --confirm 4be1f03a`
    """
    request = choices.request(repo, snapshot)
    secret = need_secret(credentials)
    ask = find_asker("restore nothing")
    with reporting(output) as report, prepared_restore(request, secret, report, ask=ask) as prepared:
        if not output.json and not output.quiet:
            with delivered("Nothing was touched. Show the plan where it can be read, or restore with --quiet."):
                for each in plan_view(prepared):
                    result_console().print(each)
        _check_confirmed(prepared.plan, confirm, yes)
        result = apply_restore(prepared, verify=verify, adapt=adapt, even_unbootable=even_unbootable, report=report)
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
