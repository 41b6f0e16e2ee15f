"""The data that is measured: a volume with real files, made once and kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from lab.cache import cached
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import GIB, MIB

SOURCES = ("/usr/lib", "/usr/bin", "/usr/share", "/usr/sbin", "/usr/include")


def find_volume(used: int = GIB) -> Path:
    """Return a file with an ext4, thrice `used` bytes large, with about `used` bytes of this host's files."""
    return cached(f"bench-ext4-{used >> 20}.img", ("ext4", str(used), *SOURCES), lambda path: _build(path, used))


def _build(path: Path, used: int) -> None:
    with path.open("wb") as file:
        file.truncate(3 * used)
    subprocess.run(["mkfs.ext4", "-q", "-L", "bench", path], check=True)
    with attach_loop(Span(path, 0, 3 * used), writable=True) as device, mounted(device) as folder:
        left = used - 64 * MIB
        for source in SOURCES:
            left = _copy(Path(source), folder, left)
    subprocess.run(["e2fsck", "-fp", path], check=False, capture_output=True)


def _copy(source: Path, folder: Path, left: int) -> int:
    """Copy regular files from below `source` until `left` bytes are used up; return what is left."""
    for parent, folders, names in os.walk(source):
        folders.sort()
        for name in sorted(names):
            file = Path(parent) / name
            if file.is_symlink() or not file.is_file():
                continue
            size = file.stat().st_size
            if size > left:
                return left
            place = folder / file.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            left -= -(-size // 4096) * 4096
    return left
