"""Holding mounted file systems still, all of them together, for a short time and never for longer than that.

A frozen file system has written everything to its disk, and whoever writes to it waits; who writes to one that was made
read-only is refused. So who holds them must not write to them, nor wait for anybody who does; and they have to be
let go even if who holds them is killed, stopped or out of memory. That is the business of another process
(`remetal.system.watchdog`), which is there before the first one is held. If it is ended, we let them go at once; so
that nobody ends both by our name, it does not have it.

Source: ioctl(2) FIFREEZE and FITHAW, fs/super.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import select
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError, RemetalError, UnavailableError
from remetal.system import watchdog
from remetal.system.apart import outliving, set_apart
from remetal.system.mounts import find_mount_of
from remetal.system.run import Process

_IN_MEMORY = (Path("/run"), Path("/dev/shm"))  # noqa: S108 - files without a name
_LIBC = ctypes.CDLL(None)
_IMPOSSIBLE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS})
_PATIENCE = 10.0
"""Seconds that the watchdog has to begin, and to let go."""


class Held:
    """File systems that are held still since `began`, by time.monotonic()."""

    def __init__(self, dog: Process, limit: float) -> None:
        self.began = time.monotonic()
        self._dog = dog
        self._limit = limit

    def check(self) -> None:
        """Raise UnavailableError if they have been let go already."""
        assert self._dog.stdout is not None
        if select.select([self._dog.stdout], [], [], 0)[0]:
            raise self.why(_line(self._dog))

    def why(self, said: bytes) -> UnavailableError:
        """Return what has happened if the watchdog says so."""
        hint = "Nothing is kept of this backup; run it again."
        if said.startswith(b"expired"):
            return UnavailableError(
                f"the file systems were to be held for longer than {self._limit:g} seconds, and were let go",
                hint="Nothing is kept of this backup. Back up when less is written, or allow more time: "
                "--freeze-limit SECONDS.",
            )
        if said.startswith(b"lost"):
            return UnavailableError("somebody else let go of a file system while it was held still", hint=hint)
        return UnavailableError("the process that watches over what is held still was ended", hint=hint)


@contextmanager
def held_still(folders: Sequence[Path], *, limit: float, read_only: Sequence[Path] = ()) -> Iterator[Held]:
    """Hold the file systems that are mounted at folders still, for at most `limit` seconds.

    Those at `folders` are frozen; those at `read_only`, whose kinds cannot be, are made read-only before. Raises
    RefusedError, with nothing left held, if one of them cannot be, or somebody else has frozen it, and UnavailableError
    if one does not work; and that at the end of the block, too, if they were not held until then: what was read in the
    block is then not of one moment. Needs root.
    """
    every = [*read_only, *folders]
    with ExitStack() as stack:
        stack.enter_context(writing_in_memory())
        opened: list[int] = []
        for folder in every:
            opened.append(_open(folder))
            stack.callback(os.close, opened[-1])
        sync_folders(every)
        dog, alive = stack.enter_context(_watching(opened, len(read_only), limit))
        held = Held(dog, limit)
        ours = _Ours(opened[: len(read_only)], opened[len(read_only) :])
        try:
            with _standing_in(alive, ours):
                for count, (folder, fd) in enumerate(zip(every, opened, strict=True), 1):
                    _tell(dog, count)
                    ours.count = count
                    try:
                        _hold(folder, fd, freeze=count > len(read_only))
                    except RemetalError:
                        ours.count = count - 1  # it is not ours to let go
                        _tell(dog, count - 1)
                        raise
                    held.check()
                yield held
        finally:
            _tell(dog, watchdog.LET_GO)
            said = _line(dog)
            if not said:  # somebody has ended it
                ours.let_go()
        if said != b"held\n":
            raise held.why(said)


@dataclass(slots=True)
class _Ours:
    """The open folders that we hold: of all the first `count` are, or are about to be."""

    read_only: list[int]
    frozen: list[int]
    count: int = 0

    def let_go(self) -> None:
        first = len(self.read_only)
        watchdog.let_go(self.read_only[: self.count], self.frozen[: max(self.count - first, 0)])


@contextmanager
def _standing_in(alive: int, ours: _Ours) -> Iterator[None]:
    """Let go at once if the watchdog, to which the other end of the pipe `alive` belongs, ends in this block."""
    over, end = os.pipe()

    def wait() -> None:
        if over not in select.select([alive, over], [], [])[0]:
            ours.let_go()

    thread = threading.Thread(target=wait, name="stand-in", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(over)


def sync_folders(folders: Sequence[Path]) -> None:
    """Write what the file systems at these folders still have in memory, so that holding them has less to write."""
    for folder in folders:
        fd = _open(folder)
        try:
            _LIBC.syncfs(fd)
        finally:
            os.close(fd)


def freezes_nest() -> bool:
    """Whether this kernel lets device-mapper freeze a file system that is frozen already, and counts: since Linux 6.8.

    Source: fs_bdev_freeze() and FREEZE_MAY_NEST in fs/super.c; before, freeze_super() in freeze_bdev() fails (EBUSY).
    """
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and (int(version[1]), int(version[2])) >= (6, 8)


def _open(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(
            f"the file system at {folder} cannot be reached any more ({error.strerror})",
            hint="See whether its disk is still there, and run it again.",
        ) from error


def _hold(folder: Path, fd: int, *, freeze: bool) -> None:
    try:
        if freeze:
            fcntl.ioctl(fd, watchdog.FIFREEZE, 0)
        else:
            watchdog.reconfigure(fd, b"ro")
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.EPERM, *_IMPOSSIBLE}:
            raise UnavailableError(
                f"the file system at {folder} does not work as it should, and cannot be held still ({error.strerror})",
                hint=f"See what the kernel says of it (dmesg), and whether {folder} can be written to.",
            ) from error
        why, hint = "its kind cannot be frozen", "Unmount it, or mount it read-only."
        if error.errno == errno.EBUSY and freeze:
            why, hint = "somebody has frozen it already", "If nobody is at it: fsfreeze --unfreeze PLACE."
        elif error.errno == errno.EBUSY:
            why, hint = "a file on it is open for writing", f"See who has it open: fuser -vm {folder}"
        elif error.errno == errno.EPERM:
            why, hint = "nobody here may", "Run remetal as root, and on the machine itself, not in a container."
        raise RefusedError(
            f"the file system at {folder} cannot be held still: {why} ({error.strerror})", hint=hint
        ) from error


@contextmanager
def writing_in_memory() -> Iterator[None]:
    """Keep Python from writing to what is held: new temporary files lie in memory, compiled modules nowhere.

    Raises RefusedError if there is no folder in memory.
    """
    for folder in _IN_MEMORY:
        if folder.is_dir() and os.access(folder, os.W_OK) and find_mount_of(folder).kind == "tmpfs":
            before = tempfile.tempdir, sys.dont_write_bytecode
            tempfile.tempdir, sys.dont_write_bytecode = str(folder), True
            try:
                yield
            finally:
                tempfile.tempdir, sys.dont_write_bytecode = before
            return
    raise RefusedError(
        "no folder is in memory, and temporary files on a frozen file system would wait for it",
        hint="Mount one: mount -t tmpfs none /dev/shm.",
    )


@contextmanager
def _watching(opened: Sequence[int], read_only: int, limit: float) -> Iterator[tuple[Process, int]]:
    """Start the watchdog; yield it, and the end of a pipe of which it has the other one for as long as it lives."""
    with ExitStack() as stack:
        alive, other = os.pipe()
        stack.callback(os.close, alive)
        words = [str(limit), str(read_only), *map(str, opened)]
        try:
            dog = stack.enter_context(outliving(watchdog.__file__, *words, pass_fds=[other, *opened]))
        finally:
            os.close(other)
        set_apart(dog.pid)
        if _line(dog) != b"ready\n":
            raise RemetalError("what has to let the file systems go did not start; nothing was held")
        yield dog, alive


def _tell(dog: Process, what: int) -> None:
    assert dog.stdin is not None
    with suppress(BrokenPipeError):
        os.write(dog.stdin.fileno(), what.to_bytes(watchdog.NUMBER, "little"))


def _line(dog: Process) -> bytes:
    assert dog.stdout is not None
    ready = select.select([dog.stdout], [], [], _PATIENCE)[0]
    return os.read(dog.stdout.fileno(), 100) if ready else b""
