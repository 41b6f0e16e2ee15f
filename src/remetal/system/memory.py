"""How much memory there is. Sources: proc_meminfo(5), cgroups(7), Documentation/admin-guide/cgroup-v2.rst."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from remetal.units import KIB

_AVAILABLE = re.compile(r"^MemAvailable: +(\d+) kB$", re.MULTILINE)
_CACHED = re.compile(r"^(?:in)?active_file (\d+)$", re.MULTILINE)
"""What the kernel caches of files counts as taken by a group, and is given up for anything else."""
_MEMINFO, _CGROUP, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""What a control group may take, and takes, in both versions."""


def probe_available() -> int:
    """Return how many bytes of memory could be taken without anything having to be swapped out, or ended for it.

    The control groups that we are in, such as a service's, may have less than the machine.
    """
    found = _AVAILABLE.search(_MEMINFO.read_text())
    assert found is not None
    return min([int(found[1]) * KIB, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what is left in each control group that has a limit."""
    with suppress(OSError):
        for line in _CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in {"", "memory"}:
                place = Path(path.lstrip("/"))
                for each in (place, *place.parents):
                    yield from _left_in(_CGROUPS / controllers / each)


def _left_in(group: Path) -> Iterator[int]:
    for limit, taken in _LIMITS:
        with suppress(OSError, ValueError):  # it has no such limit: `max`
            left = int((group / limit).read_text()) - int((group / taken).read_text())
            cached = sum(int(each) for each in _CACHED.findall((group / "memory.stat").read_text()))
            yield max(left + cached, 0)
