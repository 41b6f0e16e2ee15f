"""The repository: encrypted chunks, signed snapshots and keys, in any store. Formats: docs/format/."""

from __future__ import annotations

from remetal.repository.catalog import Catalog, open_catalog
from remetal.repository.check import CheckResult, check_repository, rebuild_index
from remetal.repository.config import DEFAULT_CHUNK_SIZE, FORMAT, Config
from remetal.repository.encoder import Statistics
from remetal.repository.forget import forget_snapshots
from remetal.repository.kit import RecoveryKit
from remetal.repository.machines import MachineKeys, check_machine_name, check_state, state_folder
from remetal.repository.maps import ZERO_ID, Run
from remetal.repository.prune import DEFAULT_GRACE, DEFAULT_UNUSED, PruneResult, prune_machine
from remetal.repository.reader import Reader, open_reader
from remetal.repository.recipients import RecipientKey, RecipientRecord
from remetal.repository.repository import (
    KeyInfo,
    Repository,
    accept_recipients,
    add_passphrase,
    add_recipient,
    change_passphrase,
    enroll_machine,
    init_repository,
    list_keys,
    load_machine_keys,
    make_kit,
    new_recipients,
    open_repository,
    remove_passphrase,
    save_machine_keys,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.repository.retention import Policy, check_policy, choose_kept
from remetal.repository.session import Batch, Session, open_session
from remetal.repository.snapshots import ImageRecord, Snapshot

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "DEFAULT_GRACE",
    "DEFAULT_UNUSED",
    "FORMAT",
    "ZERO_ID",
    "Batch",
    "Catalog",
    "CheckResult",
    "Config",
    "ImageRecord",
    "KeyInfo",
    "MachineKeys",
    "Policy",
    "PruneResult",
    "Reader",
    "RecipientKey",
    "RecipientRecord",
    "RecoveryKit",
    "Repository",
    "Run",
    "Session",
    "Snapshot",
    "Statistics",
    "accept_recipients",
    "add_passphrase",
    "add_recipient",
    "change_passphrase",
    "check_machine_name",
    "check_policy",
    "check_repository",
    "check_state",
    "choose_kept",
    "enroll_machine",
    "forget_snapshots",
    "init_repository",
    "list_keys",
    "load_machine_keys",
    "make_kit",
    "new_recipients",
    "open_catalog",
    "open_reader",
    "open_repository",
    "open_session",
    "prune_machine",
    "rebuild_index",
    "remove_passphrase",
    "save_machine_keys",
    "state_folder",
    "unlock_with_kit",
    "unlock_with_passphrase",
]
