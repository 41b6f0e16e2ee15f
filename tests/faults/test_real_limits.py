"""The real thing: a disk without a free byte, one that is remounted read-only, a process without descriptors."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.errors import EXIT_CODES
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import MIB
from tests.commands.site import REMETAL, Ran, Site
from tests.faults.counting import StartCount
from tests.repositories import noise

_DISK = 12 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on an ext4 of 12 MiB."""
    image = tmp_path / "small.img"
    with image.open("wb") as file:
        file.truncate(_DISK)
    run(["mkfs.ext4", "-q", "-m", "0", image])
    with attach_loop(Span(image, 0, _DISK), writable=True) as device, mounted(device) as folder:
        yield folder


def site_on(folder: Path, tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.environment["REMETAL_REPO"] = str(folder / "repository")
    site.remetal("init", "--quiet", "--chunk-size", "64K")
    return site


def backup(site: Site, name: str, chunks: int, code: int | None = 0) -> Ran:
    disk = site.folder / "disk.img"
    disk.write_bytes(noise(name, chunks))
    return site.remetal("backup", "--machine", "web", "--disk", disk, "--json", "--quiet", code=code)


def restored(site: Site, snapshot: str) -> bytes:
    target = site.folder / "target.img"
    target.unlink(missing_ok=True)
    site.remetal("restore", snapshot, "--map", f"disk.img={target}", "--yes", "--quiet")
    return target.read_bytes()


def ids(site: Site) -> list[str]:
    return [each["id"] for each in site.remetal("snapshots", "--json").json]


def test_a_disk_that_fills_up_is_pruned_and_goes_on(small_disk: Path, tmp_path: Path, counts: StartCount) -> None:
    count = counts("real limits, full disk")
    site = site_on(small_disk, tmp_path)
    backup(site, "first", 32)
    backup(site, "second", 32)
    ran = backup(site, "third", 120, code=6)
    assert "No space left on device" in ran.err
    assert "free there" in ran.err
    count.told()
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        size = MIB
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    assert os.statvfs(small_disk).f_bavail == 0
    with count.case():
        old, new = ids(site)
        site.remetal("forget", "--keep-last", "1")
        site.remetal("prune", "--grace", "0")
        assert ids(site) == [new]
        site.remetal("check", "--read-data")
        assert restored(site, new) == noise("second", 32)
        backup(site, "fourth", 8)
        assert len(ids(site)) == 2
        assert old not in ids(site)


def test_a_disk_that_becomes_read_only(small_disk: Path, tmp_path: Path, counts: StartCount) -> None:
    count = counts("real limits, read-only disk")
    site = site_on(small_disk, tmp_path)
    backup(site, "first", 8)
    (first,) = ids(site)
    run(["mount", "-o", "remount,ro", small_disk])
    commands = [
        ("forget", first, "--even-newest"),
        ("prune", "--grace", "0"),
        ("key", "change-passphrase", "--new-passphrase-file", str(site.secret)),
    ]
    for words in commands:
        with count.case(words[0]):
            assert "read-only" in site.remetal(*words, code=6).err
        count.told()
    with count.case("backup"):
        assert "read-only" in backup(site, "second", 8, code=6).err
    count.told()
    with count.case("restore"):
        assert restored(site, first) == noise("first", 8)
    run(["mount", "-o", "remount,rw", small_disk])
    with count.case("after it", faults=0):
        backup(site, "second", 8)
        site.remetal("prune", "--grace", "0")
        site.remetal("check", "--read-data")
        assert restored(site, first) == noise("first", 8)


def test_a_process_without_descriptors(tmp_path: Path, counts: StartCount) -> None:
    """However many it may have: it does all of its work, or says that it cannot."""
    count = counts("real limits, no descriptors")
    site = Site(tmp_path)
    site.remetal("init", "--quiet", "--chunk-size", "64K")
    backup(site, "first", 8)
    (first,) = ids(site)
    disk = site.folder / "disk.img"
    disk.write_bytes(noise("second", 8))
    codes: list[int] = []
    for limit in (9, 12, 15, 18, 64):
        done = subprocess.run(
            [REMETAL, "backup", "--machine", "web", "--disk", disk, "--quiet"],
            capture_output=True,
            text=True,
            env=site.environment,
            stdin=subprocess.DEVNULL,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),  # noqa: B023
        )
        codes.append(done.returncode)
        with count.case(limit):
            assert done.returncode in EXIT_CODES
            assert "Traceback" not in done.stderr
            assert "error in remetal itself" not in done.stderr, done.stderr
            assert done.returncode == 0 or done.stderr
            there = ids(site)
            assert len(there) == 1 + codes.count(0)
        if done.returncode:
            count.told()
    with count.case("after it", faults=0):
        site.remetal("check", "--read-data")
        assert restored(site, first) == noise("first", 8)
    assert codes[-1] == 0
    assert codes[0] != 0
