"""How much memory remetal takes at most, computed from the constants and record types of the code itself.

Each part is an upper limit by itself; all of them together are never reached at once. docs/explanation/memory.md
shows the result; a test keeps it true.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from remetal.image.capture import READ_AHEAD, batch_size
from remetal.image.restore import WAITING, group_size
from remetal.repository.check import READERS
from remetal.repository.config import MAX_CHUNK
from remetal.repository.copy import AT_ONCE
from remetal.repository.encoder import PACKS_AT_ONCE
from remetal.repository.indexes import INDEX_CHUNKS
from remetal.repository.keyed import DIRECTORY, WAITING_ROWS, directory_bits
from remetal.repository.maps import ID_SIZE, PAGE_CHUNKS
from remetal.repository.named import NUMBERED
from remetal.repository.packs import ENTRY, MAX_CHUNKS, PACK_SIZE, pack_room
from remetal.repository.parity import GROUP as GROUP_PACKS
from remetal.repository.parity import PIECE
from remetal.repository.protect import FRAGMENTS
from remetal.repository.reader import OPEN_PACKS
from remetal.repository.rescue import REBUILT_PACKS
from remetal.repository.table import CHUNK
from remetal.system.processors import MOST
from remetal.units import KIB, MIB, TIB

GOAL = 256 * MIB
PROGRAM = 58 * MIB
"""Python, its libraries and the program's own code, measured (a test sees that it is not more)."""

_OBJECT = 33
"""What Python adds to the bytes of an object of bytes."""
_SLOT = 8
"""A reference in a list or tuple."""
_ENTRY = 80
"""A key's entry in a dictionary or set that has just grown, and the number it leads to."""
_NAME = 128
"""The name of an object, while a folder is listed."""
_COPIES = 4
"""Copies that are made on the way from a sealed object to its parts: read, opened, unpacked, taken apart."""


@dataclass(frozen=True)
class Case:
    """What is carried: bytes of the disk, all of them in use and none compressible; snapshots that are kept.

    `changed` is the part of a map's pages that differ from one snapshot to the next, `condemned` the part of all packs
    that one prune condemns.
    """

    disk: int = 100 * TIB
    chunk_size: int = 256 * KIB
    workers: int = MOST
    snapshots: int = 30
    changed: float = 0.05
    condemned: float = 0.01

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.disk // self.chunk_size

    @property
    def packs(self) -> int:
        """How many packs there are."""
        return self.disk // PACK_SIZE

    @property
    def pages(self) -> int:
        """How many pages a map has."""
        return -(-self.chunks // PAGE_CHUNKS)

    @property
    def kept_pages(self) -> int:
        """How many different pages the maps of all snapshots have."""
        return int(self.pages * (1 + self.changed * (self.snapshots - 1)))


def bound(case: Case) -> dict[str, dict[str, int]]:
    """Return for each kind of work its parts, in bytes."""
    program = {"program": PROGRAM}
    table = {"table of chunks and packs": _table(case)}
    buffers = case.workers + 1
    restoring = case.workers + WAITING
    condemned = int(case.condemned * case.packs) * (2 * (_OBJECT + ID_SIZE + _ENTRY) + _COPIES * ID_SIZE)
    pruning = {"bytes needed of each pack": 4 * case.packs, "what is condemned": condemned}
    return {
        "backup": program
        | {
            "packs being made and stored": PACKS_AT_ONCE * _pack(case),
            "parity in the making": _pack(case) + 2 * PIECE,
            "packs that have parity": _rows(case.packs, NUMBERED.itemsize),
            "chunks in them": PACKS_AT_ONCE * MAX_CHUNKS * (_OBJECT + ID_SIZE + _ENTRY),
            "chunks at work": case.workers * _COPIES * case.chunk_size,
            "buffers": (buffers + READ_AHEAD) * batch_size(buffers, case.chunk_size),
        }
        | table
        | {"maps, of before and of now": 2 * _map(case)},
        "backup, writing the snapshot": program
        | {"packs that have parity": _rows(case.packs, NUMBERED.itemsize)}
        | table
        | {"a snapshot and its map": _snapshot(case)},
        "restore": program
        | {
            "buffers": restoring * (group_size(restoring, case.chunk_size) + _COPIES * case.chunk_size),
            "keys of packs": OPEN_PACKS * 4 * KIB,
            "packs needed": case.packs,
            "packs rebuilt, if some are damaged": (REBUILT_PACKS + 3) * _pack(case),
            "packs and their groups, then": 3 * _rows(case.packs, NUMBERED.itemsize),
        }
        | table
        | {"a map": _map(case)},
        "check, comparing objects": program
        | {
            "a group being read": _pack(case) + 2 * PIECE,
            "packs seen, packs with parity": 3 * _rows(case.packs, NUMBERED.itemsize),
        },
        "check, looking for chunks": program
        | {"packs being read": min(case.workers, READERS) * (PACK_SIZE + _COPIES * case.chunk_size)}
        | table
        | {"snapshots": _snapshots(case)},
        "prune, looking": program
        | pruning
        | {"packs being written anew": 2 * _pack(case), "names in a folder": case.kept_pages * _NAME}
        | table
        | {"snapshots": _snapshots(case)},
        "prune, deciding": program
        | pruning
        | table
        | {
            "snapshots": _snapshots(case),
            "reading them": case.kept_pages * _ENTRY + _snapshot(case),
        },
        "prune, protecting": program
        | {
            "what is condemned": condemned,
            "packs that are there, packs with parity": 3 * _rows(case.packs, NUMBERED.itemsize),
            "parity in the making, a pack": 3 * _pack(case),
            "groups that lose packs": _broken_groups(case),
            "parts of groups": FRAGMENTS * GROUP_PACKS * (2 * _ENTRY + _OBJECT + ID_SIZE),
            "snapshots": _snapshots(case),
        },
        "copy": program
        | {
            "objects under way": AT_ONCE * _pack(case),
            "packs that are at the target": _rows(case.packs, NUMBERED.itemsize),
        },
    }


def table_of(case: Case) -> str:
    """Return the bounds for chunks of several sizes as a table in Markdown, in MiB."""
    sizes = [case.chunk_size << shift for shift in range(3)]
    columns = [bound(replace(case, chunk_size=size)) for size in sizes]
    lines = [f"| | {' | '.join(f'{size // KIB} KiB' for size in sizes)} |", "|---|" + "---|" * len(sizes)]
    for work, parts in columns[0].items():
        totals = (f"**{sum(column[work].values()) / MIB:.0f}**" for column in columns)
        lines.append(f"| **{work}** | {' | '.join(totals)} |")
        lines += [
            f"| {part} | {' | '.join(f'{column[work][part] / MIB:.1f}' for column in columns)} |" for part in parts
        ]
    return "\n".join(lines) + "\n"


def _pack(case: Case) -> int:
    """What is used of the memory for a pack, which has room for the largest chunk."""
    return pack_room() - MAX_CHUNK + case.chunk_size


def _broken_groups(case: Case) -> int:
    """A number, and the name of the parity object, of each group that has lost packs."""
    return int(min(1.0, GROUP_PACKS * case.condemned) * case.packs / GROUP_PACKS) * (_NAME + _SLOT + 2 * 8)


def _table(case: Case) -> int:
    """Chunks, packs that are there, packs that are known: what waits in memory, and directories."""
    chunks = _rows(case.chunks, CHUNK.itemsize)
    packs = _rows(case.packs, NUMBERED.itemsize)
    index = _COPIES * INDEX_CHUNKS * ENTRY.itemsize + INDEX_CHUNKS * CHUNK.itemsize
    return chunks + 2 * packs + index


def _rows(rows: int, width: int) -> int:
    waiting = min(rows, WAITING_ROWS) * (width + _OBJECT + ID_SIZE + _ENTRY)
    directory = DIRECTORY.itemsize << directory_bits(rows)
    merging = 2 * directory + _COPIES * WAITING_ROWS * width if rows > WAITING_ROWS else 0
    return waiting + merging


def _map(case: Case) -> int:
    """The names of the pages of one snapshot's map."""
    return case.pages * (ID_SIZE + _OBJECT + _SLOT)


def _snapshot(case: Case) -> int:
    """The one that is made and the one before it, and on the way from or to the store another few of their bytes."""
    return 2 * _map(case) + _COPIES * case.pages * ID_SIZE


def _snapshots(case: Case) -> int:
    """All that are kept: pages that several have are there once."""
    return case.kept_pages * (ID_SIZE + _OBJECT) + case.snapshots * case.pages * _SLOT
