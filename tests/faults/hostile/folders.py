"""What may lie in a repository's folder on a stranger's disk, and is no object at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from remetal.repository.objects import CONFIG, HISTORY, INDEX, MACHINES, MAPS, PACKS, RECIPIENTS, SECRETS, SLOTS
from tests.faults.hostile.case import ALL, ESCAPES, NAMES, READ, Attacker, Case

_WORDS = (*ALL, READ)
_FOLDERS = (RECIPIENTS, SLOTS, MACHINES, SECRETS, PACKS, INDEX, MAPS, HISTORY)


def in_place(name: str, put: Callable[[Path], None], folder: str = "") -> Case:
    """Something else in the place of the first object below a folder."""

    def make(attacker: Attacker) -> None:
        found = attacker.repository / (attacker.names(folder)[0] if folder else CONFIG)
        found.unlink()
        put(found)

    return Case("folders", f"{folder or CONFIG} is {name}", make, _WORDS, frozenset({0, 3, 5, 6}))


def beside(name: str, put: Callable[[Path], None]) -> Case:
    """Something beside the objects, in every folder: nobody minds it."""

    def make(attacker: Attacker) -> None:
        for folder in [attacker.repository, *(path for path in attacker.repository.rglob("*") if path.is_dir())]:
            put(folder)

    return Case("folders", f"beside: {name}", make, _WORDS, frozenset({0, 3, 5, 6}), refused=False)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def listen(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def named(folder: Path, name: bytes) -> None:
    """Put a file there, of this name if a file can have it."""
    try:
        (folder / os.fsdecode(name.replace(b"/", b"-"))).write_bytes(b"x")
    except (OSError, ValueError):
        (folder / "other").write_bytes(b"x")


def rings(folder: Path) -> None:
    for number in range(40):
        (folder / f"ring{number}").symlink_to(".")


def tower(folder: Path) -> None:
    path = folder
    for _ in range(60):
        path = path / "d"
    path.mkdir(parents=True, exist_ok=True)
    (path / "x").write_bytes(b"")


def crowd(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number:064x}").write_bytes(b"")


_THINGS: dict[str, Callable[[Path], None]] = {
    "a link to /etc/shadow": lambda path: path.symlink_to("/etc/shadow"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a socket": listen,
    "/dev/zero itself": lambda path: os.mknod(path, 0o020600, os.makedev(1, 5)),
    "a folder": lambda path: path.mkdir(),
    "a sparse file of a TiB": sparse,
    "empty": lambda path: path.touch(),
}

CASES = [
    *(in_place(name, put) for name, put in _THINGS.items() if name != "a sparse file of a TiB"),
    *(in_place(name, put, folder) for folder in _FOLDERS for name, put in _THINGS.items()),
    *(
        beside(f"a file named {each[:30]!r}", lambda folder, each=each: named(folder, each.encode()))  # type: ignore[misc]
        for each in NAMES
    ),
    beside("a file named in no UTF-8", lambda folder: named(folder, b"\xff\xfe")),
    beside("a file with a title for the terminal", lambda folder: named(folder, ESCAPES.encode())),
    beside("links in a ring", rings),
    beside("folders, 60 deep", tower),
    beside("300 empty objects", crowd),
]
