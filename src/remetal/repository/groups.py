"""Which groups a machine's packs are in, however many there are, in files without a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from remetal.errors import DamagedError
from remetal.repository.named import NamedObjects
from remetal.repository.objects import hash_in_name
from remetal.repository.parity import Group, find_groups, parity_folder, read_group
from remetal.storage import Entry, NotFoundError, Store

_COUNT_BITS = 8


class GroupIndex:
    """Pack → groups, for packs that have to be rebuilt. Used by one thread at a time.

    In memory are only packs that are in several groups: parity that was replaced and could not be deleted.
    """

    def __init__(self, store: Store, machine_id: str, problems: list[DamagedError]) -> None:
        """Look at all parity of a machine; what is damaged is added to `problems`."""
        self._store = store
        self._machine_id = machine_id
        self._objects = NamedObjects()
        self._members = NamedObjects()
        self._more: dict[bytes, list[int]] = {}
        for group in find_groups(store, machine_id, problems):
            self._add(group)

    def of(self, identity: bytes) -> Iterator[Group]:
        """Yield the groups that a pack is in, as they are now."""
        first = self._members.sizes([identity])[0]
        for number in [*([first] if first >= 0 else []), *self._more.get(identity, ())]:
            name_hash, facts = self._objects[number]
            count, size = facts % (1 << _COUNT_BITS), facts >> _COUNT_BITS
            name = f"{parity_folder(self._machine_id)}{count:02x}.{name_hash.hex()}"
            with suppress(DamagedError, NotFoundError):  # changed or deleted since
                group = read_group(self._store, Entry(name, size))
                if identity in group.packs:
                    yield group

    def _add(self, group: Group) -> None:
        (number,) = self._objects.add([(hash_in_name(group.name) or b"", group.size << _COUNT_BITS | len(group.packs))])
        if number < 0:
            return
        identities = list(group.packs)
        for identity, place in zip(identities, self._members.add((e, number) for e in identities), strict=True):
            if place < 0:
                self._more.setdefault(identity, []).append(number)
