"""The data that is measured: real volumes, made once and kept in the cache.

- A Debian root on ext4 and the same on XFS: an installed system, more than 2 GB used.
- A mixed volume, 8 GB used: that root's files, compressed archives, a database file, and zeros.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.cache import cached
from remetal.media.apt import probe_apt_sources
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import GIB, MIB

PACKAGES = (
    *("linux-image-amd64", "systemd-sysv", "initramfs-tools", "openssh-server", "vim", "git", "python3-scipy"),
    *(
        "build-essential",
        "clang",
        "postgresql",
        "mariadb-server",
        "apache2",
        "php",
        "default-jdk-headless",
        "golang-go",
    ),
)
_SEED = 7
_VERSION = "1"
"""Goes up when the volumes are to be made in another way."""


@dataclass(frozen=True)
class Volume:
    """A disk file that holds one file system: its name in the tables, and what blkid and partclone call it."""

    name: str
    path: Path
    kind: str
    partclone: str


def find_root(kind: str) -> Volume:
    """Return an installed Debian on `kind` ("ext4" or "xfs")."""
    fill = _install if kind == "ext4" else _copy_root
    path = cached(f"bench-root-{kind}", (kind, *_inputs()), lambda path: _make(path, kind, 5 * GIB, fill))
    return Volume(f"Debian root, {kind}", path, kind, {"ext4": "extfs", "xfs": "xfs"}[kind])


def find_mixed() -> Volume:
    """Return a volume of text, binaries, compressed archives, a database and zeros."""
    path = cached("bench-mixed", ("mixed", *_inputs()), lambda path: _make(path, "ext4", 11 * GIB, _fill_mixed))
    return Volume("mixed, ext4", path, "ext4", "extfs")


def find_noise() -> Path:
    """Return a file of 1 GiB that looks encrypted."""
    return cached("bench-noise", ("1",), lambda path: _write_noise(path, 1024, random.Random(_SEED)))


@contextmanager
def opened(volume: Volume) -> Iterator[Path]:
    """Yield a folder with the volume's files, read-only."""
    with attach_loop(Span(volume.path, 0, volume.path.stat().st_size)) as device, mounted(device) as folder:
        yield folder


def _write_noise(path: Path, mebibytes: int, noise: random.Random) -> None:
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(noise.randbytes(MIB))


def _inputs() -> list[str]:
    sources = probe_apt_sources()
    return [_VERSION, *PACKAGES, sources.distribution, sources.suite, *sources.lines]


def _make(path: Path, kind: str, size: int, fill: Callable[[Path], None]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    with attach_loop(Span(path, 0, size), writable=True) as device:
        run([f"mkfs.{kind}", "-q", "-L", "bench", device])
        with mounted(device) as folder:
            fill(folder)


def _install(folder: Path) -> None:
    sources = probe_apt_sources()
    listing = folder.parent / f"{folder.name}.list"
    listing.write_text("\n".join(sources.lines) + "\n")
    try:
        run(
            [
                *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--skip=output/mknod"),
                f"--include={','.join(PACKAGES)}",
                *(f"--aptopt={option}" for option in sources.options),
                *(sources.suite, folder, listing),
            ],
        )
    finally:
        listing.unlink()


def _copy_root(folder: Path) -> None:
    with opened(find_root("ext4")) as source:
        run(["cp", "-a", f"{source}/.", folder])


def _fill_mixed(folder: Path) -> None:
    with opened(find_root("ext4")) as source:
        run(["cp", "-a", f"{source}/usr", f"{source}/var", folder])
        archive = folder / "archives" / "usr.tar.zst"
        archive.parent.mkdir()
        run(["tar", "--zstd", "-C", source, "-cf", archive, "usr"])
    noise = random.Random(_SEED)
    _write_noise(archive.parent / "encrypted.bin", 1024, noise)
    _fill_database(folder / "database.sqlite", noise)
    with (folder / "zeros.img").open("wb") as file:
        for _ in range(1024):
            file.write(bytes(MIB))


def _fill_database(path: Path, noise: random.Random) -> None:
    """Make a table of orders with an index on a random key, about 2 GB large."""
    words = [noise.randbytes(noise.randint(2, 6)).hex() for _ in range(5000)]
    with closing(sqlite3.connect(path)) as database:
        database.executescript("pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -400000")
        database.execute(
            "create table orders (id integer primary key, key blob, customer text, amount real, note text)"
        )
        database.executemany(
            "insert into orders (key, customer, amount, note) values (?, ?, ?, ?)",
            (
                (noise.randbytes(16), noise.choice(words), noise.random() * 1e4, " ".join(noise.choices(words, k=20)))
                for _ in range(7_000_000)
            ),
        )
        database.execute("create index by_key on orders (key)")
        database.commit()
