"""What is mounted where: hostile names, and mounting that can never destroy what is mounted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import RemetalError
from remetal.system import mounts
from remetal.system.mounts import Mount, find_mount_of, mounted, parse_mountinfo, probe_mounts
from remetal.system.run import ProgramFailedError

RECORDED = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
23 22 0:21 / /proc rw,nosuid shared:13 - proc proc rw
24 22 0:22 / /mnt/with\\040blank\\011tab\\134slash ro,relatime - tmpfs  rw,size=10k
36 22 98:0 /sub /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/ro\\040ot ro,errors=continue
"""


def test_recorded_lines() -> None:
    assert parse_mountinfo(RECORDED) == [
        Mount("/dev/vda1", Path("/"), "ext4", (254, 1), False),
        Mount("proc", Path("/proc"), "proc", (0, 21), False),
        Mount("", Path("/mnt/with blank\ttab\\slash"), "tmpfs", (0, 22), False),
        Mount("/dev/ro ot", Path("/mnt2"), "ext3", (98, 0), True, "/sub"),
    ]
    assert parse_mountinfo("") == []


def escaped(name: str) -> str:
    """Escape as the kernel does (mangle_path in fs/seq_file.c)."""
    return "".join(f"\\{ord(each):03o}" if each in " \t\n\\" else each for each in name)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20))
@settings(max_examples=300)
def test_any_name_survives(name: str) -> None:
    line = f"1 0 7:3 / /m/{escaped(name)} rw - ext4 {escaped(name)} rw"
    (mount,) = parse_mountinfo(f"{line}\n")
    assert str(mount.target) == str(Path(f"/m/{name}"))
    assert mount.source == name


@pytest.mark.parametrize(
    "name", ["with blank", "cr\rff\x0cvt\x0bnel\u0085ls\u2028", "back\\slash - dash", os.fsdecode(b"latin\xe9")]
)
def test_a_real_mount_of_a_hostile_name_is_found(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    with mounted(Path("tmpfs"), kind="tmpfs", options=["ro", "size=64k"], target=place) as folder:
        assert folder == place
        (mount,) = [mount for mount in probe_mounts() if mount.target == place]
        assert (mount.kind, mount.read_only) == ("tmpfs", True)
        assert find_mount_of(place / "not" / "there") == mount
    assert place.is_dir()
    assert not [mount for mount in probe_mounts() if mount.target == place]


def test_the_upper_of_two_mounts_on_one_place_counts(tmp_path: Path) -> None:
    with mounted(Path("lower"), kind="tmpfs", target=tmp_path), mounted(Path("upper"), kind="tmpfs", target=tmp_path):
        assert find_mount_of(tmp_path / "x").source == "upper"


def test_a_world_without_mounts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "probe_mounts", list)
    with pytest.raises(RemetalError, match="cannot tell"):
        find_mount_of(tmp_path)


def test_a_fresh_folder_goes_with_its_mount() -> None:
    with mounted(Path("tmpfs"), kind="tmpfs") as folder:
        (folder / "file").write_text("x")
        assert os.path.ismount(folder)
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), mounted(Path("tmpfs"), kind="tmpfs") as folder:
        raise ZeroDivisionError
    assert not folder.exists()


def test_a_mount_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ProgramFailedError), mounted(tmp_path / "no-such-device", kind="ext4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_is_busy_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    with mounted(Path("tmpfs"), kind="tmpfs") as folder:
        (folder / "ready").touch()
        holder = subprocess.Popen(["sleep", "0.5"], cwd=folder)
    assert not folder.exists()
    holder.wait()


def test_a_mount_that_stays_busy_keeps_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing the fresh folder with what is in it would delete the restored system's files."""
    monkeypatch.setattr(mounts, "_UMOUNT_TRIES", 2)
    with ExitStack() as stack:
        folder = stack.enter_context(mounted(Path("tmpfs"), kind="tmpfs"))
        (folder / "precious").write_text("data")
        holder = subprocess.Popen(["sleep", "60"], cwd=folder)
        with pytest.raises(ProgramFailedError, match="busy"):
            stack.close()
    try:
        assert (folder / "precious").read_text() == "data"
    finally:
        holder.kill()
        holder.wait()
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_private_mounts_vanish_with_a_killed_process(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    code = (
        "import time; from pathlib import Path; from remetal.system.blockdev import Span\n"
        "from remetal.system.loop import attach_loop; from remetal.system.mounts import enter_private_mounts, mounted\n"
        "enter_private_mounts()\n"
        f"span = Span(Path({str(disk)!r}), 0, 16 << 20)\n"
        "with attach_loop(span, writable=True) as device, mounted(device) as folder:\n"
        "    (folder / 'seen').touch(); print(folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert not (Path(folder) / "seen").exists()
        assert Path(f"/proc/{process.pid}/root{folder}/seen").exists()
        assert subprocess.run(["losetup", "-j", disk], check=True, capture_output=True).stdout
        process.kill()
    deadline = time.monotonic() + 5
    while (left := subprocess.run(["losetup", "-j", disk], check=True, capture_output=True).stdout) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert left == b""
    Path(folder).rmdir()
