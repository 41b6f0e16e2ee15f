"""A program on a terminal of its own, which a test watches and types at as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress


class Terminal:
    """A running program; made by `on_terminal`."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.said = ""
        self.seen = 0

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait until the program says something new that `pattern` finds, and return that."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.said[self.seen :])
            if found is not None:
                self.seen += found.end()
                return found[0]
            if time.monotonic() > deadline or not self._read(deadline):
                raise AssertionError(f"nobody said {pattern!r}, but: {self.said[self.seen :]}")

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.fd, f"{line}\n".encode())

    def end(self, seconds: float = 60.0) -> int:
        """Wait until the program ends, and return its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            data = os.read(self.fd, 4096)
        except OSError:  # so a terminal tells that the other side is gone
            return False
        self.said += data.decode(errors="replace").replace("\r", "")
        return bool(data)


@contextmanager
def on_terminal(argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program on a new terminal for the length of a block."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe(argv[0], list(argv), dict(environment))
    try:
        yield Terminal(pid, fd)
    finally:
        os.close(fd)  # hangs up: a program that still runs gets SIGHUP
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
