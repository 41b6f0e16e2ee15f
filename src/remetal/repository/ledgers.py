"""Ledgers: what recipients have decided about a machine's history. Specification: docs/format/ledger.md.

Forgetting snapshots and condemning what nothing needs any more are entries of the history like snapshots are. The
newest ledger says all that the older ones said. The body is public: MessagePack in Zstandard.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

from remetal.repository.clocks import MAX_WITNESSES, Waited
from remetal.repository.history import (
    LEDGER,
    MAX_ENTRIES,
    Envelope,
    Gone,
    encode_clear,
    entry_name,
    pack_body,
    put_entry,
    sign_entry,
    split_body,
    unpack_body,
)
from remetal.repository.objects import INDEX, MAPS, PARITY, Record, check_moment, damaged
from remetal.repository.recipients import RecipientKey
from remetal.storage import Store
from remetal.units import MIB

MAX_LEDGER = 64 * MIB
MAX_BODY = 64 * MIB
_HASH = 32
_ID = re.compile("[0-9a-f]{64}")
_CONDEMNABLE = re.compile(rf"(({INDEX}|{MAPS})[0-9a-f]{{32}}/|{PARITY}[0-9a-f]{{32}}/[0-9a-f]{{2}}\.)[0-9a-f]{{64}}")


class Condemned(Record, frozen=True, kw_only=True):
    """What one prune found that nothing needs: packs as their hashes one behind the other, other objects by name.

    `since` is the number of the ledger that first said so, `waited` what hosts know of how long ago that was.
    """

    since: int
    waited: tuple[Waited, ...]
    packs: bytes
    names: tuple[str, ...]

    @property
    def age(self) -> float:
        """How many seconds have surely passed since then."""
        return max((each.age for each in self.waited), default=0.0)


class LedgerBody(Record, frozen=True, kw_only=True):
    """What a ledger says. `doomed` is being deleted: it may be there or not."""

    time: str
    version: str
    gone: tuple[Gone, ...]
    condemned: tuple[Condemned, ...]
    doomed: Condemned


class _Refuse(NamedTuple):
    packs: frozenset[bytes]
    names: frozenset[str]


class Ledger:
    """A verified ledger: its envelope, and what it says."""

    def __init__(self, envelope: Envelope, body: LedgerBody) -> None:
        self.envelope = envelope
        self.body = body

    @property
    def packs(self) -> frozenset[bytes]:
        """The hashes of all packs that nobody may rely on any more."""
        return self._refuse.packs

    @property
    def names(self) -> frozenset[str]:
        """The names of all other objects that nobody may rely on any more."""
        return self._refuse.names

    @cached_property
    def _refuse(self) -> _Refuse:
        groups = (*self.body.condemned, self.body.doomed)
        packs = frozenset(each for group in groups for each in split_packs(group.packs))
        return _Refuse(packs, frozenset(name for group in groups for name in group.names))


NOTHING_DOOMED = Condemned(since=0, waited=(), packs=b"", names=())


def split_packs(packs: bytes) -> list[bytes]:
    """Return the hashes of packs that stand one behind the other."""
    return [packs[start : start + _HASH] for start in range(0, len(packs), _HASH)]


def encode_ledger(
    body: LedgerBody, machine_id: str, key: RecipientKey, sequence: int, previous: str, ledger: int
) -> bytes:
    """Return the bytes of a ledger's object."""
    packed = pack_body("the list of what is forgotten and to be deleted", body, MAX_BODY)
    clear = encode_clear(
        LEDGER,
        key.repository_id,
        machine_id,
        sequence,
        previous=previous,
        ledger=ledger,
        signer=key.id,
        size=len(packed),
    )
    return sign_entry(LEDGER, key.signing_seed, clear, packed)


def put_ledger(store: Store, machine_id: str, sequence: int, data: bytes) -> None:
    """Create a ledger. Raises AlreadyExistsError if the history has gone on meanwhile."""
    put_entry(store, entry_name(machine_id, sequence), data)


def open_ledger(envelope: Envelope, data: bytes) -> Ledger:
    """Parse the body of a ledger whose envelope was checked, strictly. Raises DamagedError."""
    name, packed = envelope.name, split_body(data)[1]
    body = unpack_body(name, packed, LedgerBody, MAX_BODY)
    check_moment(name, body.time)
    _check_gone(name, body.gone, envelope.sequence)
    for group in (*body.condemned, body.doomed):
        impossible = len(group.waited) > MAX_WITNESSES or not all(each.age >= 0 for each in group.waited)
        if impossible or len(group.packs) % _HASH or not 0 <= group.since <= envelope.sequence:
            raise damaged(name, "what it condemns is impossible")
        if not all(_CONDEMNABLE.fullmatch(each) and each.split("/")[1] == envelope.machine_id for each in group.names):
            raise damaged(name, "it condemns what is not the machine's")
    return Ledger(envelope, body)


def _check_gone(name: str, gone: tuple[Gone, ...], sequence: int) -> None:
    last = 0
    for each in gone:
        whole = _ID.fullmatch(each.id) and (_ID.fullmatch(each.previous) if each.first > 1 else not each.previous)
        if not last < each.first <= each.last < sequence or not whole:
            raise damaged(name, "what it has forgotten is impossible")
        last = each.last
    if len(gone) > MAX_ENTRIES:
        raise damaged(name, "what it has forgotten is impossible")
