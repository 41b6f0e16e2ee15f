"""Writing a backup: chunks into packs, packs into the index, and at the end one signed snapshot.

The caller's thread reads; worker threads hash, compress, encrypt and verify, each filling a pack of its own; two
more threads store finished packs. Memory, whatever the image's size: two packs per worker and two more being
stored (16 MiB each), the caller's batches, one page of the map (128 KiB), and the table of known chunks
(`remetal.repository.table`).

What is stored appears in this order: pack, index, snapshot. Index objects are written every few packs, so that a
backup that is cut off leaves little that the next one has to store again.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from remetal import __version__
from remetal.errors import DamagedError, RemetalError, UnavailableError
from remetal.events import Note, Report, Warn, silent
from remetal.repository.catalog import MachineAccess, Newest, check_keys, find_newest, is_void, read_entry, read_vouched
from remetal.repository.chunks import image_runs, load_table
from remetal.repository.encoder import UPLOADERS, Encoded, Statistics, Uploads, Worker
from remetal.repository.history import LEDGER, entry_name, open_envelope, put_entry
from remetal.repository.ledgers import open_ledger
from remetal.repository.locks import MachineLock, hold_machine
from remetal.repository.machines import Head, MachineKeys
from remetal.repository.maps import PAGE_CHUNKS, PageBuilder, map_digest, map_folder, page_slots, put_page
from remetal.repository.repository import Repository, drop_revoked, new_recipients, utc_now
from remetal.repository.snapshots import Body, ImageRecord, Snapshot, check_image, encode_snapshot, open_snapshot
from remetal.repository.table import ChunkTable
from remetal.storage import AlreadyExistsError

_BATCHES_AHEAD = 4
"""How many batches per worker may wait, where the producer's own pool of buffers sets no lower limit."""


@dataclass(frozen=True)
class Batch:
    """Consecutive whole chunks of an image; only the image's last chunk may be short.

    `first` is the index of the first chunk. `release` is called exactly once, from any thread, when the bytes in
    `data` are no longer needed.
    """

    first: int
    data: memoryview
    release: Callable[[], None]


class _MapWriter:
    """Collects an image's ids in order and stores the pages of its map."""

    def __init__(self, repository: Repository, keys: MachineKeys, size: int, avoid: Collection[str]) -> None:
        self._repository = repository
        self._keys = keys
        self._size = size
        self._avoid = avoid
        self._page: PageBuilder | None = None
        self.pages: list[bytes] = []

    def add(self, first: int, ids: list[bytes]) -> None:
        """Set the ids of consecutive chunks, behind all that were set before."""
        done = 0
        while done < len(ids):
            number, slot = divmod(first + done, PAGE_CHUNKS)
            self._turn_to(number)
            assert self._page is not None
            part = ids[done : done + PAGE_CHUNKS - slot]
            self._page.set(slot, part)
            done += len(part)

    def finish(self, pages: int) -> list[bytes]:
        """Store what is left and return the names of all `pages` pages."""
        self._turn_to(pages)
        return self.pages

    def _turn_to(self, number: int) -> None:
        if self._page is not None and len(self.pages) < number:
            body = self._page.encode()
            repository = self._repository
            name = put_page(repository.store, repository.config.id, self._keys.domain, body, avoid=self._avoid)
            self.pages.append(name)
            self._page = None
        self.pages += [b""] * (number - len(self.pages))
        if self._page is None:
            slots = page_slots(number, self._size, self._repository.config.chunk_size)
            self._page = PageBuilder(slots) if slots > 0 else None


class _Predecessor:
    """The ids of an earlier image, read along with a new one, to tell how much has changed."""

    def __init__(self, repository: Repository, keys: MachineKeys, image: ImageRecord | None, report: Report) -> None:
        same = image is not None and image.chunk_size == repository.config.chunk_size
        self._runs = image_runs(repository, keys.domain, image) if image is not None and same else iter(())
        self._report = report
        self._first = 0
        self._ids: list[bytes] = []

    def changed(self, first: int, ids: list[bytes]) -> list[bool]:
        """Tell for each of these chunks whether it differs from the one that stood there."""
        return [self._id_at(first + number) != identity for number, identity in enumerate(ids)]

    def _id_at(self, index: int) -> bytes:
        while index >= self._first + len(self._ids):
            try:
                run = next(self._runs, None)
            except DamagedError as error:
                self._report(Warn(f"The predecessor cannot be compared: {error.message}", error.hint))
                run = None
            if run is None:
                self._runs, self._first, self._ids = iter(()), 1 << 63, []
                return b""
            self._first, self._ids = run.first, run.ids
        return self._ids[index - self._first] if index >= self._first else b""


class Session:
    """One backup of one machine. Made by `open_session`; its methods are called from one thread."""

    def __init__(
        self,
        repository: Repository,
        keys: MachineKeys,
        lock: MachineLock,
        newest: Newest,
        table: ChunkTable,
        *,
        workers: int,
        report: Report,
    ) -> None:
        self.previous = newest.snapshot
        self.statistics = Statistics()
        self.chunk_size = repository.config.chunk_size
        self.workers = workers
        self._repository = repository
        self._keys = keys
        self._lock = lock
        self._report = report
        self._follows = newest.follows
        self._ledger = newest.ledgers.newest
        self._avoid = self._ledger.names if self._ledger is not None else frozenset[str]()
        self._uploads = Uploads(repository, keys, table, workers + UPLOADERS, self._avoid)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._ahead = workers * _BATCHES_AHEAD
        self._workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._workers.put(Worker(repository, keys, self._uploads))
        self._failed = threading.Event()
        self._images: list[ImageRecord] = []
        self._ended = False

    def write_image(
        self, volume: str, size: int, batches: Iterable[Batch], *, previous: ImageRecord | None = None
    ) -> ImageRecord:
        """Store a volume's content of `size` bytes and return the record that the snapshot will hold.

        Takes batches in this thread, in ascending order; chunks in no batch are holes. Every batch that was
        taken is released, whatever happens. `previous` is the volume's image in an earlier snapshot: only the
        count of changed bytes needs it. Raises UnavailableError if the store fails, RemetalError if this
        computer miscalculates, and whatever `batches` raises; the session can then only be left.
        """
        assert not self._ended, "the session has ended"
        assert not self._failed.is_set(), "an image of the session has failed"
        chunk_size = self._repository.config.chunk_size
        pages = -(-size // (chunk_size * PAGE_CHUNKS))
        writer = _MapWriter(self._repository, self._keys, size, self._avoid)
        predecessor = _Predecessor(self._repository, self._keys, previous, self._report)
        before = self.statistics
        waiting: deque[Future[Encoded | None]] = deque()
        try:
            following = 0
            for batch in batches:
                waiting.append(self._submit(batch, following, size))
                following = batch.first + -(-len(batch.data) // chunk_size)
                while waiting and (waiting[0].done() or len(waiting) >= self._ahead):
                    self._collect(waiting.popleft(), writer, predecessor)
            while waiting:
                self._collect(waiting.popleft(), writer, predecessor)
            names = writer.finish(pages)
        except BaseException:
            self._failed.set()
            raise
        finally:
            for each in waiting:
                with suppress(Exception):
                    each.result()
        record = ImageRecord(
            volume=volume,
            size=size,
            chunk_size=chunk_size,
            used=self.statistics.read_bytes - before.read_bytes,
            stored=self.statistics.stored_bytes - before.stored_bytes,
            digest=map_digest(size, chunk_size, names),
            pages=tuple(names),
        )
        check_image(volume, record)
        self._images.append(record)
        return record

    def commit(self, *, layout: bytes, hostname: str, tags: Sequence[str] = (), time: str | None = None) -> Snapshot:
        """Store all that is still in memory, then the signed snapshot, and return it: the backup is acknowledged.

        `layout` is the layout's JSON; `time` is UTC in ISO 8601, by default now. Raises UnavailableError if the
        store fails, the lock was lost, or a prune has condemned what this backup relies on; then there is no
        snapshot.
        """
        assert not self._ended, "the session has ended"
        assert not self._failed.is_set(), "an image of the session has failed"
        self._ended = True
        self._flush()
        body = Body(
            time=time or utc_now(),
            hostname=hostname,
            tags=tuple(tags),
            version=__version__,
            layout=bytes(layout),
            images=tuple(self._images),
        )
        snapshot = self._append(body)
        try:
            self._keys.remember(Head(sequence=snapshot.sequence, id=snapshot.id))
        except RemetalError as error:
            self._report(Warn(f"The backup is complete, but {error.message}", error.hint))
        return snapshot

    def _append(self, body: Body) -> Snapshot:
        """Make the snapshot the next entry of the history, behind whatever recipients have added meanwhile."""
        store, machine_id = self._repository.store, self._keys.machine_id
        while True:
            sequence = self._follows.sequence + 1
            data = encode_snapshot(
                body,
                self._repository.config.id,
                self._keys.domain,
                self._keys.stored.signing_seed,
                sequence,
                previous=self._follows.id,
                ledger=self._ledger.envelope.sequence if self._ledger is not None else 0,
            )
            snapshot = self._read_back(sequence, data)
            self._lock.check()
            try:
                put_entry(store, entry_name(machine_id, sequence), data)
            except AlreadyExistsError:
                self._follow(sequence)
                continue
            if is_void(self._repository, self._keys.stored.record, sequence):
                raise _outrun()
            return snapshot

    def _follow(self, sequence: int) -> None:
        """Go on behind an entry that was added since this backup began, unless it takes away what this one needs."""
        repository, machine = self._repository, self._keys.stored.record
        try:
            name = entry_name(machine.id, sequence)
            envelope, data = read_entry(repository, name, machine, read_vouched(repository))
            ledger = open_ledger(envelope, data) if envelope.kind == LEDGER else None
        except DamagedError as error:  # it may be a ledger that takes away what this backup needs
            raise UnavailableError(
                f"what was added to this machine's history meanwhile cannot be read: {error.message}",
                hint="Nothing is lost; run the backup again: it will rely on nothing that may be gone.",
            ) from error
        if ledger is None:
            raise UnavailableError(
                "another backup of this machine was made while this one was at work",
                hint="Nothing is lost; run this one again.",
            )
        pages = {map_folder(machine.id) + page.hex() for image in self._images for page in image.pages if page}
        if ledger.packs & self._uploads.relied_on() or ledger.names & pages:
            raise _outrun()
        self._follows, self._ledger = Head(sequence=sequence, id=envelope.id), ledger

    def abandon(self) -> None:
        """Leave without a snapshot: what is stored already is put into the index for the next backup."""
        self._failed.set()
        self._ended = True
        self._pool.shutdown(wait=True)
        with suppress(Exception):  # the error that led here is the one to tell
            self._uploads.finish()

    def _submit(self, batch: Batch, following: int, size: int) -> Future[Encoded | None]:
        chunk_size = self._repository.config.chunk_size
        start = batch.first * chunk_size
        whole = len(batch.data) % chunk_size == 0 or start + len(batch.data) == size
        try:
            if batch.first < following or not whole or start + len(batch.data) > size:
                raise ValueError(f"a batch of {len(batch.data)} bytes cannot stand at chunk {batch.first}")
            return self._pool.submit(self._encode, batch)
        except BaseException:
            batch.release()
            raise

    def _encode(self, batch: Batch) -> Encoded | None:
        """Runs in a worker thread; None if the session has failed meanwhile."""
        worker = self._workers.get()
        try:
            return None if self._failed.is_set() else worker.encode(batch.first, batch.data)
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._workers.put(worker)
            batch.release()

    def _collect(self, future: Future[Encoded | None], writer: _MapWriter, predecessor: _Predecessor) -> None:
        done = future.result()
        if done is None:
            return  # another batch has failed, and its future says why
        writer.add(done.first, done.ids)
        counts, total = done.statistics, self.statistics
        size = self._repository.config.chunk_size
        changed = sum(
            min(size, counts.read_bytes - number * size)
            for number, differs in enumerate(predecessor.changed(done.first, done.ids))
            if differs
        )
        self.statistics = Statistics(
            read_bytes=total.read_bytes + counts.read_bytes,
            new_bytes=total.new_bytes + counts.new_bytes,
            stored_bytes=total.stored_bytes + counts.stored_bytes,
            changed_bytes=total.changed_bytes + changed,
            chunks_known=total.chunks_known + counts.chunks_known,
            chunks_new=total.chunks_new + counts.chunks_new,
            chunks_zero=total.chunks_zero + counts.chunks_zero,
        )

    def _flush(self) -> None:
        self._pool.shutdown(wait=True)
        while not self._workers.empty():
            self._workers.get().flush()
        self._uploads.finish()

    def _read_back(self, sequence: int, data: bytes) -> Snapshot:
        """Decode a snapshot from the very bytes that will be stored."""
        machine = self._keys.stored.record
        envelope = open_envelope(entry_name(machine.id, sequence), data, machine, {})
        return open_snapshot(envelope, data, machine, self._keys.domain)


def _outrun() -> UnavailableError:
    return UnavailableError(
        "a prune ran while this backup was at work, and deletes what this backup relies on",
        hint="Nothing is lost; run the backup again.",
    )


@contextmanager
def open_session(
    repository: Repository, keys: MachineKeys, *, workers: int | None = None, report: Report = silent
) -> Iterator[Session]:
    """Begin a backup of the machine that the keys belong to.

    `workers` is the number of threads that encode, by default one per processor. Leaving the block without
    `commit` leaves no snapshot. Raises UnavailableError if another backup of the machine is at work,
    RefusedError if the keys are another repository's.
    """
    check_keys(repository, keys)
    with hold_machine(repository.store, keys.machine_id) as lock:
        problems: list[str] = []
        access = MachineAccess(keys.stored.record, keys.domain)
        newest = find_newest(repository, access, keys.stored.head, problems)
        damage: list[DamagedError] = []
        table = ChunkTable()
        if newest.ledgers.certain:
            table = load_table(repository, keys.domain, newest.ledgers.newest, damage)
            problems += [f"{error.message}; its chunks are stored again" for error in damage]
            if table.absent:
                problems.append(
                    f"{len(table.absent)} packs are missing; what this machine still has of them is stored again"
                )
        else:
            problems.append("what was decided last about this machine cannot be read: all of its data is stored again")
        for problem in problems:
            report(Warn(problem, "Run `remetal check`."))
        _follow_recipients(repository, keys, report)
        session = Session(repository, keys, lock, newest, table, workers=workers or os.cpu_count() or 1, report=report)
        try:
            yield session
        finally:
            session.abandon()


def _follow_recipients(repository: Repository, keys: MachineKeys, report: Report) -> None:
    """Seal no more to recipients that were revoked; tell of new ones, which somebody has to accept."""
    try:
        for recipient in drop_revoked(repository, keys):
            report(Note(f"the recipient {recipient.id} was removed: nothing is sealed to it any more"))
        fresh = new_recipients(repository, keys)
    except DamagedError as error:
        report(Warn(error.message, error.hint))
        return
    for recipient in fresh:
        report(
            Warn(
                f"The repository has a recipient that this machine does not seal to yet: {recipient.id}",
                "If you know whose key that is, accept it: remetal key accept",
            )
        )
