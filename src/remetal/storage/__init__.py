"""Objects by name: one contract, one file per kind of store, wrappers on the same contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from remetal.errors import UsageError
from remetal.storage.local import LocalStore
from remetal.storage.store import AlreadyExistsError, Entry, NotFoundError, Pieces, Store

__all__ = ["AlreadyExistsError", "Entry", "LocalStore", "NotFoundError", "Pieces", "Store", "find_folder", "open_store"]


def _open_file(location: str) -> Store:
    parts = urlsplit(location)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise UsageError(f"'{location}' is not a folder of this machine", hint="Write file:///absolute/path.")
    return LocalStore(Path(unquote(parts.path)), location)


KINDS: dict[str, Callable[[str], Store]] = {"file": _open_file}
"""What opens a location, by its scheme; a new kind of store is one line here."""


def open_store(location: str) -> Store:
    """Open the store that a person named: a path, or `file:///path`. Nothing is created or read yet.

    Raises UsageError for an empty location and for a scheme that no store is registered for.
    """
    if not location:
        raise UsageError("no repository given", hint="Use --repo LOCATION, or set REMETAL_REPO.")
    scheme, separator, _ = location.partition("://")
    if not separator:
        if location.startswith(("~", "file:")):
            raise UsageError(
                f"'{location}' is not a folder of this machine",
                hint="Write the whole path, such as /home/me/backup: only the shell knows `~`, and not in every place.",
            )
        return LocalStore(Path(location), location)
    if scheme not in KINDS:
        known = ", ".join(f"{each}://" for each in sorted(KINDS))
        raise UsageError(
            f"no kind of repository is called '{scheme}://'", hint=f"Give a folder's path, or one of: {known}"
        )
    return KINDS[scheme](location)


def find_folder(location: str) -> Path | None:
    """Return the folder of this machine that a location means, with links followed; None if it means none."""
    store = open_store(location)
    return store.root.resolve() if isinstance(store, LocalStore) else None
