"""Paths inside a restored system, which is not ours: its symbolic links must not lead out of it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from remetal.errors import RemetalError

_LINKS_MAX = 40
_LABEL = "security.selinux"


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


def write_inside(root: Path, path: str, data: bytes, mode: int = 0o644) -> None:
    """Write a file of the system mounted at `root`, which may be new: it is root's then, and bears its folder's label.

    Durable on return. Raises RemetalError if there is no such folder, or if it cannot be written.
    """
    if find_file(root, path) is not None:
        overwrite_inside(root, path, data)
        return
    folder, name = _need_folder(root, path)
    place = folder / f".{name}.remetal"
    place.unlink(missing_ok=True)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        with suppress(OSError):  # a system without SELinux has no label
            os.setxattr(fd, _LABEL, os.getxattr(folder, _LABEL))
        os.fsync(fd)
        place.rename(folder / name)
    except OSError as error:
        place.unlink(missing_ok=True)
        raise RemetalError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)


def link_inside(root: Path, path: str, target: str) -> None:
    """Make a symbolic link in the system mounted at `root`, durably; what is there stays. Raises RemetalError."""
    folder, name = _need_folder(root, path)
    try:
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)
    except OSError as error:
        raise RemetalError(f"{path} cannot be made: {os.strerror(error.errno or 0)}") from error


def find_file(root: Path, path: str) -> Path | None:
    """Return where a regular file of the system mounted at `root` really is, or None if there is none."""
    place = find_inside(root, path)
    return place if place is not None and place.is_file() else None


def _need_folder(root: Path, path: str) -> tuple[Path, str]:
    """Return the folder that a file goes into, made if need be, and its name there."""
    above, _, name = path.rpartition("/")
    place = root
    for part in reversed(_parts(above)):
        folder = find_inside(root, f"{place.relative_to(root)}/{part}")
        if folder is None:
            folder = place / part
            try:
                folder.mkdir()
            except OSError as error:
                raise RemetalError(f"{above} cannot be made: {os.strerror(error.errno or 0)}") from error
        place = folder
    return place, name


def _parts(path: str) -> list[str]:
    """Return the path's names, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in {"", "."}]
