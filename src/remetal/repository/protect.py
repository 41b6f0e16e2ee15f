"""Parity for packs that have none: after a prune or a loss, and where an interrupted backup has left a gap.

What can be had from parity that is there is not read from packs: of a group that loses a few packs only those are read,
and groups that have become small are made one without reading any.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np

from remetal.errors import DamagedError
from remetal.events import Progress, Report, Warn
from remetal.repository.groups import GroupIndex
from remetal.repository.named import NamedObjects
from remetal.repository.objects import miscalculated, pack_name
from remetal.repository.parity import (
    GROUP,
    Group,
    Xor,
    add_parity,
    find_groups,
    is_possible,
    put_parity,
    read_pack,
    rebuild_from,
    size_class,
)
from remetal.repository.repository import Repository
from remetal.system.spool import Spool

FRAGMENTS = 2048
"""How many fragments wait in memory to be put together; where there are more, the fullest groups are written."""
_ENCODED_BITS, _COUNT_BITS = 48, 8
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(tuple[str, str, str, dict[bytes, int]])


@dataclass(slots=True)
class Protected:
    """What was done: how many parity objects are new, and the names of those that nobody needs any more."""

    added: int = 0
    obsolete: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Packs that are to be in one group. If `group` is there, they are what stays of it."""

    packs: dict[bytes, int]
    group: Group | None = None

    @property
    def untouched(self) -> bool:
        """Whether it is a stored group as it stands."""
        return self.group is not None and len(self.packs) == len(self.group.packs)


class Sorting:
    """What is to be made into groups: packs in none, what stays of broken ones, and whole ones with room left.

    However many groups there are, in memory is only a number of each that is not whole and full.
    """

    def __init__(self, packs: NamedObjects, groups: Iterable[Group]) -> None:
        """Look at all groups of a machine; `packs` are those that stay."""
        self.obsolete: list[str] = []
        """Names of groups of which nothing is needed, complete once all fragments were taken."""
        self.size = sum(size for _, size in packs)
        """At most so many bytes are in all fragments together."""
        self._packs = packs
        self._covered = NamedObjects()
        self._spool = Spool()
        self._places = array("Q")
        for group in groups:
            if len(group.packs) < GROUP or not group.whole(packs):
                self._put_off(group)
            else:
                self._cover(group)

    def fragments(self) -> Iterator[Fragment]:
        """Yield them: whole groups, then broken ones, the largest first, then single packs. Called once."""
        for place in np.sort(np.array(self._places, np.uint64)):
            group = self._taken_up(int(place))
            names = list(group.packs)
            there = zip(group.packs.items(), self._packs.sizes(names), self._covered.numbers(names), strict=True)
            own = {identity: size for (identity, size), found, number in there if found == size and number < 0}
            whole = group.whole(self._packs)
            if not own:
                self.obsolete.append(group.name)
            elif not whole or (len(group.packs) < GROUP and len(own) == len(group.packs)):
                yield Fragment(own, group)
            self._covered.add(own.items())
        for identity, size in self._packs:
            if identity not in self._covered and is_possible(size):
                yield Fragment({identity: size})

    def _cover(self, group: Group) -> None:
        """Note what a full and whole group protects."""
        fresh = zip(group.packs.values(), self._covered.add(group.packs.items()), strict=True)
        sizes = [size for size, number in fresh if number >= 0]
        self.size -= sum(sizes)
        if not sizes:
            self.obsolete.append(group.name)

    def _put_off(self, group: Group) -> None:
        """Keep a group in a file; its place there sorts as it is to be taken up again."""
        data = _ENCODER.encode((group.name, group.repository_id, group.machine_id, group.packs))
        start = self._spool.append(np.frombuffer(len(data).to_bytes(4, "little") + data, np.uint8))
        order = (not group.whole(self._packs)) << _COUNT_BITS - 1 | (1 << _COUNT_BITS - 1) - 1 - len(group.packs)
        self._places.append(order << _ENCODED_BITS | start)

    def _taken_up(self, place: int) -> Group:
        start = place & (1 << _ENCODED_BITS) - 1
        size = int.from_bytes(self._spool.read(start, 4), "little")
        return Group(*_DECODER.decode(self._spool.read(start + 4, size)))


def protect_packs(
    repository: Repository,
    machine_id: str,
    packs: NamedObjects,
    *,
    only_add: bool = False,
    report: Report,
) -> Protected:
    """See to it that each of a machine's packs is in a group whose packs all stay.

    `only_add` leaves all groups alone that are as they should be, however
    small they are. Nothing is deleted. Packs that are beyond reading are told and left out. Raises UnavailableError if
    the store fails; what was added until then stays.
    """
    sorting = Sorting(packs, find_groups(repository.store, machine_id, []))
    result = Protected(obsolete=sorting.obsolete)
    work = _Protection(repository, machine_id, result, report)
    fragments = (each for each in sorting.fragments() if not (only_add and each.untouched))
    done = 0
    for each in in_groups(fragments):
        if len(each) > 1 or not each[0].untouched:
            work.write(each)
            done += sum(size for part in each for size in part.packs.values())
            report(Progress("packs protected by parity", done, sorting.size))
    return result


def in_groups(fragments: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """Yield what is to become one group each; of many fragments only some thousands are looked at together."""
    waiting: list[Fragment] = []
    for fragment in fragments:
        waiting.append(fragment)
        if len(waiting) >= FRAGMENTS:
            bins = sorted(fill(waiting), key=_count)
            waiting = []
            while bins and _count(bins[0]) < GROUP and len(waiting) + len(bins[0]) <= FRAGMENTS // 2:
                waiting += bins.pop(0)
            yield from bins
    yield from fill(waiting)


def fill(fragments: Iterable[Fragment]) -> list[list[Fragment]]:
    """Put fragments of packs of about the same size together, up to as many packs as a group may have."""
    done: list[list[Fragment]] = []
    waiting: dict[int, list[tuple[int, list[Fragment]]]] = {}
    for each in sorted(fragments, key=lambda each: -len(each.packs)):
        kind = waiting.setdefault(size_class(max(each.packs.values())), [])
        place = next((number for number, (count, _) in enumerate(kind) if count + len(each.packs) <= GROUP), -1)
        count, parts = kind.pop(place) if place >= 0 else (0, [])
        parts.append(each)
        if count + len(each.packs) < GROUP:
            kind.insert(max(place, 0), (count + len(each.packs), parts))
        else:
            done.append(parts)
    return [*done, *(parts for kind in waiting.values() for _, parts in kind)]


def _count(fragments: Sequence[Fragment]) -> int:
    return sum(len(each.packs) for each in fragments)


class _Protection:
    """Writes the groups of one machine."""

    def __init__(self, repository: Repository, machine_id: str, result: Protected, report: Report) -> None:
        self._repository = repository
        self._store = repository.store
        self._machine_id = machine_id
        self._result = result
        self._report = report

    def write(self, fragments: Sequence[Fragment]) -> None:
        """Make one group of fragments; the groups that they come from are obsolete then."""
        xor = Xor()
        packs: dict[bytes, int] = {}
        for each in fragments:
            packs.update(self._add(xor, each))
        if not packs:
            return
        name = put_parity(self._store, self._repository.config.id, self._machine_id, packs, xor).name
        self._result.added += 1
        self._result.obsolete += [
            each.group.name
            for each in fragments
            if each.group is not None and each.group.name != name and packs.keys() >= each.packs.keys()
        ]

    def _add(self, xor: Xor, fragment: Fragment) -> Mapping[bytes, int]:
        """XOR a fragment's packs in, and return which of them those are."""
        if fragment.group is not None and 2 * len(fragment.packs) > len(fragment.group.packs):
            try:
                part = self._remainder(fragment.group, fragment.packs)
            except DamagedError as error:
                self._report(Warn(error.message, error.hint))
            else:
                xor.add([part.first(max(fragment.packs.values()))])
                if not part.sound():
                    raise miscalculated(f"the parity of {len(fragment.packs)} packs")
                return fragment.packs
        added: dict[bytes, int] = {}
        for identity, size in fragment.packs.items():
            try:
                data = self._read(identity)
            except DamagedError as error:
                self._report(Warn(error.message, error.hint))
            else:
                xor.add_pack(identity, data)
                added[identity] = size
        return added

    def _remainder(self, group: Group, packs: Mapping[bytes, int]) -> Xor:
        """Return the parity of some packs of a group: that of all of them without the others. Raises DamagedError."""
        xor = Xor()
        add_parity(self._store, group, xor)
        for identity in group.packs.keys() - packs.keys():
            xor.add_pack(identity, self._read(identity))
        if not xor.is_zero(max(packs.values())):
            raise DamagedError(f"the object {group.name} does not fit its packs", hint="Run `remetal repair`.")
        return xor

    def _read(self, identity: bytes) -> bytes:
        """Return a pack's bytes as they were written, even if the pack is damaged and some group can rebuild it."""
        try:
            return read_pack(self._store, self._machine_id, identity)
        except DamagedError as error:
            data = rebuild_from(self._store, self._machine_id, self._groups.of(identity), identity)
            name = pack_name(self._machine_id, identity)
            self._report(Warn(error.message, f"Run `remetal repair`: parity can rebuild {name}."))
            return data

    @cached_property
    def _groups(self) -> GroupIndex:
        return GroupIndex(self._store, self._machine_id, [])
