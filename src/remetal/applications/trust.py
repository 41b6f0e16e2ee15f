"""Who may change what is obeyed as root: the file of hooks, and the programs and options that it names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from remetal.errors import RefusedError

_MOST_LINKS = 40


def check_owner(path: Path, *, missing: bool = False) -> None:
    """Raise RefusedError if somebody other than root, or who runs us, owns what is obeyed as root, or may change it.

    The same holds for every folder and every symbolic link on the way to it: who may write there may put another file
    in its place, but for folders such as /tmp in which nobody can touch what others own. Raises OSError; not if what
    is `missing` may be, but then for the folders that lead to where it may be put.
    """
    try:
        for each in _way_to(path.absolute()):
            _check(path, each)
    except FileNotFoundError:
        if not missing:
            raise


def need_trusted(path: Path) -> None:
    """Raise RefusedError for what others may change, or may put there if it is missing, and for what cannot be told."""
    try:
        check_owner(path, missing=True)
    except OSError as error:
        raise RefusedError(f"cannot look at {path}: {error.strerror}") from error


def _check(path: Path, place: Path) -> None:
    about = place.lstat()
    shared = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
    if about.st_uid not in {0, os.geteuid()}:
        why = f"belongs to user {about.st_uid}"
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared and not stat.S_ISLNK(about.st_mode):
        why = f"may be changed by others (mode {stat.S_IMODE(about.st_mode):04o})"
    else:
        return
    raise RefusedError(
        f"{path} would be obeyed as root, but {place} {why}",
        hint=f"Let it be root's alone: chown -h root {place} && chmod go-w {place}",
    )


def _way_to(path: Path) -> Iterator[Path]:
    """Yield all that leads to a path: each folder and each link, from the root on, and what it is itself.

    The caller looks at each before the next is asked for. Raises OSError.
    """
    done, links = Path("/"), 0
    yield done
    waiting = list(reversed(path.parts[1:]))
    while waiting:
        name = waiting.pop()
        if name == "..":
            done = done.parent
            continue
        place = done / name
        yield place
        if not place.is_symlink():
            done = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = place.readlink()
        if target.is_absolute():
            done = Path("/")
        waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
