"""Retiring a machine: whatever is signed with its keys from now on counts for nothing."""

from __future__ import annotations

from contextlib import suppress

from remetal.errors import DamagedError, RefusedError
from remetal.repository.catalog import (
    History,
    MachineAccess,
    entry_names,
    last_number,
    read_entry,
    read_vouched,
)
from remetal.repository.forget import Decision, append_ledger, need_whole_history
from remetal.repository.history import LEDGER, sequence_of
from remetal.repository.machines import MachineRecord, open_secrets, read_machines
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, active_recipients, utc_now
from remetal.repository.retired import Retired, Vouched, find_line, put_retirement
from remetal.storage import RetainedError


def retire_machine(
    repository: Repository, key: RecipientKey, machine_id: str, *, successor: str = "", last: int | None = None
) -> Retired:
    """Let a machine's keys count no more, and return from where on. What stands in its history now stays good.

    What stands there is everything before a ledger that is added for it: so no listing that lacks an entry costs one.
    With `last`, which is for a history that is damaged, that is the last entry that counts, no ledger is added, and
    nothing is deleted. `successor` is the id of the machine that goes on in its place. Entries that were signed with
    the keys afterwards are deleted, so doing it again cleans up. Raises RefusedError if there is no such machine or
    successor, if the key counts no more itself, or `last` is given for a history that is whole or has no such entry,
    DamagedError if the machine's history is not whole.
    """
    machines = {each.id: each for each in read_machines(repository.store, repository.config.id)[0]}
    if key.id not in {each.id for each in active_recipients(repository)}:
        raise RefusedError(f"the recipient {key.id} counts no more itself", hint="Use the key of another recipient.")
    for each in (machine_id, *([successor] if successor else [])):
        if each not in machines:
            raise RefusedError(f"there is no machine {each}", hint="List the machines: remetal key list")
    vouched = read_vouched(repository)
    if successor and find_line(successor, vouched.retired) == machine_id:
        raise RefusedError(
            f"machine {machine_id} has taken the place of {successor} already",
            hint="Name the machine that goes on; `remetal key list` shows who follows whom.",
        )
    before = vouched.retired.get(machine_id)
    if last is not None:
        _need_damaged(repository, key, machines[machine_id], last)
        put_retirement(repository.store, machine_id, last=last, successor=successor, key=key, created=utc_now())
    else:
        last = before.last if before is not None else _close_history(repository, key, machines[machine_id])
        put_retirement(repository.store, machine_id, last=last, successor=successor, key=key, created=utc_now())
        _delete_behind(repository, machines[machine_id], last, vouched)
    return read_vouched(repository).retired.get(machine_id, Retired(last, successor))


def _need_damaged(repository: Repository, key: RecipientKey, machine: MachineRecord, last: int) -> None:
    """Raise RefusedError unless a machine's history is damaged, and has an entry `last`."""
    with suppress(DamagedError):
        access = MachineAccess(machine, open_secrets(repository.store, machine, key))
        need_whole_history(repository, access, read_vouched(repository))
        raise RefusedError(
            f"the history of machine '{machine.name}' is whole, so all of it counts",
            hint="Run the same command without --last. Snapshots that are not wanted are forgotten: remetal forget",
        )
    newest = last_number(entry_names(repository, machine.id))
    if not 0 <= last <= newest:
        raise RefusedError(
            f"the history of machine '{machine.name}' has no entry {last}; its newest one is {newest}",
            hint="`remetal show` tells the number of a snapshot.",
        )


def _close_history(repository: Repository, key: RecipientKey, machine: MachineRecord) -> int:
    """Add a ledger that says what was said before, and return its number."""
    access = MachineAccess(machine, open_secrets(repository.store, machine, key))

    def decide(history: History) -> Decision:
        carried = history.ledgers.newest
        return Decision((), carried.body.condemned, carried.body.doomed) if carried is not None else Decision()

    return append_ledger(repository, key, access, decide)[0]


def _delete_behind(repository: Repository, machine: MachineRecord, last: int, vouched: Vouched) -> None:
    """Delete what the machine has signed behind an entry, so that it stands in nobody's way."""
    signed = Vouched(vouched.recipients, {})
    for name in entry_names(repository, machine.id):
        if sequence_of(name) > last:
            with suppress(DamagedError, RetainedError):
                if read_entry(repository, name, machine, signed)[0].kind != LEDGER:
                    repository.store.delete(name)
