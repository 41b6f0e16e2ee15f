"""From bytes to stored packs: what a session's threads do. Several workers encode, two more threads store.

The workers fill one pack together, so the memory does not grow with their number, and neighbours on the disk are
neighbours in the repository.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from remetal.repository.cipher import chunk_id, digest
from remetal.repository.indexes import INDEX_CHUNKS, PACKS_PER_INDEX, put_index
from remetal.repository.machines import MachineKeys
from remetal.repository.maps import ZERO_ID
from remetal.repository.packs import Codec, Contents, Pack, PackBuilder, Slot, pack_room, put_pack
from remetal.repository.parity import folded
from remetal.repository.parity_writer import ParityWriter
from remetal.repository.repository import Repository
from remetal.repository.table import ChunkTable
from remetal.system.blockdev import aligned_buffer

UPLOADERS = 2
_SHARE_AT_RISK = 64
"""A backup that is cut off has to store again at most this part of what it had stored."""
PACKS_AT_ONCE = 4
"""How many packs may be in memory: one that is being filled, those that are stored, and some that wait for that."""


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
    """What became of a batch: its chunks' ids in order, their hash from before they were looked up, and the counts."""

    first: int
    ids: list[bytes]
    seal: bytes
    statistics: Statistics


class Uploads:
    """Stores finished packs beside the workers, adds them to the table, and writes index objects and parity."""

    def __init__(
        self,
        repository: Repository,
        keys: MachineKeys,
        table: ChunkTable,
        entry: int,
        parity: ParityWriter | None,
    ) -> None:
        self._repository = repository
        self._entry = entry
        self._parity = parity
        self._keys = keys
        self._pool = ThreadPoolExecutor(UPLOADERS, thread_name_prefix="upload")
        self._buffers: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(PACKS_AT_ONCE):
            self._buffers.put(None)  # memory is taken when it is first needed
        self._guard = threading.Lock()
        self._table = table
        self._claimed: set[bytes] = set()
        self._old = len(table.packs)
        self._relied = bytearray(self._old)
        self._stored: list[Contents] = []
        self._stored_chunks = 0
        self._futures: list[Future[None]] = []

    def claim(self, ids: Sequence[bytes]) -> list[bool]:
        """Return for each id whether the caller has to store it: nobody has, and nobody else is at it."""
        with self._guard:
            mine: list[bool] = []
            packs = self._table.packs_of(ids)
            for identity, pack in zip(ids, packs, strict=True):
                fresh = pack < 0 and identity != ZERO_ID and identity not in self._claimed
                if fresh:
                    self._claimed.add(identity)
                if 0 <= pack < self._old:
                    self._relied[pack] = True
                mine.append(fresh)
            return mine

    def knows(self, ids: Sequence[bytes]) -> bool:
        """Whether all of these chunks are stored, or are about to be."""
        with self._guard:
            packs = self._table.packs_of(ids)
            pairs = zip(ids, packs, strict=True)
            return all(pack >= 0 or identity == ZERO_ID or identity in self._claimed for identity, pack in pairs)

    def relies_on(self, packs: Collection[bytes]) -> bool:
        """Whether one of these packs holds what was read: one that was there, or one that is new."""
        with self._guard:
            numbers = self._table.packs.numbers(list(packs))
            return any(number >= self._old or (number >= 0 and self._relied[number]) for number in numbers)

    def buffer(self) -> memoryview:
        """Return memory for a pack; waits while too many packs are under way."""
        return self._buffers.get() or aligned_buffer(pack_room())

    def give_back(self, buffer: memoryview) -> None:
        """Take back the memory of a pack that is done with."""
        self._buffers.put(buffer)

    def store(self, pack: Pack, buffer: memoryview) -> None:
        """Hand a pack over, and with it the memory it lies in. Raises what an earlier pack ran into."""
        future = self._pool.submit(self._store, pack, buffer)
        with self._guard:
            done = [each for each in self._futures if each.done()]
            self._futures = [*(each for each in self._futures if not each.done()), future]
        for each in done:
            each.result()

    def finish(self) -> None:
        """Wait for every pack, put what is stored into the index, and complete its parity.

        Raises what any of the packs ran into.
        """
        self._pool.shutdown(wait=True)
        try:
            for each in self._futures:
                each.result()
        finally:
            with self._guard:
                waiting, self._stored = self._stored, []
            if waiting:
                self._put_index(waiting)
            if self._parity is not None:
                self._parity.finish()

    def _store(self, pack: Pack, buffer: memoryview) -> None:
        try:
            fold = folded(pack.data) if self._parity is not None else None
            put_pack(self._repository.store, self._keys.machine_id, pack)
            with self._guard:
                self._table.add([pack.contents])
                self._claimed.difference_update(row.tobytes() for row in pack.contents.entries["id"])
                self._stored.append(pack.contents)
                self._stored_chunks += len(pack.contents.entries)
                ready = self._stored if self._has_enough() else []
                if ready:
                    self._stored, self._stored_chunks = [], 0
            if ready:
                self._put_index(ready)
            if self._parity is not None and fold is not None:
                self._parity.add(pack, fold)
        finally:
            self.give_back(buffer)

    def _has_enough(self) -> bool:
        """Whether what is stored should go into the index: the more this session has done, the larger its parts."""
        share = (len(self._table.packs) - self._old) // _SHARE_AT_RISK
        return len(self._stored) >= max(PACKS_PER_INDEX, share) or self._stored_chunks >= INDEX_CHUNKS

    def _put_index(self, packs: Sequence[Contents]) -> None:
        repository = self._repository
        put_index(repository.store, repository.config.id, self._keys.domain, packs, entry=self._entry)


class Filling:
    """The pack that the workers fill together."""

    def __init__(self, repository: Repository, keys: MachineKeys, uploads: Uploads) -> None:
        self._repository_id = repository.config.id
        self._machine = keys.stored
        self._uploads = uploads
        self._opening = threading.Lock()
        self._builder: PackBuilder | None = None

    def add(self, identity: bytes, chunk: memoryview, codec: Codec) -> int:
        """Add a chunk and return how many bytes it takes; may be called from many threads at once.

        Raises RemetalError if this computer miscalculates, and what an earlier pack ran into.
        """
        encoded = codec.encode(chunk)
        builder, slot = self._reserve(len(encoded.data))
        try:
            builder.fill(slot, identity, chunk, encoded)
        finally:
            last = builder.leave()
            if last and not builder.whole:
                self._uploads.give_back(builder.buffer)
        if last and builder.whole:
            self._finish(builder, codec)
        return slot.size

    def flush(self) -> None:
        """Hand over the open pack, when no thread is at work any more."""
        builder, self._builder = self._builder, None
        if builder is not None and builder.close() and builder.whole:
            self._finish(builder, Codec(self._machine.id_key))

    def _finish(self, builder: PackBuilder, codec: Codec) -> None:
        try:
            pack = builder.finish(codec)
        except BaseException:
            self._uploads.give_back(builder.buffer)
            raise
        self._uploads.store(pack, builder.buffer)

    def _reserve(self, encoded: int) -> tuple[PackBuilder, Slot]:
        with self._opening:
            if self._builder is None:
                machine = self._machine
                buffer = self._uploads.buffer()
                self._builder = PackBuilder(self._repository_id, machine.record.id, machine.recipients, buffer)
            builder = self._builder
            slot = builder.reserve(encoded)
            if builder.full:
                builder.close()
                self._builder = None
            return builder, slot


class Worker:
    """Turns batches into chunks; used by one thread at a time."""

    def __init__(self, repository: Repository, keys: MachineKeys, uploads: Uploads, filling: Filling) -> None:
        self._repository = repository
        self._keys = keys
        self._uploads = uploads
        self._filling = filling
        self._codec = Codec(keys.stored.id_key)
        self._zero_ids: dict[int, bytes] = {}

    def encode(self, first: int, data: memoryview) -> Encoded:
        """Hash the chunks of a batch, and store those that nobody has."""
        size = self._repository.config.chunk_size
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        ids = [self._identify(chunk) for chunk in chunks]
        seal = digest(*ids)
        new_bytes = stored = new = 0
        for chunk, identity, mine in zip(chunks, ids, self._uploads.claim(ids), strict=True):
            if mine:
                stored += self._filling.add(identity, chunk, self._codec)
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
        return Encoded(first, ids, seal, counts)

    def _identify(self, chunk: memoryview) -> bytes:
        identity = self._codec.identify(chunk)
        zero = self._zero_ids.get(len(chunk))
        if zero is None:
            self._zero_ids.clear()
            zero = self._zero_ids[len(chunk)] = chunk_id(self._keys.stored.id_key, bytes(len(chunk)))
        return ZERO_ID if identity == zero else identity
