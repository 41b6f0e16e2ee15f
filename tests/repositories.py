"""Small repositories for tests: a store in memory that can be made to fail, backups of bytes, and restores."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from remetal.errors import UnavailableError
from remetal.repository.machines import MachineKeys
from remetal.repository.maps import ZERO_ID
from remetal.repository.reader import open_reader
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, enroll_machine, init_repository, open_repository, unlock_with_kit
from remetal.repository.session import Batch, Session, open_session
from remetal.repository.snapshots import Snapshot
from remetal.storage import AlreadyExistsError, Entry, NotFoundError, Pieces
from remetal.storage.store import check_name
from remetal.units import KIB

CHUNK = 64 * KIB
PASSPHRASE = "correct horse battery staple"

Operation = tuple[str, str]
"""Method and object name of one call of a store."""


@dataclass
class MemoryStore:
    """A store in memory. `before` and `after` are called around every change, and may raise."""

    objects: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[Operation], None] = lambda operation: None
    after: Callable[[Operation], None] = lambda operation: None
    guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def location(self) -> str:
        return "memory"

    def put(self, name: str, data: Pieces) -> None:
        check_name(name)
        self.before(("put", name))
        whole = b"".join(data)
        with self.guard:
            if name in self.objects:
                raise AlreadyExistsError(f"{name} is there")
            self.objects[name] = whole
        self.after(("put", name))

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        check_name(name)
        with self.guard:
            if name not in self.objects:
                raise NotFoundError(f"no {name}")
            return self.objects[name][start : None if size is None else start + size]

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self.guard:
            found = [Entry(name, len(data)) for name, data in self.objects.items() if name.startswith(prefix)]
        yield from sorted(found, key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        check_name(name)
        self.before(("delete", name))
        with self.guard:
            self.objects.pop(name, None)
        self.after(("delete", name))

    def keep(self, names: Iterable[str]) -> int:
        return 0

    def close(self) -> None:
        pass

    def copy(self) -> MemoryStore:
        return MemoryStore(dict(self.objects))


@dataclass
class Site:
    """A repository in memory with one machine, and the key that restores it."""

    store: MemoryStore
    repository: Repository
    keys: MachineKeys
    key: RecipientKey

    def copy(self) -> Site:
        """Return the same site over a copy of the store; the machine's memory is copied, too."""
        store = self.store.copy()
        return Site(store, open_repository(store), MachineKeys(self.keys.stored), self.key)


def noise(name: str, chunks: int) -> bytes:
    """Return so many chunks of bytes that no compression makes smaller, the same ones for the same name."""
    return hashlib.shake_256(name.encode()).digest(chunks * CHUNK)


def make_site() -> Site:
    """Make a repository in memory and enroll a machine (0.2 s, Argon2id)."""
    store = MemoryStore()
    repository, kit = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
    return Site(store, repository, enroll_machine(repository, "web"), unlock_with_kit(repository, kit.text()))


def batches_of(data: bytes, *, chunks: int = 3, holes: Sequence[int] = ()) -> Iterator[Batch]:
    """Yield batches of up to `chunks` chunks of 64 KiB, leaving out the chunks at the indexes in `holes`."""
    count = -(-len(data) // CHUNK)
    first = 0
    while first < count:
        last = first
        while last < count and last not in holes and last - first < chunks:
            last += 1
        if last > first:
            yield Batch(first, memoryview(data)[first * CHUNK : last * CHUNK], lambda: None)
        first = max(last, first + 1)


def write(session: Session, data: bytes, *, volume: str = "sda:1", holes: Sequence[int] = ()) -> None:
    """Write bytes as an image into a session, against the image of that name in the predecessor."""
    images = session.previous.images if session.previous else ()
    previous = next((image for image in images if image.volume == volume), None)
    session.write_image(volume, len(data), batches_of(data, holes=holes), previous=previous)


def backup(site: Site, data: bytes, *, workers: int = 2, holes: Sequence[int] = ()) -> Snapshot:
    """Back up bytes as the only image of a snapshot."""
    with open_session(site.repository, site.keys, workers=workers) as session:
        write(session, data, holes=holes)
        return session.commit(layout=b'{"version": 1}', hostname="web.example", tags=("t",))


def restore(site: Site, snapshot: Snapshot, number: int = 0) -> bytes:
    """Read an image back, holes as zeros, after making sure that all of it is there."""
    image = snapshot.images[number]
    data = bytearray(image.size)
    with open_reader(site.repository, site.key, snapshot) as reader:
        reader.verify_present([image])
        for run in reader.runs(image):
            for index, identity in enumerate(run.ids, start=run.first):
                if identity != ZERO_ID:
                    chunk = reader.read_chunk(identity)
                    assert reader.chunk_id(chunk) == identity
                    data[index * CHUNK : index * CHUNK + len(chunk)] = chunk
    assert len(data) == image.size
    return bytes(data)


class StoreDiedError(UnavailableError):
    """The failure that tests put into a store."""


def die_at(number: int, *, after: bool) -> Callable[[MemoryStore], None]:
    """Return what makes a store fail for good at its `number`-th change, before or after it took effect."""

    def arm(store: MemoryStore) -> None:
        count = 0
        guard = threading.Lock()

        def step(operation: Operation) -> None:
            nonlocal count
            with guard:
                count += 1
                if count >= number:
                    raise StoreDiedError(f"the store died at {operation}")

        if after:
            store.after = step
            store.before = lambda operation: _refuse_if(count >= number, operation)
        else:
            store.before = step

    return arm


def _refuse_if(dead: bool, operation: Operation) -> None:
    if dead:
        raise StoreDiedError(f"the store is dead: {operation}")
