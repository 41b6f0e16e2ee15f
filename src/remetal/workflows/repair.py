"""Mending a repository, and taking that back."""

from __future__ import annotations

from remetal.events import Report, silent
from remetal.repository.recipients import RecipientKey
from remetal.repository.repair import RepairResult, Undone, accept_repair, repair_repository, undo_repair
from remetal.repository.repository import Repository
from remetal.workflows.access import Secret, opened_repository, unlock


def repair(location: str, secret: Secret | None, *, report: Report = silent) -> RepairResult:
    """Repair the repository at `location`; without a secret what takes no key."""
    with opened_repository(location) as repository:
        return repair_repository(repository, _key(repository, secret), report=report)


def undo_last_repair(location: str, secret: Secret | None, *, report: Report = silent) -> Undone:
    """Take the last repair of the repository at `location` back; see `undo_repair`."""
    with opened_repository(location) as repository:
        return undo_repair(repository, _key(repository, secret), report=report)


def accept_repairs(location: str) -> int:
    """Delete what the repairs of the repository at `location` have set aside; see `accept_repair`."""
    with opened_repository(location, urgent=True) as repository:
        return accept_repair(repository)


def _key(repository: Repository, secret: Secret | None) -> RecipientKey | None:
    return unlock(repository, secret) if secret is not None else None
