"""Reading a snapshot's chunks with a recipient's key. Nothing is returned that was not verified."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import TracebackType

import numpy as np

from remetal.errors import DamagedError, RefusedError
from remetal.events import Report, silent
from remetal.repository.catalog import entry_names, find_ledgers, read_vouched
from remetal.repository.chunks import find_packs, image_runs, load_table, read_contents
from remetal.repository.cipher import chunk_id
from remetal.repository.machines import Domain, open_secrets, read_machines
from remetal.repository.maps import ZERO_ID, Run
from remetal.repository.named import gather
from remetal.repository.objects import HELP, damaged, pack_name
from remetal.repository.packs import ZSTD, Codec, NotSealedError, PackOpener, head_size, open_pack
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository
from remetal.repository.rescue import Rescue
from remetal.repository.snapshots import ImageRecord, Snapshot
from remetal.repository.table import ChunkTable, Place
from remetal.storage import NotFoundError

OPEN_PACKS = 512
"""How many packs' keys are kept; each takes about a kilobyte."""


class Reader:
    """The chunks of one machine. Every method may be called from many threads at once."""

    def __init__(
        self, repository: Repository, key: RecipientKey, domain: Domain, table: ChunkTable, rescue: Rescue
    ) -> None:
        self._repository = repository
        self._rescue = rescue
        self._key = key
        self._domain = domain
        self._table = table
        self._packs: OrderedDict[int, PackOpener] = OrderedDict()
        self._guard = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packs.clear()

    def runs(self, image: ImageRecord) -> Iterator[Run]:
        """Yield the image's chunk ids in ascending order: ZERO_ID for zeros, nothing for holes.

        Raises DamagedError.
        """
        return image_runs(self._repository, self._domain, image)

    def chunk_id(self, data: bytes | memoryview) -> bytes:
        """Return the id that a chunk of these bytes has, ZERO_ID if all of them are zero."""
        identity = chunk_id(self._domain.id_key, data)
        return ZERO_ID if identity == self._zero_id(len(data)) else identity

    def read_chunk(self, identity: bytes) -> bytes:
        """Return a chunk's bytes. `identity` is not ZERO_ID.

        Where its pack is missing, shorter, or holds anything else, the pack is rebuilt from parity.
        Raises DamagedError naming the pack if that cannot be.
        """
        place = self._table.find(identity)
        if place is None:
            raise self._lost(identity, "somebody asked for")
        try:
            return self._read_stored(identity, place)
        except NotSealedError:
            raise
        except DamagedError as error:
            return self._read_rebuilt(identity, place, error)

    def _read_stored(self, identity: bytes, place: Place) -> bytes:
        pack = self._open_pack(place.pack)
        size = place.word & (ZSTD - 1)
        try:
            sealed = self._repository.store.get(pack.name, start=place.offset, size=size)
        except NotFoundError as error:
            raise damaged(pack.name, "it is missing") from error
        if len(sealed) != size:
            raise damaged(pack.name, "it is shorter than it was")
        return pack.open_chunk(sealed, place.ordinal, identity, place.word, place.plain, self._codec())

    def _read_rebuilt(self, identity: bytes, place: Place, failed: DamagedError) -> bytes:
        pack = self._table.packs[place.pack][0]
        try:
            data = self._rescue.rebuild(pack)
        except DamagedError as error:
            raise DamagedError(f"{failed.message}; {error.message}", hint=failed.hint) from error
        opener = open_pack(pack_name(self._domain.machine_id, pack), data, self._key)
        sealed = data[place.offset : place.offset + (place.word & (ZSTD - 1))]
        return opener.open_chunk(sealed, place.ordinal, identity, place.word, place.plain, self._codec())

    def verify_present(self, images: Iterable[ImageRecord]) -> None:
        """Raise DamagedError unless every chunk is in the index and every pack it needs is there in full size.

        A pack that parity can rebuild is as good, and told. Reads the maps and lists the packs. Those of the first
        recipient, to whom every pack is sealed, are not opened; another's are, and RefusedError is raised if one was
        written before that key was accepted. Meant for the moment before a restore's first write.
        """
        packs = self._table.packs
        needed = np.zeros(len(packs), np.bool_)
        for image in images:
            for run in self.runs(image):
                ids = [each for each in run.ids if each != ZERO_ID]
                numbers = self._table.packs_of(ids)
                if -1 in numbers:
                    raise self._lost(ids[numbers.index(-1)], f"the image of {image.volume} needs")
                needed[numbers] = True
        self._verify_packs(pack for number, pack in enumerate(packs) if needed[number])
        if self._key.id != self._repository.config.id:
            self._verify_sealed(np.flatnonzero(needed).tolist())

    def _verify_packs(self, packs: Iterable[tuple[bytes, int]]) -> None:
        present = find_packs(self._repository, self._domain.machine_id)
        for identity, size in packs:
            there = present.sizes([identity])[0]
            if there == size:
                continue
            if not self._rescue.can_rebuild(identity, size):
                found = "it is missing" if there < 0 else f"it has {there} bytes instead of {size}"
                raise damaged(pack_name(self._domain.machine_id, identity), found)
            self._rescue.tell(identity)

    def _lost(self, identity: bytes, who: str) -> DamagedError:
        absent = self._table.absent
        why = f"; the pack {pack_name(self._domain.machine_id, absent[0][0])} is missing or cut short" if absent else ""
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        what = "which no index object knows" if not absent else "which is in no pack that is there"
        return DamagedError(f"{who} the chunk {identity.hex()}, {what}{why}{more}", hint=HELP)

    def _verify_sealed(self, packs: Iterable[int]) -> None:
        try:
            for number in packs:
                try:
                    self._open_pack(number)
                except NotSealedError:
                    raise
                except DamagedError:
                    pack = self._table.packs[number][0]
                    open_pack(pack_name(self._domain.machine_id, pack), self._rescue.rebuild(pack), self._key)
        except NotSealedError as error:
            raise RefusedError(
                f"the key {self._key.id} does not open all of this snapshot: part of it was stored before the machine "
                "had accepted that key",
                hint="Use the passphrase or the recovery kit of the repository's first recipient.",
            ) from error

    def _open_pack(self, number: int) -> PackOpener:
        with self._guard:
            pack = self._packs.get(number)
            if pack is not None:
                self._packs.move_to_end(number)
                return pack
        name = pack_name(self._domain.machine_id, self._table.packs[number][0])
        try:
            head = self._repository.store.get(name, size=head_size())
        except NotFoundError as error:
            raise damaged(name, "it is missing") from error
        pack = open_pack(name, head, self._key)
        if pack.machine_id != self._domain.machine_id:
            raise damaged(name, "it belongs to another machine")
        with self._guard:
            self._packs[number] = pack
            if len(self._packs) > OPEN_PACKS:
                self._packs.popitem(last=False)
        return pack

    def _codec(self) -> Codec:
        codec: Codec | None = getattr(self._local, "codec", None)
        if codec is None:
            codec = self._local.codec = Codec(self._domain.id_key)
        return codec

    def _zero_id(self, size: int) -> bytes:
        known: tuple[int, bytes] = getattr(self._local, "zero", (-1, b""))
        if known[0] != size:
            known = self._local.zero = (size, chunk_id(self._domain.id_key, bytes(size)))
        return known[1]


def open_reader(repository: Repository, key: RecipientKey, snapshot: Snapshot, *, report: Report = silent) -> Reader:
    """Open a reader for the chunks of a snapshot's machine; it may be used in a `with` block.

    A damaged index object is passed over: what it knew is missed when it is needed. Packs that have to be rebuilt from
    parity are reported, from whatever thread comes upon them. Raises DamagedError if the machine's record or secrets
    are damaged.
    """
    machines, problems = read_machines(repository.store, repository.config.id)
    machine = next((each for each in machines if each.id == snapshot.machine_id), None)
    if machine is None:
        said = f": {problems[0]}" if problems else ""
        raise DamagedError(f"the record of machine '{snapshot.machine}' is missing{said}", hint=HELP)
    domain = open_secrets(repository.store, machine, key)
    ledgers = find_ledgers(repository, machine, read_vouched(repository), entry_names(repository, machine.id), [])
    table = load_table(repository, domain, ledgers.newest, [])
    rescue = Rescue(repository, machine.id, report)
    back = gather((identity, size) for identity, size in table.absent if rescue.can_rebuild(identity, size))
    if back:
        for _, packs in read_contents(repository, domain, ledgers.newest, []):
            table.add(
                [
                    each
                    for each, size in zip(packs, back.sizes([e.identity for e in packs]), strict=True)
                    if each.size == size
                ]
            )
        table.absent = gather(each for each in table.absent if each[0] not in back)
        table.settle()
    return Reader(repository, key, domain, table, rescue)
