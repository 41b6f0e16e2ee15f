"""Machines whose keys count no more: what they have signed up to a certain entry stands, and nothing behind it.

A recipient says so, for instance after somebody has broken into the machine. The machine then enrolls anew, under a new
id; the recipient may name that one as the successor, so that both are treated as one machine.
Specification: docs/format/keys.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remetal.errors import DamagedError
from remetal.repository.cipher import SIGNATURE_SIZE, CipherError, sign, verify
from remetal.repository.objects import (
    MAX_KEY_OBJECT,
    RETIRED,
    Record,
    damaged,
    decode_json,
    encode_json,
    encode_lines,
    get_named,
    put_named,
    split_lines,
)
from remetal.repository.recipients import RecipientKey, RecipientRecord
from remetal.storage import Store

_CONTEXT = b"remetal 1 retirement\0"


class Retirement(Record, frozen=True, kw_only=True):
    """That a machine's keys count no more behind the entry `last`. `successor` is the id of its new keys, or empty."""

    id: str
    repository: str
    last: int
    successor: str
    retired_by: str
    created: str


@dataclass(frozen=True, slots=True)
class Retired:
    """What all that was said of a machine comes to: the last number that counts, and who goes on in its place."""

    last: int
    successor: str


@dataclass(frozen=True, slots=True)
class Vouched:
    """Who may sign what: the recipients that a repository's id vouches for, and the machines that were retired."""

    recipients: Mapping[str, RecipientRecord]
    retired: Mapping[str, Retired]


NOBODY = Vouched({}, {})


def put_retirement(
    store: Store, machine_id: str, *, last: int, successor: str, key: RecipientKey, created: str
) -> None:
    """Write that a machine's keys count no more behind an entry, signed by `key`."""
    record = Retirement(
        id=machine_id,
        repository=key.repository_id,
        last=last,
        successor=successor,
        retired_by=key.id,
        created=created,
    )
    signature = sign(key.signing_seed, _CONTEXT, encode_json(record))
    put_named(store, f"{RETIRED}{machine_id}.", encode_lines(record, signature))


def read_retired(
    store: Store, repository_id: str, recipients: Mapping[str, RecipientRecord]
) -> tuple[dict[str, Retired], list[str]]:
    """Return the machines that one of `recipients` has retired, by id, and what is wrong with other records.

    Of several records for one machine the earliest end counts, and a successor only if all that name one agree.
    """
    found: dict[str, list[Retirement]] = {}
    problems: list[str] = []
    for entry in store.entries(RETIRED):
        try:
            text, signature = split_lines(entry.name, get_named(store, entry.name, MAX_KEY_OBJECT), SIGNATURE_SIZE)
            record = decode_json(entry.name, text, Retirement)
            if record.repository != repository_id or record.retired_by not in recipients or record.last < 0:
                raise damaged(entry.name, "it is not said by a recipient of this repository")
            verify(recipients[record.retired_by].verify_key, signature, _CONTEXT, text)
        except DamagedError as error:
            problems.append(error.message)
        except CipherError:
            problems.append(f"the object {entry.name} is not signed by the recipient that it names")
        else:
            found.setdefault(record.id, []).append(record)
    return {machine_id: _sum_up(records) for machine_id, records in found.items()}, problems


def _sum_up(records: list[Retirement]) -> Retired:
    successors = {each.successor for each in records if each.successor}
    return Retired(min(each.last for each in records), successors.pop() if len(successors) == 1 else "")


def find_line(machine_id: str, retired: Mapping[str, Retired]) -> str:
    """Return the id under which a machine goes on today: its own, or that of its last successor."""
    return (machine_id, *find_successors(machine_id, retired))[-1]


def find_successors(machine_id: str, retired: Mapping[str, Retired]) -> tuple[str, ...]:
    """Return the ids of those that went on in a machine's place, one after the other; none if they go in a circle."""
    found: list[str] = []
    while machine_id in retired and retired[machine_id].successor:
        machine_id = retired[machine_id].successor
        if machine_id in found:
            return ()
        found.append(machine_id)
    return tuple(found)
