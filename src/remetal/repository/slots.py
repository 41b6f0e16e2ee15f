"""Passphrase slots: a recipient's seed under a passphrase. Specification: docs/format/keys.md.

The parameters of Argon2id come from the store, where somebody may have made them absurd; they are capped
before any memory is taken.
"""

from __future__ import annotations

import secrets
import unicodedata
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.ids import new_id
from remetal.repository.cipher import KEY_SIZE, TAG_SIZE, derive, stretch
from remetal.repository.objects import (
    MAX_KEY_OBJECT,
    SLOTS,
    Record,
    check_moment,
    damaged,
    decode_json,
    encode_json,
    get_named,
    miscalculated,
    put_named,
)
from remetal.repository.recipients import RecipientKey
from remetal.storage import Store

MEMORY_KIB = 64 << 10
ITERATIONS = 3
LANES = 4
"""RFC 9106 section 4, the second recommended option: it also fits a small machine that is being recovered."""

MAX_SLOTS = 32
MAX_MEMORY_KIB = 128 << 10
MAX_ITERATIONS = 16
MAX_LANES = 16
MAX_WORK = 512 << 10
"""Cap of memory (KiB) times iterations, about three times what is written today."""
MAX_WORK_OF_ALL = 6 << 20
"""The same for all passphrases of a repository: as many as there may be, each as it is written today."""


class Slot(Record, frozen=True, kw_only=True):
    """A sealed seed and the parameters that make its key from a passphrase. `memory` is in KiB."""

    id: str
    repository: str
    recipient: str
    created: str
    memory: int
    iterations: int
    lanes: int
    salt: bytes
    sealed: bytes = b""


@dataclass(frozen=True, slots=True)
class StoredSlot:
    """A slot and the object that holds it."""

    name: str
    slot: Slot


def put_slot(store: Store, key: RecipientKey, passphrase: str, *, created: str) -> Slot:
    """Write a new slot that gives `key` to whoever knows the passphrase. Raises UsageError for an empty one."""
    if not unicodedata.normalize("NFC", passphrase).strip():
        raise UsageError("the passphrase is empty", hint="Choose a long one; a sentence is easy to remember.")
    blank = Slot(
        id=new_id(),
        repository=key.repository_id,
        recipient=key.id,
        created=created,
        memory=MEMORY_KIB,
        iterations=ITERATIONS,
        lanes=LANES,
        salt=secrets.token_bytes(16),
    )
    sealed = AESGCM(_slot_key(blank, passphrase)).encrypt(bytes(12), key.seed, encode_json(blank))
    slot = msgspec.structs.replace(blank, sealed=sealed)
    if try_slot(slot, passphrase) != key:
        raise miscalculated("the passphrase's slot")
    put_named(store, f"{SLOTS}{slot.id}.", encode_json(slot))
    return slot


def read_slots(store: Store, repository_id: str) -> tuple[list[StoredSlot], list[DamagedError]]:
    """Return the slots that can be used, and what is wrong with others."""
    slots: list[StoredSlot] = []
    problems: list[DamagedError] = []
    work = 0
    for entry in store.entries(SLOTS):
        if len(slots) + len(problems) >= MAX_SLOTS:
            problems.append(damaged(SLOTS, f"it holds more than {MAX_SLOTS} passphrases"))
            break
        try:
            slot = decode_json(entry.name, get_named(store, entry.name, MAX_KEY_OBJECT), Slot)
            check_slot(entry.name, slot, repository_id)
        except DamagedError as error:
            problems.append(error)
        else:
            work += slot.memory * slot.iterations
            if work > MAX_WORK_OF_ALL:
                problems.append(damaged(entry.name, "it would take too long to try, with all that come before it"))
                break
            slots.append(StoredSlot(entry.name, slot))
    return slots, problems


def need_room_for_slot(store: Store, repository_id: str) -> None:
    """Raise RefusedError if a further passphrase might never be tried, because there are so many."""
    slots, problems = read_slots(store, repository_id)
    work = sum(each.slot.memory * each.slot.iterations for each in slots) + MEMORY_KIB * ITERATIONS
    if len(slots) + len(problems) >= MAX_SLOTS or work > MAX_WORK_OF_ALL:
        raise RefusedError(
            f"the repository has {len(slots)} passphrases, and cannot have more",
            hint="Remove one that is not needed any more (remetal key remove-passphrase), or change one (remetal key "
            "change-passphrase).",
        )


def check_slot(name: str, slot: Slot, repository_id: str) -> None:
    """Raise DamagedError for parameters that would cost too much, and for anything else that is not ours."""
    good_memory = 8 * slot.lanes <= slot.memory <= MAX_MEMORY_KIB and 1 <= slot.lanes <= MAX_LANES
    good_work = 1 <= slot.iterations <= MAX_ITERATIONS and slot.memory * slot.iterations <= MAX_WORK
    if not good_memory or not good_work:
        raise damaged(name, "its Argon2id parameters are beyond all reason")
    if slot.repository != repository_id or not 8 <= len(slot.salt) <= 64:
        raise damaged(name, "it belongs to another repository")
    check_moment(name, slot.created)
    if len(slot.sealed) != KEY_SIZE + TAG_SIZE:
        raise damaged(name, "its sealed part has the wrong length")


def try_slot(slot: Slot, passphrase: str) -> RecipientKey | None:
    """Return the key that a slot holds, or None if the passphrase does not open it. Takes some 0.2 s."""
    blank = msgspec.structs.replace(slot, sealed=b"")
    try:
        seed = AESGCM(_slot_key(slot, passphrase)).decrypt(bytes(12), slot.sealed, encode_json(blank))
    except InvalidTag:
        return None
    key = RecipientKey(slot.repository, seed)
    return key if key.id == slot.recipient else None


def unlock(store: Store, repository_id: str, passphrase: str) -> tuple[RecipientKey, StoredSlot]:
    """Return the key that a passphrase opens, and its slot.

    Raises RefusedError if it opens none, DamagedError if it opens none and a slot is damaged or missing.
    """
    slots, problems = read_slots(store, repository_id)
    for each in slots:
        key = try_slot(each.slot, passphrase)
        if key is not None:
            return key, each
    if problems:
        raise problems[0]
    if not slots:
        raise RefusedError(
            "the repository has no passphrase", hint="Unlock it with the recovery kit (--kit-file FILE) instead."
        )
    raise RefusedError(
        "the passphrase opens nothing in this repository",
        hint="Mind keyboard layout and Caps Lock; or use the printed recovery kit.",
    )


def _slot_key(slot: Slot, passphrase: str) -> bytes:
    stretched = stretch(passphrase, slot.salt, memory_kib=slot.memory, iterations=slot.iterations, lanes=slot.lanes)
    return derive("passphrase slot", stretched)
