"""`remetal repair`: mending what is damaged, and taking that back."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from remetal.cli.options import Credentials, Output, Repo, find_secret
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.errors import DamagedError, UnavailableError, UsageError
from remetal.repository.repair import RepairResult
from remetal.workflows.access import Secret
from remetal.workflows.repair import accept_repairs, undo_last_repair
from remetal.workflows.repair import repair as repair_at


def repair(
    *,
    repo: Repo,
    undo: Annotated[
        bool, Parameter(name="--undo", negative="", help="Take the last repair back, the one before it the next time.")
    ] = False,
    accept: Annotated[
        bool,
        Parameter(
            name="--accept",
            negative="",
            help="Delete what repairs have set aside, to free its space; they cannot be undone any more.",
        ),
    ] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> int:
    """Mend what is damaged or missing: packs from parity, parity from packs, and the index from packs.

    Every object is read. A pack is rebuilt if all others of its group are whole, and put in place only if it has the
    hash that is its name. That takes no key; with the passphrase or the recovery kit, packs that no readable index
    object knows are put into the index as well.

    It only adds objects. What was damaged is set aside, not deleted, and all of it can be undone. Ends with exit code 5
    if anything is damaged still: bring it back from a copy, or back up again and forget the snapshots that need it.
    """
    if undo and accept:
        raise UsageError("--undo and --accept exclude each other", hint="Give one of them.")
    secret = find_secret(credentials)
    if accept:
        count = accept_repairs(repo)
        print_result(output, {"accepted": count}, f"Accepted {count} repair{'' if count == 1 else 's'}.")
        return 0
    if undo:
        with reporting(output) as report:
            undone = undo_last_repair(repo, secret, report=report)
        print_result(
            output,
            undone,
            f"Took the repair of {escape(undone.time)} back; objects removed: {undone.removed}, "
            f"returned: {undone.returned}.",
        )
        return 0
    with reporting(output) as report:
        result = repair_at(repo, secret, report=report)
    print_result(
        output,
        result,
        *(f"[red]lost:[/red] {escape(each)}" for each in result.lost),
        *(f"[red]damaged:[/red] {escape(each)}" for each in result.damaged),
        _summary(result, secret),
    )
    if result.lost or result.damaged:
        return DamagedError.exit_code
    if result.busy:
        raise UnavailableError(
            f"the packs of {len(result.busy)} machines were passed over, because backups of them are at work",
            hint="Run the command again when they have ended.",
        )
    return 0


def _summary(result: RepairResult, secret: Secret | None) -> str:
    done = [
        f"{count} {what}"
        for count, what in (
            (result.rebuilt, "packs rebuilt from parity"),
            (result.indexed, "packs put into the index that no index object knew"),
            (result.parity, "parity objects added"),
            (result.aside, "damaged objects set aside"),
        )
        if count
    ]
    said = "; ".join(done) or ("nothing" if result.lost or result.damaged else "nothing to do")
    taken = " `remetal repair --undo` takes it back." if done else ""
    index = "" if secret is not None else " The index was not looked at: that takes the passphrase or the recovery kit."
    return f"Repaired: {said}.{taken}{index}"
