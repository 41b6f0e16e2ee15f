"""The files of the lab's file systems: awkward ones where the file system can hold them, and hundreds of small ones.

Much is deleted again, so that free blocks hold old data, as on a machine that has lived.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from hashlib import shake_128
from pathlib import Path
from typing import Literal, TypeAlias

from lab.awkward import make_awkward

Files: TypeAlias = Literal["awkward", "plain", "none"]

_TIME = 1_700_000_000
_SMALL = 240


def fill_awkward(folder: Path, seed: str) -> None:
    """Fill a file system that keeps xattrs, ACLs, inode flags and any name."""
    make_awkward(folder / "awkward", seed.encode())
    _fill_small(folder / "small", seed)


def fill_plain(folder: Path, seed: str) -> None:
    """Fill a file system of another world: names, times and contents that FAT, exFAT and NTFS keep as well."""
    _fill_small(folder / "small", seed)
    names = folder / "names"
    names.mkdir()
    for name in (
        "a" * 200 + ".txt",
        "Ünïcödé 文件",
        "two  blanks",
        "UPPER.TXT",
        "lower.txt",
        "Mixed.Case",
        "many.dots.x",
    ):
        (names / name).write_bytes(name.encode() + seed.encode())
    deep = folder.joinpath(*["deeper"] * 12)
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(seed.encode())
    (folder / "empty").touch()
    (folder / "large").write_bytes(_noise(seed, 3_000_001))
    settle_times(folder)


def _fill_small(folder: Path, seed: str) -> None:
    """Make files of one byte to some blocks; every third of them goes again."""
    for number in range(_SMALL):
        place = folder / f"folder-{number % 7}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file-{number}").write_bytes(_noise(f"{seed}{number}", 1 + number * 97 % 9000))
        if number % 3 == 0:
            (place / f"gone-{number}").write_bytes(_noise(f"gone{number}", 20_000))
    os.sync()
    for gone in folder.glob("*/gone-*"):
        gone.unlink()
    settle_times(folder)


def settle_times(folder: Path) -> None:
    """Give everything under a folder times that every file system keeps: even seconds."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            path = Path(parent, name)
            if not path.is_symlink():
                os.utime(path, (_TIME, _TIME + 2 * (len(name) % 50)))


def remove_some(folder: Path) -> None:
    """Change what `fill_awkward` or `fill_plain` left, so that a snapshot of before differs."""
    shutil.rmtree(folder / "small" / "folder-3")
    (folder / "small" / "folder-4" / "file-4").write_bytes(b"changed after the snapshot")
    settle_times(folder / "small")


def _noise(seed: str, size: int) -> bytes:
    return shake_128(seed.encode()).digest(size)


FILL: dict[Files, Callable[[Path, str], None]] = {
    "awkward": fill_awkward,
    "plain": fill_plain,
    "none": lambda folder, seed: None,
}
