"""How much processor and disk time a process gets beside others, and normal priority for what must not wait.

Source: setpriority(2), ioprio_set(2): on Linux both are a thread's own, and threads inherit them when they are made.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Run this thread at normal priority for the length of a block, if it has less and the kernel lets us."""
    nice, disk = os.getpriority(os.PRIO_PROCESS, 0), _disk_priority()
    changed = False
    try:
        if nice > 0 and os.geteuid() == 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            changed = True
        if disk >> _CLASS_SHIFT:
            _set_disk_priority(0)
        yield
    finally:
        if changed:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        if disk >> _CLASS_SHIFT:
            _set_disk_priority(disk)


def _set_disk_priority(value: int) -> None:
    calls = _CALLS.get(platform.machine())
    if calls is not None and _LIBC.syscall(calls[0], _PROCESS, 0, value) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _disk_priority() -> int:
    """Return this thread's class and level; without a class where none was set, or nobody can tell."""
    calls = _CALLS.get(platform.machine())
    return max(int(_LIBC.syscall(calls[1], _PROCESS, 0)), 0) if calls is not None else 0
