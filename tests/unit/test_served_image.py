"""An image as a file: read from everywhere at once, mounted, replayed, damaged, killed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab import CHECKOUT
from remetal.errors import DamagedError
from remetal.events import Event, Progress, silent
from remetal.image import served
from remetal.image.copy import mounted_image
from remetal.image.served import served_image
from remetal.repository.reader import Reader, open_reader
from remetal.repository.snapshots import ImageRecord, Snapshot
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted, probe_mounts
from remetal.units import MIB
from tests.real_disks import blank, program
from tests.remaking import capture
from tests.repositories import CHUNK, Site, backup, make_site


@pytest.fixture(scope="module")
def site() -> Site:
    return make_site()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let images be shown in a folder of the test's own, since others may show some at the same time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@contextmanager
def opened(site: Site, data: bytes) -> Iterator[tuple[Reader, ImageRecord]]:
    """Back bytes up, chunks of nothing but zeros as holes, and open a reader for them."""
    zeros = bytes(CHUNK)
    holes = [start // CHUNK for start in range(0, len(data), CHUNK) if zeros.startswith(data[start : start + CHUNK])]
    snapshot: Snapshot = backup(site, data, holes=holes)
    with open_reader(site.repository, site.key, snapshot) as reader:
        yield reader, snapshot.images[0]


@contextmanager
def captured(site: Site, disk: Path) -> Iterator[tuple[Reader, ImageRecord]]:
    """Back a disk file up, and open a reader for it."""
    snapshot = capture(site, Span(disk, 0, disk.stat().st_size))
    with open_reader(site.repository, site.key, snapshot) as reader:
        yield reader, snapshot.images[0]


def scattered(size: int, seed: int = 1) -> bytes:
    """Return bytes with chunks of noise, of zeros that are stored as such, and of holes."""
    chance = random.Random(seed)
    data = bytearray(size)
    for start in range(0, size, CHUNK):
        kind = chance.randrange(4)
        if kind < 2:
            data[start : start + CHUNK] = chance.randbytes(min(CHUNK, size - start))
        elif kind == 2:
            data[min(start + CHUNK, size) - 1] = 7
    return bytes(data)


def test_every_byte_is_where_it_was(site: Site) -> None:
    """Read from several threads at random places, and the whole file by another program; the size is an odd one."""
    data = scattered(5 * MIB + 12_345)
    with opened(site, data) as (reader, image), served_image(reader, image, part="sda:1") as path:
        assert path.stat().st_size == len(data)
        fd = os.open(path, os.O_RDONLY)

        def look(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(60):
                offset, size = chance.randrange(len(data)), chance.randrange(1, 300_000)
                assert os.pread(fd, size, offset) == data[offset : offset + size]

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(look, range(4)))
        assert os.pread(fd, 10, len(data)) == b""
        os.close(fd)
        said = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout
        assert said.split()[0] == hashlib.sha256(data).hexdigest()


def test_only_few_chunks_are_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CACHE", 4 * CHUNK)
    monkeypatch.setattr(served, "AHEAD", 2 * CHUNK)
    data = random.Random(2).randbytes(3 * MIB)
    with opened(site, data) as (reader, image), ThreadPoolExecutor(2) as pool:
        chunks = served._Chunks(reader, image, pool)
        for offset in [*range(0, len(data), 50_000), 17]:
            assert b"".join(chunks.read(offset, min(50_000, len(data) - offset))) == data[offset : offset + 50_000]
            assert len(chunks._kept) <= 4


def test_what_is_written_is_forgotten(site: Site) -> None:
    data = scattered(MIB + 777)
    with opened(site, data) as (reader, image):
        with served_image(reader, image, part="sda:1") as path:
            expected = bytearray(data)
            chance = random.Random(3)
            with path.open("r+b", buffering=0) as file:
                for _ in range(200):
                    offset = chance.randrange(len(data) - 9000)
                    new = chance.randbytes(chance.randrange(1, 9000))
                    file.seek(offset)
                    assert file.write(new) == len(new)
                    expected[offset : offset + len(new)] = new
                os.fsync(file.fileno())
                with pytest.raises(OSError, match="No space left"):
                    os.pwrite(file.fileno(), b"x", len(data))
            Path("/proc/sys/vm/drop_caches").write_text("3")
            assert path.read_bytes() == bytes(expected)
        with served_image(reader, image, part="sda:1") as path:
            assert path.read_bytes() == data


def test_progress_ends_where_it_should(site: Site) -> None:
    told: list[Event] = []
    data = random.Random(4).randbytes(12 * MIB)
    with (
        opened(site, data) as (reader, image),
        served_image(reader, image, part="sda:1", report=told.append) as path,
    ):
        assert path.read_bytes() == data
        assert path.read_bytes() == data
    counts = [event.done for event in told if isinstance(event, Progress)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], len(counts) > 3) == (0, image.used, True)


def made(path: Path, size: int, *make: str) -> Path:
    """Make a file system with a few files in a disk file."""
    program(*make, blank(path, size))
    with attach_loop(Span(path, 0, size), writable=True) as device, mounted(device) as folder:
        (folder / "large").write_bytes(random.Random(5).randbytes(3_000_000))
        (folder / "folder").mkdir()
        (folder / "folder" / "small").write_text("here\n")
    return path


@pytest.mark.parametrize(
    ("kind", "size", "make"),
    [("ext4", 24 * MIB, ("mkfs.ext4", "-q")), ("xfs", 300 * MIB, ("mkfs.xfs", "-q"))],
)
def test_an_image_can_be_mounted(site: Site, tmp_path: Path, kind: str, size: int, make: tuple[str, ...]) -> None:
    disk = made(tmp_path / "disk.img", size, *make)
    with (
        captured(site, disk) as (reader, image),
        mounted_image(reader, image, kind=kind, part="sda:1") as folder,
    ):
        assert program("cat", folder / "folder" / "small") == "here\n"
        found = program("sha256sum", folder / "large").split()[0]
        assert found == hashlib.sha256(random.Random(5).randbytes(3_000_000)).hexdigest()
        touched = subprocess.run(["touch", folder / "x"], capture_output=True, text=True, check=False)
        assert "Read-only file system" in touched.stderr


@pytest.mark.parametrize(
    ("kind", "size", "make"),
    [("ext4", 24 * MIB, ("mkfs.ext4", "-q")), ("xfs", 300 * MIB, ("mkfs.xfs", "-q"))],
)
def test_a_journal_is_replayed(site: Site, tmp_path: Path, kind: str, size: int, make: tuple[str, ...]) -> None:
    """The copy is taken of a mounted file system: the file is known to its journal only."""
    disk, copy = made(tmp_path / "disk.img", size, *make), tmp_path / "copy.img"
    with attach_loop(Span(disk, 0, size), writable=True) as device, mounted(device) as folder:
        (folder / "late").write_text("only the journal knows\n")
        fd = os.open(folder / "late", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        program("dd", f"if={disk}", f"of={copy}", "bs=1M", "conv=sparse", "status=none")
    with captured(site, copy) as (reader, image):
        with mounted_image(reader, image, kind=kind, part="sda:1") as folder:
            assert program("cat", folder / "late") == "only the journal knows\n"
        with served_image(reader, image, part="sda:1") as path:
            said = program("sha256sum", path).split()[0]
    assert said == program("sha256sum", copy).split()[0], "the image itself is as it was"


def lose_packs(site: Site) -> Site:
    """Return the site without its packs, and without the parity that would bring them back."""
    lost = site.copy()
    for name in [name for name in lost.store.objects if name.startswith(("packs/", "parity/"))]:
        del lost.store.objects[name]
    return lost


def read_wrongly(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error") as caught:
        os.pread(fd, 4096, 0)
    os.close(fd)
    assert caught.value.errno == errno.EIO


def test_damage_is_an_error_for_the_reader_and_named_afterwards(tmp_path: Path) -> None:
    site = make_site()
    data = made(tmp_path / "disk.img", 24 * MIB, "mkfs.ext4", "-q").read_bytes()
    snapshot = backup(site, data)
    broken = lose_packs(site)
    with open_reader(broken.repository, broken.key, snapshot) as reader:
        with pytest.raises(DamagedError, match="missing"), served_image(reader, snapshot.images[0], part="x") as path:
            read_wrongly(path)
        with (
            pytest.raises(DamagedError, match="missing"),
            mounted_image(reader, snapshot.images[0], kind="ext4", part="x"),
        ):
            raise AssertionError("a file system without its blocks cannot be mounted")
    assert leftovers(tmp_path) == []


def leftovers(folder: Path) -> list[str]:
    """Return what is still mounted of images in a folder, loop devices over them, and our threads that answer."""
    mounts = [str(mount.target) for mount in probe_mounts() if mount.target.is_relative_to(folder)]
    loops = [line for line in program("losetup", "--list", "--noheadings").splitlines() if f"{folder}/remetal-" in line]
    return mounts + loops + [thread.name for thread in threading.enumerate() if thread.name == "fuse"]


def test_an_error_leaves_nothing_behind(site: Site, tmp_path: Path) -> None:
    left: list[tuple[Path, int]] = []

    def fail() -> None:
        with opened(site, scattered(MIB)) as (reader, image), served_image(reader, image, part="x") as path:
            left.append((path, os.open(path, os.O_RDONLY)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    ((path, fd),) = left
    assert leftovers(tmp_path) == []
    with pytest.raises(OSError, match=r"not connected|aborted|Input/output"):
        os.pread(fd, 4096, 0)
    with suppress(OSError):
        os.close(fd)
    assert not path.exists()


_KILLED = """
import random, sys, time
from pathlib import Path
from remetal.image.copy import mounted_image
from remetal.repository.reader import open_reader
from remetal.system.mounts import enter_private_mounts
from remetal.system.run import start
from tests.remaking import capture
from tests.repositories import backup, make_site
enter_private_mounts()
site = make_site()
snapshot = backup(site, Path(sys.argv[1]).read_bytes())
with open_reader(site.repository, site.key, snapshot) as reader:
    with mounted_image(reader, snapshot.images[0], kind="ext4", part="x") as folder:
        reading = f"while true; do cat {folder}/large >/dev/null; echo 3 >/proc/sys/vm/drop_caches; done"
        with start(["bash", "-c", reading]):
            print("ready", flush=True)
            time.sleep(60)
"""


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    """Killed while another program reads: the kernel ends the connection, the mount and the loop device."""
    disk = made(tmp_path / "disk.img", 24 * MIB, "mkfs.ext4", "-q")
    argv = [sys.executable, "-c", _KILLED, str(disk)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(argv, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    end = time.monotonic() + 20
    while leftovers(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    assert leftovers(tmp_path) == []


def test_silence_is_possible(site: Site) -> None:
    with opened(site, b"x" * 5000) as (reader, image), served_image(reader, image, part="x", report=silent) as path:
        assert path.read_bytes() == b"x" * 5000


def test_the_head_is_a_place_on_a_disk(site: Site, tmp_path: Path) -> None:
    """What is written there lasts, also by a write that goes over its end; the rest is the image's, and forgotten."""
    image, head = scattered(3 * MIB), 1 * MIB + 4096
    disk = blank(tmp_path / "disk.img", 4 * MIB)
    disk.write_bytes(scattered(4 * MIB, seed=2))
    before = disk.read_bytes()
    change = b"changed " * 8192
    place = head - len(change) // 2
    with opened(site, image) as (reader, record):
        for _ in range(2):
            with served_image(reader, record, part="x", head=Span(disk, 8192, head)) as path:
                shown = program("sha256sum", path).split()[0]
                there = disk.read_bytes()
                assert shown == hashlib.sha256(there[8192 : 8192 + head] + image[head:]).hexdigest()
                (tmp_path / "change").write_bytes(change)
                words = ("bs=4096", f"seek={place // 4096}", "conv=notrunc")
                program("dd", f"if={tmp_path / 'change'}", f"of={path}", *words)
    kept = change[: head - place]
    assert disk.read_bytes() == before[: 8192 + place] + kept + before[8192 + head :]
