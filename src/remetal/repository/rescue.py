"""Reading what is damaged: packs are rebuilt from parity in memory, and nothing is written to the repository.

So a restore gets by with a repository that nobody can repair, such as one on a read-only disk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property

from remetal.errors import DamagedError
from remetal.events import Report, Warn
from remetal.repository.chunks import find_packs
from remetal.repository.groups import GroupIndex
from remetal.repository.named import NamedObjects
from remetal.repository.objects import pack_name
from remetal.repository.parity import rebuild_from
from remetal.repository.repository import Repository

REBUILT_PACKS = 2
"""How many rebuilt packs are kept in memory, 16 MiB each; while one is rebuilt it takes three more."""


class Rescue:
    """The packs of one machine that parity can bring back. Every method may be called from many threads at once.

    What parity there is is looked for when it is needed first: a repository that is whole costs nothing.
    """

    def __init__(self, repository: Repository, machine_id: str, report: Report) -> None:
        self._repository = repository
        self._machine_id = machine_id
        self._report = report
        self._guard = threading.Lock()
        self._rebuilt: OrderedDict[bytes, bytes] = OrderedDict()
        self._told: set[bytes] = set()

    def can_rebuild(self, identity: bytes, size: int) -> bool:
        """Whether a pack of this size can be rebuilt as far as a listing tells: all others of its group are there."""
        with self._guard:
            return any(
                group.packs[identity] == size and self._has_all(group.packs, identity)
                for group in self._groups.of(identity)
            )

    def tell(self, identity: bytes) -> None:
        """Say once that a pack is not what it should be."""
        with self._guard:
            self._tell(identity)

    def rebuild(self, identity: bytes) -> bytes:
        """Return the bytes of a pack as they were written. Raises DamagedError if parity cannot tell them."""
        with self._guard:
            data = self._rebuilt.get(identity)
            if data is None:
                data = rebuild_from(self._repository.store, self._machine_id, self._groups.of(identity), identity)
                self._tell(identity)
                self._rebuilt[identity] = data
                if len(self._rebuilt) > REBUILT_PACKS:
                    self._rebuilt.popitem(last=False)
            self._rebuilt.move_to_end(identity)
            return data

    def _tell(self, identity: bytes) -> None:
        if identity not in self._told:
            self._told.add(identity)
            name = pack_name(self._machine_id, identity)
            self._report(
                Warn(
                    f"The pack {name} is damaged or missing; what it held is rebuilt from parity",
                    "Nothing is lost. Run `remetal repair` before anything else breaks.",
                )
            )

    def _has_all(self, packs: Mapping[bytes, int], identity: bytes) -> bool:
        """Whether all packs but one are there in full size."""
        others = {each: size for each, size in packs.items() if each != identity}
        return self._present.sizes(list(others)) == list(others.values())

    @cached_property
    def _groups(self) -> GroupIndex:
        problems: list[DamagedError] = []
        found = GroupIndex(self._repository.store, self._machine_id, problems)
        for error in problems:
            self._report(Warn(error.message, error.hint))
        return found

    @cached_property
    def _present(self) -> NamedObjects:
        return find_packs(self._repository, self._machine_id)
