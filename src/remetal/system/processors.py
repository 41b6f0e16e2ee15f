"""How many threads work at once on bytes that are hashed, compressed, encrypted, or the opposite."""

from __future__ import annotations

import os

MOST = 16
"""Of more processors than these nothing gains: between two calls into a library each thread waits for Python's lock."""


def probe_processors() -> int:
    """Return how many processors this process may use, at most MOST. Source: sched_getaffinity(2)."""
    return min(len(os.sched_getaffinity(0)), MOST)
