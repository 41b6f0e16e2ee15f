"""What the files `remake_*.py` share: making a file system anew where its blocks do not fit."""

from __future__ import annotations

from collections.abc import Callable

from remetal.layout.model import FileSystem, Struct
from remetal.units import align_up, format_bytes


class Remake(Struct, frozen=True, kw_only=True):
    """How a file system is made anew on a space, decided from what was captured.

    `needed` is the least size of a space onto which all files are sure to fit, in bytes. `commands` make it, each with
    the device as its last word; `checks` bring one that an interrupted restore left into order. `size` is the least
    that it will have, `features` what it is asked for. `losses` are sentences about what cannot be kept.
    """

    needed: int
    size: int
    block_size: int
    features: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    checks: tuple[tuple[str, ...], ...] = ()
    losses: tuple[str, ...] = ()

    @property
    def programs(self) -> set[str]:
        """The programs that it needs, beside those that copy."""
        return {command[0] for command in (*self.commands, *self.checks)}


Plan = Remake | str
"""A way to make it anew, or the sentence why there is none."""

UNKNOWN = "the snapshot does not tell how it was made: back it up again with this remetal, or choose a larger target"
NEW_INODES = "inode numbers and the times of the last change (ctime) are new"

_ROUNDS = 500
NEVER = 1 << 63
"""Where the overhead grows as fast as the size: no disk is large enough."""

_BLOCKS = frozenset(1 << bit for bit in range(9, 26))
_NAME = 264
"""Bytes of the longest entry in a folder; XFS and f2fs take less."""


def fits(plan: Remake, space: int) -> Plan:
    """Return the plan, or the sentence that the space is too small."""
    if plan.needed <= space:
        return plan
    needed, there = format_bytes(plan.needed), format_bytes(space)
    return f"its files may need {needed} ({plan.needed} bytes), and there is {there}"


def least_size(data: int, overhead: Callable[[int], int], step: int) -> int:
    """Return the least size, a multiple of `step` bytes, that holds `data` beside the overhead of that size."""
    size = 0
    for _ in range(_ROUNDS):
        needed = align_up(data + overhead(size), step)
        if needed <= size:
            return size
        if needed >= NEVER:
            break
        size = needed
    return NEVER


def folder_growth(data: int, inodes: int) -> int:
    """Return the bytes by which folders may grow when they are filled anew: their blocks end up half full.

    At most they double; and every file has one name of 255 bytes at most, but for those with several hard links, which
    in return have no inodes and contents of their own.
    """
    return min(data, 2 * _NAME * inodes)


def find_obstacle(volume: FileSystem, label_size: int) -> str:
    """Return why no mkfs could be told to make this file system, or nothing; a label has at most `label_size` bytes."""
    name = next((name for name in volume.features if name.startswith("FEATURE_")), "")
    if name:
        return f"it has a feature that remetal does not know ({name})"
    if len(volume.label.encode()) > label_size:
        return f"its label has bytes that are no text ({volume.label!r})"
    if volume.block_size not in _BLOCKS:
        return f"it has blocks of {volume.block_size} bytes"
    return ""


def larger_blocks(now: int, before: int) -> str:
    """Return the sentence that blocks become as large as the disk's sectors."""
    return f"its blocks become {now} bytes large, as the sectors of the disk are (before: {before})"
