"""Removing a recipient: it counts no more, once the others open all that it opens."""

from __future__ import annotations

from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor

from remetal.errors import RefusedError
from remetal.events import Report, Step, silent
from remetal.repository.catalog import open_catalog
from remetal.repository.chunks import live_packs
from remetal.repository.machines import read_machines
from remetal.repository.objects import SECRETS, pack_name
from remetal.repository.packs import head_size, sealed_to
from remetal.repository.recipients import RecipientKey, put_revocation
from remetal.repository.repository import Repository, active_recipients, trusted_recipients, utc_now
from remetal.repository.retired import put_retirement, read_retired
from remetal.repository.slots import read_slots
from remetal.storage import NotFoundError

_AT_ONCE = 16
"""Packs whose heads are read at once: a store answers each after some milliseconds."""


def remove_recipient(
    repository: Repository, key: RecipientKey, recipient: str, *, abandon: bool = False, report: Report = silent
) -> None:
    """Let a recipient count no more: nothing is sealed to it from now on, and its passphrases are removed.

    What was sealed to it before stays open to it, in this repository until the packs are written anew
    (`prune_machine(reseal=True)`), and in every copy for ever. If a removal was cut off, doing it again ends it. Raises
    RefusedError if there is no such recipient, if it is the one whose key this is, and unless `abandon` if there are
    packs that none of the others opens.
    """
    active = {each.id for each in active_recipients(repository)}
    if recipient not in {each.id for each in trusted_recipients(repository)}:
        raise RefusedError(f"there is no recipient {recipient}", hint="List the keys: remetal key list")
    if recipient == key.id:
        raise RefusedError(
            "a recipient cannot remove itself", hint="Open the repository with the key of another recipient."
        )
    if key.id not in active:
        raise RefusedError(
            f"the recipient {key.id} counts no more itself", hint="Open the repository with the key of another one."
        )
    if recipient in active:
        if not abandon:
            _need_other_owners(repository, key, recipient, active - {recipient}, report)
        _take_over_retirements(repository, recipient, key)
        put_revocation(repository.store, recipient, key=key, created=utc_now())
    for name in [*_slots_of(repository, recipient), *_secrets_of(repository, recipient)]:
        repository.store.delete(name)


def _need_other_owners(
    repository: Repository, key: RecipientKey, recipient: str, others: Set[str], report: Report
) -> None:
    """Raise RefusedError if a pack that is relied on is sealed to none of the others, or if that cannot be told."""
    report(Step("Looking whether others open all that it opens"))
    catalog = open_catalog(repository, key)
    if catalog.closed:
        raise RefusedError(
            f"it cannot be told whether others open all that recipient {recipient} opens: {catalog.closed[0]}",
            hint="Run `remetal check` and mend that first; or remove it whatever is lost: --abandon.",
        )
    alone: dict[str, int] = {}
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="heads") as pool:
        for access in catalog.machines.values():
            packs = live_packs(repository, access.domain, catalog.ledgers[access.machine.id].newest)
            names = [pack_name(access.machine.id, pack.identity) for pack in packs]
            closed = sum(pool.map(lambda name: _is_closed(repository, name, others), names))
            if closed:
                alone[access.machine.name] = closed
    if alone:
        told = ", ".join(f"{count} of machine '{name}'" for name, count in alone.items())
        raise RefusedError(
            f"there are packs that none of the other recipients opens: {told}",
            hint=f"Nothing was changed. Accept the new recipient on each machine (remetal key accept), and let it open "
            f"what was there before: remetal prune --reseal, with the passphrase or kit of {recipient}. If what these "
            f"packs hold may be lost: --abandon.",
        )


def _is_closed(repository: Repository, name: str, recipients: Set[str]) -> bool:
    """Whether a pack is sealed to none of these; one that a prune has deleted just now does not count."""
    try:
        return recipients.isdisjoint(sealed_to(name, repository.store.get(name, size=head_size())))
    except NotFoundError:
        return False


def _slots_of(repository: Repository, recipient: str) -> Iterator[str]:
    slots, _ = read_slots(repository.store, repository.config.id)
    yield from (each.name for each in slots if each.slot.recipient == recipient)


def _secrets_of(repository: Repository, recipient: str) -> Iterator[str]:
    for machine in read_machines(repository.store, repository.config.id)[0]:
        for entry in list(repository.store.entries(f"{SECRETS}{machine.id}.{recipient}.")):
            yield entry.name


def _take_over_retirements(repository: Repository, recipient: str, key: RecipientKey) -> None:
    """Say again with `key` what a recipient has said about machines: what it says counts no more once it is removed."""
    active = {each.id: each for each in active_recipients(repository)}
    retired, _ = read_retired(repository.store, repository.config.id, active)
    active.pop(recipient, None)
    remaining, _ = read_retired(repository.store, repository.config.id, active)
    for machine_id, each in retired.items():
        if remaining.get(machine_id) != each:
            put_retirement(
                repository.store, machine_id, last=each.last, successor=each.successor, key=key, created=utc_now()
            )
