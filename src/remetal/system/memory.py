"""How much memory there is. Source: proc_meminfo(5)."""

from __future__ import annotations

import re
from pathlib import Path

from remetal.units import KIB

_AVAILABLE = re.compile(r"^MemAvailable: +(\d+) kB$", re.MULTILINE)


def probe_available() -> int:
    """Return how many bytes of memory could be taken without anything having to be swapped out."""
    found = _AVAILABLE.search(Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * KIB
