"""Where an installed system keeps its kernels: /boot, and what firmware reads, which is a FAT.

A FAT is read and written without mounting it, since a kernel may lack vfat; so both are looked into in one way here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

from remetal.adapt.fat_files import FatTree, apply_fat_file, probe_fat, read_fat_file
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import find_inside, list_inside
from remetal.adapt.roots import System
from remetal.errors import RemetalError

_BOOT = "/boot"
_FIRMWARE_POINTS = ("/boot", "/boot/efi", "/efi")


class BootFolder(Protocol):
    """A folder with kernels, `point` by its path in the system. Paths in it begin with a slash."""

    @property
    def point(self) -> str:
        """Its path in the system."""

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if there is no such folder."""

    def open(self, path: str) -> BinaryIO | None:
        """Return a file, opened for reading; None if there is none."""

    def append(self, path: str, data: bytes) -> None:
        """Put bytes behind a file, durable on return; it stays as it was if that fails, which raises RemetalError."""


@dataclass(frozen=True, slots=True)
class BootFile:
    """A file in a folder with kernels, by its path there."""

    folder: BootFolder
    path: str

    @property
    def shown(self) -> str:
        """Its path in the system."""
        return self.folder.point + self.path

    def open(self) -> BinaryIO:
        """Return it opened for reading. Raises RemetalError if it is not there."""
        file = self.folder.open(self.path)
        if file is None:
            raise RemetalError(f"{self.shown} is not there")
        return file

    def append(self, data: bytes) -> None:
        """Put bytes behind it, durable on return; it stays as it was if that fails, which raises RemetalError."""
        self.folder.append(self.path, data)


def find_boot_folders(system: System, restored: Restored, root: Path) -> Sequence[BootFolder]:
    """Return the folders that hold kernels of a system whose root is mounted at `root`. Raises RemetalError."""
    folders = list(_fat_folders(system, restored))
    if any(each.point == _BOOT for each in folders):
        return folders
    return (RootFolder(root, _BOOT), *folders)


def _fat_folders(system: System, restored: Restored) -> Iterator[BootFolder]:
    for point in _FIRMWARE_POINTS:
        space = system.mounts.get(point)
        if space is not None and restored.is_type(space, "vfat") and restored.is_restored(space):
            yield FatFolder(probe_fat(restored.span(space)), point)


@dataclass(frozen=True, slots=True)
class RootFolder:
    """A folder of the system mounted at `root`."""

    root: Path
    point: str

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder."""
        return list_inside(self.root, self.point + folder)

    def open(self, path: str) -> BinaryIO | None:
        """Return a regular file, opened for reading."""
        place = find_inside(self.root, self.point + path)
        return place.open("rb") if place is not None and place.is_file() else None

    def append(self, path: str, data: bytes) -> None:
        """Put bytes behind a regular file, whose own blocks stay where they are."""
        place = find_inside(self.root, self.point + path)
        if place is None:
            raise RemetalError(f"{self.point}{path} vanished from the restored system while it was being adapted")
        fd = os.open(place, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise RemetalError(f"{self.point}{path} is no regular file")
            try:
                _write_behind(fd, data, found.st_size)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(fd, found.st_size)
                    os.fsync(fd)
                raise RemetalError(
                    f"{len(data)} bytes cannot be put behind {self.point}{path}: {os.strerror(error.errno or 0)}",
                    hint=f"Make room in {self.point}, for example by removing kernels that are not needed any more.",
                ) from error
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class FatFolder:
    """A FAT that the system has mounted at `point`."""

    tree: FatTree
    point: str

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder."""
        start = f"{folder.rstrip('/')}/".lower()
        inner = (path[len(start) :].rstrip("/") for path in self.tree.paths if path.lower().startswith(start))
        return sorted({name for name in inner if name and "/" not in name})

    def open(self, path: str) -> BinaryIO | None:
        """Return a file, opened for reading."""
        found = self.tree.find(path)
        return BytesIO(read_fat_file(self.tree.span, found)) if found is not None else None

    def append(self, path: str, data: bytes) -> None:
        """Write the file anew with these bytes behind it; if that fails, as it was."""
        found = self.tree.find(path) or path
        old = read_fat_file(self.tree.span, found)
        try:
            apply_fat_file(self.tree, found, old + data)
        except RemetalError:
            apply_fat_file(self.tree, found, old)
            raise


def _write_behind(fd: int, data: bytes, at: int) -> None:
    os.posix_fallocate(fd, at, len(data))
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    os.fsync(fd)
