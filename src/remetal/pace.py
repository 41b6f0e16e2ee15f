"""Moving no more bytes a second than one may, on the long run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """`rate` bytes a second for all threads together."""

    def __init__(
        self,
        rate: float,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._sleep = sleep
        self._clock = clock
        self._guard = threading.Lock()
        self._free_at = 0.0

    def pay(self, size: int) -> None:
        """Wait until what was moved before has had its time, and take the time of `size` bytes."""
        with self._guard:
            now = self._clock()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self._rate
        if begin > now:
            self._sleep(begin - now)
