"""Looking at every byte of a repository without any key: is each object what was written, does parity fit its packs?

Packs are read group by group, so that one pass tells both. What is read is hashed in pieces; the memory is a piece, one
buffer of a pack's size, and the names of what is bad.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field

from blake3 import blake3

from remetal.errors import DamagedError, RefusedError
from remetal.events import Note, Progress, Report
from remetal.repository.config import decode_config
from remetal.repository.groups import GroupIndex
from remetal.repository.named import NamedObjects, gather
from remetal.repository.objects import (
    CONFIG,
    HISTORY,
    LOCKS,
    MAX_KEY_OBJECT,
    PACKS,
    PARITY,
    get_named,
    get_object,
    hash_in_name,
    largest,
    pack_folder,
    pack_name,
)
from remetal.repository.packs import MAX_PACK
from remetal.repository.parity import PIECE, Group, Xor, parity_folder, read_group
from remetal.storage import Entry, NotFoundError, Store, UnreadableError

_ID = "[0-9a-f]{32}"
_HASH = "[0-9a-f]{64}"
_OURS = re.compile(
    rf"config|keys/(recipients|revoked|slots|machines|retired)/{_ID}\.{_HASH}|keys/secrets/{_ID}\.{_ID}\.{_HASH}"
    rf"|packs/{_ID}/([0-9a-f]{{2}})/\2[0-9a-f]{{62}}|(index|maps)/{_ID}/{_HASH}|(history|locks)/{_ID}/[0-9a-f]{{16}}"
    rf"|parity/{_ID}/[0-9a-f]{{2}}\.{_HASH}|repairs/[0-9a-f]{{16}}/[0-9a-f]{{8}}\.{_HASH}"
    rf"|aside/[0-9a-f]{{16}}/[0-9a-f]{{8}}\.[0-9a-f]{{8}}\.{_HASH}"
)
_OF_MACHINE = re.compile(
    rf"(?:{PACKS}({_ID})/([0-9a-f]{{2}})/\2[0-9a-f]{{62}})|(?:{PARITY}({_ID})/[0-9a-f]{{2}}\.{_HASH})"
)


@dataclass(slots=True)
class Scrubbed:
    """What a scrub has found: how much it read, what is wrong, and the state of packs and parity.

    `problems` has a sentence for each object that is there and not as it should be, by its name. `bad` are names of
    objects that are not what was written, packs that parity misses included. `misfits` are names of parity objects that
    are what was written and no parity: nonsense, or other than their packs give, all of which are whole. `unprotected`
    counts packs in no group.
    """

    store: Store
    objects: int = 0
    bytes: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    misfits: set[str] = field(default_factory=set)
    unprotected: int = 0
    _index: tuple[str, GroupIndex] | None = field(default=None, repr=False)

    def look_again(self) -> None:
        """Read once more what is bad: what is whole now was misread, by a store or a computer that is not at its best.

        Meant for the moment before anything is made of it.
        """
        for name in list(self.bad):
            with suppress(DamagedError):
                get_named(self.store, name, largest(name))
                self.forget(name)

    def forget(self, name: str) -> None:
        """Note that nothing is wrong with an object any more."""
        self.bad.discard(name)
        self.misfits.discard(name)
        self.problems.pop(name, None)

    def groups_of(self, name: str) -> list[Group]:
        """Return the groups that a pack is in."""
        found, identity = _OF_MACHINE.fullmatch(name), hash_in_name(name)
        if found is None or found[1] is None or identity is None:
            return []
        if self._index is None or self._index[0] != found[1]:
            self._index = found[1], GroupIndex(self.store, found[1], [])
        return list(self._index[1].of(identity))

    def helpers(self, name: str) -> list[Group]:
        """Return the groups from which a bad pack can be rebuilt. Best asked machine by machine."""
        return [
            group
            for group in self.groups_of(name)
            if group.name not in self.misfits
            and self.bad.isdisjoint({group.name, *(pack_name(group.machine_id, each) for each in group.packs)} - {name})
        ]


def scrub_store(store: Store, report: Report) -> Scrubbed:
    """Read every object of a store and compare it with its name. Raises UnavailableError if the store fails."""
    total = sum(entry.size for entry in store.entries(""))
    work = _Scrub(store, total, report)
    for machine_id in sorted(_machines(store)):
        work.scrub_machine(machine_id)
    for entry in store.entries(""):
        if not entry.name.startswith(LOCKS) and not _OF_MACHINE.fullmatch(entry.name):
            work.count(entry.size)
            work.scrub_object(entry)
    return work.result


def _machines(store: Store) -> set[str]:
    """Return the machines that have packs or parity."""
    matches = (_OF_MACHINE.fullmatch(entry.name) for prefix in (PACKS, PARITY) for entry in store.entries(prefix))
    return {match[1] or match[3] for match in matches if match is not None}


class _Scrub:
    """The parts of a scrub."""

    def __init__(self, store: Store, total: int, report: Report) -> None:
        self.result = Scrubbed(store)
        self._store = store
        self._total = total
        self._report = report
        self._xor = Xor()

    def count(self, size: int) -> None:
        """Note that an object of so many bytes is looked at."""
        result = self.result
        result.objects += 1
        result.bytes += size
        self._report(Progress("objects", result.bytes, max(self._total, result.bytes)))

    def scrub_object(self, entry: Entry) -> None:
        """Look at an object that is neither a pack nor parity."""
        if not _OURS.fullmatch(entry.name):
            self._report(Note(f"the object {entry.name} is not one of remetal's"))
        elif entry.name == CONFIG:
            try:
                decode_config(get_object(self._store, CONFIG, MAX_KEY_OBJECT))
            except (DamagedError, RefusedError) as error:
                self.result.problems[CONFIG] = error.message
        elif not entry.name.startswith(HISTORY):
            self._compare(entry.name, entry.size)

    def scrub_machine(self, machine_id: str) -> None:
        """Look at the packs and the parity of one machine."""
        entries = (entry for entry in self._store.entries(pack_folder(machine_id)) if _OF_MACHINE.fullmatch(entry.name))
        present = gather((hash_in_name(entry.name) or b"", entry.size) for entry in entries)
        seen, good = NamedObjects(), NamedObjects()
        for entry in self._store.entries(parity_folder(machine_id)):
            if _OF_MACHINE.fullmatch(entry.name):
                self.count(entry.size)
                self._scrub_group(entry, present, seen, good)
        for identity, size in present:
            if identity not in seen:
                self.count(size)
                self._compare(pack_name(machine_id, identity), size)
            self.result.unprotected += identity not in good

    def _scrub_group(self, entry: Entry, present: NamedObjects, seen: NamedObjects, good: NamedObjects) -> None:
        """Look at a parity object and at the packs that it covers, and whether their sum is zero."""
        group = self._read_group(entry)
        if group is None:
            return
        xor, result = self._xor, self.result
        xor.clear()
        whole = self._compare(group.name, entry.size, xor, skip=group.head_size)
        fits = whole
        for identity in group.packs:
            name, size = pack_name(group.machine_id, identity), present.sizes([identity])[0]
            if size < 0:
                result.bad.add(name)
                fits = False
                continue
            if seen.add([(identity, size)]) != [-1]:
                self.count(size)
            fits = self._compare(name, size, xor) and fits
        if fits and not xor.is_zero():
            result.misfits.add(group.name)
            result.problems[group.name] = f"the parity in {group.name} does not fit its packs, which are whole"
        elif whole:
            good.add(group.packs.items())

    def _read_group(self, entry: Entry, *, again: bool = False) -> Group | None:
        """Return what a parity object says of itself; None if it says nothing that can be."""
        try:
            return read_group(self._store, entry)
        except (DamagedError, NotFoundError) as error:
            if not self._compare(entry.name, entry.size):
                return None
            if not again:  # it is what was written: was it misread?
                return self._read_group(entry, again=True)
            self.result.problems[entry.name] = str(error)
            self.result.misfits.add(entry.name)
            return None

    def _compare(self, name: str, size: int, xor: Xor | None = None, skip: int = 0) -> bool:
        """Hash an object, XOR its bytes behind the first `skip` in, and return whether it is what was written."""
        problem = f"the object {name} is not what was written: its hash differs"
        try:
            if self._hash(name, size, xor, skip) == hash_in_name(name):
                return True
        except UnreadableError as error:
            problem = error.message
        if name not in self.result.bad:
            self.result.bad.add(name)
            self.result.problems[name] = problem
        return False

    def _hash(self, name: str, size: int, xor: Xor | None, skip: int) -> bytes | None:
        if size > largest(name):
            return None  # so large is nothing that was ever written, and there is no end to reading a sparse file
        hasher = blake3()
        done = 0
        with suppress(NotFoundError):
            while piece := self._store.get(name, start=done, size=skip - done if done < skip else PIECE):
                if xor is not None and skip <= done and done - skip + len(piece) <= MAX_PACK:
                    xor.add_at(done - skip, piece)
                hasher.update(piece)
                done += len(piece)
            return hasher.digest()
        return None
