"""Files without a name: they are gone when the process is, however it ends.

They are written and read, never mapped: what the kernel keeps of them in memory it may drop, and it is none of the
process's own.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from remetal.errors import UnavailableError


class Spool:
    """A file without a name. Raises UnavailableError where it cannot be written or read."""

    def __init__(self) -> None:
        self.size = 0
        try:
            with tempfile.TemporaryFile(prefix="remetal-") as file:
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise _unavailable(0, error) from error
        weakref.finalize(self, os.close, self._fd)

    def append(self, rows: npt.NDArray[Any]) -> int:
        """Write rows behind all that was written before, and return the first byte's place."""
        start = self.size
        self.write(start, np.ascontiguousarray(rows).view(np.uint8).data)
        return start

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Write bytes at a place."""
        left = memoryview(data)
        position = start
        try:
            while left:
                done = os.pwrite(self._fd, left, position)
                left, position = left[done:], position + done
        except OSError as error:
            raise _unavailable(position, error) from error
        self.size = max(self.size, position)

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from a place; all of them were written before."""
        try:
            data = os.pread(self._fd, size, start)
        except OSError as error:
            raise _unavailable(self.size, error) from error
        if len(data) != size:
            raise _unavailable(self.size, OSError(0, "it is shorter than what was written to it"))
        return data


def _unavailable(size: int, error: OSError) -> UnavailableError:
    what = os.strerror(error.errno) if error.errno else error.strerror
    return UnavailableError(
        f"a temporary file of {size} bytes in {tempfile.gettempdir()} failed: {what}",
        hint="Free some space there, or set TMPDIR to a folder on a larger disk.",
    )
