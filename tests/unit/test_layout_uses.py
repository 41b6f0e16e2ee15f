"""What uses a disk or a disk file now: found through partitions, loop devices, mounts, locks of other programs."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.layout.disks import check_capturable, describe_use
from remetal.layout.model import Layout
from remetal.layout.plan import PlanOptions, plan_restore
from remetal.layout.probe import probe_layout
from remetal.layout.targets import probe_target
from remetal.layout.uses import Use, disks_of_number
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from tests.real_disks import MIB, blank, fill, program

START, SECTORS = 2048, 40960


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = blank(tmp_path / "m.img", 32 * MIB)
    program("sfdisk", "-q", path, data=f"label: gpt\nstart={START},size={SECTORS}\n")
    fill(path, START, SECTORS, "mkfs.ext4", "-q")
    return path


def disks_behind(path: Path) -> set[str]:
    number = path.stat().st_dev
    return disks_of_number((os.major(number), os.minor(number)))


def check(path: Path) -> Layout:
    layout = probe_layout([path])
    check_capturable(layout, {layout.disks[0].name: path})
    return layout


def test_nobody_uses_it(disk: Path) -> None:
    assert describe_use(disk) == []
    assert check(disk).layer_on("m.img:1") is not None


def test_attached_is_not_used(disk: Path) -> None:
    """A loop device that a killed process left behind must not stand in the way of going on."""
    with attach_loop(Span(disk, START * 512, SECTORS * 512), writable=True):
        assert describe_use(disk) == []


def test_mounted_read_only_may_be_captured_but_not_overwritten(disk: Path) -> None:
    with (
        attach_loop(Span(disk, START * 512, SECTORS * 512)) as device,
        mounted(device, options=["ro", "noload"]) as place,
    ):
        (use,) = describe_use(disk)
        assert (use.what, use.where, use.start, use.read_only) == ("mount", str(place), START * 512, True)
        layout = check(disk)
        target = probe_target(disk, size_if_missing=0)
        assert target.uses == (f"{device} is mounted read-only at {place}",)
        with pytest.raises(RefusedError, match="must not be overwritten"):
            plan_restore(layout, {}, {"m.img": target}, snapshot="s", options=PlanOptions())
    assert describe_use(disk) == []


def test_mounted_read_write_is_refused_with_the_way_out(disk: Path) -> None:
    with attach_loop(Span(disk, START * 512, SECTORS * 512), writable=True) as device, mounted(device) as place:
        with pytest.raises(RefusedError, match="m.img:1: ") as caught:  # noqa: RUF043
            check(disk)
        assert f"is mounted read-write at {place}" in caught.value.message
        assert "recovery medium" in caught.value.hint
        assert "snapshot" in caught.value.hint
        assert caught.value.exit_code == 3


def test_a_loop_device_on_a_loop_device(disk: Path) -> None:
    with (
        attach_loop(Span(disk, 0, 32 * MIB), writable=True) as outer,
        attach_loop(Span(outer, START * 512, SECTORS * 512), writable=True) as inner,
        mounted(inner) as place,
    ):
        assert describe_use(disk) == [Use("mount", str(place), str(inner), START * 512)]
        assert describe_use(outer) == [Use("mount", str(place), str(inner), START * 512)]
        with pytest.raises(RefusedError, match="read-write"):
            check(disk)


def test_a_file_that_a_virtual_machine_has_locked(disk: Path) -> None:
    """QEMU takes locks of the open file description on bytes 100 and up of its images."""
    fd = os.open(disk, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0))
        (use,) = describe_use(disk)
        assert use.what == "lock"
        with pytest.raises(RefusedError, match="another program has locked"):
            check(disk)
    finally:
        os.close(fd)
    assert describe_use(disk) == []


def test_a_device_that_the_kernel_holds(disk: Path) -> None:
    with attach_loop(Span(disk, 0, 32 * MIB)) as device:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            assert [use.what for use in describe_use(device)] == ["busy"]
        finally:
            os.close(fd)
        assert describe_use(device) == []


def test_the_disk_behind_a_file(disk: Path) -> None:
    with attach_loop(Span(disk, START * 512, SECTORS * 512), writable=True) as device, mounted(device) as place:
        assert disks_behind(place / "lost+found") == disks_behind(disk)
    assert disks_behind(Path("/proc/self")) == set()
