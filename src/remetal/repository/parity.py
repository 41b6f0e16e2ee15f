"""Parity: what one lost pack of a group is computed from. Specification: docs/format/parity.md.

    8 header, 16 repository, 16 machine, u32 number of packs
    per pack, in the order of names: 32 name (hash), u32 size in bytes
    the packs' bytes XORed, each continued with zeros to the size of the largest

It is made of encrypted bytes only and named after its own, so it takes no key to look after it, nor to use it. XOR is
linear: parity of few packs grows by what is added, and shrinks by what is taken out, without looking at the others.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from remetal.errors import DamagedError
from remetal.repository.cipher import digest
from remetal.repository.named import NamedObjects
from remetal.repository.objects import (
    HEADER_SIZE,
    HELP,
    PARITY,
    damaged,
    get_named,
    hash_in_name,
    header,
    miscalculated,
    pack_name,
    put_hashed,
)
from remetal.repository.packs import MAX_PACK
from remetal.storage import Entry, NotFoundError, Pieces, Store
from remetal.units import MIB

GROUP = 16
"""Packs that share a parity object: it takes up 1/16 of what they do, and 16 objects are read to rebuild one."""
MAX_MEMBERS = 64

_CLEAR = struct.Struct("<8s16s16sI")
_MEMBER = struct.Struct("<32sI")
_MAX_HEAD = _CLEAR.size + MAX_MEMBERS * _MEMBER.size
PIECE = 4 * MIB
"""Parity is read in pieces of so many bytes."""
_NAME = re.compile(rf"{PARITY}[0-9a-f]{{32}}/([0-9a-f]{{2}})\.[0-9a-f]{{64}}")
_SMALLEST_CLASS = 16
_FOLD = 4096

Folded = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Group:
    """A parity object and what it says of itself: the packs of its machine that it covers, with their sizes."""

    name: str
    repository_id: str
    machine_id: str
    packs: Mapping[bytes, int]

    @property
    def head_size(self) -> int:
        """Where the XORed bytes begin."""
        return _CLEAR.size + len(self.packs) * _MEMBER.size

    @property
    def size(self) -> int:
        """How many bytes the object has."""
        return self.head_size + max(self.packs.values())

    def whole(self, present: NamedObjects) -> bool:
        """Whether all of its packs are there in full size."""
        return present.sizes(list(self.packs)) == list(self.packs.values())


def folded(data: bytes | memoryview, position: int = 0) -> Folded:
    """Return bytes that begin at a position, XORed in blocks of 4 KiB.

    It is linear as parity is: what parity folds to are the folded packs XORed. So parity that a failing memory has
    changed is told from what it should be, without its packs.
    """
    before, total = position % _FOLD, np.zeros(_FOLD, np.uint8)
    first = min(_FOLD - before, len(data)) if before else 0
    rows = (len(data) - first) // _FOLD
    view = np.frombuffer(data, np.uint8)
    total[before : before + first] ^= view[:first]
    if rows:
        blocks = view[first : first + rows * _FOLD].view(np.uint64).reshape(rows, -1)
        total ^= np.bitwise_xor.reduce(blocks, axis=0).view(np.uint8)
    rest = view[first + rows * _FOLD :]
    total[: len(rest)] ^= rest
    return total.view(np.uint64)


class Xor:
    """Bytes of packs XORed, the shorter ones continued with zeros. Takes as much memory as the longest has."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MAX_PACK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # provided as it is touched
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._folded = folded(b"")
        self._size = 0

    def add(self, pieces: Pieces) -> None:
        """XOR bytes in, from the start on; adding them again takes them out. At most MAX_PACK."""
        position = 0
        for piece in pieces:
            position = self.add_at(position, piece)

    def add_at(self, position: int, piece: bytes | memoryview, fold: Folded | None = None) -> int:
        """XOR bytes in at a position, and return the one behind them. `fold` is what `folded` gave of them before."""
        end = position + len(piece)
        if end > MAX_PACK:
            raise ValueError(f"{end} bytes are more than a pack has")
        self._folded ^= folded(piece, position) if fold is None else fold
        part = self._bytes[position:end]
        np.bitwise_xor(part, np.frombuffer(piece, np.uint8), out=part)
        self._size = max(self._size, end)
        return end

    def add_pack(self, identity: bytes, data: bytes) -> None:
        """XOR a pack in. Raises RemetalError if its bytes are not what they were when they were read."""
        self.add_at(0, data)
        if digest(data) != identity:
            raise miscalculated("a pack")

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self._bytes[: self._size] = 0
        self._folded = folded(b"")
        self._size = 0

    def sound(self) -> bool:
        """Whether the memory still holds what was added."""
        return bool((folded(memoryview(self._memory)[: self._size]) == self._folded).all())

    def is_zero(self, start: int = 0) -> bool:
        """Whether nothing is left, from a position on."""
        return not self._bytes[start : self._size].any()

    def first(self, size: int) -> memoryview:
        """Return the first `size` bytes, which change with the next that are added."""
        return memoryview(self._memory)[:size]


def is_possible(size: int) -> bool:
    """Whether a pack can have this size; parity covers no others."""
    return HEADER_SIZE < size <= MAX_PACK


def size_class(size: int) -> int:
    """Return which packs share a group: those of about this size, within a factor of two, so that little is wasted."""
    return max((size - 1).bit_length(), _SMALLEST_CLASS)


def parity_folder(machine_id: str) -> str:
    """Return the prefix of a machine's parity objects."""
    return f"{PARITY}{machine_id}/"


def count_in_name(name: str) -> int:
    """Return how many packs a parity object covers, as its name says; 0 for another object's name."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else 0


def put_parity(store: Store, repository_id: str, machine_id: str, packs: Mapping[bytes, int], xor: Xor) -> Group:
    """Store the parity of packs, whose bytes are in `xor`. The same packs give the same object.

    Raises RemetalError if this computer's memory has changed any of it.
    """
    ids = bytes.fromhex(repository_id), bytes.fromhex(machine_id)
    rows = b"".join(_MEMBER.pack(identity, packs[identity]) for identity in sorted(packs))
    head = _CLEAR.pack(header("parity"), *ids, len(packs)) + rows
    pieces: list[bytes | memoryview] = [head, xor.first(max(packs.values()))]
    name = f"{parity_folder(machine_id)}{len(packs):02x}.{digest(*pieces).hex()}"
    group = Group(name, repository_id, machine_id, dict(sorted(packs.items())))
    try:
        good = decode_head(name, head, group.size) == group and xor.sound()
    except DamagedError:
        good = False
    if not good:
        raise miscalculated(f"the parity of {len(packs)} packs")
    put_hashed(store, name, pieces)
    return group


def decode_head(name: str, data: bytes, size: int) -> Group:
    """Parse what a parity object of `size` bytes begins with. Raises DamagedError."""
    if len(data) < _CLEAR.size:
        raise damaged(name, "it is too short for parity")
    magic, repository, machine, number = _CLEAR.unpack_from(data)
    end = _CLEAR.size + number * _MEMBER.size
    if magic != header("parity") or not name.startswith(parity_folder(machine.hex())) or number != count_in_name(name):
        raise damaged(name, "it is no parity object of this machine")
    if not 0 < number <= MAX_MEMBERS or len(data) < end:
        raise damaged(name, "its number of packs is impossible")
    rows = list(_MEMBER.iter_unpack(data[_CLEAR.size : end]))
    packs: dict[bytes, int] = dict(rows)
    if [row[0] for row in rows] != sorted(packs) or not all(map(is_possible, packs.values())):
        raise damaged(name, "its packs are impossible")
    if size != end + max(packs.values()):
        raise damaged(name, f"it has {size} bytes, which does not fit its packs")
    return Group(name, repository.hex(), machine.hex(), packs)


def read_group(store: Store, entry: Entry) -> Group:
    """Read what a parity object says of itself; its bytes as a whole are not looked at. Raises DamagedError."""
    return decode_head(entry.name, store.get(entry.name, size=_MAX_HEAD), entry.size)


def find_groups(store: Store, machine_id: str, problems: list[DamagedError]) -> Iterator[Group]:
    """Yield a machine's groups in the order of their names. What is damaged is added to `problems`."""
    for entry in store.entries(parity_folder(machine_id)):
        if hash_in_name(entry.name):
            try:
                yield read_group(store, entry)
            except DamagedError as error:
                problems.append(error)
            except NotFoundError:  # replaced meanwhile
                continue


def add_parity(store: Store, group: Group, xor: Xor) -> None:
    """XOR a group's parity in, comparing the whole object with its name.

    Raises DamagedError if it is not what was written; `xor` is then of no use any more, but to be cleared.
    """
    hasher, done, start = blake3(), 0, b""
    while done < group.size:
        try:
            piece = store.get(group.name, start=done, size=PIECE + 1 if done + PIECE >= group.size else PIECE)
        except NotFoundError as error:
            raise DamagedError(f"{store.location} lacks the object {group.name}", hint=HELP) from error
        if not piece or done + len(piece) > group.size:
            break
        start = start or piece[: group.head_size]
        first = min(max(group.head_size - done, 0), len(piece))
        if first < len(piece):
            xor.add_at(done + first - group.head_size, memoryview(piece)[first:])
        hasher.update(piece)
        done += len(piece)
    if done != group.size or hasher.digest() != hash_in_name(group.name):
        raise DamagedError(f"the object {group.name} is not what was written: its hash differs", hint=HELP)
    if decode_head(group.name, start, group.size) != group:
        raise damaged(group.name, "it is another one than it was")


def read_pack(store: Store, machine_id: str, identity: bytes) -> bytes:
    """Return a pack's bytes after comparing them with its name. Raises DamagedError."""
    return get_named(store, pack_name(machine_id, identity), MAX_PACK)


def rebuild_pack(store: Store, group: Group, identity: bytes) -> bytes:
    """Return the bytes of a pack as they were written, from all others of its group.

    Nothing else is ever returned: they have the hash that is the pack's name. Raises DamagedError if another one, or
    the parity object, is damaged or missing as well.
    """
    name = pack_name(group.machine_id, identity)
    xor = Xor()
    try:
        add_parity(store, group, xor)
        for other in group.packs:
            if other != identity:
                xor.add([read_pack(store, group.machine_id, other)])
    except DamagedError as error:
        raise damaged(name, f"it cannot be rebuilt either, because {error.message}") from error
    data = bytes(xor.first(group.packs[identity]))
    if digest(data) != identity:
        raise damaged(name, f"it cannot be rebuilt either, because {group.name} does not fit its packs")
    return data


def rebuild_from(store: Store, machine_id: str, groups: Iterable[Group], identity: bytes) -> bytes:
    """Rebuild a machine's pack from whichever of its groups can. Raises DamagedError if none can."""
    failed: DamagedError | None = None
    for group in groups:
        if identity in group.packs:
            try:
                return rebuild_pack(store, group, identity)
            except DamagedError as error:
                failed = failed or error
    raise failed or damaged(pack_name(machine_id, identity), "it is damaged or missing, and no parity covers it")
