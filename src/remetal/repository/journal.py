"""What a repair does is written down before it is done, so that it can be undone. Specification: docs/format/repair.md.

A repair works through a store that keeps its journal: each object that it creates, and each that it sets aside. What is
set aside is not destroyed, it gets other names. Repairs are numbered, and the last one is undone first, its last step
first; a crash anywhere leaves a journal with which the same command goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from remetal import __version__
from remetal.errors import DamagedError
from remetal.repository.cipher import digest
from remetal.repository.history import MAX_SEQUENCE
from remetal.repository.objects import (
    ASIDE,
    INDEX,
    MAX_KEY_OBJECT,
    PACKS,
    PARITY,
    REPAIRS,
    Record,
    check_moment,
    damaged,
    decode_json,
    encode_json,
    get_named,
    hash_in_name,
    is_there,
    miscalculated,
    put_hashed,
    put_named,
)
from remetal.repository.repository import utc_now
from remetal.storage import AlreadyExistsError, Entry, NotFoundError, Pieces, Store, UnreadableError
from remetal.storage.store import is_volatile
from remetal.units import MIB

_PART = 32 * MIB
"""What is set aside is kept in parts of at most so many bytes."""
_BLOCK = MIB
"""Of an object that cannot be read, so many bytes are given up at once: each attempt may take the disk seconds."""
TOUCHED = (PACKS, PARITY, INDEX)
"""What a repair adds or sets aside; an undo leaves all else alone, whatever a journal says."""
_STEP = re.compile(rf"{REPAIRS}([0-9a-f]{{16}})/([0-9a-f]{{8}})\.[0-9a-f]{{64}}")


class BeginRecord(Record, frozen=True, kw_only=True):
    """The first record of a repair: when it was, and the number of each machine's newest entry at that time."""

    time: str
    version: str
    heads: dict[str, int]


class StepRecord(Record, frozen=True, kw_only=True):
    """One step: that the object `name` was added, or set aside; then `parts` are the objects with its bytes."""

    action: Literal["added", "aside"]
    name: str
    parts: tuple[str, ...] = ()


class Journal:
    """A store that writes down what is created in it. Whoever holds it is one repair."""

    def __init__(self, store: Store, heads: Mapping[str, int]) -> None:
        """Nothing is written before the first change."""
        self._store = store
        self._heads = dict(heads)
        self._number = 0
        self._steps = 0
        self.added = 0
        self.aside = 0

    @property
    def location(self) -> str:
        """See the contract of stores."""
        return self._store.location

    @property
    def number(self) -> int:
        """The repair's number, 0 if it has changed nothing."""
        return self._number

    def put(self, name: str, data: Pieces) -> None:
        """Create an object that was not there; see the contract."""
        if is_volatile(name):
            self._store.put(name, data)
            return
        if is_there(self._store, name):
            raise AlreadyExistsError(f"{self.location} has an object '{name}' already")
        record = self._note(StepRecord(action="added", name=name))
        try:
            self._store.put(name, data)
        except AlreadyExistsError:  # somebody else was quicker: it is not ours to take back
            self._store.delete(record)
            raise
        self.added += 1

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See the contract of stores."""
        return self._store.get(name, start=start, size=size)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See the contract of stores."""
        return self._store.entries(prefix)

    def delete(self, name: str) -> None:
        """Locks come and go; everything else is set aside, never deleted."""
        if not is_volatile(name):
            raise AssertionError("a repair deletes nothing")
        self._store.delete(name)

    def keep(self, names: Iterable[str]) -> int:
        """See the contract of stores."""
        return self._store.keep(names)

    def close(self) -> None:
        """The store is not ours to close."""

    def set_aside(self, name: str) -> None:
        """Take an object out of the repository, keeping its bytes; one that is not there changes nothing.

        Of one that cannot be read, what can be read is kept, with zeros in place of the rest.
        """
        parts: list[str] = []
        self._begin()
        start = 0
        try:
            try:
                while piece := self._store.get(name, start=start, size=_PART):
                    parts.append(self._keep(piece, len(parts)))
                    start += len(piece)
                self._need_same(name, parts)
            except UnreadableError:
                parts = [self._keep(piece, number) for number, piece in enumerate(self._salvage(name))]
        except NotFoundError:
            return
        self._note(StepRecord(action="aside", name=name, parts=tuple(parts)))
        self._store.delete(name)
        self.aside += 1

    def _keep(self, piece: bytes, number: int) -> str:
        """Store a part of what is being set aside, and return its name."""
        return put_named(self._store, f"{ASIDE}{self._number:016x}/{self._steps:08x}.{number:08x}.", piece)

    def _salvage(self, name: str) -> Iterator[bytes]:
        """Yield the parts of an object, with zeros in place of what cannot be read."""
        size = next((entry.size for entry in self._store.entries(name) if entry.name == name), 0)
        for start in range(0, size, _PART):
            end = min(start + _PART, size)
            yield b"".join(
                self._salvage_block(name, each, min(each + _BLOCK, end)) for each in range(start, end, _BLOCK)
            )

    def _salvage_block(self, name: str, start: int, end: int) -> bytes:
        try:
            return self._store.get(name, start=start, size=end - start)
        except UnreadableError:
            return bytes(end - start)

    def _need_same(self, name: str, parts: Iterable[str]) -> None:
        """Raise RemetalError unless an object's parts are what it has in the store: then it may be deleted."""
        for number, part in enumerate(parts):
            if digest(self._store.get(name, start=number * _PART, size=_PART)) != hash_in_name(part):
                raise miscalculated(f"what is set aside of {name}")

    def _begin(self) -> None:
        if self._number:
            return
        number = max((each for each, _, _ in _records(self._store)), default=0) + 1
        self._number = number
        self._put_record(0, BeginRecord(time=utc_now(), version=__version__, heads=self._heads))
        self._steps = 1

    def _note(self, step: StepRecord) -> str:
        self._begin()
        name = self._put_record(self._steps, step)
        self._steps += 1
        return name

    def _put_record(self, number: int, record: BeginRecord | StepRecord) -> str:
        """Store a record, after seeing that it says what it should: what it says is what an undo deletes."""
        data = encode_json(record)
        name = f"{REPAIRS}{self._number:016x}/{number:08x}.{digest(data).hex()}"
        try:
            good = decode_json(name, data, type(record)) == record
        except DamagedError:
            good = False
        if not good:
            raise miscalculated("a record of a repair")
        put_hashed(self._store, name, [data])
        return name


class Repair:
    """What the journal tells of a repair, to be undone or to be accepted."""

    def __init__(self, store: Store, number: int) -> None:
        """Read its records. Raises DamagedError if one of them is not what was written."""
        self.number = number
        self._store = store
        found = [(step, name) for each, step, name in _records(store) if each == number]
        data = {step: get_named(store, name, MAX_KEY_OBJECT) for step, name in found}
        self._names = dict(found)
        if 0 not in data:
            raise damaged(f"{REPAIRS}{number:016x}/", "its first record is missing")
        self.begin = decode_json(self._names[0], data[0], BeginRecord)
        check_moment(self._names[0], self.begin.time)
        if not all(0 <= each <= MAX_SEQUENCE for each in self.begin.heads.values()):
            raise damaged(self._names[0], "it tells of entries that no history can have")
        self.steps = [
            (step, decode_json(self._names[step], data[step], StepRecord))
            for step in sorted(data, reverse=True)
            if step
        ]
        """Numbers and steps, the last one first."""
        for number, each in self.steps:
            if not each.name.startswith(TOUCHED) or not all(part.startswith(ASIDE) for part in each.parts):
                raise damaged(self._names[number], f"no repair has {each.action} {each.name[:100]!a}")

    def added(self) -> set[str]:
        """Return the names of all objects that it added."""
        return {step.name for _, step in self.steps if step.action == "added"}

    def read_aside(self, step: StepRecord) -> bytes:
        """Return the bytes of an object that was set aside. Raises DamagedError."""
        return b"".join(get_named(self._store, each, _PART) for each in step.parts)

    def undo_step(self, number: int, step: StepRecord) -> bool:
        """Take back one step; return whether that changed anything.

        An object that stands where one was set aside, and is another one, stays: it was not put there by the repair.
        """
        changed = is_there(self._store, step.name) == (step.action == "added")
        if step.action == "added":
            self._store.delete(step.name)
        elif changed:
            self._store.put(step.name, [self.read_aside(step)])
        self._store.delete(self._names[number])
        return changed

    def forget(self) -> None:
        """Delete its journal, and what it has set aside: now it cannot be undone any more."""
        for _, name in sorted(self._names.items(), reverse=True):
            if name != self._names[0]:
                self._store.delete(name)
        for entry in list(self._store.entries(f"{ASIDE}{self.number:016x}/")):
            self._store.delete(entry.name)
        self._store.delete(self._names[0])


def last_repair(store: Store) -> Repair | None:
    """Return the repair that can be undone, or None if there is none. Raises DamagedError if its journal is damaged."""
    numbers = [number for number, _, _ in _records(store)]
    return Repair(store, max(numbers)) if numbers else None


def _records(store: Store) -> Iterator[tuple[int, int, str]]:
    """Yield number of the repair, number of the step, and name of each record."""
    for entry in store.entries(REPAIRS):
        match = _STEP.fullmatch(entry.name)
        if match:
            yield int(match[1], 16), int(match[2], 16), entry.name
