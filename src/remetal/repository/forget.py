"""Forgetting snapshots, and adding ledgers to a history. What only forgotten snapshots needed stays until a prune."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from remetal import __version__
from remetal.errors import DamagedError, UnavailableError
from remetal.repository.catalog import (
    History,
    MachineAccess,
    is_void,
    open_catalog,
    read_history,
    read_vouched,
)
from remetal.repository.cipher import digest
from remetal.repository.history import (
    LEDGER,
    Envelope,
    Gone,
    entry_name,
    is_gone,
    merge_gone,
    open_envelope,
    sequence_of,
)
from remetal.repository.ledgers import (
    NOTHING_DOOMED,
    Condemned,
    Ledger,
    LedgerBody,
    encode_ledger,
    open_ledger,
    put_ledger,
)
from remetal.repository.objects import HELP, miscalculated
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, utc_now
from remetal.repository.retired import Vouched
from remetal.storage import AlreadyExistsError, RetainedError

_TRIES = 20


@dataclass(frozen=True, slots=True)
class Decision:
    """What a new ledger will add: entries that are forgotten, and the whole of what is condemned and doomed."""

    forget: tuple[Envelope, ...] = ()
    condemned: tuple[Condemned, ...] = ()
    doomed: Condemned = NOTHING_DOOMED


def forget_snapshots(repository: Repository, key: RecipientKey, ids: Collection[str]) -> list[str]:
    """Forget the snapshots with these ids and return the ids of those that were there.

    From the moment that a machine's ledger is stored none of them is listed; then their objects are deleted. The
    history tells for ever that somebody with a recipient's key has done this. Raises DamagedError if a machine's
    history cannot be read whole, or one of the snapshots is not to be seen and anything is damaged; UnavailableError if
    the store fails.
    """
    catalog = open_catalog(repository, key)
    found = {each.id: each.machine_id for each in catalog.snapshots() if each.id in ids}
    if catalog.problems and len(found) < len(set(ids)):
        raise DamagedError(f"nothing is forgotten, because not all of it can be read: {catalog.problems[0]}", hint=HELP)
    wanted = set(found.values())
    forgotten: list[str] = []
    for machine_id in sorted(wanted):

        def decide(history: History) -> Decision:
            carried = history.ledgers.newest.body if history.ledgers.newest is not None else None
            return Decision(
                tuple(each for each in history.envelopes if each.kind != LEDGER and each.id in ids),
                carried.condemned if carried is not None else (),
                carried.doomed if carried is not None else NOTHING_DOOMED,
            )

        _, decision = append_ledger(repository, key, catalog.machines[machine_id], decide)
        delete_gone(repository, catalog.machines[machine_id])
        forgotten += [each.id for each in decision.forget]
    return forgotten


def append_ledger(
    repository: Repository, key: RecipientKey, access: MachineAccess, decide: Callable[[History], Decision]
) -> tuple[int, Decision]:
    """Add a ledger to a machine's history, and return its number and what it decides.

    `decide` is asked again whenever the history has gone on meanwhile. Raises DamagedError if the history is not whole.
    """
    vouched = read_vouched(repository)
    for _ in range(_TRIES):
        history = need_whole_history(repository, access, vouched)
        decision = decide(history)
        body, links = _body(history, decision), _links(history)
        data = encode_ledger(body, access.machine.id, key, *links)
        sequence = links.sequence
        if digest(data) != _read_back(access, vouched, data, body, links):
            raise miscalculated("a ledger")
        try:
            put_ledger(repository.store, access.machine.id, sequence, data)
        except AlreadyExistsError:
            continue
        if not is_void(repository, access.machine, sequence):
            return sequence, decision
    raise UnavailableError(
        f"the history of machine '{access.machine.name}' changes faster than it can be read",
        hint="Wait until its backups have ended, then run the command again.",
    )


def need_whole_history(repository: Repository, access: MachineAccess, vouched: Vouched) -> History:
    """Return a machine's history. Raises DamagedError if anything about it is not as it should be."""
    history = read_history(repository, access, vouched)
    if history.problems or not history.ledgers.certain:
        what = history.problems[0] if history.problems else "its newest ledger cannot be read"
        raise DamagedError(
            f"nothing of machine '{access.machine.name}' is forgotten or deleted while its history is damaged: {what}",
            hint=HELP,
        )
    return history


def delete_gone(repository: Repository, access: MachineAccess) -> None:
    """Delete the objects of entries that are forgotten."""
    history = need_whole_history(repository, access, read_vouched(repository))
    for name in history.names:
        if is_gone(sequence_of(name), history.ledgers.gone):
            with suppress(RetainedError):  # it is not listed any more, and deleted when the store lets it go
                repository.store.delete(name)


def _body(history: History, decision: Decision) -> LedgerBody:
    """Return what the ledger says that follows all that there is."""
    return LedgerBody(
        time=utc_now(),
        version=__version__,
        gone=merge_gone([*history.ledgers.gone, *_new_gone(history.ledgers.newest, decision)]),
        condemned=decision.condemned,
        doomed=decision.doomed,
    )


class _Links(NamedTuple):
    """The number of the next entry, the id of the one before it, and the number of the ledger before it."""

    sequence: int
    previous: str
    ledger: int


def _links(history: History) -> _Links:
    before = history.ledgers.newest
    last = history.envelopes[-1] if history.envelopes else None
    ledger = before.envelope.sequence if before is not None else 0
    return _Links(last.sequence + 1, last.id, ledger) if last is not None else _Links(1, "", ledger)


def _read_back(access: MachineAccess, vouched: Vouched, data: bytes, body: LedgerBody, links: _Links) -> bytes:
    """Decode a ledger from the very bytes that will be stored, and return their hash. Raises RemetalError."""
    try:
        name = entry_name(access.machine.id, links.sequence)
        envelope = open_envelope(name, data, access.machine, vouched)
        found = open_ledger(envelope, data).body
    except DamagedError as error:
        raise miscalculated("a ledger") from error
    if found != body or (envelope.previous, envelope.ledger) != (links.previous, links.ledger):
        raise miscalculated("a ledger")
    return bytes.fromhex(envelope.id)


def _new_gone(before: Ledger | None, decision: Decision) -> Iterator[Gone]:
    """Yield what the new ledger makes obsolete: the ledger before it, and what is forgotten."""
    for each in (*decision.forget, *([before.envelope] if before is not None else [])):
        yield Gone(first=each.sequence, last=each.sequence, previous=each.previous, id=each.id)
