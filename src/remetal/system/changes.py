"""Noticing that somebody writes to files, if only to write back what was there.

Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_IN_MODIFY = 2  # <sys/inotify.h>
_EVENTS = 4096
"""Bytes, of which any is enough."""


class Changes:
    """Whether anybody has written to a file in some folders, but not in those below them."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Begin to notice. Raises OSError if the kernel does not let us."""
        self._seen = False
        self._open = ExitStack()
        with ExitStack() as stack:
            self._fd = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            stack.callback(os.close, self._fd)
            for folder in folders:
                # what the kernel makes up when it is looked for, such as tracefs, is another one once it was forgotten
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                _checked(_LIBC.inotify_add_watch(self._fd, os.fsencode(folder), _IN_MODIFY))
            self._open = stack.pop_all()

    @property
    def seen(self) -> bool:
        """Whether anything was written since it began."""
        with suppress(BlockingIOError):
            self._seen = bool(os.read(self._fd, _EVENTS)) or self._seen
        return self._seen

    def close(self) -> None:
        """Stop."""
        self._open.close()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
