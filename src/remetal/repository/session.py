"""Writing a backup: chunks into packs, packs into the index, and at the end one signed snapshot.

The caller's thread reads; worker threads hash, compress, encrypt and verify, and fill one pack together; two more
threads store finished packs. Memory, whatever the image's size and the number of threads: four packs of 16 MiB, the
parity of the packs that are stored (one pack's size), the caller's batches, one page of the map (128 KiB), and the
table of known chunks (`remetal.repository.table`).

What is stored appears in this order: pack, index, parity, snapshot. Index objects are written every few packs, so that
a backup that is cut off leaves little that the next one has to store again.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from remetal import __version__
from remetal.errors import DamagedError, RemetalError, UnavailableError
from remetal.events import Note, Report, Warn, silent
from remetal.repository.catalog import (
    MachineAccess,
    Newest,
    check_keys,
    find_newest,
    is_void,
    need_unretired,
    read_entry,
    read_vouched,
)
from remetal.repository.chunks import image_runs, load_table
from remetal.repository.cipher import digest
from remetal.repository.encoder import Encoded, Filling, Statistics, Uploads, Worker
from remetal.repository.history import LEDGER, entry_name, open_envelope, put_entry
from remetal.repository.ledgers import open_ledger
from remetal.repository.locks import MachineLock, hold_machine
from remetal.repository.machines import Head, MachineKeys
from remetal.repository.maps import (
    PAGE_CHUNKS,
    ZERO_ID,
    PageBuilder,
    decode_page,
    map_digest,
    page_name,
    page_slots,
    put_page,
)
from remetal.repository.objects import miscalculated
from remetal.repository.parity_writer import ParityWriter
from remetal.repository.repository import Repository, drop_revoked, new_recipients, utc_now
from remetal.repository.retired import NOBODY
from remetal.repository.snapshots import (
    Body,
    ImageRecord,
    LeftOut,
    Snapshot,
    check_image,
    encode_snapshot,
    open_snapshot,
)
from remetal.repository.table import ChunkTable
from remetal.storage import AlreadyExistsError
from remetal.system.processors import probe_processors

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


@dataclass(frozen=True)
class Known:
    """Consecutive chunks of an image that are stored already, by their ids; `size` is how many bytes they have."""

    first: int
    ids: Sequence[bytes]
    size: int


class _MapWriter:
    """Collects an image's ids in order and stores the pages of its map."""

    def __init__(
        self, repository: Repository, keys: MachineKeys, size: int, entry: int, former: Sequence[bytes]
    ) -> None:
        """`entry` as for `put_record`; `former` are pages of an earlier map that will stay, empty where one may not."""
        self._set: list[tuple[int, bytes]] = []
        self._repository = repository
        self._keys = keys
        self._size = size
        self._entry = entry
        self._former = former
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
            self._set += enumerate(part, slot)
            done += len(part)

    def finish(self, pages: int) -> list[bytes]:
        """Store what is left and return the names of all `pages` pages."""
        self._turn_to(pages)
        return self.pages

    def _turn_to(self, number: int) -> None:
        if self._page is not None and len(self.pages) < number:
            body = self._page.encode()
            self._need_good(body)
            store, repository_id, domain = self._repository.store, self._repository.config.id, self._keys.domain
            former = self._former[len(self.pages)] if len(self.pages) < len(self._former) else b""
            self.pages.append(put_page(store, repository_id, domain, body, entry=self._entry, former=former))
            self._page = None
        self.pages += [b""] * (number - len(self.pages))
        if self._page is None:
            slots = page_slots(number, self._size, self._repository.config.chunk_size)
            self._page = PageBuilder(slots) if slots > 0 else None

    def _need_good(self, body: bytes) -> None:
        """Raise RemetalError unless a page's body says of each slot what it should."""
        number = len(self.pages)
        slots = page_slots(number, self._size, self._repository.config.chunk_size)
        try:
            runs = decode_page("of a map", body, slots) if body else []
        except DamagedError:
            runs = []
        found = [pair for run in runs for pair in enumerate(run.ids, run.first)]
        if found != self._set:
            raise miscalculated("a page of an image's map")
        self._set = []


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
        self._certain = newest.ledgers.certain
        self._entry = newest.follows.sequence
        parity = ParityWriter(repository, keys.machine_id, table.packs, report) if repository.config.parity else None
        self._uploads = Uploads(repository, keys, table, self._entry, parity)
        self._filling = Filling(repository, keys, self._uploads)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._ahead = workers * _BATCHES_AHEAD
        self._workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._workers.put(Worker(repository, keys, self._uploads, self._filling))
        self._failed = threading.Event()
        self._images: list[ImageRecord] = []
        self._stored_ahead: Counter[str] = Counter()
        self._ended = False

    def store(self, volume: str, size: int, batches: Iterable[Batch], keep: Callable[[Known], None]) -> None:
        """Store chunks ahead of the volume's image of `size` bytes, of which they may be; `keep` is told their ids.

        Batches are taken and released as `write_image` does, and the same is raised. Of the session's statistics only
        what is new counts: the image will count what it has.
        """
        before = self.statistics.stored_bytes
        with self._writing(), closing(self._encoded(batches, size)) as done:
            for encoded in done:
                counts = encoded.statistics
                self._count(
                    Statistics(
                        new_bytes=counts.new_bytes, stored_bytes=counts.stored_bytes, chunks_new=counts.chunks_new
                    )
                )
                keep(Known(encoded.first, encoded.ids, counts.read_bytes))
        self._stored_ahead[volume] += self.statistics.stored_bytes - before

    def write_image(
        self, volume: str, size: int, batches: Iterable[Batch | Known], *, previous: ImageRecord | None = None
    ) -> ImageRecord:
        """Store a volume's content of `size` bytes and return the record that the snapshot will hold.

        Takes batches in this thread, in ascending order; chunks in no batch are holes. Every batch that was
        taken is released, whatever happens. `previous` is the volume's image in the snapshot before: the pages
        of its map that have not changed are used again, and changed bytes are counted against it. Raises
        UnavailableError if the store fails, RemetalError if this computer miscalculates, and whatever `batches`
        raises; the session can then only be left.
        """
        chunk_size = self._repository.config.chunk_size
        pages = -(-size // (chunk_size * PAGE_CHUNKS))
        before = self.statistics
        with self._writing():
            writer = _MapWriter(self._repository, self._keys, size, self._entry, self._staying_pages(previous))
            predecessor = _Predecessor(self._repository, self._keys, previous, self._report)
            with closing(self._encoded(batches, size)) as done:
                for encoded in done:
                    writer.add(encoded.first, encoded.ids)
                    self._count(encoded.statistics, predecessor.changed(encoded.first, encoded.ids))
            names = writer.finish(pages)
        record = ImageRecord(
            volume=volume,
            size=size,
            chunk_size=chunk_size,
            used=self.statistics.read_bytes - before.read_bytes,
            stored=self.statistics.stored_bytes - before.stored_bytes + self._stored_ahead.pop(volume, 0),
            digest=map_digest(size, chunk_size, names),
            pages=tuple(names),
        )
        check_image(volume, record)
        self._images.append(record)
        return record

    def commit(
        self,
        *,
        layout: bytes,
        hostname: str,
        tags: Sequence[str] = (),
        left_out: Sequence[LeftOut] = (),
        time: str | None = None,
    ) -> Snapshot:
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
            left_out=tuple(left_out),
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
            snapshot = self._read_back(sequence, data, body)
            self._lock.check()
            if digest(data).hex() != snapshot.id:
                raise miscalculated("the snapshot")
            try:
                put_entry(store, entry_name(machine_id, sequence), data)
            except AlreadyExistsError:
                self._follow(sequence)
                continue
            need_unretired(self._repository, self._keys.stored.record)
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
        pages = {page_name(machine.id, page) for image in self._images for page in image.pages if page}
        if self._uploads.relies_on(ledger.packs) or ledger.names & pages:
            raise _outrun()
        self._follows, self._ledger = Head(sequence=sequence, id=envelope.id), ledger

    def _staying_pages(self, image: ImageRecord | None) -> list[bytes]:
        """Return the pages of an image's map, empty where one was condemned, or may have been."""
        if image is None or not self._certain:
            return []
        condemned = self._ledger.names if self._ledger is not None else frozenset[str]()
        return [b"" if page_name(self._keys.machine_id, page) in condemned else page for page in image.pages]

    def abandon(self) -> None:
        """Leave without a snapshot: what is stored already is put into the index for the next backup."""
        self._failed.set()
        self._ended = True
        self._pool.shutdown(wait=True)
        with suppress(Exception):  # the error that led here is the one to tell
            self._uploads.finish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Let nothing follow what has failed."""
        assert not self._ended, "the session has ended"
        assert not self._failed.is_set(), "an image of the session has failed"
        try:
            yield
        except BaseException:
            self._failed.set()
            raise

    def _encoded(self, batches: Iterable[Batch | Known], size: int) -> Generator[Encoded, None, None]:
        """Let the workers encode batches of an image of `size` bytes, and yield what became of them, in order."""
        chunk_size = self._repository.config.chunk_size
        waiting: deque[Future[Encoded | None]] = deque()
        try:
            following = 0
            for batch in batches:
                if isinstance(batch, Known):
                    waiting.append(self._take_known(batch, following))
                    following = batch.first + len(batch.ids)
                else:
                    waiting.append(self._submit(batch, following, size))
                    following = batch.first + -(-len(batch.data) // chunk_size)
                while waiting and (waiting[0].done() or len(waiting) >= self._ahead):
                    yield from self._collect(waiting.popleft())
            while waiting:
                yield from self._collect(waiting.popleft())
        except BaseException:
            self._failed.set()  # so that the workers take no more of what waits
            raise
        finally:
            for each in waiting:
                with suppress(Exception):
                    each.result()

    def _take_known(self, known: Known, following: int) -> Future[Encoded | None]:
        """Return what stands for chunks that are stored already. Raises RemetalError if they are not."""
        if known.first < following:
            raise ValueError(f"{len(known.ids)} known chunks cannot stand at chunk {known.first}")
        ids = list(known.ids)
        seal = digest(*ids)
        if not self._uploads.knows(ids):
            raise miscalculated("the list of what was read")
        zero = ids.count(ZERO_ID)
        counts = Statistics(read_bytes=known.size, chunks_known=len(ids) - zero, chunks_zero=zero)
        future: Future[Encoded | None] = Future()
        future.set_result(Encoded(known.first, ids, seal, counts))
        return future

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

    def _collect(self, future: Future[Encoded | None]) -> Iterator[Encoded]:
        done = future.result()
        if done is None:
            return  # another batch has failed, and its future says why
        if digest(*done.ids) != done.seal:
            raise miscalculated("a page of an image's map")
        yield done

    def _count(self, counts: Statistics, differs: Sequence[bool] = ()) -> None:
        """Add to the session's statistics; `differs` tells which of the chunks are not what stood there before."""
        total, size = self.statistics, self._repository.config.chunk_size
        changed = sum(min(size, counts.read_bytes - number * size) for number, each in enumerate(differs) if each)
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
        self._filling.flush()
        self._uploads.finish()

    def _read_back(self, sequence: int, data: bytes, body: Body) -> Snapshot:
        """Decode a snapshot from the very bytes that will be stored. Raises RemetalError if it is another one."""
        machine = self._keys.stored.record
        try:
            envelope = open_envelope(entry_name(machine.id, sequence), data, machine, NOBODY)
            snapshot = open_snapshot(envelope, data, machine, self._keys.domain)
        except DamagedError as error:
            raise miscalculated("the snapshot") from error
        said, meant = (
            (each.time, each.hostname, each.tags, each.version, each.layout, each.images, each.left_out)
            for each in (snapshot, body)
        )
        ledger = self._ledger.envelope.sequence if self._ledger is not None else 0
        if said != meant or (envelope.previous, envelope.ledger) != (self._follows.id, ledger):
            raise miscalculated("the snapshot")
        return snapshot


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
    RefusedError if the keys are another repository's, or were retired.
    """
    check_keys(repository, keys)
    need_unretired(repository, keys.stored.record)
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
        session = Session(repository, keys, lock, newest, table, workers=workers or probe_processors(), report=report)
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
