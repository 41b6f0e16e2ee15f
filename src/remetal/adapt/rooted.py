"""Paths inside a restored system, which is not ours: its symbolic links must not lead out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from remetal.errors import RemetalError

_LINKS_MAX = 40


def find_inside(root: Path, path: str) -> Path | None:
    """Return where `path` of the system mounted at `root` really is, or None if it is nowhere.

    Every symbolic link on the way is followed as that system would follow it: an absolute one starts at `root`,
    and `..` never leaves it. What is returned holds no link, so opening it touches nothing outside.
    """
    pending = _parts(path)
    place = root
    links = 0
    while pending:
        name = pending.pop()
        if name == "..":
            place = place.parent if place != root else root
            continue
        step = place / name
        try:
            mode = step.lstat().st_mode
            if not stat.S_ISLNK(mode):
                place = step
                continue
            links += 1
            if links > _LINKS_MAX:
                return None
            target = os.readlink(step)  # noqa: PTH115 - Path would normalise the text
        except (OSError, ValueError):
            return None
        place = root if target.startswith("/") else place
        pending += _parts(target)
    return place


def read_inside(root: Path, path: str, *, limit: int = 1 << 20) -> bytes | None:
    """Return a regular file of the system mounted at `root`; None if there is none, or it exceeds `limit` bytes."""
    place = find_inside(root, path)
    if place is None or not place.is_file() or place.stat().st_size > limit:
        return None
    return place.read_bytes()


def list_inside(root: Path, folder: str) -> list[str]:
    """Return the names in a folder of the system mounted at `root`, sorted; none if there is no such folder."""
    place = find_inside(root, folder)
    try:
        return sorted(each.name for each in place.iterdir()) if place is not None else []
    except OSError:
        return []


def overwrite_inside(root: Path, path: str, data: bytes) -> None:
    """Replace a file's content and keep the file: its owner, mode, ACLs and labels stay. Durable on return.

    Raises RemetalError if there is no such file.
    """
    place = find_inside(root, path)
    if place is None:
        raise RemetalError(f"{path} vanished from the restored system while it was being adapted")
    fd = os.open(place, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def _parts(path: str) -> list[str]:
    """Return the path's names, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in {"", "."}]
