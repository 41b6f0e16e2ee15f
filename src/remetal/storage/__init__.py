"""Objects by name: one contract, one file per kind of store, wrappers on the same contract."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from remetal.errors import UnavailableError, UsageError
from remetal.pace import Pace
from remetal.storage.address import split_address
from remetal.storage.limit import LimitedStore
from remetal.storage.local import LocalStore
from remetal.storage.retry import RetryingStore
from remetal.storage.store import (
    AlreadyExistsError,
    Entry,
    NotFoundError,
    Pieces,
    RetainedError,
    Store,
    UnreadableError,
)
from remetal.units import KIB, parse_bytes

__all__ = [
    "AlreadyExistsError",
    "Entry",
    "LocalStore",
    "NotFoundError",
    "Pieces",
    "RetainedError",
    "Store",
    "UnreadableError",
    "find_folder",
    "is_redundant",
    "open_folder",
    "open_store",
]


_LEAST_RATE = 10 * KIB


def _open_file(location: str) -> Store:
    parts = split_address(location, "file:///absolute/path", secrets="A folder of this machine needs none.")
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise UsageError(f"'{location}' is not a folder of this machine", hint="Write file:///absolute/path.")
    return LocalStore(Path(unquote(parts.path)), location)


def _open_sftp(location: str) -> Store:
    from remetal.storage.sftp import SftpStore

    return SftpStore(location)


def _open_http(location: str) -> Store:
    from remetal.storage.http import HttpStore

    return HttpStore(location)


def _open_s3(location: str) -> Store:
    from remetal.storage.s3 import S3Store

    return S3Store(location)


KINDS: dict[str, Callable[[str], Store]] = {
    "file": _open_file,
    "sftp": _open_sftp,
    "http": _open_http,
    "https": _open_http,
    "s3": _open_s3,
}
"""What opens a location, by its scheme; a new kind of store is one line here."""


def open_store(location: str, *, urgent: bool = False, rate: float | None = None) -> Store:
    """Open the store that a person named: a path, or an address such as `sftp://host/folder`.

    Nothing is created or read yet. `urgent` is whoever is about to make room there. It moves no more bytes a second
    than `rate`, or where that is None than REMETAL_LIMIT_RATE says, such as `10M`.
    Raises UsageError for an empty location and for a scheme that no store is registered for.
    """
    store = _open_bare(location)
    if isinstance(store, LocalStore):
        return open_folder(store.root, store.location, urgent=urgent, rate=rate)
    return RetryingStore(_limited(store, rate))


def open_folder(
    root: Path, location: str, *, urgent: bool = False, remote: bool = False, rate: float | None = None
) -> Store:
    """Open the store in a folder that was mounted for it, and that a person calls `location`; else as `open_store`.

    What a `remote` folder's server fails to do is tried again.
    """
    store = _limited(LocalStore(root, location, urgent=urgent), rate)
    return RetryingStore(store) if remote else store


def parse_rate(text: str, name: str) -> float:
    """Return the bytes a second that an option or a variable called `name` allows. Raises UsageError."""
    rate = parse_bytes(text)
    if rate < _LEAST_RATE:
        raise UsageError(f"{name} is {text}, which would take for ever", hint="Give 10K at least.")
    return rate


def _limited(store: Store, rate: float | None) -> Store:
    """Return a store at a pace; it lies below what tries again, so that each attempt counts."""
    limit = os.environ.get("REMETAL_LIMIT_RATE", "")
    if rate is None and limit:
        rate = parse_rate(limit, "REMETAL_LIMIT_RATE")
    return store if rate is None else LimitedStore(store, Pace(rate))


def _open_bare(location: str) -> Store:
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
        known = ", ".join(f"{each}://" for each in sorted({*KINDS, "nfs", "smb"}))
        raise UsageError(
            f"no kind of repository is called '{scheme}://'", hint=f"Give a folder's path, or one of: {known}"
        )
    return KINDS[scheme](location)


REDUNDANT = frozenset({"s3"})
"""Kinds of stores that keep every object several times, on several machines, by themselves."""


def is_redundant(location: str) -> bool:
    """Whether the store that a location means guards against damage itself; a folder or server may be one disk."""
    return location.partition("://")[0] in REDUNDANT


def find_folder(location: str) -> Path | None:
    """Return the folder of this machine that a location means, with links followed; None if it means none.

    Raises UnavailableError if it cannot be looked at.
    """
    store = _open_bare(location)
    if not isinstance(store, LocalStore):
        return None
    try:
        return store.root.resolve(strict=True)
    except FileNotFoundError:
        return store.root.resolve()
    except OSError as error:
        raise UnavailableError(f"the folder {store.root} cannot be looked at: {error.strerror}") from error
