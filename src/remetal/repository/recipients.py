"""Recipients: the public keys that packs are sealed to, and the private key that opens them.

Everything that is private about a recipient is a seed of 32 bytes. The repository's id is the id of its first
recipient, and each further one is signed by one that stands already, so a store that slips in a key of its own
is noticed by whoever knows the repository's id. Specification: docs/format/keys.md.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from remetal.errors import DamagedError
from remetal.repository.cipher import (
    KEM_PUBLIC_SIZE,
    KEY_SIZE,
    SIGNATURE_SIZE,
    CipherError,
    KemPrivate,
    KemPublic,
    derive,
    sign,
    verify,
    verify_key,
)
from remetal.repository.objects import (
    MAX_KEY_OBJECT,
    RECIPIENTS,
    REVOKED,
    Record,
    check_moment,
    damaged,
    decode_json,
    encode_json,
    encode_lines,
    get_named,
    put_named,
    split_lines,
)
from remetal.storage import Store

MAX_RECIPIENTS = 16
"""To so many a pack is sealed at most; those that were revoked do not count."""
MAX_RECORDS = 1 << 10
"""Objects of recipients or revocations that are looked at: far more than there may be recipients."""
_CONTEXT = b"remetal 1 recipient record\0"
_REVOCATION = b"remetal 1 revocation\0"


class RecipientRecord(Record, frozen=True, kw_only=True):
    """The public part of a recipient; `certified_by` is the id of the recipient that signed this record."""

    id: str
    repository: str
    kem_public: bytes
    verify_key: bytes
    certified_by: str
    created: str

    @property
    def kem(self) -> KemPublic:
        """The key to seal to."""
        return KemPublic(self.kem_public)


class Revocation(Record, frozen=True, kw_only=True):
    """That a recipient counts no more: nothing is sealed to it from now on. Signed by `revoked_by`, another one."""

    id: str
    repository: str
    revoked_by: str
    created: str


@dataclass(frozen=True)
class RecipientKey:
    """The private half of a recipient: who has it can restore everything that was sealed to it."""

    repository_id: str
    seed: bytes = field(repr=False)
    kem: KemPrivate = field(init=False, repr=False, compare=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kem", KemPrivate(self.seed))
        object.__setattr__(self, "id", recipient_id(self.kem.public.raw, verify_key(self.signing_seed)))

    @property
    def signing_seed(self) -> bytes:
        """The Ed25519 seed with which this recipient certifies others."""
        return derive("recipient signing key", self.seed)


def recipient_id(kem_public: bytes, signing_public: bytes) -> str:
    """Return the id of a recipient: 128 bits of hash over its public keys, in hexadecimal."""
    return derive("recipient id", kem_public + signing_public, size=16).hex()


def put_recipient(store: Store, key: RecipientKey, *, certifier: RecipientKey, created: str) -> RecipientRecord:
    """Write the public record of `key`, signed by `certifier` (itself, for a repository's first recipient)."""
    record = RecipientRecord(
        id=key.id,
        repository=key.repository_id,
        kem_public=key.kem.public.raw,
        verify_key=verify_key(key.signing_seed),
        certified_by=certifier.id,
        created=created,
    )
    signature = sign(certifier.signing_seed, _CONTEXT, encode_json(record))
    put_named(store, f"{RECIPIENTS}{record.id}.", encode_lines(record, signature))
    return record


def read_recipients(store: Store, repository_id: str) -> tuple[list[RecipientRecord], list[str]]:
    """Return the recipients that the repository's id vouches for, founder first, and what is wrong with others."""
    found: defaultdict[str, list[tuple[RecipientRecord, bytes, bytes]]] = defaultdict(list)
    ids: set[str] = set()
    problems: list[str] = []
    for count, entry in enumerate(store.entries(RECIPIENTS)):
        if count >= MAX_RECORDS:
            problems.append(f"{RECIPIENTS} holds more than {MAX_RECORDS} objects")
            break
        try:
            record, text, signature = _read_recipient(store, entry.name, repository_id)
        except DamagedError as error:
            problems.append(error.message)
        else:
            found[record.certified_by].append((record, text, signature))
            ids.add(record.id)
    trusted: dict[str, RecipientRecord] = {}
    founders = [each for each in found[repository_id] if each[0].id == repository_id]
    waiting = deque((each[0], founders) for each in founders[:1])
    while waiting:
        certifier, candidates = waiting.popleft()
        for record, text, signature in candidates:
            if record.id not in trusted:
                with suppress(CipherError):
                    verify(certifier.verify_key, signature, _CONTEXT, text)
                    trusted[record.id] = record
                    waiting.append((record, found[record.id]))
    problems += [
        f"the recipient {each} is vouched for by nobody: do not trust it" for each in sorted(ids - trusted.keys())
    ]
    return list(trusted.values()), problems


def put_revocation(store: Store, recipient: str, *, key: RecipientKey, created: str) -> None:
    """Write that a recipient counts no more, signed by `key`."""
    record = Revocation(id=recipient, repository=key.repository_id, revoked_by=key.id, created=created)
    signature = sign(key.signing_seed, _REVOCATION, encode_json(record))
    put_named(store, f"{REVOKED}{recipient}.", encode_lines(record, signature))


def read_revoked(
    store: Store, repository_id: str, recipients: Sequence[RecipientRecord]
) -> tuple[frozenset[str], list[str]]:
    """Return the ids of the recipients that one of `recipients` has revoked, and what is wrong with other records."""
    known = {each.id: each for each in recipients}
    revoked: set[str] = set()
    problems: list[str] = []
    for count, entry in enumerate(store.entries(REVOKED)):
        if count >= MAX_RECORDS:
            problems.append(f"{REVOKED} holds more than {MAX_RECORDS} objects")
            break
        try:
            text, signature = split_lines(entry.name, get_named(store, entry.name, MAX_KEY_OBJECT), SIGNATURE_SIZE)
            record = decode_json(entry.name, text, Revocation)
            if record.repository != repository_id or record.revoked_by not in known or record.id == record.revoked_by:
                raise damaged(entry.name, "it is not said by another recipient of this repository")
            verify(known[record.revoked_by].verify_key, signature, _REVOCATION, text)
        except DamagedError as error:
            problems.append(error.message)
        except CipherError:
            problems.append(f"the object {entry.name} is not signed by the recipient that it names")
        else:
            revoked.add(record.id)
    return frozenset(revoked), problems


def _read_recipient(store: Store, name: str, repository_id: str) -> tuple[RecipientRecord, bytes, bytes]:
    text, signature = split_lines(name, get_named(store, name, MAX_KEY_OBJECT), SIGNATURE_SIZE)
    record = decode_json(name, text, RecipientRecord)
    check_recipient(name, record, repository_id)
    return record, text, signature


def check_recipient(name: str, record: RecipientRecord, repository_id: str) -> None:
    """Raise DamagedError unless the record's keys have the right sizes and are what its id says."""
    sizes = (len(record.kem_public), len(record.verify_key)) == (KEM_PUBLIC_SIZE, KEY_SIZE)
    if not sizes or record.id != recipient_id(record.kem_public, record.verify_key):
        raise damaged(name, "its keys are not those of its id")
    check_moment(name, record.created)
    if record.repository != repository_id:
        raise damaged(name, "it belongs to another repository")
