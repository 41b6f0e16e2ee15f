"""How much processor and disk time a process gets beside others, and normal priority for what must not wait.

Source: setpriority(2), ioprio_set(2): on Linux both are a thread's own, and threads inherit them when they are made.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal, TypeAlias

from remetal.errors import RefusedError

IoClass: TypeAlias = Literal["idle", "low", "normal"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_CALLS = {"x86_64": (251, 252), "aarch64": (30, 31)}
"""Numbers of ioprio_set and ioprio_get, by machine. Source: <asm/unistd.h>."""
_PROCESS = 1  # IOPRIO_WHO_PROCESS in <linux/ioprio.h>
_CLASS_SHIFT = 13
_VALUES: dict[IoClass, int] = {"idle": 3 << _CLASS_SHIFT, "low": 2 << _CLASS_SHIFT | 7, "normal": 0}


def set_priority(nice: int | None, disk: IoClass | None) -> None:
    """Give this thread, and all that it will start, less processor (-20 to 19) and disk time; None changes nothing.

    Raises RefusedError if the kernel does not let us.
    """
    try:
        if nice is not None:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        if disk is not None:
            _set_disk_priority(_VALUES[disk])
    except OSError as error:
        raise RefusedError(
            f"the priority cannot be changed: {error.strerror}", hint="More than normal priority needs root."
        ) from error


@contextmanager
def normal_priority() -> Iterator[None]:
    """Run all threads of this process at normal priority for the length of a block, if the kernel lets us."""
    changed: list[tuple[int, int, int]] = []
    try:
        for thread in map(int, os.listdir("/proc/self/task")):  # noqa: PTH208 - names only
            with suppress(OSError):  # it has ended
                nice, disk = os.getpriority(os.PRIO_PROCESS, thread), _disk_priority(thread)
                changed.append((thread, nice, disk))
                _make_normal(thread, nice, disk)
        yield
    finally:
        for thread, nice, disk in changed:
            with suppress(OSError):
                if os.getpriority(os.PRIO_PROCESS, thread) != nice:
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
                if _disk_priority(thread) != disk:
                    _set_disk_priority(disk, thread)


def _make_normal(thread: int, nice: int, disk: int) -> None:
    if nice > 0 and os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, thread, 0)
    if disk >> _CLASS_SHIFT:
        _set_disk_priority(0, thread)


def _set_disk_priority(value: int, thread: int = 0) -> None:
    calls = _CALLS.get(platform.machine())
    if calls is not None and _LIBC.syscall(calls[0], _PROCESS, thread, value) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _disk_priority(thread: int = 0) -> int:
    """Return a thread's class and level; without a class where none was set, or nobody can tell."""
    calls = _CALLS.get(platform.machine())
    return max(int(_LIBC.syscall(calls[1], _PROCESS, thread)), 0) if calls is not None else 0
