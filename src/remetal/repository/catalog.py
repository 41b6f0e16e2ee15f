"""The catalog: what somebody with a key sees of machines, snapshots and chunks, with everything verified."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from remetal.errors import DamagedError, RefusedError
from remetal.repository.indexes import index_folder, read_index
from remetal.repository.machines import Domain, Head, MachineKeys, MachineRecord, open_secrets, read_machines
from remetal.repository.maps import Run, read_pages
from remetal.repository.objects import SNAPSHOTS, damaged, get_named
from remetal.repository.packs import Contents
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository
from remetal.repository.snapshots import (
    MAX_SNAPSHOT,
    Envelope,
    ImageRecord,
    Snapshot,
    check_chain,
    open_envelope,
    open_snapshot,
    snapshot_folder,
    snapshot_name,
)
from remetal.repository.table import ChunkTable

_NAME = re.compile(rf"{SNAPSHOTS}([0-9a-f]{{32}})/([0-9a-f]{{16}})\.([0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class MachineAccess:
    """A machine's public record together with its opened secrets."""

    machine: MachineRecord
    domain: Domain


@dataclass(slots=True)
class Catalog:
    """Verified snapshots, oldest first, and in `problems` a sentence for everything that is not as it should be."""

    repository: Repository
    machines: dict[str, MachineAccess]
    problems: list[str] = field(default_factory=list)
    _snapshots: list[Snapshot] = field(default_factory=list)

    def snapshots(self) -> list[Snapshot]:
        """Return the verified snapshots of all machines that the key gives access to, oldest first."""
        return list(self._snapshots)

    def runs(self, snapshot: Snapshot, image: ImageRecord) -> Iterator[Run]:
        """Yield an image's chunk ids in order; holes are left out. Raises DamagedError."""
        return image_runs(self.repository, self.machines[snapshot.machine_id].domain, image)


def open_catalog(repository: Repository, keys: MachineKeys | RecipientKey) -> Catalog:
    """Read and verify all snapshots: with a machine's keys its own, with a recipient's key those of all machines.

    Damage does not raise: what can be verified is listed, what cannot is told in `problems`.
    Raises RefusedError if the keys belong to another repository.
    """
    catalog = Catalog(repository, {})
    if isinstance(keys, MachineKeys):
        check_keys(repository, keys)
        catalog.machines[keys.machine_id] = MachineAccess(keys.stored.record, keys.domain)
    else:
        _open_machines(catalog, keys)
    for access in catalog.machines.values():
        _read_snapshots(catalog, access)
    if isinstance(keys, MachineKeys):
        present = {(each.sequence, each.id) for each in catalog.snapshots()}
        problem = head_problem(keys.stored.head, present)
        catalog.problems += [problem] if problem else []
    catalog._snapshots.sort(key=lambda each: (each.time, each.machine_id, each.sequence))
    return catalog


def check_keys(repository: Repository, keys: MachineKeys) -> None:
    """Raise RefusedError unless the keys were made for this repository as it is."""
    if keys.repository_id != repository.config.id or keys.stored.chunk_size != repository.config.chunk_size:
        raise RefusedError(
            f"{repository.store.location} is not the repository that this machine was enrolled in",
            hint="Check the location; if it is right, somebody has put another repository there.",
        )


def image_runs(repository: Repository, domain: Domain, image: ImageRecord) -> Iterator[Run]:
    """Yield an image's chunk ids in order, a page of the map in memory at a time. Raises DamagedError."""
    return read_pages(
        repository.store,
        repository.config.id,
        domain,
        size=image.size,
        chunk_size=image.chunk_size,
        pages=image.pages,
    )


def read_contents(
    repository: Repository, domain: Domain, problems: list[DamagedError] | None = None
) -> Iterator[tuple[str, list[Contents]]]:
    """Yield name and packs of each of a machine's index objects.

    A damaged one is added to `problems` and passed over; without such a list it raises DamagedError.
    """
    for entry in repository.store.entries(index_folder(domain.machine_id)):
        try:
            packs = read_index(repository.store, entry.name, repository.config.id, domain)
        except DamagedError as error:
            if problems is None:
                raise
            problems.append(error)
        else:
            yield entry.name, packs


def load_table(repository: Repository, domain: Domain, problems: list[DamagedError] | None = None) -> ChunkTable:
    """Return all chunks that a machine's index objects know; `problems` as in `read_contents`."""
    table = ChunkTable()
    for _, packs in read_contents(repository, domain, problems):
        for pack in packs:
            table.add(pack)
    return table


def read_envelope(repository: Repository, name: str, machine: MachineRecord) -> tuple[Envelope, bytes]:
    """Read a snapshot's object, checking name, form and signature. Raises DamagedError."""
    if not _NAME.fullmatch(name):
        raise damaged(name, "no snapshot is named so")
    data = get_named(repository.store, name, MAX_SNAPSHOT)
    return open_envelope(name, data, machine), data


def find_newest(
    repository: Repository, access: MachineAccess, head: Head | None, problems: list[str]
) -> tuple[Snapshot | None, Head | None]:
    """Return a machine's newest readable snapshot, and the one that the next snapshot has to follow.

    The latter is the newest that is signed, or the one that the machine remembers if that is newer. Only the
    newest is read. What is wrong is added to `problems`.
    """
    names = [entry.name for entry in repository.store.entries(snapshot_folder(access.machine.id))]
    newest: Head | None = None
    snapshot: Snapshot | None = None
    for name in reversed(names):
        try:
            envelope, data = read_envelope(repository, name, access.machine)
            newest = newest or Head(sequence=envelope.sequence, id=envelope.id)
            snapshot = open_snapshot(envelope, data, access.machine, access.domain)
            break
        except DamagedError as error:
            problems.append(error.message)
    if head is not None:
        if snapshot_name(access.machine.id, head.sequence, head.id) not in names:
            problems.append(_vanished(head))
        if newest is None or head.sequence >= newest.sequence:
            newest = head
    return snapshot, newest


def head_problem(head: Head | None, present: Iterable[tuple[int, str]]) -> str:
    """Return a sentence if the snapshot that a machine remembers as its newest is not there, else nothing."""
    return _vanished(head) if head is not None and (head.sequence, head.id) not in set(present) else ""


def _vanished(head: Head) -> str:
    return (
        f"snapshot {head.sequence} ({head.id[:12]}), which this machine has made, is not in the repository: "
        "it was removed, or the repository was set back"
    )


def _open_machines(catalog: Catalog, key: RecipientKey) -> None:
    repository = catalog.repository
    if key.repository_id != repository.config.id:
        raise RefusedError("the key belongs to another repository", hint="Unlock this repository with its own key.")
    machines, problems = read_machines(repository.store, repository.config.id)
    catalog.problems += problems
    for machine in machines:
        try:
            catalog.machines[machine.id] = MachineAccess(machine, open_secrets(repository.store, machine, key))
        except DamagedError as error:
            catalog.problems.append(error.message)
    known = {machine.id for machine in machines}
    owners = {entry.name.split("/")[1] for entry in repository.store.entries(SNAPSHOTS) if _NAME.fullmatch(entry.name)}
    catalog.problems += [f"the machine of {SNAPSHOTS}{each}/ has no record" for each in sorted(owners - known)]


def _read_snapshots(catalog: Catalog, access: MachineAccess) -> None:
    envelopes: list[Envelope] = []
    for entry in catalog.repository.store.entries(snapshot_folder(access.machine.id)):
        try:
            envelope, data = read_envelope(catalog.repository, entry.name, access.machine)
            envelopes.append(envelope)
            catalog._snapshots.append(open_snapshot(envelope, data, access.machine, access.domain))
        except DamagedError as error:
            catalog.problems.append(error.message)
    catalog.problems += check_chain(envelopes, access.machine.name)
