"""Writing anew, smaller, what is needed of wasteful packs, and the index objects that name what is to go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np
from blake3 import blake3

from remetal.errors import UnavailableError
from remetal.events import Progress, Report
from remetal.repository.catalog import History, MachineAccess, last_number
from remetal.repository.chunks import find_packs, read_contents
from remetal.repository.indexes import INDEX_CHUNKS, MAX_PACKS, PACKS_PER_INDEX, put_index, read_index
from remetal.repository.named import NamedObjects
from remetal.repository.needed import Needed, mark_needed, refusal
from remetal.repository.objects import damaged, get_object, pack_name
from remetal.repository.packs import (
    MAX_PACK,
    ZSTD,
    Codec,
    Contents,
    Pack,
    PackBuilder,
    head_size,
    offsets,
    open_pack,
    put_pack,
    sealed_to,
)
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, active_recipients
from remetal.repository.table import ChunkTable
from remetal.storage import NotFoundError

_MANY_SMALL = 16
"""So many index objects that are not full are made few."""
_LEAST_WASTE = 0.1
"""A pack of which less than this part is of no use is left alone."""


class Rewriting:
    """One machine's packs and index objects, some of which are written anew.

    `kept_bytes` counts the new packs, `rewritten_bytes` the chunks in them.
    """

    def __init__(
        self, repository: Repository, key: RecipientKey, access: MachineAccess, *, reseal: bool, report: Report
    ) -> None:
        """Of a machine; `reseal` takes every pack that is sealed to others than the recipients that count now."""
        self.kept_bytes = self.rewritten_bytes = 0
        self._repository = repository
        self._store = repository.store
        self._key = key
        self._access = access
        self._machine = access.machine
        self._reseal = reseal
        self._report = report
        self._active = {each.id: each for each in active_recipients(repository)}

    def choose(self, found: Needed, max_unused: float) -> list[bytes]:
        """Return the packs to write anew, the most wasteful first, until little enough of the rest is of no use."""
        table, used = found.table, found.used
        allowed, waste = max_unused * int(used.sum(dtype=np.int64)), 0
        chosen: list[int] = []
        worth: list[tuple[float, int, int]] = []
        for number, (identity, size) in enumerate(table.packs):
            live = int(used[number])
            if not live:
                continue
            if self._reseal and set(self._owners(self._name(identity))) != self._active.keys():
                chosen.append(number)
                continue
            waste += size - live
            if size - live >= _LEAST_WASTE * size:
                worth.append((live / size, number, size - live))
        for _, number, gain in sorted(worth):
            if waste <= allowed:
                break
            chosen.append(number)
            waste -= gain
        return [table.packs[number][0] for number in chosen]

    def rewrite(self, history: History, found: Needed, wasteful: Sequence[bytes]) -> tuple[set[bytes], set[str]]:
        """Write anew what is needed of wasteful packs, and the index objects that would name what is to go.

        Returns the packs and the names of other objects that nothing needs any more. Raises UnavailableError if the
        store has shown less than it holds.
        """
        going = found.dead | set(wasteful)
        ledger = history.ledgers.newest
        refused = ledger.packs if ledger is not None else frozenset()
        names = ledger.names if ledger is not None else frozenset()
        entry = last_number(history.names)
        self._put_index(self._repack(found, wasteful), entry, set())
        stale: set[str] = set()
        small: set[str] = set()
        for name, packs in read_contents(self._repository, self._access.domain, ledger):
            if any(each.identity in going for each in packs):
                stale.add(name)
            elif len(packs) < PACKS_PER_INDEX:
                small.add(name)
        if len(small) > _MANY_SMALL:
            stale |= small
        self._put_index(self._staying(stale, going | refused, found.rescued), entry, stale)
        self._need_all(history, going | (refused - found.rescued), names | stale)
        return going, found.names | stale

    def _name(self, identity: bytes) -> str:
        return pack_name(self._machine.id, identity)

    def _owners(self, name: str) -> list[str]:
        try:
            return sealed_to(name, self._store.get(name, size=head_size()))
        except NotFoundError as error:
            raise damaged(name, "it is missing") from error

    def _staying(self, stale: Set[str], going: Set[bytes], rescued: Set[bytes]) -> Iterator[Contents]:
        """Yield what index objects that are to go say of packs that stay, each pack once."""
        seen = NamedObjects()
        for name in sorted(stale):
            packs = read_index(self._store, name, self._repository.config.id, self._access.domain)
            numbers = seen.add((each.identity, each.size) for each in packs)
            for each, number in zip(packs, numbers, strict=True):
                if number >= 0 and each.identity not in going:
                    yield each
        yield from self._contents_of(set(rescued))

    def _put_index(self, packs: Iterable[Contents], entry: int, avoid: Set[str]) -> None:
        """Write index objects for packs, as large as they should become; `entry` and `avoid` as for `put_record`."""
        group: list[Contents] = []
        chunks = 0
        for each in packs:
            group.append(each)
            chunks += len(each.entries)
            if len(group) >= MAX_PACKS or chunks >= INDEX_CHUNKS:
                self._put_group(group, entry, avoid)
                group, chunks = [], 0
        if group:
            self._put_group(group, entry, avoid)

    def _put_group(self, group: Sequence[Contents], entry: int, avoid: Set[str]) -> None:
        put_index(self._store, self._repository.config.id, self._access.domain, group, entry=entry, avoid=avoid)

    def _need_all(self, history: History, going: Set[bytes], stale: Set[str]) -> None:
        """Look once more whether the snapshots have all they need without what is about to be condemned.

        Raises UnavailableError if not: then the store has shown less than it holds while this prune looked.
        """
        table = ChunkTable()
        present = find_packs(self._repository, self._machine.id)
        for name, packs in read_contents(self._repository, self._access.domain, None):
            if name not in stale:
                table.add([each for each in packs if each.identity not in going and each.identity in present])
        if mark_needed(self._repository, self._access, history, table)[1]:
            raise UnavailableError(
                f"{self._store.location} showed less than it holds while machine '{self._machine.name}' was pruned",
                hint="Nothing is lost; run the prune again.",
            )

    def _repack(self, found: Needed, wasteful: Sequence[bytes]) -> Iterator[Contents]:
        """Yield the contents of new packs that hold what is needed of the wasteful ones; they are stored by then."""
        codec = Codec(self._access.domain.id_key)
        builders: dict[tuple[str, ...], PackBuilder] = {}
        done, total = 0, sum(found.table.packs.sizes(wasteful))
        for contents in self._contents_of(set(wasteful)):
            name = self._name(contents.identity)
            data = get_object(self._store, name, MAX_PACK)
            if blake3(data).digest() != contents.identity:
                raise refusal(self._access, f"the pack {name} is not what was written")
            opener = open_pack(name, data, self._key)
            if opener.machine_id != self._machine.id:
                raise damaged(name, "it belongs to another machine")
            owners = self._new_owners(sealed_to(name, data))
            starts = offsets(contents.entries, contents.start).tolist()
            for ordinal, (raw, word, plain) in enumerate(contents.entries.tolist()):
                identity = bytes(raw)
                if not found.table.is_marked(identity, contents.identity):
                    continue
                start, size = starts[ordinal], word & (ZSTD - 1)
                chunk = opener.open_chunk(data[start : start + size], ordinal, identity, word, plain, codec)
                if owners not in builders:
                    sealing = [self._active[each] for each in owners]
                    builders[owners] = PackBuilder(self._repository.config.id, self._machine.id, sealing)
                self.rewritten_bytes += builders[owners].add(identity, memoryview(chunk), codec)
                if builders[owners].full:
                    yield self._put(builders.pop(owners).finish(codec))
            done += len(data)
            self._report(Progress(f"packs of {self._machine.name} written anew", done, total))
        for builder in builders.values():
            yield self._put(builder.finish(codec))

    def _new_owners(self, old: Sequence[str]) -> tuple[str, ...]:
        """Return whom a pack is sealed to when it is written anew: those before that still count, else all."""
        kept = () if self._reseal else tuple(each for each in old if each in self._active)
        return kept or tuple(self._active)

    def _contents_of(self, packs: set[bytes]) -> Iterator[Contents]:
        for _, contents in read_contents(self._repository, self._access.domain, None):
            for each in contents:
                if each.identity in packs:
                    packs.discard(each.identity)
                    yield each

    def _put(self, pack: Pack) -> Contents:
        put_pack(self._store, self._machine.id, pack)
        self.kept_bytes += pack.contents.size
        return pack.contents
