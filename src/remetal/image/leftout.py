"""Which bytes of a mounted file system belong to files that are left out of its image, though they stay files.

A file's extents are left out, and nothing else of it: it comes back with its name and its size, and with zeros, or with
what stood there on the target, as its content. So the file system is as sound as before. What anything else depends on
is captured: extents that files share, those that are not whole blocks of plain data, and all of a file that has another
name elsewhere. Only file systems that say where a file lies on their own device are asked (`KINDS`).

While a file system is held still, everybody waits for this walk. So it has a `Budget`, and a place for which that does
not last is captured as if nobody had named it.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from remetal.image.ranges import Extent, Extents, subtract
from remetal.ondisk.bitmaps import merge
from remetal.system.fiemap import is_realtime, open_inside, probe_extents
from remetal.units import align_down, align_up

KINDS = frozenset({"ext2", "ext3", "ext4", "xfs"})
"""File systems, by blkid's names, whose files can be left out."""

FEW = 20_000
"""So many files and folders may be looked at while file systems are held still."""
PATIENCE = 10.0
"""Seconds for the walk before, which may have to wait for a slow disk."""
_MOMENT = 0.5
"""Seconds for the first walk while a file system is held still."""
_LATER = 3
"""How many times as long a later one may take: what was left out before would have to be read at once."""
_MANY = 10 * FEW
"""So many files and folders are looked at where nobody waits."""
_PIECES = 16
"""So many extents of a file cost as much as another file."""
_GRACE = 0.2
"""Seconds that a walk may take to notice that the moment is over."""
_OPEN, _SETS = 64, 4
"""So many files are closed at once, and so many such sets may wait for that."""


@dataclass(frozen=True, slots=True)
class Place:
    """A regular file, or all of them below a folder: `path` as the machine knows it.

    It lies at `inside` ("." for all of it) of what is mounted at `folder`, which is the folder `root` of its file
    system. Only files whose names end with `suffix` count, and of each the first `keep` bytes do not.
    """

    path: Path
    folder: Path
    inside: str
    suffix: str = ""
    keep: int = 0
    root: str = "/"


class SpentError(Exception):
    """A budget is used up."""


class Budget:
    """How many files and folders may be looked at, and for how many seconds from now on."""

    def __init__(self, entries: int, seconds: float = float("inf")) -> None:
        self._entries = entries
        self._end = time.monotonic() + seconds

    def spend(self) -> None:
        """Take one. Raises SpentError if that is too many, or too late."""
        self._entries -= 1
        if self._entries < 0 or time.monotonic() > self._end:
            raise SpentError


_Name: TypeAlias = tuple[int, str]
"""A name of a file: the number of the folder that it stands in, and how it is called there."""


@dataclass(slots=True)
class _File:
    """A file: the place in which it was found first, how many names it has, and in which places these were seen."""

    place: Place
    links: int
    extents: list[Extent]
    names: dict[_Name, Place] = field(default_factory=dict)


class Omission:
    """What is left out of one mounted file system with blocks of `block` bytes; `device` is its st_dev."""

    def __init__(self, device: int, block: int, places: Sequence[Place]) -> None:
        self.places = list(places)
        self.given_up: list[Place] = []
        self.sizes: dict[Path, int] = {}
        """How many bytes the last look has left out, by the places' paths; only where there are any."""
        self._device = device
        self._block = block
        self._moment = _MOMENT

    def rehearse(self, budget: Budget) -> None:
        """Walk while nobody waits, so that the next walk is quick; give up what takes too long even so."""
        self._take(self._walk(budget, aside=False))
        self._take(self._walk(Budget(FEW, _MOMENT / 2), aside=False))

    def take_from(self, used: Iterable[Extent], *, held: bool, copy: Path | None = None) -> Extents:
        """Return what is used without what is left out now; if the file system is held still, within a moment.

        `copy` is where all of a snapshot of the file system is mounted, if that is what is to be looked at.
        """
        files = self._take(self._walk_soon() if held else self._walk(Budget(_MANY), aside=False, copy=copy))
        self._moment = _LATER * _MOMENT
        self.sizes = {}
        for each in files:
            size = sum(extent.size for extent in each.extents)
            if size:
                self.sizes[each.place.path] = self.sizes.get(each.place.path, 0) + size
        ranges = sorted((extent.start, extent.size) for each in files for extent in each.extents)
        return Extents(subtract(used, (Extent(*each) for each in merge(ranges))))

    def _walk_soon(self) -> tuple[list[_File], int]:
        """Walk, but for no longer than a moment: who closes a file on a frozen XFS may hold it until that thaws."""
        pool = ThreadPoolExecutor(1)
        walk = pool.submit(self._walk, Budget(2 * FEW, self._moment), aside=True)
        pool.shutdown(wait=False)
        try:
            return walk.result(self._moment + _GRACE)
        except TimeoutError:
            return [], 0

    def _walk(self, budget: Budget, *, aside: bool, copy: Path | None = None) -> tuple[list[_File], int]:
        """Return the files in the places for which the budget lasts, and how many places these are."""
        done = 0
        device = copy.stat().st_dev if copy else self._device
        with closing(_Closer(aside=aside)) as closer:
            walk = _Walk(device, self._block, budget, closer)
            with suppress(SpentError):
                for place in self.places:
                    if copy:
                        walk.go(place, copy, str(Path(place.root, place.inside).relative_to("/")))
                    else:
                        walk.go(place, place.folder, place.inside)
                    done += 1
        return list(walk.files.values()), done

    def _take(self, walked: tuple[list[_File], int]) -> list[_File]:
        """Return which of these files are left out, each once; give up the places that were not done."""
        files, done = walked
        self.given_up += self.places[done:]
        self.places = self.places[:done]
        return [each for each in files if max(each.links, 1) <= self._seen(each)]

    def _seen(self, file: _File) -> int:
        """Return how many names of a file are in places that were not given up."""
        return sum(place in self.places for place in file.names.values())


class _Walk:
    """Collects the files of one place after the other, by their numbers. What cannot be looked at is in none."""

    def __init__(self, device: int, block: int, budget: Budget, closer: _Closer) -> None:
        self.files: dict[int, _File] = {}
        self._device = device
        self._block = block
        self._budget = budget
        self._closer = closer

    def go(self, place: Place, folder: Path, inside: str) -> None:
        """Add the files of a place, `inside` of a folder. Raises SpentError if the budget does not last for them."""
        with self._opened(None, str(folder)) as root:
            if root is None or os.fstat(root).st_dev != self._device:
                return  # something else is mounted there by now
            waiting = [inside]
            while waiting:
                path = waiting.pop()
                with self._opened(root, path) as found, suppress(OSError):
                    if found is None:
                        continue
                    if stat.S_ISDIR(os.fstat(found).st_mode):
                        waiting += [f"{path}/{each}" for each in self._read(found, place)]
                    else:
                        parent, name = os.path.split(path)
                        self._add(found, (os.stat(parent or ".", dir_fd=root).st_ino, name), place)

    def _read(self, folder: int, place: Place) -> list[str]:
        """Add the files in an open folder, and return the names of the folders in it."""
        folders = []
        number = os.fstat(folder).st_ino
        with os.scandir(folder) as entries, suppress(OSError):
            for entry in entries:
                self._budget.spend()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False) and entry.name.endswith(place.suffix):
                    with self._opened(folder, entry.name) as file:
                        if file is not None:
                            self._add(file, (number, entry.name), place)
        return folders

    def _add(self, file: int, name: _Name, place: Place) -> None:
        """Add an open file by one of its names."""
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            return
        if about.st_ino not in self.files:
            self.files[about.st_ino] = _File(place, about.st_nlink, list(self._extents(file, place.keep)))
        self.files[about.st_ino].names.setdefault(name, place)

    def _extents(self, file: int, keep: int) -> Iterator[Extent]:
        """Yield the whole blocks of an open file, behind its first `keep` bytes, that are its alone."""
        with suppress(OSError):
            if is_realtime(file):
                return
            for number, each in enumerate(probe_extents(file), 1):
                if number % _PIECES == 0:
                    self._budget.spend()
                start = align_up(each.place + max(0, keep - each.offset), self._block)
                end = align_down(each.place + each.size, self._block)
                if each.alone and start < end:
                    yield Extent(start, end - start)

    @contextmanager
    def _opened(self, folder: int | None, path: str) -> Iterator[int | None]:
        """Open a file or a folder, below an open one without leaving its file system; None if that cannot be."""
        try:
            fd = open_inside(folder, path) if folder is not None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            yield fd
        finally:
            self._closer.take(fd)


class _Closer:
    """Closes files, `aside` in a thread of its own, for which nobody waits.

    Before Linux 6.12 whoever closes a file on XFS may have to free what is set aside behind its end, and that waits for
    as long as the file system is frozen.
    """

    def __init__(self, *, aside: bool) -> None:
        self._files: list[int] = []
        self._pool = ThreadPoolExecutor(1) if aside else None
        self._waiting: list[Future[None]] = []

    def take(self, file: int) -> None:
        """Close a file, now or later. Raises SpentError if too many wait for that."""
        if self._pool is None:
            os.close(file)
            return
        self._files.append(file)
        if len(self._files) >= _OPEN:
            self._waiting = [each for each in self._waiting if not each.done()]
            self._waiting.append(self._pool.submit(_close, self._files))
            self._files = []
            if len(self._waiting) > _SETS:
                raise SpentError

    def close(self) -> None:
        """Close the rest."""
        if self._pool is not None:
            self._pool.submit(_close, self._files)
            self._pool.shutdown(wait=False)


def _close(files: Sequence[int]) -> None:
    for each in files:
        os.close(each)
