"""The process that lets go of file systems that are held still, whatever happens to the one that holds them.

`python -I -S watchdog.py SECONDS COUNT FD…` has the file systems' folders open: first `COUNT` that are made read-only,
then those that are frozen. It says `ready`, and then takes bytes: how many of them are held or about to be, the
first ones, or `LET_GO`. When that comes, or so many seconds are over since the first one was to be held, or the one who
asked is gone, it makes them writable again and thaws them. It answers `held` if they were held until it was
asked, else `expired`.

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
from pathlib import Path

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
LET_GO = 255
_MCL_CURRENT, _MCL_FUTURE = 1, 2  # <sys/mman.h>
_FSPICK, _FSCONFIG = 433, 431  # <asm-generic/unistd.h>
_FSPICK_EMPTY_PATH, _SET_FLAG, _RECONFIGURE = 8, 0, 7  # <linux/mount.h>
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


def let_go(read_only: list[int], frozen: list[int]) -> None:
    """Let go of file systems, each by a process of its own, because one that is just being held lets nobody in."""
    children = []
    for number, folder in enumerate([*read_only, *frozen]):
        child = os.fork()
        if not child:
            with contextlib.suppress(OSError):  # it was not held
                if number < len(read_only):
                    reconfigure(folder, b"rw")
                else:
                    fcntl.ioctl(folder, FITHAW, 0)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def watch(limit: float) -> tuple[int, bool]:
    """Wait until it is time; return how many file systems there are to let go, and whether somebody asked."""
    count, until = 0, float("inf")
    while (left := until - time.monotonic()) > 0:
        if not select.select([0], [], [], min(left, 3600.0))[0]:
            continue
        told = os.read(0, 1)
        if not told or told[0] == LET_GO:
            return count, bool(told)
        count = told[0]
        until = min(until, time.monotonic() + limit)
    return count, False


def main() -> None:
    """Watch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE)
    limit, writable, *folders = float(sys.argv[1]), *(int(each) for each in sys.argv[2:])
    os.write(1, b"ready\n")
    count, held = watch(limit)
    let_go(folders[: min(count, writable)], folders[writable : max(count, writable)])
    with contextlib.suppress(OSError):
        os.write(1, b"held\n" if held else b"expired\n")


if __name__ == "__main__":
    main()
