"""Is the repository what was written to it? Problems are listed, all of them, and nothing is changed.

Three depths: without a key every object is hashed again and every public record, signature and link is checked;
with a key every snapshot's chunks are looked up; with a recipient's key every chunk can be decoded, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from remetal.errors import DamagedError
from remetal.events import Note, Progress, Report, Step, silent
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
from remetal.repository.chunks import find_packs, image_runs, live_packs, load_table, read_contents
from remetal.repository.history import LEDGER, Envelope, check_chain, is_gone, sequence_of
from remetal.repository.indexes import PACKS_PER_INDEX, put_index
from remetal.repository.machines import MachineKeys, MachineRecord, read_machines
from remetal.repository.maps import ZERO_ID
from remetal.repository.named import NamedObjects
from remetal.repository.objects import (
    HISTORY,
    PACKS,
    damaged,
    get_object,
    hash_in_name,
    pack_name,
)
from remetal.repository.packs import FOOTER, MAX_PACK, ZSTD, Codec, Contents, offsets, open_pack
from remetal.repository.recipients import RecipientKey, read_recipients, read_revoked
from remetal.repository.repository import Repository
from remetal.repository.retired import read_retired
from remetal.repository.scrub import scrub_store
from remetal.repository.slots import read_slots
from remetal.repository.snapshots import Snapshot
from remetal.repository.table import ChunkTable
from remetal.storage import Entry, Store
from remetal.system.processors import probe_processors

READERS = 6
"""So many packs are read and opened at once, however many processors there are: each is 16 MiB of memory."""


@dataclass(slots=True)
class CheckResult:
    """What a check has looked at, and a sentence for each thing that is wrong.

    `repairable` packs are damaged or missing, and parity can rebuild them; `unprotected` ones have no parity.
    """

    problems: list[str] = field(default_factory=list)
    objects: int = 0
    bytes: int = 0
    snapshots: int = 0
    chunks_read: int = 0
    repairable: int = 0
    unprotected: int = 0
    _told: set[str] = field(default_factory=set, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, *problems: str) -> None:
        """Note problems, each of them once."""
        fresh = [each for each in dict.fromkeys(problems) if each not in self._told]
        self._told.update(fresh)
        self.problems += fresh


def check_repository(
    repository: Repository,
    *,
    keys: RecipientKey | MachineKeys | None = None,
    read_data: bool = False,
    report: Report = silent,
) -> CheckResult:
    """Check a repository as deep as the keys allow; `read_data` decodes every chunk and needs a recipient's key.

    Raises RefusedError if the keys are another repository's, UnavailableError if the store cannot be read.
    """
    assert not read_data or isinstance(keys, RecipientKey), "reading data needs a recipient's key"
    result = CheckResult()
    report(Step("Comparing every object with the hash in its name"))
    _scrub(repository, result, report)
    catalog = check_records(repository, keys, result, report)
    if catalog is not None and isinstance(keys, RecipientKey):
        _note_orphans(catalog, report)
        if read_data:
            report(Step("Decoding every chunk"))
            for access in catalog.machines.values():
                _check_data(catalog, keys, access, result, report)
    return result


def check_records(
    repository: Repository,
    keys: RecipientKey | MachineKeys | None,
    result: CheckResult,
    report: Report,
    *,
    without: Container[str] = (),
) -> Catalog | None:
    """Check what the objects say, without looking at all of their bytes, and return what the keys open of it.

    Without keys those are the public records; with keys the chunks of every snapshot are looked up, too, but for those
    of the machines `without`.
    """
    report(Step("Checking keys, signatures and the chain of snapshots"))
    _check_public(repository, result)
    if keys is None:
        return None
    catalog = open_catalog(repository, keys)
    result.add(*catalog.problems)
    result.snapshots = len(catalog.snapshots())
    report(Step("Looking for every snapshot's chunks"))
    for access in catalog.machines.values():
        if access.machine.id not in without:
            _check_chunks(catalog, access, result, report)
    return catalog


def rebuild_index(repository: Repository, key: RecipientKey, *, report: Report = silent) -> int:
    """Write the index anew for packs that no readable index object knows, and return how many there were.

    The packs' own tables of contents are enough for that. Useful after an index object was lost; packs that an
    interrupted backup has left behind become useful, too. A pack that is damaged is passed over with a note.
    """
    catalog = open_catalog(repository, key)
    known = known_packs(catalog)
    found: dict[str, list[Contents]] = {}
    count = 0
    for entry in repository.store.entries(PACKS):
        identity = hash_in_name(entry.name)
        if identity is None or identity in known:
            continue
        try:
            machine_id, contents = _read_pack_contents(repository, key, entry)
        except DamagedError as error:
            report(Note(error.message))
            continue
        if machine_id not in catalog.machines or entry.name != pack_name(machine_id, identity):
            report(Note(f"the pack {entry.name} belongs to no machine that this key knows"))
            continue
        found.setdefault(machine_id, []).append(contents)
        count += 1
        if len(found[machine_id]) >= PACKS_PER_INDEX:
            _put_found(repository, catalog, found, machine_id)
    for machine_id in list(found):
        _put_found(repository, catalog, found, machine_id)
    return count


def _put_found(repository: Repository, catalog: Catalog, found: dict[str, list[Contents]], machine_id: str) -> None:
    domain, entry = catalog.machines[machine_id].domain, last_number(entry_names(repository, machine_id))
    put_index(repository.store, repository.config.id, domain, found.pop(machine_id), entry=entry)


def known_packs(catalog: Catalog) -> NamedObjects:
    """Return all packs that are in an index or condemned; the sizes of the latter are not known."""
    known = NamedObjects()
    for access in catalog.machines.values():
        for _, packs in read_contents(catalog.repository, access.domain, None, []):
            known.add((pack.identity, pack.size) for pack in packs)
        ledger = catalog.ledgers[access.machine.id].newest
        known.add((identity, 0) for identity in (ledger.packs if ledger is not None else ()))
    return known


def _read_pack_contents(repository: Repository, key: RecipientKey, entry: Entry) -> tuple[str, Contents]:
    data = get_object(repository.store, entry.name, MAX_PACK)
    if blake3(data).digest() != hash_in_name(entry.name) or len(data) < FOOTER.size:
        raise damaged(entry.name, "its hash differs")
    opener = open_pack(entry.name, data, key)
    return opener.machine_id, opener.open_contents(data, len(data))


def _scrub(repository: Repository, result: CheckResult, report: Report) -> None:
    found = scrub_store(repository.store, report)
    result.objects, result.bytes = found.objects, found.bytes
    result.add(*found.problems.values())
    packs = sorted(name for name in found.bad if name.startswith(PACKS))
    missing = set(packs)
    if packs:
        missing.difference_update(entry.name for entry in repository.store.entries(PACKS))
    result.repairable = sum(bool(found.helpers(name)) for name in packs)
    if missing:
        report(Note(f"{len(missing)} packs that parity covers are not there, {min(missing)} among them"))
    if result.repairable:
        report(Note(f"parity can rebuild {result.repairable} of {len(packs)} damaged or missing packs: remetal repair"))
    if repository.config.parity and found.unprotected:
        result.unprotected = found.unprotected
        report(Note(f"{result.unprotected} packs have no parity: `remetal repair` or `remetal prune` adds it"))


def _check_public(repository: Repository, result: CheckResult) -> None:
    store, repository_id = repository.store, repository.config.id
    recipients, problems = read_recipients(store, repository_id)
    problems += read_revoked(store, repository_id, recipients)[1]
    problems += read_retired(store, repository_id, {each.id: each for each in recipients})[1]
    result.add(*problems, *([] if recipients else ["the repository's first recipient is missing or damaged"]))
    result.add(*(error.message for error in read_slots(store, repository_id)[1]))
    machines, problems = read_machines(store, repository_id)
    result.add(*problems)
    for machine in machines:
        _check_history(repository, machine, result)
    _check_owners(store, machines, result)


def _check_history(repository: Repository, machine: MachineRecord, result: CheckResult) -> None:
    vouched = read_vouched(repository)
    names, problems = entry_names(repository, machine.id), list[str]()
    gone = find_ledgers(repository, machine, vouched, names, problems).gone
    result.add(*problems)
    envelopes: list[Envelope] = []
    for name in names:
        if is_gone(sequence_of(name), gone):
            continue
        try:
            envelopes.append(read_entry(repository, name, machine, vouched)[0])
        except DamagedError as error:
            result.add(error.message)
    result.snapshots += sum(each.kind != LEDGER for each in envelopes)
    result.add(*check_chain(envelopes, gone, machine.name))
    retired = vouched.retired.get(machine.id)
    if retired is not None and max(map(sequence_of, names), default=0) < retired.last:
        result.add(
            f"the newest entries of machine '{machine.name}' have vanished: its keys were retired with {retired.last}"
        )


def _check_owners(store: Store, machines: list[MachineRecord], result: CheckResult) -> None:
    known = {machine.id for machine in machines}
    owners = {entry.name.split("/")[1] for entry in store.entries(HISTORY)}
    result.add(*(f"the machine of {HISTORY}{each}/ has no record" for each in sorted(owners - known)))


def _check_chunks(catalog: Catalog, access: MachineAccess, result: CheckResult, report: Report) -> None:
    damage: list[DamagedError] = []
    ledger = catalog.ledgers[access.machine.id].newest
    table = load_table(catalog.repository, access.domain, ledger, damage)
    result.add(*(error.message for error in damage))
    checked: set[bytes] = set()
    lacking = 0
    for snapshot in catalog.snapshots():
        if snapshot.machine_id == access.machine.id:
            lacking += _check_snapshot(catalog, snapshot, table, checked, result)
    if not lacking and table.absent:
        report(Note(f"{len(table.absent)} packs of {access.machine.name} are missing that no snapshot needs, harmless"))
    present = find_packs(catalog.repository, access.machine.id) if lacking else NamedObjects()
    for identity, size in table.absent if lacking else ():
        there = present.sizes([identity])[0]
        what = f"it has {there} bytes instead of {size}" if there >= 0 else "it is missing"
        result.add(damaged(pack_name(access.machine.id, identity), what).message)


def _check_snapshot(
    catalog: Catalog, snapshot: Snapshot, table: ChunkTable, checked: set[bytes], result: CheckResult
) -> int:
    """Look up all chunks of a snapshot, and return how many are not there.

    Images whose map was found whole before are passed over.
    """
    lacking = 0
    for image in snapshot.images:
        identity = bytes.fromhex(image.digest)
        if identity in checked:
            continue
        what = f"snapshot {snapshot.id[:12]} of '{snapshot.machine}', image of {image.volume}"
        unknown = misfits = 0
        try:
            for run in image_runs(catalog.repository, catalog.machines[snapshot.machine_id].domain, image):
                needed = [(at, each) for at, each in enumerate(run.ids, run.first) if each != ZERO_ID]
                for (at, _), length in zip(needed, table.lengths_of([each for _, each in needed]), strict=True):
                    unknown += length < 0
                    misfits += 0 <= length != min(image.chunk_size, image.size - at * image.chunk_size)
        except DamagedError as error:
            result.add(f"{what}: {error.message}")
            continue
        if misfits:
            result.add(f"{what}: {misfits} chunks are longer or shorter than their place")
        if unknown:
            where = "in no pack that is there" if table.absent else "in no index object"
            result.add(f"{what}: {unknown} chunks are {where} of machine {snapshot.machine_id}")
        if not unknown and not misfits:
            checked.add(identity)
        lacking += unknown
    return lacking


def _note_orphans(catalog: Catalog, report: Report) -> None:
    known = known_packs(catalog)
    orphans = sum(hash_in_name(entry.name) not in known for entry in catalog.repository.store.entries(PACKS))
    if orphans:
        report(Note(f"{orphans} packs are in no index: left by an interrupted backup, harmless"))


def _check_data(
    catalog: Catalog, key: RecipientKey, access: MachineAccess, result: CheckResult, report: Report
) -> None:
    repository, ledger = catalog.repository, catalog.ledgers[access.machine.id].newest
    total = sum(pack.size for pack in live_packs(repository, access.domain, ledger))
    done = 0
    workers = min(probe_processors(), READERS)
    waiting: deque[tuple[Contents, Future[list[str]]]] = deque()
    part = f"packs of {access.machine.name}"
    with ThreadPoolExecutor(workers) as pool:
        packs = live_packs(repository, access.domain, ledger)
        while True:
            pack = next(packs, None)
            if pack is not None:
                waiting.append((pack, pool.submit(_check_pack, repository, key, access, pack)))
            while waiting and (pack is None or len(waiting) > 2 * workers):
                finished, future = waiting.popleft()
                result.add(*future.result())
                result.chunks_read += len(finished.entries)
                done += finished.size
                report(Progress(part, done, total))
            if pack is None:
                return


def _check_pack(repository: Repository, key: RecipientKey, access: MachineAccess, pack: Contents) -> list[str]:
    name = pack_name(access.machine.id, pack.identity)
    problems: list[str] = []
    codec = Codec(access.domain.id_key)
    try:
        data = get_object(repository.store, name, MAX_PACK)
        opener = open_pack(name, data, key)
        if opener.machine_id != access.machine.id or len(data) != pack.size:
            raise damaged(name, "it is not the pack that the index means")
        if opener.open_contents(data, len(data)).entries.tobytes() != pack.entries.tobytes():
            raise damaged(name, "its table of contents differs from the index")
    except DamagedError as error:
        return [error.message]
    starts = offsets(pack.entries, pack.start).tolist()
    for ordinal, (identity, word, plain) in enumerate(pack.entries.tolist()):
        start, size = starts[ordinal], word & (ZSTD - 1)
        try:
            opener.open_chunk(data[start : start + size], ordinal, bytes(identity), word, plain, codec)
        except DamagedError as error:
            problems.append(error.message)
    return problems
