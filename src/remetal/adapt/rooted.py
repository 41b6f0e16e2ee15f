"""Paths inside a restored system, which is not ours: its symbolic links must not lead out of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from remetal.errors import RemetalError

_LINKS_MAX = 40
_LABEL = "security.selinux"
_HINTS = {
    errno.ENOSPC: "Make room on that file system.",
    errno.EDQUOT: "Make room on that file system.",
    errno.EEXIST: "Look at what has that name.",
    errno.ENOTDIR: "Look at what stands in the way.",
}


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

    Raises RemetalError if there is no such file, or it cannot be written.
    """
    place = find_inside(root, path)
    if place is None:
        raise RemetalError(f"{path} vanished from the restored system while it was being adapted")
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.ftruncate(fd, len(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _failed("write", path, error) from error


def create_inside(root: Path, path: str, data: bytes, mode: int = 0o644) -> None:
    """Write a new file of root's, by default one that everybody may read, with the label of its neighbours.

    Durable on return. Folders above it that are missing are made alike. One that is there already is overwritten as
    `overwrite_inside` does. Raises RemetalError if something else has its name, or there is no room for it.
    """
    folder, _, name = path.rpartition("/")
    try:
        place = _make_folder(root, folder)
        if (place / name).is_file() and not (place / name).is_symlink():
            overwrite_inside(root, path, data)
            return
        fd = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _dress(fd, place, mode, is_folder=False)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except BaseException:
            (place / name).unlink(missing_ok=True)  # half a file would be read as a whole one
            raise
        finally:
            os.close(fd)
        _sync_folder(place)
    except OSError as error:
        raise _failed("write", path, error) from error


def rename_inside(root: Path, old: str, new: str) -> None:
    """Give a file another name in its folder. Durable on return. Raises RemetalError, also where the name is taken."""
    place = find_inside(root, old)
    if place is None:
        raise RemetalError(f"{old} vanished from the restored system while it was being adapted")
    target = place.parent / new.rpartition("/")[2]
    try:
        if target.is_symlink() or target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        place.rename(target)
        _sync_folder(place.parent)
    except OSError as error:
        raise _failed("rename", old, error) from error


def _make_folder(root: Path, path: str) -> Path:
    """Return a folder of the system mounted at `root`, made with those above it where it is missing."""
    place = find_inside(root, path)
    if place is not None and place.is_dir():
        return place
    above, _, name = path.rpartition("/")
    if not name:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    parent = _make_folder(root, above)
    (parent / name).mkdir(mode=0o700)
    fd = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _dress(fd, parent, 0o755, is_folder=True)
        os.fsync(fd)
    finally:
        os.close(fd)
    _sync_folder(parent)
    return parent / name


def _dress(fd: int, folder: Path, mode: int, *, is_folder: bool) -> None:
    """Give a new file owner, mode, and the label of the files beside it, or else of the folder, which they inherit."""
    os.fchown(fd, 0, 0)
    os.fchmod(fd, mode)
    own = os.fstat(fd).st_ino
    with os.scandir(folder) as entries:
        beside = [each.path for each in entries if each.is_file(follow_symlinks=False) and each.inode() != own]
    for path in (*(() if is_folder else sorted(beside)), os.fspath(folder)):
        try:
            os.setxattr(fd, _LABEL, os.getxattr(path, _LABEL, follow_symlinks=False))
        except OSError as error:
            if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM}:
                continue
            raise
        return


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link_inside(root: Path, path: str, target: str) -> None:
    """Make a symbolic link in the system mounted at `root`, durably; what is there stays. Raises RemetalError."""
    folder, _, name = path.rpartition("/")
    try:
        place = _make_folder(root, folder)
        if not os.path.lexists(place / name):
            (place / name).symlink_to(target)
            _sync_folder(place)
    except OSError as error:
        raise _failed("make", path, error) from error


def find_file(root: Path, path: str) -> Path | None:
    """Return where a regular file of the system mounted at `root` really is, or None if there is none."""
    place = find_inside(root, path)
    return place if place is not None and place.is_file() else None


def _failed(what: str, path: str, error: OSError) -> RemetalError:
    reason = os.strerror(error.errno or 0)
    return RemetalError(f"cannot {what} {path} in the restored system: {reason}", hint=_HINTS.get(error.errno or 0, ""))


def _parts(path: str) -> list[str]:
    """Return the path's names, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in {"", "."}]
