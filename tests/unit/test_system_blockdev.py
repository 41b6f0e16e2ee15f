"""Disks, ranges of disks and loop devices: alignment, ends, and what the kernel says."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError, RemetalError
from remetal.system import blockdev
from remetal.system.blockdev import (
    PAGE,
    Geometry,
    Span,
    aligned_buffer,
    flush_cache,
    is_block_device,
    is_read_only,
    open_disk,
    probe_geometry,
    reread_partitions,
)
from remetal.system.loop import attach_loop, open_device
from remetal.units import KIB, MIB

SIZE = 3 * PAGE + 512
ODD = 3 * PAGE + 77


def content(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content(SIZE))
    return path


def test_a_span_reads_as_a_person_would_write_it() -> None:
    assert str(Span(Path("/dev/sda"), 0, 5)) == "/dev/sda"
    assert str(Span(Path("/dev/sda"), 512, 5)) == "/dev/sda@512"


@pytest.mark.parametrize("size", [SIZE, ODD])
@pytest.mark.parametrize("direct", [False, True])
@given(offset=st.integers(0, ODD + 600), length=st.integers(0, ODD + 600))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_read_or_the_end_is_told(
    tmp_path: Path, size: int, direct: bool, offset: int, length: int
) -> None:
    path = tmp_path / f"{size}.img"
    data = content(size)
    if not path.exists():
        path.write_bytes(data)
    with open_disk(path, direct=direct) as io:
        assert io.size() == size
        if offset + length <= size:
            assert io.read(offset, length) == data[offset : offset + length]
        elif length:
            with pytest.raises(RemetalError, match=f"ends at byte {max(size, offset)}"):
                io.read(offset, length)


@pytest.mark.parametrize("direct", [False, True])
def test_read_into_fills_or_raises(disk: Path, direct: bool) -> None:
    with open_disk(disk, direct=direct) as io:
        assert io.direct == direct
        buffer = aligned_buffer(2 * PAGE)
        io.read_into(buffer, PAGE)
        assert bytes(buffer) == content(SIZE)[PAGE : 3 * PAGE]
        last = aligned_buffer(PAGE)[:512]
        io.read_into(last, 3 * PAGE)
        assert bytes(last) == content(SIZE)[3 * PAGE :]
        with pytest.raises(RemetalError, match=f"ends at byte {SIZE}"):
            io.read_into(aligned_buffer(2 * PAGE), 2 * PAGE)


def test_the_odd_end_of_a_file_can_be_read_directly(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(content(ODD))
    with open_disk(path, direct=True) as io:
        assert io.direct
        tail = aligned_buffer(PAGE)[:77]
        io.read_into(tail, 3 * PAGE)
        assert bytes(tail) == content(ODD)[3 * PAGE :]


@pytest.mark.parametrize("direct", [False, True])
def test_what_was_written_is_read(disk: Path, direct: bool) -> None:
    block = aligned_buffer(PAGE)
    block[:] = b"w" * PAGE
    with open_disk(disk, writable=True, direct=direct) as io:
        io.write(block, PAGE)
    assert disk.read_bytes() == content(SIZE)[:PAGE] + b"w" * PAGE + content(SIZE)[2 * PAGE :]
    with open_disk(disk, writable=True) as io:
        io.write(b"odd", 5)
    assert disk.read_bytes()[:10] == b"01234odd89"


def test_a_read_only_disk_is_not_written(disk: Path) -> None:
    with open_disk(disk) as io, pytest.raises(RemetalError, match=r"writing .* at byte 0 failed"):
        io.write(b"x", 0)
    assert disk.read_bytes() == content(SIZE)


def test_tmpfs_is_read_through_the_cache_where_it_takes_no_direct_io() -> None:
    path = Path(f"/dev/shm/remetal-test-{os.getpid()}")
    try:
        path.write_bytes(content(SIZE))
        with open_disk(path, direct=True) as io:
            assert io.read(5, 500) == content(SIZE)[5:505]
    finally:
        path.unlink()


def test_a_full_file_system_says_so() -> None:
    with open_disk(Path("/dev/full"), writable=False) as io:
        assert io.read(0, 10) == bytes(10)
    fd_error = _write_error(Path("/dev/full"))
    assert "No space left" in fd_error.message
    assert "Free space" in fd_error.hint


def _write_error(path: Path) -> RemetalError:
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(RemetalError) as caught:
            blockdev.DiskIO(path, fd, direct=False).write(b"x", 0)
    finally:
        os.close(fd)
    return caught.value


def test_an_fsync_that_fails_is_told(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(RemetalError, match="did not reach it"), open_disk(disk, writable=True) as io:
        io.write(b"x", 0)


def test_no_sync_is_tried_after_a_failure(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: pytest.fail("synced"))
    with pytest.raises(ZeroDivisionError), open_disk(disk, writable=True):
        raise ZeroDivisionError


def test_buffers_are_aligned_and_zero() -> None:
    for size in (0, 1, PAGE, 5 * PAGE + 1):
        buffer = aligned_buffer(size)
        assert len(buffer) == size
        assert not any(buffer)


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/null")):
        assert not is_block_device(path)
        with pytest.raises(RefusedError, match="neither a block device nor a regular file"):
            probe_geometry(path)
    for path in (tmp_path / "absent", tmp_path / "absent" / "deeper"):
        assert not is_block_device(path)
        with pytest.raises(RefusedError, match="No such file"):
            probe_geometry(path)
        with pytest.raises(RefusedError, match="cannot open the disk"), open_disk(path):
            pass


def test_a_loop_device_is_exactly_its_span(disk: Path, tmp_path: Path) -> None:
    disk.write_bytes(content(1 << 20))
    link = tmp_path / "by-id"
    with attach_loop(Span(disk, 4096, 8192)) as device:
        link.symlink_to(device)
        assert is_block_device(device)
        assert is_block_device(link)
        assert is_read_only(device)
        assert probe_geometry(link) == Geometry(8192, 512, 512)
        with open_disk(device, direct=True) as io:
            assert io.direct
            assert io.read(0, 8192) == content(1 << 20)[4096:12288]
            with pytest.raises(RemetalError, match="ends at byte 8192"):
                io.read(8000, 500)
        with pytest.raises(RemetalError), open_disk(device, writable=True) as io:
            io.write(b"x", 0)
        flush_cache(device)
    assert not is_read_only(disk)
    assert disk.read_bytes() == content(1 << 20)
    backing = Path("/sys/class/block", device.name, "loop/backing_file")
    until = time.monotonic() + 20  # it goes when whoever looks at all disks just now has closed it
    while str(disk) in read_if_there(backing) and time.monotonic() < until:
        time.sleep(0.1)
    assert str(disk) not in read_if_there(backing)


def read_if_there(path: Path) -> str:
    """Return a file's text, none if it has gone."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def test_a_writable_loop_writes_its_span_only(disk: Path) -> None:
    disk.write_bytes(bytes(1 << 20))
    with attach_loop(Span(disk, 4096, 8192), writable=True) as device:
        assert not is_read_only(device)
        reread_partitions(device)
        with open_disk(device, writable=True) as io:
            io.write(b"y" * 8192, 0)
            with pytest.raises(RemetalError, match="No space left"):
                io.write(b"y", 8192)
    assert disk.read_bytes() == bytes(4096) + b"y" * 8192 + bytes((1 << 20) - 12288)
    reread_partitions(disk)
    flush_cache(disk)


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, SIZE + 1), (SIZE, 512), (512, SIZE), (-512, 1024), (512, -1)])
def test_a_span_that_is_no_part_of_its_disk_is_refused(disk: Path, start: int, size: int) -> None:
    with pytest.raises(RefusedError, match="not a part of"), attach_loop(Span(disk, start, size)):
        pass


def test_a_whole_device_needs_no_loop_and_a_part_does(disk: Path) -> None:
    disk.write_bytes(content(1 << 20))
    with attach_loop(Span(disk, 0, 1 << 20)) as device:
        with open_device(Span(device, 0, 1 << 20)) as path:
            assert path == device
        with open_device(Span(device, 512, 4096)) as path:
            assert path != device
            with open_disk(path) as io:
                assert io.read(0, 4096) == content(1 << 20)[512 : 512 + 4096]
    with open_device(Span(disk, 0, 1 << 20)) as path:
        assert is_block_device(path)


def test_a_block_device_under_a_mounted_file_system_is_read_fresh(disk: Path) -> None:
    """Bytes that went to the disk behind the device's cache are seen by a direct reader."""
    disk.write_bytes(bytes(1 << 20))
    with attach_loop(Span(disk, 0, 1 << 20), writable=True) as device:
        with open_disk(device) as io:
            assert io.read(0, 512) == bytes(512)
        with disk.open("r+b") as file:
            file.write(b"n" * 512)
            file.flush()
            os.fsync(file.fileno())
        with open_disk(device, direct=True) as io:
            assert io.read(0, 512) == b"n" * 512


def test_holes_of_a_disk_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(MIB + 100)
        file.seek(256 * KIB)
        file.write(b"x" * 4096)
    with open_disk(path) as disk:
        assert disk.is_hole(0, 256 * KIB)
        assert not disk.is_hole(0, 256 * KIB + 1)
        assert not disk.is_hole(256 * KIB, 4096)
        assert disk.is_hole(512 * KIB, 512 * KIB + 100)
        assert not disk.is_hole(512 * KIB, MIB), "what lies behind the end is no hole: reading it has to fail"


def test_a_block_device_has_no_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(MIB)
    with attach_loop(Span(path, 0, MIB)) as device, open_disk(device) as disk:
        assert not disk.is_hole(0, MIB)


def open_disk_as(user: int, patch: pytest.MonkeyPatch, path: Path) -> None:
    """Open a disk, which the kernel refuses."""

    def refuse(*words: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, "geteuid", lambda: user)
    patch.setattr(os, "open", refuse)
    with open_disk(path):
        pytest.fail("it was opened")


def test_where_root_may_not_open_a_disk_it_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for user, words in ((0, "a container"), (1000, "as root")):
        with monkeypatch.context() as patch, pytest.raises(RefusedError) as raised:
            open_disk_as(user, patch, tmp_path / "disk")
        assert words in raised.value.hint
