"""Mending what is damaged, as far as the repository itself can tell what it was, and taking that back.

Packs come back from parity, which takes no key; index objects from the packs, which takes a recipient's. Everything
goes through a journal (`remetal.repository.journal`): a repair only adds, what stood in the way is set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from remetal.errors import DamagedError, RefusedError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.repository.catalog import (
    Catalog,
    MachineAccess,
    entry_names,
    find_ledgers,
    last_number,
    open_catalog,
    read_entry,
    read_vouched,
)
from remetal.repository.check import CheckResult, check_records, known_packs, rebuild_index
from remetal.repository.chunks import find_packs, image_runs, read_contents
from remetal.repository.history import LEDGER, is_gone, sequence_of
from remetal.repository.journal import Journal, Repair, last_repair
from remetal.repository.ledgers import Ledger
from remetal.repository.locks import LockedError, hold_machine
from remetal.repository.machines import MachineRecord, read_machines
from remetal.repository.maps import ZERO_ID
from remetal.repository.objects import INDEX, PACKS, hash_in_name, pack_folder, pack_name, put_hashed
from remetal.repository.parity import parity_folder, rebuild_from
from remetal.repository.protect import protect_packs
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository
from remetal.repository.scrub import Scrubbed, scrub_store
from remetal.repository.snapshots import Snapshot
from remetal.repository.table import ChunkTable
from remetal.storage import Store

_EVERYWHERE = "0" * 32
"""The lock that repairs hold is that of no machine."""


@dataclass(slots=True)
class RepairResult:
    """What a repair did: counts of objects, and a sentence for each thing that it could not mend.

    `lost` tells of packs that are beyond help, `damaged` of all else that is not as it should be. `indexed` packs are
    in the index now and were not; `rebuilt` ones were damaged or missing and are whole; `parity` is how many parity
    objects were added. `number` is the repair's own, 0 if there was nothing to do.
    """

    number: int = 0
    rebuilt: int = 0
    indexed: int = 0
    parity: int = 0
    aside: int = 0
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Undone:
    """Which repair was undone: its number, when it was, how many objects were removed and how many brought back."""

    number: int
    time: str
    removed: int
    returned: int


def repair_repository(repository: Repository, key: RecipientKey | None, *, report: Report = silent) -> RepairResult:
    """Rebuild packs from parity, parity from packs, and with a recipient's key the index from packs.

    A pack is put only if it has the hash that is its name. Machines that are being backed up are passed over, but for
    their index. Raises UnavailableError if another repair is at work or the store fails; the next one then goes on.
    """
    with _held(repository.store):
        machines = {each.id: each for each in read_machines(repository.store, repository.config.id)[0]}
        heads = {each: _newest(repository, each) for each in machines}
        journal = Journal(repository.store, heads)
        result = RepairResult()
        report(Step("Comparing every object with the hash in its name"))
        scrubbed = scrub_store(repository.store, report)
        scrubbed.look_again()
        work = _Mending(repository, key, machines, journal, scrubbed, result, report)
        work.each_machine(work.mend_packs)
        if key is not None:
            work.mend_index(key)
        if repository.config.parity:
            work.each_machine(work.mend_parity)
        work.tell_rest()
        result.number, result.aside = journal.number, journal.aside
        return result


def undo_repair(repository: Repository, key: RecipientKey | None, *, report: Report = silent) -> Undone:
    """Take the last repair back: what it added is removed, what it had set aside returns.

    A key is needed if backups were made since, to see whether they rely on what the repair added. Raises RefusedError,
    having changed nothing, if they do or that cannot be told, or if there is no repair.
    """
    with _held(repository.store):
        repair = _need_repair(repository.store)
        machines = read_machines(repository.store, repository.config.id)[0]
        touched = [each for each in machines if _touched(repair, each.id)]
        removed = returned = 0
        with _all_held(repository.store, [each.id for each in touched]):
            for machine in touched:
                _need_unused(repository, key, machine, repair)
            report(Step(f"Undoing the repair of {repair.begin.time}"))
            for number, step in repair.steps:
                if repair.undo_step(number, step):
                    removed += step.action == "added"
                    returned += step.action == "aside"
            repair.forget()
    return Undone(repair.number, repair.begin.time, removed, returned)


def accept_repair(repository: Repository) -> int:
    """Delete what all repairs have set aside, with their journals, and return how many there were.

    They cannot be undone any more. Raises RefusedError if there is none.
    """
    with _held(repository.store):
        _need_repair(repository.store)
        count = 0
        while (repair := last_repair(repository.store)) is not None:
            repair.forget()
            count += 1
    return count


class _Mending:
    """The parts of one repair."""

    def __init__(
        self,
        repository: Repository,
        key: RecipientKey | None,
        machines: Mapping[str, MachineRecord],
        journal: Journal,
        scrubbed: Scrubbed,
        result: RepairResult,
        report: Report,
    ) -> None:
        self._repository = repository
        self._mending = Repository(journal, repository.config)
        self._key = key
        self._machines = machines
        self._journal = journal
        self._scrubbed = scrubbed
        self._result = result
        self._report = report

    def each_machine(self, mend: Callable[[str], None]) -> None:
        """Mend something of every machine that has packs or a record, and is not being backed up."""
        store = self._repository.store
        found = (entry.name.split("/") for entry in store.entries(PACKS))
        for machine_id in sorted({*self._machines, *(parts[1] for parts in found if len(parts) == 4)}):
            if machine_id in self._result.busy:
                continue
            with ExitStack() as stack:
                try:
                    stack.enter_context(hold_machine(store, machine_id))
                except LockedError as error:
                    self._result.busy.append(machine_id)
                    name = self._machines[machine_id].name if machine_id in self._machines else machine_id
                    self._report(Warn(f"The packs of '{name}' are passed over: {error.message}", error.hint))
                    continue
                mend(machine_id)

    def mend_packs(self, machine_id: str) -> None:
        """Rebuild the packs that are bad and not condemned, one after the other where groups overlap."""
        scrubbed, result, ledger = self._scrubbed, self._result, self._ledger(machine_id)
        unwanted = ledger.packs if ledger is not None else frozenset[bytes]()
        names = sorted(each for each in scrubbed.bad if each.startswith(pack_folder(machine_id)))
        waiting = {each: identity for each in names if (identity := hash_in_name(each)) and identity not in unwanted}
        while ready := [each for each in waiting if scrubbed.helpers(each)]:
            for name in ready:
                identity = waiting.pop(name)
                try:
                    data = rebuild_from(self._journal, machine_id, scrubbed.helpers(name), identity)
                except DamagedError as error:
                    result.lost.append(error.message)
                    continue
                self._journal.set_aside(name)
                put_hashed(self._journal, name, [data])
                scrubbed.forget(name)
                result.rebuilt += 1
                self._report(Note(f"rebuilt from parity: {name}"))
        unneeded = self._unneeded() if waiting else set[bytes]()
        for name, identity in waiting.items():
            if identity in unneeded:
                continue
            covered = scrubbed.groups_of(name)
            why = "others of its group are, too, or the parity is" if covered else "no parity covers it"
            result.lost.append(f"the pack {name} is damaged or missing, and {why}")

    def mend_index(self, key: RecipientKey) -> None:
        """Put packs into the index that are in none, and set damaged index objects aside."""
        self._report(Step("Looking for packs that no index knows"))
        self._result.indexed = rebuild_index(self._mending, key, report=self._report)
        for name in sorted(each for each in self._scrubbed.bad if each.startswith(INDEX)):
            self._journal.set_aside(name)
            self._scrubbed.forget(name)

    def mend_parity(self, machine_id: str) -> None:
        """Set parity aside that is of no use, and add what is lacking."""
        scrubbed = self._scrubbed
        broken = {each for each in scrubbed.bad if each.startswith(parity_folder(machine_id))}
        broken |= {each for each in scrubbed.misfits if each.startswith(parity_folder(machine_id))}
        for name in sorted(broken):
            self._journal.set_aside(name)
            scrubbed.forget(name)
        ledger = self._ledger(machine_id)
        refused = ledger.packs if ledger is not None else frozenset[bytes]()
        bad = {hash_in_name(each) or b"" for each in scrubbed.bad if each.startswith(pack_folder(machine_id))}
        staying = find_packs(self._mending, machine_id, without=refused | bad)
        done = protect_packs(self._mending, machine_id, staying, only_add=True, report=self._report)
        self._result.parity += done.added

    def tell_rest(self) -> None:
        """Note what is damaged still: what a scrub sees, and what a check of the records finds now.

        Packs are told elsewhere, and so are machines that are passed over: the next repair looks at theirs.
        """
        busy = tuple(folder(each) for each in self._result.busy for folder in (pack_folder, parity_folder))
        rest = {name: said for name, said in self._scrubbed.problems.items() if not name.startswith((PACKS, *busy))}
        records = CheckResult()
        check_records(self._repository, self._key, records, self._report, without=self._result.busy)
        self._result.damaged += dict.fromkeys([*rest.values(), *records.problems])

    def _unneeded(self) -> set[bytes]:
        """Return missing packs that nothing needs, although parity still tells of them: they are in no index.

        Without a key, or with a damaged index, record or secrets, nobody can tell; then they count as lost, too.
        """
        if self._key is None or any(each.startswith(INDEX) for each in self._scrubbed.bad):
            return set()
        missing = {each for each in self._scrubbed.bad if each.startswith(PACKS)}
        missing.difference_update(entry.name for entry in self._repository.store.entries(PACKS))
        if not missing:
            return set()
        catalog = open_catalog(self._repository, self._key)
        if catalog.closed:
            return set()
        known = known_packs(catalog)
        return {identity for each in missing if (identity := hash_in_name(each)) and identity not in known}

    def _ledger(self, machine_id: str) -> Ledger | None:
        repository, machine = self._repository, self._machines.get(machine_id)
        if machine is None:
            return None
        return find_ledgers(
            repository, machine, read_vouched(repository), entry_names(repository, machine.id), []
        ).newest


def _need_repair(store: Store) -> Repair:
    repair = last_repair(store)
    if repair is None:
        raise RefusedError("there is no repair to take back or to accept")
    return repair


def _touched(repair: Repair, machine_id: str) -> bool:
    return any(step.name.split("/")[1:2] == [machine_id] for _, step in repair.steps)


def _need_unused(repository: Repository, key: RecipientKey | None, machine: MachineRecord, repair: Repair) -> None:
    """Raise RefusedError if what was done since the repair relies on what the repair added, or may do so.

    That is a snapshot, or a prune: of two packs with the same chunk it may have kept the one that was rebuilt.
    """
    added = {name for name in repair.added() if name.startswith((pack_folder(machine.id), f"{INDEX}{machine.id}/"))}
    head = repair.begin.heads.get(machine.id, 0)
    since = _snapshots_since(repository, machine, head)
    if added and _pruned_since(repository, machine, head):
        raise RefusedError(
            f"'{machine.name}' was pruned since the repair, which may have kept only what the repair added",
            hint="The repair stays. Accept it: remetal repair --accept",
        )
    if not added or not since:
        return
    if key is None:
        raise RefusedError(
            f"'{machine.name}' was backed up since the repair, and may rely on what the repair added",
            hint="Give the passphrase or the recovery kit, so that remetal can see whether it does.",
        )
    catalog = open_catalog(repository, key)
    access = catalog.machines.get(machine.id)
    newer = [each for each in catalog.snapshots() if each.machine_id == machine.id and each.sequence in since]
    if access is None or len(newer) != len(since):
        raise RefusedError(f"the snapshots that '{machine.name}' has made since the repair cannot be read")
    table = _table_without(catalog, access, added)
    for snapshot in newer:
        if _relies(repository, access, snapshot, table):
            raise RefusedError(
                f"snapshot {snapshot.id[:12]} of '{machine.name}', made since the repair, relies on what it added",
                hint="The repair stays. To take it back all the same, forget that snapshot first: remetal forget.",
            )


def _pruned_since(repository: Repository, machine: MachineRecord, head: int) -> bool:
    """Whether anything was condemned or doomed after an entry of a machine's history, or that cannot be told."""
    names = entry_names(repository, machine.id)
    ledgers = find_ledgers(repository, machine, read_vouched(repository), names, [])
    newest = ledgers.newest
    if newest is None or newest.envelope.sequence <= head:
        return not ledgers.certain
    return bool(newest.body.doomed.packs) or any(each.since > head for each in newest.body.condemned)


def _snapshots_since(repository: Repository, machine: MachineRecord, head: int) -> set[int]:
    """Return the numbers of the snapshots that came after an entry; of what cannot be read it is taken to be one."""
    found: set[int] = set()
    recipients, names = read_vouched(repository), entry_names(repository, machine.id)
    gone = find_ledgers(repository, machine, recipients, names, []).gone
    for name in names:
        if sequence_of(name) > head and not is_gone(sequence_of(name), gone):
            try:
                if read_entry(repository, name, machine, recipients)[0].kind == LEDGER:
                    continue
            except DamagedError:
                pass
            found.add(sequence_of(name))
    return found


def _table_without(catalog: Catalog, access: MachineAccess, removed: Collection[str]) -> ChunkTable:
    """Return the chunks of a machine as they would be known without some of its objects."""
    table = ChunkTable()
    present = find_packs(catalog.repository, access.machine.id)
    for name, packs in read_contents(catalog.repository, access.domain, catalog.ledgers[access.machine.id].newest, []):
        if name not in removed:
            table.add(
                [e for e in packs if e.identity in present and pack_name(access.machine.id, e.identity) not in removed]
            )
    return table


def _relies(repository: Repository, access: MachineAccess, snapshot: Snapshot, table: ChunkTable) -> bool:
    try:
        return any(
            -1 in table.packs_of([each for each in run.ids if each != ZERO_ID])
            for image in snapshot.images
            for run in image_runs(repository, access.domain, image)
        )
    except DamagedError:
        return True


def _newest(repository: Repository, machine_id: str) -> int:
    return last_number(entry_names(repository, machine_id))


@contextmanager
def _held(store: Store) -> Iterator[None]:
    """Be the only repair of the repository."""
    with hold_machine(store, _EVERYWHERE):
        yield


@contextmanager
def _all_held(store: Store, machines: list[str]) -> Iterator[None]:
    if not machines:
        yield
        return
    with hold_machine(store, machines[0]), _all_held(store, machines[1:]):
        yield
