"""Backing up a disk whose file system is in use, as a person does it; and whatever happens, it is let go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.disk import fresh_disk
from remetal.errors import RefusedError, UnavailableError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import Site

SIZE = 64 * MIB


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path)
    found.remetal("init")
    return found


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A disk with an ext4 on all of it."""
    with fresh_disk(tmp_path / "disk.img", SIZE) as device:
        yield device


@pytest.fixture
def folder(device: Path) -> Iterator[Path]:
    """Where it is mounted."""
    with mounted(device) as folder:
        (folder / "before").write_text("before")
        yield folder


@pytest.fixture
def slow_look(tmp_path: Path) -> Path:
    """What makes the look at a frozen file system take ten seconds; the file is there once it has begun.

    The first look is none: it only has everything read that will be looked at, while nothing is frozen.
    """
    tools, begun, before = tmp_path / "tools", tmp_path / "begun", tmp_path / "before"
    tools.mkdir()
    slow = tools / "dumpe2fs"
    slow.write_text(
        f'#!/bin/sh\nif test -e {before}; then touch {begun}; sleep 10; fi\ntouch {before}\nexec /sbin/dumpe2fs "$@"\n'
    )
    slow.chmod(0o755)
    return begun


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"{path} did not come")


def write_within(folder: Path, seconds: float) -> None:
    """Write a file; it must not wait for longer."""
    code = f"open({str(folder / 'after')!r}, 'w').write('after')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=seconds)


def test_a_disk_in_use_comes_back(site: Site, device: Path, folder: Path, tmp_path: Path) -> None:
    first = site.remetal("backup", "--disk", device, "--json").json
    assert 0 < first["pause"] < 10
    (volume,) = first["volumes"]
    assert (volume["kind"], volume["way"], volume["used"]) == ("ext4", "tracked", first["used"])
    (folder / "more").write_bytes(os.urandom(MIB))
    second = site.remetal("backup", "--disk", device)
    assert "File systems were held still for" in second.out
    assert re.search(rf"^{device.name} +ext4 +.* MiB +while in use, then held still", second.out, re.MULTILINE)
    assert "Holding" in second.err
    target = tmp_path / "target.img"
    site.remetal("restore", "latest", "--map", target, "--yes")
    subprocess.run(["e2fsck", "-fn", target], check=True, capture_output=True)
    with attach_loop(Span(target, 0, SIZE)) as copy, mounted(copy, options=("ro",)) as found:
        assert (found / "before").read_text() == "before"
        assert (found / "more").read_bytes() == (folder / "more").read_bytes()
    site.remetal("check", "--read-data")


def test_limits_are_heeded_but_for_the_pause(site: Site, device: Path, folder: Path) -> None:
    (folder / "more").write_bytes(os.urandom(12 * MIB))
    told = site.remetal("backup", "--disk", device, "--json", "--limit-read", "4M", "--nice", "19", "--ionice", "idle")
    assert told.json["seconds"] > 12 / 4 - 1
    assert told.json["pause"] < 2
    for words in (
        ["--limit-read", "9"],
        ["--limit-rate", "fast"],
        ["--nice", "20"],
        ["--ionice", "never"],
        ["--freeze-limit", "0"],
    ):
        site.remetal("backup", "--disk", device, *words, code=2)


def test_a_repository_on_what_is_held_still_is_refused(site: Site, device: Path, folder: Path) -> None:
    inside = folder / "repository"
    site.remetal("init", "--repo", inside)
    said = site.remetal("backup", "--disk", device, "--repo", inside, code=RefusedError.exit_code).err
    assert f"the repository {inside} lies on a file system that would be held still" in said
    write_within(folder, 10)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_backup_that_is_ended_while_it_holds_lets_go(
    site: Site, device: Path, folder: Path, slow_look: Path, tmp_path: Path, how: signal.Signals
) -> None:
    site.environment["PATH"] = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
    with site.start("backup", "--disk", device, "--freeze-limit", "600") as process:
        wait_for(slow_look)
        process.send_signal(how)
        write_within(folder, 8)
        assert process.wait(30) != 0
    assert site.remetal("snapshots", "--json").json == []
    site.environment["PATH"] = os.environ["PATH"]
    site.remetal("backup", "--disk", device)


def test_a_backup_that_is_stopped_lets_go_when_its_time_is_over(
    site: Site, device: Path, folder: Path, slow_look: Path, tmp_path: Path
) -> None:
    site.environment["PATH"] = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
    with site.start("backup", "--disk", device, "--freeze-limit", "1") as process:
        wait_for(slow_look)
        process.send_signal(signal.SIGSTOP)
        write_within(folder, 8)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == UnavailableError.exit_code, "what was read is not of one moment"
    assert site.remetal("snapshots", "--json").json == []


def test_a_second_backup_meanwhile_is_refused_and_lets_the_first_one_be(
    site: Site, device: Path, folder: Path, slow_look: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    other.remetal("init")
    quick = site.environment["PATH"] = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
    with site.start("backup", "--disk", device, "--freeze-limit", "600") as process:
        wait_for(slow_look)
        said = other.remetal("backup", "--disk", device, code=RefusedError.exit_code).err
        assert "somebody has frozen it already" in said
        assert process.wait(60) == 0
    write_within(folder, 8)
    site.environment["PATH"] = quick.partition(":")[2]
    assert [each["sequence"] for each in site.remetal("snapshots", "--json").json] == [1]
    assert other.remetal("snapshots", "--json").json == []


def test_a_disk_file_that_is_in_use_is_refused(site: Site, folder: Path, tmp_path: Path) -> None:
    said = site.remetal("backup", "--disk", tmp_path / "disk.img", code=RefusedError.exit_code).err
    assert f"is mounted read-write at {folder}" in said


def test_a_repository_in_a_disk_file_on_what_is_held_still_is_refused(
    site: Site, device: Path, folder: Path, tmp_path: Path
) -> None:
    with fresh_disk(folder / "vault.img", 24 * MIB) as inner, mounted(inner) as vault:
        site.remetal("init", "--repo", vault / "repository")
        said = site.remetal("backup", "--disk", device, "--repo", vault / "repository", code=3).err
    assert "lies on a file system that would be held still" in said


def test_what_is_written_to_though_nobody_has_mounted_it_is_no_image(
    site: Site, device: Path, folder: Path, tmp_path: Path
) -> None:
    """As the disk of a virtual machine, or one that is mounted where we do not see it."""
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(16 * MIB))
    with attach_loop(Span(other, 0, 16 * MIB), writable=True) as raw:
        disks = ("--disk", device, "--disk", raw)
        site.remetal("backup", *disks)
        with site.start("backup", *disks, "--limit-read", "4M", stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            while f"Capturing {raw.name}".encode() not in (line := process.stderr.readline()):
                assert line, "it has ended"
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={raw}", "bs=4k", "count=1", "oflag=direct", "status=none"], check=True
            )
            said = process.stderr.read().decode()
            assert process.wait(60) == UnavailableError.exit_code
    assert f"a program has written to {raw.name} ({raw}) while it was captured" in said
    assert [each["sequence"] for each in site.remetal("snapshots", "--json").json] == [1]


def test_what_another_file_system_was_mounted_over_is_refused(
    site: Site, device: Path, folder: Path, tmp_path: Path
) -> None:
    with fresh_disk(tmp_path / "other.img", SIZE) as other, mounted(other, target=folder):
        said = site.remetal("backup", "--disk", device, code=RefusedError.exit_code).err
    assert f"is mounted read-write at {folder}" in said


def test_what_is_no_longer_mounted_is_told_and_nothing_else_is_held(site: Site, device: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.toml"
    with mounted(device) as folder:
        hooks.write_text(f'[[hook]]\nrun = ["/bin/umount", "--lazy", "{folder}"]\nat = ["before-freeze"]\n')
        said = site.remetal("backup", "--disk", device, "--hooks", hooks, code=UnavailableError.exit_code).err
        assert f"is not mounted at {folder} any more" in said
        if not folder.is_mount():  # who has mounts of its own has unmounted it for itself only
            subprocess.run(["mount", device, folder], check=True)
    assert site.remetal("snapshots", "--json").json == []


def test_a_volume_that_grows_meanwhile_is_told(site: Site, tmp_path: Path) -> None:
    """Its file system may have grown with it, and what was planned does not show all of it."""
    image, hooks, grow = tmp_path / "disk.img", tmp_path / "hooks.toml", tmp_path / "grow"
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    device = Path(found.stdout.strip())
    try:
        grow.write_text(f"#!/bin/sh -e\ntruncate --size=+16M {image}\nlosetup --set-capacity {device}\n")
        grow.chmod(0o755)
        hooks.write_text(f'[[hook]]\nrun = ["{grow}"]\nat = ["before-freeze"]\n')
        with mounted(device):
            said = site.remetal("backup", "--disk", device, "--hooks", hooks, code=UnavailableError.exit_code).err
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert "has another size now than when this backup began" in said
    assert site.remetal("snapshots", "--json").json == []


def test_where_the_kernel_does_not_count_that_is_told(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(MIB))
    with attach_loop(Span(other, 0, MIB), writable=True) as raw:
        iostats = Path("/sys/class/block", raw.name, "queue/iostats")
        iostats.write_text("0")
        try:
            said = site.remetal("backup", "--disk", raw).err
        finally:
            iostats.write_text("1")
    assert f"the kernel does not count what is written to {raw.name} ({raw})" in said
