"""Deleting what no snapshot needs, in two phases. Specification: docs/format/ledger.md.

First what nothing needs is *condemned*: a ledger in the machine's history names it. From then on no backup relies on
it, and one that began before cannot commit if it did, because the ledger has taken the number that its snapshot would
have had. Restores that are under way may go on reading. After the grace period, as witnesses tell it, another ledger
says that it is *doomed*, and it is deleted. A crash between any two steps leaves nothing that the next prune does not
finish. Packs that are needed in part are written anew, smaller, if enough can be gained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from blake3 import blake3

from remetal.errors import DamagedError, UnavailableError
from remetal.events import Note, Progress, Report, Step, Warn, silent
from remetal.repository.catalog import History, MachineAccess, open_catalog, read_vouched
from remetal.repository.chunks import find_packs, image_runs, load_table, read_contents
from remetal.repository.clocks import passed, witness_now
from remetal.repository.forget import Decision, append_ledger, delete_gone, need_whole_history
from remetal.repository.indexes import PACKS_PER_INDEX, put_index
from remetal.repository.ledgers import NOTHING_DOOMED, Condemned, split_packs
from remetal.repository.locks import MachineLock, hold_machine
from remetal.repository.maps import ZERO_ID, map_folder
from remetal.repository.objects import (
    CONFIG,
    HELP,
    HISTORY,
    INDEX,
    KEYS,
    MAPS,
    PACKS,
    damaged,
    get_object,
    hash_in_name,
    pack_name,
    put_once,
)
from remetal.repository.packs import (
    MAX_PACK,
    ZSTD,
    Codec,
    Contents,
    Pack,
    PackBuilder,
    head_size,
    offsets,
    open_pack,
    sealed_to,
)
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, active_recipients
from remetal.repository.table import ChunkTable
from remetal.storage import NotFoundError, RetainedError

DEFAULT_GRACE = 7 * 86400.0
"""Seconds from the prune that condemns something to the one that may delete it."""
DEFAULT_UNUSED = 0.1
"""How much of what is kept may be of no use before packs are written anew."""
_DELETIONS_PER_LOOK = 100
"""After so many deletions the lock is looked at again."""
_MANY_SMALL = 16
"""So many index objects that are not full are made few."""
_LEAST_WASTE = 0.1
"""A pack of which less than this part is of no use is left alone."""


@dataclass(slots=True)
class PruneResult:
    """What a prune of one machine did: bytes of packs, and counts of objects.

    `deleted` is gone, `retained` would be if the store did not protect it yet, `condemned` waits, and `rewritten` of
    the bytes that are condemned now were kept in new packs.
    `grace_left` is how many seconds the first of what waits has to wait at least.
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


@dataclass(slots=True)
class _Found:
    """What a machine has: its chunks with the needed ones marked, the needed pages of maps, and what it does not need.

    `rescued` was condemned, and is needed all the same.
    """

    table: ChunkTable
    dead: set[bytes]
    wasteful: list[bytes]
    names: set[str]
    rescued: set[bytes]
    rescued_names: set[str]


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
        self.reseal = reseal
        self.active = {each.id: each for each in active_recipients(repository)}
        self.report = report
        self.result = PruneResult(access.machine.name)
        self.retained: list[str] = []
        self.sizes = find_packs(repository, access.machine.id)

    def look(self) -> PruneResult:
        """Return what would be condemned now."""
        found = self._find(need_whole_history(self.repository, self.access, read_vouched(self.repository)))
        going = found.dead | set(found.wasteful)
        used = dict(zip((identity for identity, _ in found.table.packs), found.table.marked_bytes(), strict=True))
        self.result.rewritten_bytes = sum(int(used[identity]) for identity in found.wasteful)
        self.result.kept_bytes = self.result.rewritten_bytes
        self._account(found, Condemned(since=0, age=0.0, packs=b"".join(going), names=tuple(found.names)))
        return self.result

    def run(self) -> PruneResult:
        """Do all of it."""
        history = need_whole_history(self.repository, self.access, read_vouched(self.repository))
        self._finish(history)
        self.report(Step(f"Looking for what no snapshot of {self.machine.name} needs"))
        found = self._find(history)
        packs, names = self._rewrite(history, found)
        group = Condemned(since=0, age=0.0, packs=b"".join(sorted(packs)), names=tuple(sorted(names)))
        self._account(found, group)
        before = history.ledgers.newest
        if group.packs or group.names or self.retained or (before is not None and before.body.condemned):
            self._check_lock()
            sequence, _ = append_ledger(
                self.repository, self.key, self.access, lambda now: self._decide(history, now, group, found)
            )
            self.report(Note(f"entry {sequence} of the history says what is to go"))
        self._finish(need_whole_history(self.repository, self.access, read_vouched(self.repository)))
        self.result.retained_objects = len(self.retained)
        self.store.keep(self._kept_names(found, group))
        return self.result

    def _kept_names(self, found: _Found, group: Condemned) -> Iterator[str]:
        """Yield the names of all objects that the machine's snapshots need."""
        going = {*map(self._name, split_packs(group.packs)), *group.names}
        yield from (name for name in (self._name(each) for each, _ in found.table.packs) if name not in going)
        for prefix in (INDEX, MAPS, HISTORY):
            for entry in self.store.entries(f"{prefix}{self.machine.id}/"):
                if entry.name not in going:
                    yield entry.name
        for prefix in KEYS:
            yield from (entry.name for entry in self.store.entries(prefix))
        yield CONFIG

    def _name(self, identity: bytes) -> str:
        return pack_name(self.machine.id, identity)

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _finish(self, history: History) -> None:
        """Delete what is forgotten and what is doomed; deleting it again does no harm."""
        delete_gone(self.repository, self.access)
        ledger = history.ledgers.newest
        if ledger is None:
            return
        self.retained = []
        packs = split_packs(ledger.body.doomed.packs)
        doomed = [*ledger.body.doomed.names, *map(self._name, packs)]
        total = sum(self.sizes.get(each, 0) for each in packs)
        for number, name in enumerate(doomed):
            if number % _DELETIONS_PER_LOOK == 0:
                self._check_lock()
            try:
                self.store.delete(name)
            except RetainedError:
                self.retained.append(name)
                continue
            self.result.deleted_bytes += self.sizes.pop(hash_in_name(name) or b"", 0)
            self.result.deleted_objects += 1
            self.report(Progress(f"deleting from {self.machine.name}", self.result.deleted_bytes, max(total, 1)))

    def _find(self, history: History) -> _Found:
        """Mark what the snapshots need. Raises DamagedError if any of it is not there."""
        ledger = history.ledgers.newest
        table = load_table(self.repository, self.access.domain, ledger)
        pages, lacking = self._mark(history, table)
        rescued: set[bytes] = set()
        if lacking and ledger is not None:  # the store has shown less than there was when it was condemned
            table = load_table(self.repository, self.access.domain, None)
            pages, lacking = self._mark(history, table)
            needed = {identity for (identity, _), used in zip(table.packs, table.marked_bytes(), strict=True) if used}
            rescued = needed & ledger.packs
        if lacking:
            absent = f"; the pack {self._name(table.absent[0][0])} is missing or cut short" if table.absent else ""
            raise self._refuse(f"{len(lacking)} chunks that its snapshots need are in no pack that is there{absent}")
        used = {identity: int(used) for (identity, _), used in zip(table.packs, table.marked_bytes(), strict=True)}
        condemned = (ledger.packs if ledger is not None else frozenset()) - rescued
        dead = {identity for identity, live in used.items() if not live}
        dead |= {identity for identity, _ in table.absent} | (self.sizes.keys() - used.keys())
        dead -= condemned
        old_names = ledger.names if ledger is not None else frozenset()
        folder = map_folder(self.machine.id)
        maps = {entry.name for entry in self.store.entries(folder) if hash_in_name(entry.name)}
        return _Found(
            table=table,
            dead=dead,
            wasteful=self._wasteful(table, used),
            names=maps - pages - old_names,
            rescued=rescued,
            rescued_names=pages & old_names,
        )

    def _refuse(self, what: str) -> DamagedError:
        return DamagedError(f"nothing of machine '{self.machine.name}' is deleted: {what}", hint=HELP)

    def _mark(self, history: History, table: ChunkTable) -> tuple[set[str], list[bytes]]:
        """Mark all chunks of all snapshots; return the names of the pages of their maps, and the chunks that lack."""
        pages: set[str] = set()
        seen: set[str] = set()
        lacking: list[bytes] = []
        for snapshot in history.snapshots:
            for image in snapshot.images:
                pages.update(map_folder(self.machine.id) + page.hex() for page in image.pages if page)
                if image.digest in seen:
                    continue
                seen.add(image.digest)
                for run in image_runs(self.repository, self.access.domain, image):
                    lacking += table.mark([each for each in run.ids if each != ZERO_ID])
        return pages, lacking

    def _wasteful(self, table: ChunkTable, used: Mapping[bytes, int]) -> list[bytes]:
        """Return the packs to write anew, the most wasteful first, until little enough of the rest is of no use."""
        kept = {identity: size for identity, size in table.packs if used[identity]}
        waste = sum(kept.values()) - sum(used[identity] for identity in kept)
        allowed = self.max_unused * sum(used.values())
        chosen: list[bytes] = []
        if self.reseal:
            chosen = [identity for identity in kept if set(self._owners(self._name(identity))) != self.active.keys()]
            waste -= sum(kept.pop(identity) - used[identity] for identity in chosen)
        for identity in sorted(kept, key=lambda each: (used[each] / kept[each], each)):
            gain = kept[identity] - used[identity]
            if waste <= allowed or gain < _LEAST_WASTE * kept[identity]:
                break
            chosen.append(identity)
            waste -= gain
        return chosen

    def _owners(self, name: str) -> list[str]:
        try:
            return sealed_to(name, self.store.get(name, size=head_size()))
        except NotFoundError as error:
            raise damaged(name, "it is missing") from error

    def _rewrite(self, history: History, found: _Found) -> tuple[set[bytes], set[str]]:
        """Write anew what is needed of wasteful packs, and the index objects that would name what is to go.

        Returns the packs and the names of other objects that nothing needs any more.
        """
        going = found.dead | set(found.wasteful)
        fresh = list(self._repack(found))
        ledger = history.ledgers.newest
        avoid = ledger.names if ledger is not None else frozenset()
        stale: dict[str, list[Contents]] = {}
        small: dict[str, list[Contents]] = {}
        for name, packs in read_contents(self.repository, self.access.domain, ledger):
            if any(each.identity in going for each in packs):
                stale[name] = packs
            elif len(packs) < PACKS_PER_INDEX:
                small[name] = packs
        if len(small) > _MANY_SMALL:
            stale |= small
        staying = {each.identity: each for packs in stale.values() for each in packs if each.identity not in going}
        staying |= {each.identity: each for each in self._contents_of(set(found.rescued))}
        kept = [*staying.values(), *fresh]
        for start in range(0, len(kept), PACKS_PER_INDEX):
            group = kept[start : start + PACKS_PER_INDEX]
            put_index(self.store, self.repository.config.id, self.access.domain, group, avoid=avoid | stale.keys())
        refused = (ledger.packs if ledger is not None else frozenset()) - found.rescued
        self._need_all(history, going | refused, avoid | stale.keys())
        return going, found.names | stale.keys()

    def _need_all(self, history: History, going: Set[bytes], stale: Set[str]) -> None:
        """Look once more whether the snapshots have all they need without what is about to be condemned.

        Raises UnavailableError if not: then the store has shown less than it holds while this prune looked.
        """
        table = ChunkTable()
        present = find_packs(self.repository, self.machine.id)
        for name, packs in read_contents(self.repository, self.access.domain, None):
            for each in packs if name not in stale else ():
                if each.identity not in going and each.identity in present:
                    table.add(each)
        if self._mark(history, table)[1]:
            raise UnavailableError(
                f"{self.store.location} showed less than it holds while machine '{self.machine.name}' was pruned",
                hint="Nothing is lost; run the prune again.",
            )

    def _repack(self, found: _Found) -> Iterator[Contents]:
        """Yield the contents of new packs that hold what is needed of the wasteful ones; they are stored by then."""
        codec = Codec(self.access.domain.id_key)
        builders: dict[tuple[str, ...], PackBuilder] = {}
        done, total = 0, sum(self.sizes[each] for each in found.wasteful)
        for contents in self._contents_of(set(found.wasteful)):
            name = self._name(contents.identity)
            data = get_object(self.store, name, MAX_PACK)
            if blake3(data).digest() != contents.identity:
                raise self._refuse(f"the pack {name} is not what was written")
            opener = open_pack(name, data, self.key)
            if opener.machine_id != self.machine.id:
                raise damaged(name, "it belongs to another machine")
            owners = tuple(self.active) if self.reseal else tuple(e for e in sealed_to(name, data) if e in self.active)
            owners = owners or tuple(self.active)
            starts = offsets(contents.entries, contents.start).tolist()
            for ordinal, (raw, word, plain) in enumerate(contents.entries.tolist()):
                identity = bytes(raw)
                if not found.table.is_marked(identity, contents.identity):
                    continue
                start, size = starts[ordinal], word & (ZSTD - 1)
                chunk = opener.open_chunk(data[start : start + size], ordinal, identity, word, plain, codec)
                if owners not in builders:
                    sealing = [self.active[each] for each in owners]
                    builders[owners] = PackBuilder(self.repository.config.id, self.machine.id, sealing, codec)
                self.result.rewritten_bytes += builders[owners].add(identity, memoryview(chunk))
                if builders[owners].full:
                    yield self._store(builders.pop(owners).finish())
            done += len(data)
            self.report(Progress(f"packs of {self.machine.name} written anew", done, total))
        for builder in builders.values():
            yield self._store(builder.finish())

    def _contents_of(self, packs: set[bytes]) -> Iterator[Contents]:
        for _, contents in read_contents(self.repository, self.access.domain, None):
            for each in contents:
                if each.identity in packs:
                    packs.discard(each.identity)
                    yield each

    def _store(self, pack: Pack) -> Contents:
        put_once(self.store, self._name(pack.contents.identity), pack.pieces)
        self.result.kept_bytes += pack.contents.size
        return pack.contents

    def _decide(self, before: History, now: History, group: Condemned, found: _Found) -> Decision:
        """Return what the next ledger says. `before` is the history that the prune has looked at."""
        if {each.id for each in now.snapshots} - {each.id for each in before.snapshots} or _said(now) != _said(before):
            raise UnavailableError(
                f"machine '{self.machine.name}' was backed up or pruned while this prune looked at its snapshots",
                hint="Nothing is lost; run the prune again.",
            )
        moment, ledger = witness_now(), now.ledgers.newest
        aged: list[Condemned] = []
        if ledger is not None:
            since = passed(ledger.body.witness, moment, self.grace / 2)
            aged = [_without(each, found, each.age + since) for each in ledger.body.condemned]
        if group.packs or group.names:
            number = now.envelopes[-1].sequence + 1 if now.envelopes else 1
            aged.append(Condemned(since=number, age=0.0, packs=group.packs, names=group.names))
        if found.rescued or found.rescued_names:
            self.report(
                Warn(
                    f"{len(found.rescued) + len(found.rescued_names)} objects that were condemned are needed and stay",
                    "The store showed less than it held when they were condemned.",
                )
            )
        ripe = [each for each in aged if each.age >= self.grace]
        waiting = tuple(each for each in aged if each.age < self.grace and (each.packs or each.names))
        self.result.grace_left = max((self.grace - each.age for each in waiting), default=0.0)
        retained = _group_of(self.retained)
        return Decision(condemned=waiting, doomed=_join([*ripe, *([retained] if self.retained else [])]))

    def _account(self, found: _Found, group: Condemned) -> None:
        going = set(split_packs(group.packs))
        self.result.kept_bytes += sum(size for identity, size in found.table.packs if identity not in going)
        self.result.condemned_bytes = sum(self.sizes.get(each, 0) for each in going)
        self.result.condemned_objects = len(going) + len(group.names)


def _said(history: History) -> tuple[frozenset[bytes], frozenset[str]]:
    """Return what the newest ledger says that nobody may rely on."""
    ledger = history.ledgers.newest
    return (ledger.packs, ledger.names) if ledger is not None else (frozenset(), frozenset())


def _without(group: Condemned, found: _Found, age: float) -> Condemned:
    """Return what is left of a group once what is needed is taken out."""
    packs = [each for each in split_packs(group.packs) if each not in found.rescued]
    names = tuple(each for each in group.names if each not in found.rescued_names)
    return Condemned(since=group.since, age=age, packs=b"".join(packs), names=names)


def _group_of(names: Sequence[str]) -> Condemned:
    packs = [hash_in_name(name) or b"" for name in names if name.startswith(PACKS)]
    others = tuple(name for name in names if not name.startswith(PACKS))
    return Condemned(since=0, age=0.0, packs=b"".join(packs), names=others)


def _join(groups: Sequence[Condemned]) -> Condemned:
    if not groups:
        return NOTHING_DOOMED
    return Condemned(
        since=max(each.since for each in groups),
        age=min(each.age for each in groups),
        packs=b"".join(each.packs for each in groups),
        names=tuple(sorted(name for each in groups for name in each.names)),  # deleted in this order: index first
    )
