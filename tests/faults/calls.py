"""Every call of the operating system that is made below some folders, seen one by one, and made to fail.

The calls are real and go to a real file system; only their errors are put in, at the door between Python and kernel.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from remetal.storage import local
from remetal.units import KIB

_OF_NAMES = ("open", "stat", "lstat", "unlink", "mkdir", "scandir", "listdir", "statvfs")
_OF_TWO_NAMES = ("link", "rename", "replace")
_OF_DESCRIPTORS = ("writev", "pwrite", "pread", "fsync", "fstat", "close", "posix_fallocate")
_MAKING = {"make", "writev", "pwrite", "mkdir", "link", "rename", "replace", "posix_fallocate"}
_CHANGING = _MAKING | {"unlink", "fsync"}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.ESTALE)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (*_BROKEN, *_TOO_MANY),
    "make": (*_FULL, *_BROKEN, *_TOO_MANY, errno.EROFS),
    "writev": (*_FULL, *_BROKEN),
    "pwrite": (*_FULL, *_BROKEN),
    "fsync": (*_FULL, *_BROKEN, errno.EROFS),
    "link": (*_FULL, *_BROKEN, errno.EROFS),
    "rename": (*_FULL, *_BROKEN, errno.EROFS),
    "replace": (*_FULL, *_BROKEN, errno.EROFS),
    "mkdir": (*_FULL, *_BROKEN, errno.EROFS),
    "unlink": (*_FULL, *_BROKEN, errno.EROFS),
    "scandir": (*_BROKEN, *_TOO_MANY),
    "listdir": (*_BROKEN, *_TOO_MANY),
    "pread": _BROKEN,
    "stat": _BROKEN,
    "lstat": _BROKEN,
    "fstat": _BROKEN,
    "close": (*_FULL, errno.EIO),
    "flock": (errno.ENOLCK, errno.EIO),
    "posix_fallocate": _FULL,
    "statvfs": (errno.EIO,),
}
"""What each call may answer; `make` is an open(2) that creates."""
_DIRECT = 64 * KIB
"""From how many bytes on an object goes past the page cache here, so that the small packs of the tests do."""
AFTER = {"link", "rename", "replace", "mkdir", "unlink", "fsync"}
"""Calls that may have been carried out although they say that they were not: the answer of a server was lost."""


def fails_from_then_on(number: int, call: str) -> bool:
    """Whether a call fails on a file system that is full, read-only, or gone, or in a process without descriptors."""
    if number in _FULL:
        return call in _MAKING
    if number == errno.EROFS:
        return call in _CHANGING
    if number in _TOO_MANY:
        return call in {"open", "make", "scandir", "listdir"}
    return call != "close"


def _whole_pages(size: int) -> int:
    """Return a size that can go past the page cache: a page at least."""
    return max(size // mmap.PAGESIZE, 1) * mmap.PAGESIZE


@contextmanager
def bad_sector(path: Path, start: int = 0) -> Iterator[None]:
    """Let reads of a file fail that reach a bad sector at `start`, as long as the file exists, under whatever name."""
    with path.open("rb") as file:  # open, so that no other file becomes this inode
        bad = os.fstat(file.fileno())

        def is_bad(fd: int, size: int, offset: int) -> bool:
            return offset < start + 512 and start < offset + size and os.path.samestat(os.fstat(fd), bad)

        with _failing_reads(is_bad):
            yield


@contextmanager
def unplugged_disk(after: int) -> Iterator[None]:
    """Let every read fail after so many."""
    count = 0

    def is_gone(fd: int, size: int, offset: int) -> bool:
        nonlocal count
        count += 1
        return count > after

    with _failing_reads(is_gone):
        yield


@contextmanager
def _failing_reads(fails: Callable[[int, int, int], bool]) -> Iterator[None]:
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if fails(fd, size, offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", pread)
        yield


class KilledError(BaseException):
    """The process is no more."""


@dataclass
class Fault:
    """What happens at call number `at`: errno `number`, once or from then on, before or after it took effect, torn.

    A torn write leaves the first half of its bytes. Without a number the process is killed: nothing is done any more.
    """

    at: int
    number: int = 0
    lasting: bool = False
    after: bool = False
    torn: bool = False


@dataclass
class Calls:
    """What was called so far; `fault` is what is to happen, `hits` how often it has."""

    folders: tuple[str, ...]
    fault: Fault | None = None
    count: int = 0
    hits: int = 0
    names: list[str] = field(default_factory=list)
    done: Callable[..., None] = lambda *words: None
    """Is told each call that has changed something: its name, paths, and what was written."""
    _open: dict[int, str] = field(default_factory=dict)
    _guard: threading.RLock = field(default_factory=threading.RLock)

    def inside(self, path: object) -> bool:
        """Whether a path lies in one of the folders."""
        try:
            text = os.fsdecode(os.fspath(path))  # type: ignore[call-overload]
        except TypeError:
            return isinstance(path, int) and path in self._open
        return any(text == each or text.startswith(each + "/") for each in self.folders)

    def carry_out(self, call: str, work: Callable[[], Any]) -> Any:
        """Count a call and carry it out, unless it is to fail. Raises OSError."""
        with self._guard:
            self.count += 1
            self.names.append(call)
            fault = self.fault
            if fault is None or not self._hit(fault, call):
                return work()
            self.hits += 1
            if not fault.number:
                raise KilledError
            if (fault.after and call in AFTER) or call == "close":
                work()
            raise OSError(fault.number, os.strerror(fault.number))

    def tell(self, call: str, *words: object) -> None:
        """Tell what was done; a descriptor is told as the path that it was opened by."""
        self.done(call, *(self._open.get(word, "") if isinstance(word, int) else word for word in words))

    def _hit(self, fault: Fault, call: str) -> bool:
        if self.count == fault.at:
            return True
        if not fault.number:
            return self.count > fault.at
        return fault.lasting and self.count > fault.at and fails_from_then_on(fault.number, call)

    def left_open(self) -> list[str]:
        """Return what was opened and is open still."""
        places = [Path(f"/proc/self/fd/{fd}") for fd in self._open]
        found = [str(place.readlink()) for place in places if place.is_symlink()]
        return [each for each in found if self.inside(each)]

    def is_torn(self) -> bool:
        """Whether the next call is a write that is to be torn."""
        return self.fault is not None and self.fault.torn and self.count + 1 == self.fault.at


@contextmanager
def watched_calls(*folders: Path, without_links: bool | str = False, short: int = 0) -> Iterator[Calls]:
    """Watch the calls below folders. `without_links` is a file system like vfat; "last resort" one like exFAT on FUSE.

    With `short` no write or read moves more than so many bytes at once, as the kernel is free to do.
    """
    calls = Calls(tuple(str(each) for each in folders))
    patch = pytest.MonkeyPatch()
    real = {name: getattr(os, name) for name in (*_OF_NAMES, *_OF_TWO_NAMES, *_OF_DESCRIPTORS)}
    lock, rename_new = fcntl.flock, local.rename_new

    def of_name(name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *words: Any, **options: Any) -> Any:
            if not calls.inside(path):
                found = real[name](path, *words, **options)
                if name == "open":
                    calls._open.pop(found, None)  # the number was free again
                return found
            making = name == "open" and words and words[0] & os.O_CREAT
            found = calls.carry_out("make" if making else name, lambda: real[name](path, *words, **options))
            if name == "open":
                calls._open[found] = os.fsdecode(path)
            calls.tell("make" if making else name, os.fsdecode(path))
            return found

        return call

    def of_two_names(name: str) -> Callable[..., Any]:
        def call(source: Any, target: Any, **options: Any) -> Any:
            if not calls.inside(target):
                return real[name](source, target, **options)
            if name == "link" and without_links:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            found = calls.carry_out(name, lambda: real[name](source, target, **options))
            calls.tell(name, os.fsdecode(source), os.fsdecode(target))
            return found

        return call

    def of_descriptor(name: str) -> Callable[..., Any]:
        def call(fd: int, *words: Any) -> Any:
            if fd not in calls._open:
                return real[name](fd, *words)
            if name == "close":
                del calls._open[fd]
            if name == "writev" and calls.is_torn():
                real["writev"](fd, [b"".join(words[0])[: sum(map(len, words[0])) // 2]])
            if short and name == "writev":
                words = ([b"".join(words[0])[:short]],)
            if name == "pwrite":
                data, offset = words
                if calls.is_torn():
                    real["pwrite"](fd, data[: _whole_pages(len(data) // 2)], offset)
                if short:
                    words = (data[: _whole_pages(short)], offset)
            if short and name == "pread":
                words = (min(words[0], short), *words[1:])
            found = calls.carry_out(name, lambda: real[name](fd, *words))
            if name == "writev":
                calls.tell(name, fd, b"".join(words[0])[:found])
            if name == "pwrite":
                calls.tell("writev", fd, bytes(words[0][:found]))
            if name == "fsync":
                calls.tell(name, fd)
            return found

        return call

    def flock(fd: Any, operation: int) -> None:
        if fd not in calls._open:
            return lock(fd, operation)
        return calls.carry_out("flock", lambda: lock(fd, operation))  # type: ignore[no-any-return]

    def rename(source: Path, target: Path) -> None:
        if without_links == "last resort":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        calls.carry_out("rename", lambda: rename_new(source, target))
        calls.tell("rename", str(source), str(target))

    for name in _OF_NAMES:
        patch.setattr(os, name, of_name(name))
    for name in _OF_TWO_NAMES:
        patch.setattr(os, name, of_two_names(name))
    for name in _OF_DESCRIPTORS:
        patch.setattr(os, name, of_descriptor(name))
    patch.setattr(fcntl, "flock", flock)
    patch.setattr(local, "_DIRECT", _DIRECT)
    patch.setattr(local, "rename_new", rename)
    try:
        yield calls
    finally:
        patch.undo()
