"""A folder of this machine as a store: an internal disk, a USB disk, a network file system that is mounted.

An object is a file of the same name below the folder. It is written to a temporary file first, made durable,
and then given its name in one step that fails if the name is taken, so that a reader (or a power cut) finds a
whole object or none. Temporary files lie in `.tmp`, which no object's name can reach.

What is visible need not be durable: whoever made it may have been killed, or have had an error, in between. So a file
whose fsync(2) failed is thrown away and never synced again (the kernel may call its lost pages clean), a name whose
folder could not be synced is taken back, and folders that were listed are synced before anything new builds on them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remetal.errors import UnavailableError
from remetal.storage.store import (
    AlreadyExistsError,
    Entry,
    NotFoundError,
    Pieces,
    UnreadableError,
    check_name,
    is_name,
)
from remetal.units import format_bytes

_TEMPORARY = ".tmp"
_ABANDONED = 86400.0
"""Seconds after which a temporary file is dead where the file system knows no locks, or not those of others."""
_SHARED = frozenset({0x6969, 0xFF534D42, 0xFE534D42, 0x65735546})
"""File systems that other computers may write to as well: NFS, CIFS, SMB2, FUSE. Source: <linux/magic.h>."""
_SETTLED = 3600.0
"""Seconds after which a folder that nobody has changed is durable, synced or not: the kernel writes within 30 s."""
_RESERVE, _RESERVE_SIZE = "reserve", 1 << 20
"""A file that takes up space for those who make room: on a full disk nothing can be deleted without writing first."""
_MAX_PIECES = 512
"""How many pieces go into one writev(2); the kernel takes up to 1024."""
_DIRECT, _DIRECT_STEP = 1 << 20, 4 << 20
"""From how many bytes on an object goes past the page cache, and how many of them in one call."""
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems answer that cannot do that."""
_UNREADABLE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""What reading a file answers on a bad sector, or where what the file system knows of the file is damaged."""
_WITNESS, _WITNESS_SIZE = "config", 64 << 10
"""An object that stands in every repository; one of which so much was read tells more: it is in no inode."""
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_SUCH_CALL = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK})
"""What link(2) and renameat2(2) answer on file systems that cannot do it (vfat, exFAT, some of FUSE)."""


class LocalStore:
    """The store of `remetal.storage.store`, in the folder `root`; the first `put` makes the folder."""

    def __init__(self, root: Path, location: str | None = None, *, urgent: bool = False) -> None:
        """Take a folder; `urgent` is whoever is about to make room there, and may use what is held in reserve."""
        self.root = root.absolute()
        self._urgent = urgent
        self._location = location or str(root)
        self._durable: set[Path] = set()
        self._seen: set[Path] = set()
        self._settling = threading.Lock()
        self._swept = False
        self._witness = _WITNESS

    @property
    def location(self) -> str:
        """The folder as the person gave it."""
        return self._location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract."""
        check_name(name)
        target = self.root / name
        with self._explained(name):
            self._settle()
            if os.path.lexists(target):
                raise self._taken(name, target)
            self._make_folder(self.root / _TEMPORARY)
            if not self._swept:
                self._sweep()
                self._hold_reserve()
                self._swept = True
            try:
                self._write(name, target, data)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or not self._give_up_reserve():
                    raise
                self._write(name, target, data)

    def _taken(self, name: str, target: Path) -> AlreadyExistsError:
        self._seen.add(target.parent)
        return AlreadyExistsError(f"{self._location} has an object '{name}' already")

    def _write(self, name: str, target: Path, data: Pieces) -> None:
        self._make_folder(target.parent)
        written: os.stat_result | None = None
        try:
            with self._temporary() as (path, fd):
                _write_all(fd, data)
                os.fsync(fd)
                written = os.fstat(fd)
                if not self._publish(path, target):
                    raise self._taken(name, target)
            _sync_folder(target.parent)
        except OSError:
            if written is not None:
                _withdraw(target, written)
            raise

    def _settle(self) -> None:
        """Make durable what was listed since the last time: whoever has made it may have been killed before.

        What has not changed for an hour the kernel has written long ago.
        """
        with self._settling:
            seen, self._seen = self._seen, set()
            try:
                for folder in seen:
                    with suppress(FileNotFoundError):
                        if time.time() - folder.stat().st_mtime < _SETTLED:
                            _sync_folder(folder)
            except OSError:
                self._seen |= seen
                raise

    def _hold_reserve(self) -> None:
        """Take up some space for whoever will have to make room; a disk that has none left has it already, or never."""
        if self._urgent:
            return
        path = self.root / _TEMPORARY / _RESERVE
        with suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _RESERVE_SIZE)
            except OSError:
                path.unlink()  # an empty one would stand in the way of a real one for ever
            finally:
                os.close(fd)

    def _give_up_reserve(self) -> bool:
        """Free the space that is held in reserve, if there is any and we may; return whether there was."""
        try:
            if self._urgent:
                (self.root / _TEMPORARY / _RESERVE).unlink()
                return True
        except OSError:
            pass
        return False

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        check_name(name)
        with self._explained(name):
            try:
                fd = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError as error:
                raise NotFoundError(f"{self._location} has no object '{name}'") from error
            try:
                state = os.fstat(fd)
                if not stat.S_ISREG(state.st_mode):
                    raise NotFoundError(f"{self._location} has no object '{name}'")
                end = state.st_size if size is None else min(state.st_size, start + size)
                data = self._read(name, fd, start, end)
            finally:
                os.close(fd)
        if len(data) >= _WITNESS_SIZE:
            self._witness = name
        return data

    def _read(self, name: str, fd: int, start: int, end: int) -> bytes:
        """Read an object's bytes. Raises UnreadableError if it is only this object that cannot be read."""
        try:
            return _read_all(fd, start, end)
        except OSError as error:
            if error.errno not in _UNREADABLE or not self._is_alive(name):
                raise
            raise UnreadableError(
                f"the object {name} cannot be read: {os.strerror(error.errno)}",
                hint=f"The disk that {self._location} lies on is failing, `dmesg` tells more: run `remetal repair`, "
                "and have a copy on another disk (`remetal copy`).",
            ) from error

    def _is_alive(self, failed: str) -> bool:
        """Whether the disk gives another object that was read before, once the kernel has forgotten what it read."""
        for name in (self._witness, _WITNESS):
            if name == failed:
                continue
            try:
                fd = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    return bool(os.pread(fd, 1, 0))
                finally:
                    os.close(fd)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError:
                return False
        return False

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects in the order of names; see the contract."""
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return
        with self._explained(prefix):
            yield from self._walk(self.root / folder if folder else self.root, folder, prefix)

    def delete(self, name: str) -> None:
        """Remove an object; see the contract."""
        check_name(name)
        with self._explained(name), suppress(FileNotFoundError):
            (self.root / name).unlink()
            _sync_folder((self.root / name).parent)

    def keep(self, names: Iterable[str]) -> int:
        """Do nothing: a folder protects nothing."""
        return 0

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _walk(self, folder: Path, name: str, prefix: str) -> Iterator[Entry]:
        found: list[str] = []  # bare names and no more: a folder may hold a great many
        try:
            with os.scandir(folder) as children:
                self._seen.add(folder)
                for child in children:
                    if not is_name(f"{name}/{child.name}" if name else child.name):
                        continue
                    if child.is_dir(follow_symlinks=False):
                        found.append(child.name + "/")
                    elif child.is_file(follow_symlinks=False):
                        found.append(child.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        found.sort()
        for child_name in found:
            path = f"{name}/{child_name}" if name else child_name
            if not path.endswith("/"):
                if path.startswith(prefix):
                    with suppress(FileNotFoundError):
                        yield Entry(path, (self.root / path).lstat().st_size)
            elif path.startswith(prefix) or prefix.startswith(path):
                yield from self._walk(self.root / path, path[:-1], prefix)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, int]]:
        """Yield path and descriptor of a new, locked temporary file; its temporary name is gone afterwards."""
        while True:
            path = self.root / _TEMPORARY / secrets.token_hex(12)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # somebody takes it for a dead writer's, and is about to remove it
                    continue
                except OSError:
                    pass  # a file system without locks: see _ABANDONED
                if not path.exists():  # swept between open and lock
                    continue
                try:
                    yield path, fd
                finally:
                    with suppress(OSError):  # a later writer sweeps it
                        path.unlink(missing_ok=True)
                return
            finally:
                os.close(fd)

    def _publish(self, path: Path, target: Path) -> bool:
        """Give a temporary file its name in one step, by whatever this file system can; False if it is taken."""
        try:
            os.link(path, target)
        except FileExistsError:
            return _is_same(path, target)
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
        else:
            return True
        return self._rename_locked(path, target)

    def _rename_locked(self, path: Path, target: Path) -> bool:
        """Rename where there are no links (vfat, exFAT, some shares), under a lock that every writer here takes.

        The kernel's own way to rename without replacing is not enough: a server of SMB replaces all the same.
        """
        fd = os.open(self.root / _TEMPORARY / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.lexists(target):
                return False
            try:
                rename_new(path, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_SUCH_CALL:
                    raise
                path.rename(target)
            return True
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        """Remove temporary files of writers that are no more: nobody holds their lock."""
        now = self._shared_now()
        for path in (self.root / _TEMPORARY).iterdir():
            with suppress(OSError):
                if path.name not in {"lock", _RESERVE} and _is_dead(path, now):
                    path.unlink()

    def _shared_now(self) -> float | None:
        """Return what the server's clock shows if other computers may write here too, whose locks may not be seen."""
        if _file_system(self.root) not in _SHARED:
            return None
        path = self.root / _TEMPORARY / secrets.token_hex(12)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"now")
            os.fsync(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder if it is not there, and see that its name is durable, whoever has made it."""
        if folder in self._durable:
            return
        inside = self.root in folder.parents
        there = folder.is_dir()
        if inside or not there:
            self._make_folder(folder.parent)
        if not there:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            _sync_folder(folder.parent)
        elif inside:
            named = {each for each in folder.parent.iterdir() if each.is_dir()}  # one sync for all of them
            _sync_folder(folder.parent)
            self._durable |= named
        else:
            with suppress(OSError):  # a root that somebody else has made, maybe where we may not look
                _sync_folder(folder.parent)
        self._durable.add(folder)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn the operating system's errors into sentences."""
        try:
            yield
        except OSError as error:
            self._durable.clear()
            what = os.strerror(error.errno or 0)
            raise UnavailableError(
                f"the repository folder {self._location} failed at '{name}': {what}", hint=self._hint(error.errno)
            ) from error

    def _hint(self, number: int | None) -> str:
        if number in {errno.ENOSPC, errno.EDQUOT}:
            return f"{self._free()} Free some space or use a larger disk, then run the command again."
        if number == errno.EROFS:
            return "The file system is mounted read-only: remount it read-write, or look at `dmesg` for why it is."
        if number in {errno.EACCES, errno.EPERM}:
            return "remetal may not write or read there: run it as root, or mend the folder's owner and mode."
        if number == errno.ENOENT:
            return "The folder, or a link on the way to it, leads to nothing: is the disk mounted?"
        if number == errno.ESTALE:
            return (
                "The server has taken the folder away, or was set up anew: mount it again, then run the command again."
            )
        if number in {errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN}:
            return "The server does not answer: is it up, and the network? Then run the command again."
        if number == errno.ENAMETOOLONG:
            return "The path is too long: choose a folder with a shorter one."
        if number in {errno.ENOTDIR, errno.ELOOP}:
            return f"Something that is not a folder stands where {self.root} or a folder below it should be."
        return "Look at `dmesg` and at the disk or network that the folder lies on, then run the command again."

    def _free(self) -> str:
        try:
            state = os.statvfs(self.root)
        except OSError:
            return "The disk is full."
        return f"{format_bytes(state.f_bavail * state.f_frsize)} are free there."


def _is_same(path: Path, target: Path) -> bool:
    """Whether both are one file: a server may have made the link, and its answer was lost before it was asked again."""
    try:
        return os.path.samestat(path.lstat(), target.lstat())
    except OSError:
        return False


def _withdraw(target: Path, written: os.stat_result) -> None:
    """Take back the name of what was written, as far as that is possible: it may not be durable."""
    with suppress(OSError):
        if os.path.samestat(target.lstat(), written):
            target.unlink()
            _sync_folder(target.parent)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file unless the new name is taken: renameat2(2) with RENAME_NOREPLACE.

    Raises FileExistsError, or OSError with EINVAL or ENOSYS where the file system or C library cannot do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    old, new = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _file_system(folder: Path) -> int:
    """Return the number that says of which kind a folder's file system is (statfs(2)); 0 if nobody knows."""
    state = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(folder), state) != 0:
        return 0
    return int.from_bytes(state.raw[:8], "little") & 0xFFFFFFFF


def _is_dead(path: Path, now: float | None) -> bool:
    """Whether nobody writes a temporary file any more; `now` is the server's clock where locks may not be seen."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        old = (time.time() if now is None else now) - os.fstat(fd).st_mtime > _ABANDONED
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return old
        return old or now is None
    finally:
        os.close(fd)


def _write_all(fd: int, data: Pieces) -> None:
    waiting = [memoryview(piece).cast("B") for piece in data if len(piece)]
    if len(waiting) == 1 and len(waiting[0]) >= _DIRECT:
        waiting = [waiting[0][_write_direct(fd, waiting[0]) :]]
    first = 0
    while first < len(waiting):
        written = os.writev(fd, waiting[first : first + _MAX_PIECES])
        while first < len(waiting) and written >= len(waiting[first]):
            written -= len(waiting[first])
            first += 1
        if written:
            waiting[first] = waiting[first][written:]


def _write_direct(fd: int, data: memoryview) -> int:
    """Write as much as can go past the page cache, which the bytes would only pass through; return how much that was.

    Needs memory that starts on a page (open(2), O_DIRECT). A file system that cannot do it is left alone.
    """
    whole = len(data) - len(data) % mmap.PAGESIZE
    if data.readonly or ctypes.addressof(ctypes.c_char.from_buffer(data)) % mmap.PAGESIZE:
        return 0
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole and done % mmap.PAGESIZE == 0:
            done += os.pwrite(fd, data[done : min(done + _DIRECT_STEP, whole)], done)
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    os.lseek(fd, done, os.SEEK_SET)
    return done


def _read_all(fd: int, start: int, end: int) -> bytes:
    if end <= start:
        return b""
    data = os.pread(fd, end - start, start)
    if len(data) == end - start:
        return data
    parts = [data]
    done = start + len(data)
    while parts[-1] and done < end:
        parts.append(os.pread(fd, end - done, done))
        done += len(parts[-1])
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # some of FUSE
            raise
    finally:
        os.close(fd)
