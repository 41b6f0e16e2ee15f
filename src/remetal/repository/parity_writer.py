"""Parity of a backup's packs, made while they stream past.

Packs of about the same size share a group. A group that is not full when the backup ends is stored as it is, and the
next backup replaces it by a fuller one: it reads that one object, XORs its own packs in, stores the result, and only
then deletes what it has replaced. So many small backups take up no more parity than a large one.

Memory: one buffer of a pack's size. Nearly all packs of a backup have about the same; where another size comes, the
group that is open is stored, and added to when its size comes again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice

from remetal.errors import DamagedError, RemetalError, UnavailableError
from remetal.events import Event, Note, Report, Warn
from remetal.repository.cipher import digest
from remetal.repository.named import NamedObjects
from remetal.repository.objects import miscalculated
from remetal.repository.packs import Pack
from remetal.repository.parity import (
    GROUP,
    Folded,
    Group,
    Xor,
    add_parity,
    count_in_name,
    find_groups,
    folded,
    parity_folder,
    put_parity,
    read_group,
    read_pack,
    size_class,
)
from remetal.repository.repository import Repository
from remetal.storage import Entry

MAX_GAP = 32
"""So many packs that an earlier backup has left without parity are read again to protect them; more are told."""


class _Open:
    """The group in the making: new packs, and the stored group that they are added to."""

    def __init__(self) -> None:
        self.base: Group | None = None
        self.packs: dict[bytes, int] = {}
        self.xor = Xor()

    @property
    def kind(self) -> int:
        """Which packs may be added to it, if there are any in it yet."""
        return size_class(max(self.packs.values()))

    @property
    def full(self) -> bool:
        """Whether no other pack may be added."""
        return len(self.packs) >= GROUP

    def clear(self) -> None:
        """Begin another one."""
        self.base, self.packs = None, {}
        self.xor.clear()


class ParityWriter:
    """Protects the packs of one backup. `add` may be called from several threads at once.

    Whatever it runs into is told and fails no backup: a pack without parity is as good as one with it until something
    happens to it, and the next backup, prune or repair closes the gap.
    """

    def __init__(self, repository: Repository, machine_id: str, present: NamedObjects, report: Report) -> None:
        """Look at the groups that are there; `present` are the packs that may be relied on. It is not kept."""
        self._repository = repository
        self._store = repository.store
        self._machine_id = machine_id
        self._report = report
        self._guard = threading.Lock()
        self._open = _Open()
        self._bases: dict[int, Group] = {}
        self._gap: list[tuple[bytes, int]] = []
        self._said: list[Event] = []
        self._attempt(partial(self._look, present))

    def add(self, pack: Pack, fold: Folded) -> None:
        """Take note of a pack that is stored. `fold` is what `folded` gave of it before its bytes were compared."""
        contents = pack.contents
        with self._guard:
            self._attempt(partial(self._add, contents.identity, contents.size, pack.data, fold))

    def finish(self) -> None:
        """Store the group that is not full, packs that were found without parity among them."""
        with self._guard:
            for identity, size in sorted(self._gap, key=lambda each: size_class(each[1])):
                self._attempt(partial(self._add_stored, identity, size))
            self._gap = []
            self._attempt(self._close)
        for said in dict.fromkeys(self._said):
            self._report(said)
        self._said = []

    def _look(self, present: NamedObjects) -> None:
        """Find the groups that may be added to, and the packs that are in none.

        The names tell how many packs a group has, so usually only the groups that are not full have to be read.
        """
        folder = parity_folder(self._machine_id)
        full = NamedObjects()  # packs in full groups
        partial_groups: list[Group] = []
        if sum(count_in_name(entry.name) for entry in self._store.entries(folder)) == len(present):
            entries = [entry for entry in self._store.entries(folder) if 0 < count_in_name(entry.name) < GROUP]
            partial_groups = list(filter(None, map(self._read, entries)))
        else:
            for group in find_groups(self._store, self._machine_id, []):
                if len(group.packs) < GROUP:
                    partial_groups.append(group)
                else:
                    full.add(group.packs.items())
            self._find_gap(present, full, partial_groups)
        for group in sorted(partial_groups, key=lambda each: len(each.packs)):
            others = [each for each in partial_groups if each is not group and each.packs.keys() >= group.packs.keys()]
            if group.whole(present) and not others and -1 in full.numbers(list(group.packs)):
                self._bases[size_class(max(group.packs.values()))] = group

    def _find_gap(self, present: NamedObjects, full: NamedObjects, partial_groups: list[Group]) -> None:
        covered = {identity for group in partial_groups for identity in group.packs}
        gap = (pack for pack in present if pack[0] not in covered and pack[0] not in full)
        self._gap = list(islice(gap, MAX_GAP + 1))
        if len(self._gap) > MAX_GAP:
            number = len(self._gap) + sum(1 for _ in gap)
            self._said.append(Note(f"{number} packs have no parity yet: `remetal repair` or `remetal prune` adds it"))
            self._gap = []

    def _read(self, entry: Entry) -> Group | None:
        with suppress(DamagedError):  # `remetal check` tells of it; its packs get no more parity here
            return read_group(self._store, entry)
        return None

    def _add_stored(self, identity: bytes, size: int) -> None:
        data = read_pack(self._store, self._machine_id, identity)
        fold = folded(data)
        if digest(data) != identity:
            raise miscalculated("a pack")
        self._add(identity, size, memoryview(data), fold)

    def _add(self, identity: bytes, size: int, data: memoryview, fold: Folded) -> None:
        group = self._open
        if group.packs and group.kind != size_class(size):
            self._attempt(self._close)
        if not group.packs:
            self._begin(size_class(size))
        group.packs[identity] = size
        group.xor.add_at(0, data, fold)
        if group.full:
            self._close()

    def _begin(self, kind: int) -> None:
        """Open a group with what a stored one has, if there is one of this kind with room left."""
        group, base = self._open, self._bases.pop(kind, None)
        if base is None:
            return
        try:
            add_parity(self._store, base, group.xor)
        except RemetalError as error:
            group.clear()
            self._said.append(Warn(error.message, error.hint))
        else:
            group.base, group.packs = base, dict(base.packs)

    def _close(self) -> None:
        """Store the open group, and delete the one that it was added to."""
        group = self._open
        if not group.packs:
            return
        try:
            made = put_parity(self._store, self._repository.config.id, self._machine_id, group.packs, group.xor)
            if not group.full:
                self._bases[group.kind] = made
            base = group.base
        finally:
            group.clear()
        if base is not None and base.name != made.name:
            with suppress(RemetalError):  # a store that lets nobody delete: the next prune finds it
                self._store.delete(base.name)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (DamagedError, UnavailableError) as error:
            self._tell(
                error, "The backup itself is not touched by that; the next backup, prune or repair adds the parity."
            )
        except RemetalError as error:  # this computer miscalculates: its own words are the ones to read
            self._tell(error, error.hint)

    def _tell(self, error: RemetalError, hint: str) -> None:
        self._said.append(Warn(f"Some packs of this backup are not protected by parity yet: {error.message}", hint))
