"""Deleting what no snapshot needs, in two phases. Specification: docs/format/ledger.md.

First what nothing needs is *condemned*: a ledger in the machine's history names it. From then on no backup relies on
it, and one that began before cannot commit if it did, because the ledger has taken the number that its snapshot would
have had. Restores that are under way may go on reading. After the grace period, as witnesses tell it, another ledger
says that it is *doomed*, and it is deleted. A crash between any two steps leaves nothing that the next prune does not
finish. Packs that are needed in part are written anew, smaller, if enough can be gained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from remetal.errors import DamagedError, UnavailableError
from remetal.events import Note, Progress, Report, Step, Warn, silent
from remetal.repository.catalog import History, Ledgers, MachineAccess, open_catalog, read_vouched
from remetal.repository.chunks import find_packs
from remetal.repository.clocks import Waited, waited_until, witness_now
from remetal.repository.forget import Decision, append_ledger, delete_gone, need_whole_history
from remetal.repository.history import is_gone, sequence_of
from remetal.repository.ledgers import NOTHING_DOOMED, Condemned, Ledger, split_packs
from remetal.repository.locks import MachineLock, hold_machine
from remetal.repository.needed import Needed, find_needed
from remetal.repository.objects import (
    CONFIG,
    HELP,
    HISTORY,
    INDEX,
    KEYS,
    MAPS,
    PACKS,
    PARITY,
    hash_in_name,
    pack_name,
)
from remetal.repository.protect import protect_packs
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository
from remetal.repository.rewrite import Rewriting
from remetal.storage import RetainedError

DEFAULT_GRACE = 7 * 86400.0
"""Seconds from the prune that condemns something to the one that may delete it."""
DEFAULT_UNUSED = 0.1
"""How much of what is kept may be of no use before packs are written anew."""
_DELETIONS_PER_LOOK = 100
"""After so many deletions the lock is looked at again."""


@dataclass(slots=True)
class PruneResult:
    """What a prune of one machine did: bytes of packs, and counts of objects.

    `deleted` is gone, `retained` would be if the store did not protect it yet, `condemned` waits, and `rewritten` of
    the bytes that are condemned now were kept in new packs.
    `grace_left` is how many seconds the first of what waits has to wait at least, as far as this host knows.
    """

    machine: str
    kept_bytes: int = 0
    deleted_bytes: int = 0
    deleted_objects: int = 0
    condemned_bytes: int = 0
    condemned_objects: int = 0
    rewritten_bytes: int = 0
    retained_objects: int = 0
    grace_left: float = 0.0


@dataclass(frozen=True, slots=True)
class _Said:
    """The snapshots of a history by their ids, and what its newest ledger says that nobody may rely on."""

    snapshots: frozenset[str]
    packs: frozenset[bytes]
    names: frozenset[str]

    @classmethod
    def of(cls, history: History) -> _Said:
        ledger = history.ledgers.newest
        packs, names = (ledger.packs, ledger.names) if ledger is not None else (frozenset[bytes](), frozenset[str]())
        return cls(frozenset(each.id for each in history.snapshots), packs, names)


def prune_machine(
    repository: Repository,
    key: RecipientKey,
    machine_id: str,
    *,
    grace: float = DEFAULT_GRACE,
    max_unused: float = DEFAULT_UNUSED,
    reseal: bool = False,
    dry_run: bool = False,
    report: Report = silent,
) -> PruneResult:
    """Condemn what no snapshot of a machine needs, and delete what was condemned at least `grace` seconds ago.

    `max_unused` is the part of the kept bytes that may be of no use. `reseal` writes anew every pack that is sealed to
    other recipients than those that count now, so that each of these opens all of it, and no other. `dry_run` changes
    nothing and takes no lock, and tells what a prune would condemn now.

    Raises DamagedError, having changed nothing, if anything that decides about what is needed is damaged or missing;
    UnavailableError if a backup of the machine is at work or the store fails.
    """
    access = open_catalog(repository, key).machines.get(machine_id)
    if access is None:
        raise DamagedError(f"the record of machine {machine_id}, or what opens it, is missing", hint=HELP)
    if dry_run:
        return _Prune(repository, key, access, None, grace, max_unused, reseal, report).look()
    with hold_machine(repository.store, machine_id) as lock:
        return _Prune(repository, key, access, lock, grace, max_unused, reseal, report).run()


class _Prune:
    """One prune of one machine, whose lock is held unless it is only looked at."""

    def __init__(
        self,
        repository: Repository,
        key: RecipientKey,
        access: MachineAccess,
        lock: MachineLock | None,
        grace: float,
        max_unused: float,
        reseal: bool,
        report: Report,
    ) -> None:
        self.repository = repository
        self.store = repository.store
        self.key = key
        self.access = access
        self.machine = access.machine
        self.lock = lock
        self.grace = grace
        self.max_unused = max_unused
        self.report = report
        self.rewriting = Rewriting(repository, key, access, reseal=reseal, report=report)
        self.result = PruneResult(access.machine.name)
        self.retained: list[str] = []
        self.obsolete: frozenset[str] = frozenset()
        self.present = find_packs(repository, access.machine.id)
        self.deleted: set[str] = set()

    def look(self) -> PruneResult:
        """Return what would be condemned now."""
        found = find_needed(self.repository, self.access, self._history(), self.present)
        wasteful = self.rewriting.choose(found, self.max_unused)
        going = found.dead | set(wasteful)
        self.result.rewritten_bytes = int(found.used[found.table.packs.numbers(wasteful)].sum(dtype=np.int64))
        self.result.kept_bytes = self.result.rewritten_bytes
        self._account(found, Condemned(since=0, waited=(), packs=b"".join(going), names=tuple(found.names)))
        return self.result

    def run(self) -> PruneResult:
        """Do all of it."""
        ledger = self._history().ledgers.newest
        self._finish(ledger, protect=self._doomed(ledger))
        self._condemn()
        ledgers = self._history().ledgers
        self._finish(ledgers.newest, protect=True)
        self.result.retained_objects = len(self.retained)
        self.store.keep(self._kept_others(ledgers))
        return self.result

    def _history(self) -> History:
        return need_whole_history(self.repository, self.access, read_vouched(self.repository))

    def _condemn(self) -> None:
        """Say in the history what nothing needs."""
        self.report(Step(f"Looking for what no snapshot of {self.machine.name} needs"))
        history = self._history()
        found = find_needed(self.repository, self.access, history, self.present)
        wasteful = self.rewriting.choose(found, self.max_unused)
        packs, names = self.rewriting.rewrite(history, found, wasteful)
        self.result.rewritten_bytes = self.rewriting.rewritten_bytes
        self.result.kept_bytes = self.rewriting.kept_bytes
        group = Condemned(since=0, waited=(), packs=b"".join(sorted(packs)), names=tuple(sorted(names)))
        self._account(found, group)
        before = history.ledgers.newest
        looked_at = _Said.of(history)
        del history  # large, and about to be read once more
        if group.packs or group.names or self.retained or (before is not None and before.body.condemned):
            self._check_lock()
            sequence, _ = append_ledger(
                self.repository, self.key, self.access, lambda now: self._decide(looked_at, now, group, found)
            )
            self.report(Note(f"entry {sequence} of the history says what is to go"))
        self.store.keep(self._kept_packs(found, packs))

    def _protect(self, ledger: Ledger | None) -> None:
        """See to it that the packs that stay have parity among themselves.

        Parity that is replaced, or of which nothing stays, is deleted: nobody relies on it.
        """
        if not self.repository.config.parity:
            return
        refused = ledger.packs if ledger is not None else frozenset[bytes]()
        staying = find_packs(self.repository, self.machine.id, without=refused)
        protected = protect_packs(self.repository, self.machine.id, staying, report=self.report)
        self.obsolete = frozenset(protected.obsolete)
        for name in protected.obsolete:
            with suppress(RetainedError):
                self.store.delete(name)
                self.result.deleted_objects += 1

    def _kept_packs(self, found: Needed, going: Set[bytes]) -> Iterator[str]:
        """Yield the names of the packs that the machine's snapshots need."""
        return (self._name(each) for each, _ in found.table.packs if each not in going)

    def _kept_others(self, ledgers: Ledgers) -> Iterator[str]:
        """Yield the names of all other objects that the machine's snapshots need.

        What is on its way out may be there still, because it waits or because the store does not let it go yet; if that
        were protected anew by each prune, it would stay for ever.
        """
        going = self.obsolete | (ledgers.newest.names if ledgers.newest is not None else frozenset())
        for prefix in (INDEX, MAPS, PARITY, HISTORY):
            for entry in self.store.entries(f"{prefix}{self.machine.id}/"):
                forgotten = prefix == HISTORY and is_gone(sequence_of(entry.name), ledgers.gone)
                if entry.name not in going and not forgotten:
                    yield entry.name
        for prefix in KEYS:
            yield from (entry.name for entry in self.store.entries(prefix))
        yield CONFIG

    def _name(self, identity: bytes) -> str:
        return pack_name(self.machine.id, identity)

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _doomed(self, ledger: Ledger | None) -> bool:
        """Whether packs are there that should have been deleted."""
        return ledger is not None and any(each in self.present for each in split_packs(ledger.body.doomed.packs))

    def _finish(self, ledger: Ledger | None, *, protect: bool) -> None:
        """Delete what is forgotten and what is doomed; deleting it again does no harm.

        What stays gets parity of its own before, or where there is no room for it, afterwards.
        """
        delete_gone(self.repository, self.access)
        failed: UnavailableError | None = None
        try:
            if protect:
                self._protect(ledger)
        except UnavailableError as error:
            failed = error
        before = self.result.deleted_bytes
        if ledger is not None:
            self._delete_doomed(ledger)
        if failed is not None:
            if self.result.deleted_bytes == before:
                raise failed
            self._protect(ledger)

    def _delete_doomed(self, ledger: Ledger) -> None:
        self.retained = []
        packs = split_packs(ledger.body.doomed.packs)
        doomed = [*ledger.body.doomed.names, *map(self._name, packs)]
        total = self._size_of(packs)
        for number, name in enumerate(doomed):
            if number % _DELETIONS_PER_LOOK == 0:
                self._check_lock()
            try:
                self.store.delete(name)
            except RetainedError:
                self.retained.append(name)
                continue
            if name not in self.deleted:
                self.deleted.add(name)
                self.result.deleted_bytes += self._size_of([hash_in_name(name) or b""]) if name.startswith(PACKS) else 0
                self.result.deleted_objects += 1
            self.report(Progress(f"deleting from {self.machine.name}", self.result.deleted_bytes, max(total, 1)))

    def _size_of(self, packs: Sequence[bytes]) -> int:
        """Return how many bytes these packs have, as far as they were there when this prune began."""
        return sum(max(size, 0) for size in self.present.sizes(packs))

    def _decide(self, before: _Said, now: History, group: Condemned, found: Needed) -> Decision:
        """Return what the next ledger says. `before` is what the history said that the prune has looked at."""
        said = _Said.of(now)
        if said.snapshots - before.snapshots or (said.packs, said.names) != (before.packs, before.names):
            raise UnavailableError(
                f"machine '{self.machine.name}' was backed up or pruned while this prune looked at its snapshots",
                hint="Nothing is lost; run the prune again.",
            )
        moment, ledger = witness_now(), now.ledgers.newest
        before_now = ledger.body.condemned if ledger is not None else ()
        aged = [_without(each, found, waited_until(each.waited, moment, self.grace / 2)) for each in before_now]
        if group.packs or group.names:
            number = now.envelopes[-1].sequence + 1 if now.envelopes else 1
            aged.append(
                Condemned(since=number, waited=waited_until((), moment, 0.0), packs=group.packs, names=group.names)
            )
        if found.rescued or found.rescued_names:
            self.report(
                Warn(
                    f"{len(found.rescued) + len(found.rescued_names)} objects that were condemned are needed and stay",
                    "The store showed less than it held when they were condemned.",
                )
            )
        ripe = [each for each in aged if each.age >= self.grace]
        waiting = tuple(each for each in aged if each.age < self.grace and (each.packs or each.names))
        self.result.grace_left = min((self.grace - each.waited[0].age for each in waiting), default=0.0)
        retained = _group_of(self.retained)
        return Decision(condemned=waiting, doomed=_join([*ripe, *([retained] if self.retained else [])]))

    def _account(self, found: Needed, group: Condemned) -> None:
        going = set(split_packs(group.packs))
        self.result.kept_bytes += sum(size for identity, size in found.table.packs if identity not in going)
        self.result.condemned_bytes = self._size_of(list(going))
        self.result.condemned_objects = len(going) + len(group.names)


def _without(group: Condemned, found: Needed, waited: tuple[Waited, ...]) -> Condemned:
    """Return what is left of a group once what is needed is taken out."""
    packs = [each for each in split_packs(group.packs) if each not in found.rescued]
    names = tuple(each for each in group.names if each not in found.rescued_names)
    return Condemned(since=group.since, waited=waited, packs=b"".join(packs), names=names)


def _group_of(names: Sequence[str]) -> Condemned:
    packs = [hash_in_name(name) or b"" for name in names if name.startswith(PACKS)]
    others = tuple(name for name in names if not name.startswith(PACKS))
    return Condemned(since=0, waited=(), packs=b"".join(packs), names=others)


def _join(groups: Sequence[Condemned]) -> Condemned:
    if not groups:
        return NOTHING_DOOMED
    return Condemned(
        since=max(each.since for each in groups),
        waited=(),
        packs=b"".join(each.packs for each in groups),
        names=tuple(sorted(name for each in groups for name in each.names)),  # deleted in this order: index first
    )
