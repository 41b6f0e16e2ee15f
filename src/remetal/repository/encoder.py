"""From bytes to stored packs: what a session's threads do. Several workers encode, two more threads store.

Each worker fills a pack of its own, so they share nothing but the question who stores a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from remetal.repository.cipher import chunk_id
from remetal.repository.indexes import PACKS_PER_INDEX, put_index
from remetal.repository.machines import MachineKeys
from remetal.repository.maps import ZERO_ID
from remetal.repository.objects import pack_name, put_once
from remetal.repository.packs import Codec, Contents, Pack, PackBuilder
from remetal.repository.repository import Repository
from remetal.repository.table import ChunkTable

UPLOADERS = 2


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a session has done so far. `changed` counts bytes that differ from the predecessor at the same place."""

    read_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    changed_bytes: int = 0
    chunks_known: int = 0
    chunks_new: int = 0
    chunks_zero: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a batch: its chunks' ids in order, and the counts."""

    first: int
    ids: list[bytes]
    statistics: Statistics


class Uploads:
    """Stores finished packs beside the workers, adds them to the table, and writes index objects."""

    def __init__(
        self, repository: Repository, keys: MachineKeys, table: ChunkTable, limit: int, avoid: Collection[str]
    ) -> None:
        self._repository = repository
        self._avoid = avoid
        self._keys = keys
        self._pool = ThreadPoolExecutor(UPLOADERS, thread_name_prefix="upload")
        self._room = threading.Semaphore(limit)
        self._guard = threading.Lock()
        self._table = table
        self._claimed: set[bytes] = set()
        self._relied: set[int] = set()
        self._new: set[bytes] = set()
        self._stored: list[Contents] = []
        self._futures: list[Future[None]] = []

    def claim(self, ids: Sequence[bytes]) -> list[bool]:
        """Return for each id whether the caller has to store it: nobody has, and nobody else is at it."""
        with self._guard:
            mine: list[bool] = []
            packs = self._table.packs_of(ids)
            self._relied.update(packs)
            for identity, pack in zip(ids, packs, strict=True):
                fresh = pack < 0 and identity != ZERO_ID and identity not in self._claimed
                if fresh:
                    self._claimed.add(identity)
                mine.append(fresh)
            return mine

    def relied_on(self) -> set[bytes]:
        """Return the hashes of the packs that hold what was read: those that were there, and those that are new."""
        with self._guard:
            return {self._table.packs[number][0] for number in self._relied if number >= 0} | self._new

    def store(self, pack: Pack) -> None:
        """Hand a pack over; waits while too many are under way. Raises what an earlier pack ran into."""
        self._room.acquire()
        future = self._pool.submit(self._store, pack)
        with self._guard:
            done = [each for each in self._futures if each.done()]
            self._futures = [*(each for each in self._futures if not each.done()), future]
        for each in done:
            each.result()

    def finish(self) -> None:
        """Wait for every pack and put what is stored into the index. Raises what any of them ran into."""
        self._pool.shutdown(wait=True)
        try:
            for each in self._futures:
                each.result()
        finally:
            with self._guard:
                waiting, self._stored = self._stored, []
            if waiting:
                self._put_index(waiting)

    def _store(self, pack: Pack) -> None:
        try:
            put_once(self._repository.store, pack_name(self._keys.machine_id, pack.contents.identity), pack.pieces)
            with self._guard:
                self._table.add(pack.contents)
                self._new.add(pack.contents.identity)
                self._claimed.difference_update(row.tobytes() for row in pack.contents.entries["id"])
                self._stored.append(pack.contents)
                ready = self._stored if len(self._stored) >= PACKS_PER_INDEX else []
                if ready:
                    self._stored = []
            if ready:
                self._put_index(ready)
        finally:
            self._room.release()

    def _put_index(self, packs: Sequence[Contents]) -> None:
        repository = self._repository
        put_index(repository.store, repository.config.id, self._keys.domain, packs, avoid=self._avoid)


class Worker:
    """Turns batches into chunks in a pack of its own; used by one thread at a time."""

    def __init__(self, repository: Repository, keys: MachineKeys, uploads: Uploads) -> None:
        self._repository = repository
        self._keys = keys
        self._uploads = uploads
        self._codec = Codec(keys.stored.id_key)
        self._zero_ids: dict[int, bytes] = {}
        self._pack: PackBuilder | None = None

    def encode(self, first: int, data: memoryview) -> Encoded:
        """Hash the chunks of a batch, and store those that nobody has."""
        size = self._repository.config.chunk_size
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        ids = [self._identify(chunk) for chunk in chunks]
        new_bytes = stored = new = 0
        for chunk, identity, mine in zip(chunks, ids, self._uploads.claim(ids), strict=True):
            if mine:
                stored += self._add(identity, chunk)
                new_bytes += len(chunk)
                new += 1
        zero = ids.count(ZERO_ID)
        counts = Statistics(
            read_bytes=len(data),
            new_bytes=new_bytes,
            stored_bytes=stored,
            chunks_known=len(ids) - new - zero,
            chunks_new=new,
            chunks_zero=zero,
        )
        return Encoded(first, ids, counts)

    def flush(self) -> None:
        """Hand over the open pack, if there is anything in it."""
        pack, self._pack = self._pack, None
        if pack is not None and not pack.empty:
            self._uploads.store(pack.finish())

    def _identify(self, chunk: memoryview) -> bytes:
        identity = self._codec.identify(chunk)
        zero = self._zero_ids.get(len(chunk))
        if zero is None:
            self._zero_ids.clear()
            zero = self._zero_ids[len(chunk)] = chunk_id(self._keys.stored.id_key, bytes(len(chunk)))
        return ZERO_ID if identity == zero else identity

    def _add(self, identity: bytes, chunk: memoryview) -> int:
        if self._pack is None:
            config, stored = self._repository.config, self._keys.stored
            self._pack = PackBuilder(config.id, stored.record.id, stored.recipients, self._codec)
        size = self._pack.add(identity, chunk)
        if self._pack.full:
            self.flush()
        return size
