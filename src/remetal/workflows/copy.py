"""Copying a repository to another place."""

from __future__ import annotations

from remetal.errors import UsageError
from remetal.events import Report, silent
from remetal.repository.copy import CopyResult, copy_repository
from remetal.workflows.stores import opened_store


def copy_to(location: str, target: str, *, delete: bool = False, report: Report = silent) -> CopyResult:
    """Copy the repository at `location` to `target`, without any key; see `copy_repository`."""
    if location.rstrip("/") == target.rstrip("/"):
        raise UsageError("source and target of the copy are the same place")
    with opened_store(location, read_only=True) as source, opened_store(target) as copy:
        return copy_repository(source.store, copy.store, delete=delete, report=report)
