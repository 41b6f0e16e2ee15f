"""What of a machine its snapshots need, and what they do not: how a prune looks before it condemns anything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from remetal.errors import DamagedError
from remetal.repository.catalog import History, MachineAccess
from remetal.repository.chunks import image_runs, load_table
from remetal.repository.maps import ZERO_ID, map_folder
from remetal.repository.named import NamedObjects
from remetal.repository.objects import HELP, MAPS, hash_in_name, pack_name
from remetal.repository.repository import Repository
from remetal.repository.table import ChunkTable


@dataclass(slots=True)
class Needed:
    """A machine's chunks with the needed ones marked, and what nothing needs: packs (`dead`), pages of maps (`names`).

    `used` are the bytes of each pack that belong to needed chunks. `rescued` are packs that were condemned, and are
    needed all the same; so are the pages of maps in `rescued_names`.
    """

    table: ChunkTable
    used: npt.NDArray[np.int32]
    dead: set[bytes]
    names: set[str]
    rescued: set[bytes]
    rescued_names: set[str]


def find_needed(repository: Repository, access: MachineAccess, history: History, present: NamedObjects) -> Needed:
    """Mark what the snapshots need; `present` are the packs that are there. Raises DamagedError if any of it is not."""
    ledger = history.ledgers.newest
    table = load_table(repository, access.domain, ledger)
    pages, lacking = mark_needed(repository, access, history, table)
    used = table.marked_bytes()
    rescued: set[bytes] = set()
    if lacking and ledger is not None:  # the store has shown less than there was when it was condemned
        table = load_table(repository, access.domain, None)
        pages, lacking = mark_needed(repository, access, history, table)
        used = table.marked_bytes()
        rescued = {identity for number, (identity, _) in enumerate(table.packs) if used[number]} & ledger.packs
    if lacking:
        absent = ""
        if table.absent:
            absent = f"; the pack {pack_name(access.machine.id, table.absent[0][0])} is missing or cut short"
        raise refusal(access, f"{lacking} chunks that its snapshots need are in no pack that is there{absent}")
    condemned = (ledger.packs if ledger is not None else frozenset()) - rescued
    idle = (identity for number, (identity, _) in enumerate(table.packs) if not used[number])
    unknown = (identity for identity, _ in present if identity not in table.packs)
    dead = {each for each in chain(idle, unknown, (each for each, _ in table.absent)) if each not in condemned}
    old_names = ledger.names if ledger is not None else frozenset()
    maps = (entry.name for entry in repository.store.entries(map_folder(access.machine.id)) if hash_in_name(entry.name))
    return Needed(
        table=table,
        used=used,
        dead=dead,
        names={name for name in maps if hash_in_name(name) not in pages and name not in old_names},
        rescued=rescued,
        rescued_names={name for name in old_names if name.startswith(MAPS) and hash_in_name(name) in pages},
    )


def mark_needed(
    repository: Repository, access: MachineAccess, history: History, table: ChunkTable
) -> tuple[NamedObjects, int]:
    """Mark all chunks of all snapshots; return the pages of their maps, and how many chunks lack."""
    pages = NamedObjects()
    seen: set[str] = set()
    lacking = 0
    for snapshot in history.snapshots:
        for image in snapshot.images:
            pages.add((page, 0) for page in image.pages if page)
            if image.digest in seen:
                continue
            seen.add(image.digest)
            for run in image_runs(repository, access.domain, image):
                lacking += table.mark([each for each in run.ids if each != ZERO_ID])
    return pages, lacking


def refusal(access: MachineAccess, what: str) -> DamagedError:
    """Return the error of a prune that would not know what to keep."""
    return DamagedError(f"nothing of machine '{access.machine.name}' is deleted: {what}", hint=HELP)
