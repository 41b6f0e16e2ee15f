"""Things that take long to build are built once, and again only when what they are made from changes.

The cache lies in `.cache/` of the checkout, or where REMETAL_CACHE says. An entry is a file or a folder whose
name ends in a hash of everything that went into it; it appears whole or not at all, and only one process builds it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import CHECKOUT

KEPT = 4
"""How many entries of one name stay; the one used longest ago makes way."""


def cache_folder() -> Path:
    """Return the cache's folder, which need not exist yet."""
    return Path(os.environ.get("REMETAL_CACHE") or CHECKOUT / ".cache").resolve()


def cached(name: str, inputs: Sequence[str], build: Callable[[Path], None]) -> Path:
    """Return the path of the entry `name` made from `inputs`, calling `build(path)` first if it is not there.

    `build` makes a file or a folder at the path it is given; an exception leaves no entry. A second process
    that wants the same entry waits for the first. Nobody may change what is at the returned path.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    key = sha256(b"".join(len(data := each.encode()).to_bytes(8, "big") + data for each in inputs)).hexdigest()[:16]
    entry = folder / f"{name}-{key}"
    with _locked(folder / f"{entry.name}.lock"):
        if not entry.exists():
            with TemporaryDirectory(dir=folder, prefix="building-") as place:
                fresh = Path(place) / entry.name
                build(fresh)
                fresh.rename(entry)
        os.utime(entry)
        _prune(folder, name, entry)
    return entry


def _prune(folder: Path, name: str, entry: Path) -> None:
    """Remove the entries of this name that were used longest ago."""
    suffix = "-" + "[0-9a-f]" * 16
    others = [path for path in folder.glob(f"{name}{suffix}") if path != entry]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[KEPT - 1 :]:
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
        (folder / f"{old.name}.lock").unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for whoever has it; the kernel frees it if we die."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
