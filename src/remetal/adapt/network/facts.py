"""What gives names to the network cards of a restored system: which udev it has, and of which version.

systemd's own library bears the version in its name, whatever the distribution packs it with: libsystemd-shared-252.so,
libsystemd-shared-252-18.el9.so. Before version 231 there was none. Source: systemd's meson.build (`-Dshared-lib-tag`).
"""

from __future__ import annotations

import re
from pathlib import Path

from remetal.adapt.network.naming import Udev
from remetal.adapt.rooted import find_inside, list_inside

_SHARED = re.compile(r"libsystemd-shared-(\d+)[^/]*\.so")
_FOLDERS = ("/usr/lib/systemd", "/lib/systemd", "/usr/lib64/systemd")
_SYSTEMD = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
_LAST_ALONE = 182
"""The last udev that was not a part of systemd; it and those before it have libudev.so.0, eudev has libudev.so.1."""
_OTHER = ("/sbin/udevd", "/usr/sbin/udevd", "/usr/bin/udevd", "/bin/udevd", "/lib/udev/udevd", "/usr/lib/udev/udevd")


def probe_udev(root: Path, *, is_debian: bool = False) -> Udev:
    """Return what gives names to cards in the system mounted at `root`."""
    if any(_is_there(root, path) for path in _SYSTEMD):
        multiarch = (f"/usr/lib/{name}/systemd" for name in list_inside(root, "/usr/lib") if name.count("-") == 2)
        names = (name for folder in (*_FOLDERS, *multiarch) for name in list_inside(root, folder))
        versions = [int(match[1]) for name in names if (match := _SHARED.fullmatch(name)) and len(match[1]) < 5]
        return Udev("systemd", max(versions, default=0), is_debian)
    if not any(_is_there(root, path) for path in _OTHER):
        return Udev()
    libraries = (name for folder in _LIBRARIES for name in list_inside(root, folder))
    is_first = any(name.startswith("libudev.so.0") for name in libraries)
    return Udev("udev", _LAST_ALONE, is_debian) if is_first else Udev("eudev", 0, is_debian)


def _is_there(root: Path, path: str) -> bool:
    place = find_inside(root, path)
    try:
        return place is not None and place.is_file()
    except OSError:
        return False
