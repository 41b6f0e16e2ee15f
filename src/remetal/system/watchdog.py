"""The process that lets go of file systems that are held still, whatever happens to the one that holds them.

`python -I -S SCRIPT SECONDS COUNT FD…` has the file systems' folders open: first `COUNT` that are made
read-only, then those that are frozen. It says `ready`, and then takes numbers of `NUMBER` bytes: how many of
them are held or about to be, the first ones, or `LET_GO`. When that comes, or the one who asked is gone, it
makes them writable again, thaws them, and ends. It says `held` if each of them was held until it was asked, or
`lost` if somebody else had let go of one. When so many seconds are over since the first one was to be held, it
does not wait to be asked: it says `expired`, lets go, and goes on letting go of what is held after that, since
one that is just being frozen cannot be thawed yet.

It imports nothing of remetal and writes to no file: it must not wait for a file system that it is there to let go.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
NUMBER, LET_GO = 4, 0xFFFFFFFF
_MCL_CURRENT, _MCL_FUTURE = 1, 2  # <sys/mman.h>
_FSPICK, _FSCONFIG = 433, 431  # <asm-generic/unistd.h>
_FSPICK_EMPTY_PATH, _SET_FLAG, _RECONFIGURE = 8, 0, 7  # <linux/mount.h>
_AGAIN = 0.1
"""Seconds after which what is held too late is let go."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def reconfigure(folder: int, flag: bytes) -> None:
    """Give a file system, but not its mount, a flag such as `ro`. Raises OSError. Source: fspick(2), fsconfig(2)."""
    context = _LIBC.syscall(_FSPICK, folder, b"", _FSPICK_EMPTY_PATH)
    done = -1
    if context >= 0:
        done = _LIBC.syscall(_FSCONFIG, context, _SET_FLAG, flag, None, 0)
        done = _LIBC.syscall(_FSCONFIG, context, _RECONFIGURE, None, None, 0) if done == 0 else done
    error = ctypes.get_errno()
    if context >= 0:
        os.close(context)
    if done != 0:
        raise OSError(error, os.strerror(error))


def let_go(read_only: list[int], frozen: list[int]) -> bool:
    """Let go of file systems; return whether all of them were held.

    Each is let go by a process of its own, because one that is just being held lets nobody in.
    """
    tasks = [*((_make_writable, each) for each in read_only), *((_thaw, each) for each in frozen)]
    children, held = [], True
    for task, folder in tasks:
        try:
            child = os.fork()
        except OSError:
            held = _was_held(task, folder) and held
            continue
        if not child:
            os._exit(0 if _was_held(task, folder) else 1)
        children.append(child)
    for child in children:
        held = os.waitpid(child, 0)[1] == 0 and held
    return held


def _was_held(task: Callable[[int], None], folder: int) -> bool:
    try:
        task(folder)
    except OSError:
        return False
    return True


def _thaw(folder: int) -> None:
    fcntl.ioctl(folder, FITHAW, 0)


def _make_writable(folder: int) -> None:
    was_read_only = os.fstatvfs(folder).f_flag & os.ST_RDONLY
    reconfigure(folder, b"rw")
    if not was_read_only:
        raise OSError


class Watch:
    """What is held: the folders that are read-only, and those that are frozen, of which the first `count` are."""

    def __init__(self, limit: float, read_only: list[int], frozen: list[int]) -> None:
        self._limit = limit
        self._read_only = read_only
        self._frozen = frozen
        self._count = 0

    def until_asked(self) -> str:
        """Wait until somebody asks, or is gone, and let go; return what is to be said."""
        until = float("inf")
        while (left := until - time.monotonic()) > 0:
            if select.select([0], [], [], min(left, 3600.0))[0]:
                if self._is_over():
                    return "held" if self._let_go() else "lost"
                until = min(until, time.monotonic() + self._limit)
        _say("expired")
        self._let_go()
        while not (select.select([0], [], [], _AGAIN)[0] and self._is_over()):
            self._let_go()
        self._let_go()
        return "over"

    def _is_over(self) -> bool:
        told = os.read(0, NUMBER)
        number = int.from_bytes(told, "little") if len(told) == NUMBER else LET_GO
        if number != LET_GO:
            self._count = number
        return number == LET_GO

    def _let_go(self) -> bool:
        first = len(self._read_only)
        return let_go(self._read_only[: self._count], self._frozen[: max(self._count - first, 0)])


def _say(what: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, what.encode() + b"\n")


def main() -> None:
    """Watch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("thaw-watchdog")  # `killall python3` does not mean it
    _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE)
    limit, first, *folders = float(sys.argv[1]), *(int(each) for each in sys.argv[2:])
    watch = Watch(limit, folders[:first], folders[first:])
    _say("ready")
    _say(watch.until_asked())


if __name__ == "__main__":
    main()
