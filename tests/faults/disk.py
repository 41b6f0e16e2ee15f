"""A disk that keeps only what was synced: file contents and the names in folders, each by itself.

It is told every call that changes something (`tests.faults.calls`), and says what may be found after a power cut. That
is less than any real file system keeps, and all that POSIX promises: fsync(2) of a file makes its content durable but
no name of it, fsync(2) of a folder makes the names in it durable but no content.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from remetal.storage.store import is_name


@dataclass
class _File:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class Disk:
    """What stands below a folder, and what of it is durable; all that is there at the beginning is."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _read(root)

    def done(self, call: str, *words: str | bytes) -> None:
        """Take in a call that was carried out; reading calls change nothing."""
        paths = [Path(word).relative_to(self._root).parts for word in words if isinstance(word, str)]
        match call:
            case "make":
                self._folder(paths[0][:-1]).names.setdefault(paths[0][-1], _File())
            case "mkdir":
                self._folder(paths[0][:-1]).names[paths[0][-1]] = _Folder()
            case "writev":
                file = self._find(paths[0])
                assert isinstance(file, _File)
                assert isinstance(words[1], bytes)
                file.content += words[1]
            case "link":
                self._folder(paths[1][:-1]).names[paths[1][-1]] = self._find(paths[0])
            case "rename" | "replace":
                found = self._folder(paths[0][:-1]).names.pop(paths[0][-1])
                self._folder(paths[1][:-1]).names[paths[1][-1]] = found
            case "unlink":
                del self._folder(paths[0][:-1]).names[paths[0][-1]]
            case "fsync":
                self._sync(self._find(paths[0]))

    @staticmethod
    def _sync(place: _File | _Folder) -> None:
        if isinstance(place, _File):
            place.synced = place.content
        else:
            place.synced = dict(place.names)

    def after_power_cut(self, chance: random.Random | None = None) -> dict[str, dict[str, bytes]]:
        """Return the objects in each folder at the top: only what was synced, or by chance more than that."""
        found: dict[str, dict[str, bytes]] = {}
        for name, folder in self._survivors(self._top, chance).items():
            if isinstance(folder, _Folder):
                found[name] = {}
                self._collect(folder, "", chance, found[name])
        return found

    def _collect(self, folder: _Folder, name: str, chance: random.Random | None, found: dict[str, bytes]) -> None:
        for child, place in self._survivors(folder, chance).items():
            path = f"{name}/{child}" if name else child
            if isinstance(place, _Folder):
                self._collect(place, path, chance, found)
            elif is_name(path):
                found[path] = place.synced if chance is None else _torn(place, chance)

    @staticmethod
    def _survivors(folder: _Folder, chance: random.Random | None) -> dict[str, _File | _Folder]:
        """Return the names that were synced; by chance each change since then is there or not."""
        names = dict(folder.synced)
        if chance is None:
            return names
        for name in sorted(folder.names.keys() | folder.synced.keys()):
            if folder.names.get(name) is not folder.synced.get(name) and chance.random() < 0.5:
                if name in folder.names:
                    names[name] = folder.names[name]
                else:
                    del names[name]
        return names

    def _folder(self, parts: tuple[str, ...]) -> _Folder:
        found = self._find(parts)
        assert isinstance(found, _Folder)
        return found

    def _find(self, parts: tuple[str, ...]) -> _File | _Folder:
        place: _File | _Folder = self._top
        for part in parts:
            assert isinstance(place, _Folder)
            place = place.names[part]
        return place


def _torn(file: _File, chance: random.Random) -> bytes:
    """Return what a file may hold whose content was not synced: nothing, a part of it, zeros, or all."""
    if file.content == file.synced:
        return file.content
    half = len(file.content) // 2
    return chance.choice([file.synced, file.content[:half], bytes(len(file.content)), file.content])


def _read(folder: Path) -> _Folder:
    found = _Folder()
    for path in folder.iterdir():
        if path.is_dir():
            found.names[path.name] = _read(path)
        else:
            data = path.read_bytes()
            found.names[path.name] = _File(data, data)
    found.synced = dict(found.names)
    return found
