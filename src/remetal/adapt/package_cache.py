"""Packages in a restored cache whose content was left out of the backup. Source: apt-get(8), deb(5).

apt takes a file in its cache for the package by its name and its size alone, and hands it to dpkg. Other package
managers look at a checksum or a signature, and fetch such a file again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import find_inside, list_inside
from remetal.adapt.roots import System, open_root

_CACHE = "/var/cache/apt/archives"
_VOLUMES = ("/var", "/var/cache")
"""Where else than on the root it may lie."""
_MAGIC = b"!<arch>\n"


def adapt_package_cache(system: System, restored: Restored) -> Adaptation:
    """Remove packages without content from apt's cache, so that apt fetches them when it needs them.

    Raises RemetalError if a file system fails; running it again goes on.
    """
    with open_root(system, restored, inner=_VOLUMES) as root:
        if not any(_find_empty(root)):
            return Adaptation()
    with open_root(system, restored, inner=_VOLUMES, writable=True) as root:
        found = list(_find_empty(root))
        for path in found:
            path.unlink()
    if not found:  # the journal knew of none
        return Adaptation()
    removed = "a package" if len(found) == 1 else f"{len(found)} packages"
    return Adaptation((Change(_CACHE, f"removed {removed} without content, which apt would have taken for good"),))


def _find_empty(root: Path) -> Iterator[Path]:
    """Yield the packages in the cache of the system mounted at `root` that are none."""
    folder = find_inside(root, _CACHE)
    for name in list_inside(root, _CACHE):
        path = None if folder is None else folder / name
        if path is not None and name.endswith(".deb") and stat.S_ISREG(path.lstat().st_mode) and not _is_package(path):
            yield path


def _is_package(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.read(fd, len(_MAGIC)) == _MAGIC
    finally:
        os.close(fd)
