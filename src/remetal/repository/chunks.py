"""Which chunks an image has, and where they lie."""

from __future__ import annotations

from collections.abc import Container, Iterator

from remetal.errors import DamagedError
from remetal.repository.indexes import index_folder, read_index
from remetal.repository.ledgers import Ledger
from remetal.repository.machines import Domain
from remetal.repository.maps import Run, read_pages
from remetal.repository.named import NamedObjects, gather
from remetal.repository.objects import hash_in_name, pack_folder
from remetal.repository.packs import Contents
from remetal.repository.repository import Repository
from remetal.repository.snapshots import ImageRecord
from remetal.repository.table import ChunkTable


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
    repository: Repository, domain: Domain, ledger: Ledger | None, problems: list[DamagedError] | None = None
) -> Iterator[tuple[str, list[Contents]]]:
    """Yield name and packs of each of a machine's index objects, without anything that the ledger has condemned.

    A damaged one is added to `problems` and passed over; without such a list it raises DamagedError.
    """
    packs = ledger.packs if ledger is not None else frozenset()
    names = ledger.names if ledger is not None else frozenset()
    for entry in repository.store.entries(index_folder(domain.machine_id)):
        if entry.name in names:
            continue
        try:
            found = read_index(repository.store, entry.name, repository.config.id, domain)
        except DamagedError as error:
            if problems is None:
                raise
            problems.append(error)
        else:
            yield entry.name, [each for each in found if each.identity not in packs]


def live_packs(repository: Repository, domain: Domain, ledger: Ledger | None) -> Iterator[Contents]:
    """Yield each pack once that a machine's index tells of and that is there; for the ledger see `read_contents`.

    Damaged index objects are passed over.
    """
    seen = NamedObjects()
    present = find_packs(repository, domain.machine_id)
    for _, packs in read_contents(repository, domain, ledger, []):
        fresh = seen.add((pack.identity, pack.size) for pack in packs)
        for pack, number in zip(packs, fresh, strict=True):
            if number >= 0 and pack.identity in present:
                yield pack


def load_table(
    repository: Repository, domain: Domain, ledger: Ledger | None, problems: list[DamagedError] | None = None
) -> ChunkTable:
    """Return all chunks that a machine's index objects know, whose packs are there, and that may be relied on.

    See `read_contents`; the table says which packs are not there.
    """
    table = ChunkTable()
    present = find_packs(repository, domain.machine_id)
    for _, packs in read_contents(repository, domain, ledger, problems):
        sizes = present.sizes([each.identity for each in packs])
        table.add([each for each, size in zip(packs, sizes, strict=True) if each.size == size])
        table.absent.add(
            (each.identity, each.size) for each, size in zip(packs, sizes, strict=True) if each.size != size
        )
    table.settle()
    return table


def find_packs(repository: Repository, machine_id: str, *, without: Container[bytes] = ()) -> NamedObjects:
    """Return the packs of a machine that are there, but for some."""
    entries = repository.store.entries(pack_folder(machine_id))
    named = ((hash_in_name(entry.name), entry.size) for entry in entries)
    return gather((identity, size) for identity, size in named if identity is not None and identity not in without)
