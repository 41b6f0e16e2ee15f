"""Loop devices vanish with whoever attached them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB


def attached_to(path: Path) -> str:
    """Return the loop devices of a file, as losetup lists them."""
    return subprocess.run(["losetup", "-j", path], check=True, capture_output=True, text=True).stdout


def detached_from(path: Path) -> bool:
    """Tell whether a file's loop devices go; another program that looks at all devices may hold one for a moment."""
    limit = time.monotonic() + 10
    while attached_to(path) and time.monotonic() < limit:
        time.sleep(0.05)
    return not attached_to(path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk file with an ext4."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    return path


def test_a_loop_device_is_there_in_its_block_only(disk: Path) -> None:
    with attach_loop(Span(disk, 0, 16 * MIB), writable=True) as device:
        assert str(device) in attached_to(disk)
        with mounted(device) as folder:
            (folder / "file").write_text("written through")
        assert str(device) in attached_to(disk)
    assert detached_from(disk)
    with attach_loop(Span(disk, 0, 16 * MIB)) as device, mounted(device, options=("ro",)) as folder:
        assert (folder / "file").read_text() == "written through"


def test_a_killed_process_leaves_no_loop_device(disk: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from remetal.system.loop import attach_loop; "
        "from remetal.system.blockdev import Span\n"
        f"with attach_loop(Span(Path({str(disk)!r}), 0, 4096)): print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert attached_to(disk) != ""
        process.send_signal(signal.SIGKILL)
    assert detached_from(disk)
