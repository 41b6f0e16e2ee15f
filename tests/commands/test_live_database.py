"""A database that is at work on several file systems is backed up, comes back, and lacks nothing that was committed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lab.live.ledger import check, committing
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import Site
from tests.spread_databases import FOLDERS, SpreadMariadb, SpreadPostgresql

CLIENTS = 3
SIZE = 512 * MIB
KINDS = {"data": "ext4", "log": "xfs", "space": "btrfs"}
"""The file system that each of the database's folders is: each on a disk of its own."""
CHECKS = {"ext4": ["e2fsck", "-fp"], "xfs": ["xfs_repair", "-nf"], "btrfs": ["btrfs", "check"]}


@pytest.fixture
def top() -> Iterator[Path]:
    """A folder that the database's own user may enter."""
    with TemporaryDirectory(prefix="database-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def mounted_at(top: Path, devices: dict[str, Path]) -> Iterator[None]:
    """Mount each disk at the folder of its name."""
    with ExitStack() as stack:
        for name, device in devices.items():
            target = top / name
            target.mkdir(exist_ok=True)
            options = ("nouuid",) if KINDS[name] == "xfs" else ()  # elsewhere the original may still be mounted
            stack.enter_context(mounted(device, options=options, target=target))
        yield


@contextmanager
def disks(folder: Path) -> Iterator[dict[str, Path]]:
    """Attach the disk files in a folder, or fresh ones with file systems."""
    with ExitStack() as stack:
        found = {}
        folder.mkdir(exist_ok=True)
        for name in FOLDERS:
            path = folder / f"{name}.img"
            if not path.exists():
                with path.open("wb") as file:
                    file.truncate(SIZE)
                subprocess.run([f"mkfs.{KINDS[name]}", "-q", path], check=True)
            found[name] = stack.enter_context(attach_loop(Span(path, 0, SIZE), writable=True))
        yield found


def look_at(kind: str, folder: Path) -> None:
    """Let the file system's own tool look for damage.

    A program with mounts of its own, which another test runs, may keep it mounted for a while longer than we do.
    """
    deadline = time.monotonic() + 120
    for name in FOLDERS:
        if KINDS[name] == kind:
            argv: list[str | Path] = [*CHECKS[kind], folder / f"{name}.img"]
            while (done := subprocess.run(argv, check=False, capture_output=True, text=True)).returncode:
                if time.monotonic() > deadline:
                    break
                time.sleep(2)
            assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def hooks_that_tell_the_time(folder: Path) -> Path:
    """Return a file of hooks of which one writes down a moment of time.monotonic() at which everything is frozen.

    Nothing can be committed meanwhile, so it does not matter which.
    """
    program, hooks = folder / "tell", folder / "hooks.toml"
    program.write_text(
        f"import pathlib, time; pathlib.Path({str(folder / 'moment')!r}).write_text(f'{{time.monotonic()}}')"
    )
    hooks.write_text(f'[[hook]]\nrun = ["{sys.executable}", "{program}"]\nat = ["frozen"]\n')
    return hooks


@pytest.mark.parametrize("kind", [SpreadPostgresql, SpreadMariadb])
def test_what_was_committed_comes_back_and_nothing_is_torn(
    tmp_path: Path, top: Path, kind: Callable[[Path], SpreadPostgresql | SpreadMariadb]
) -> None:
    site, database = Site(tmp_path), kind(top)
    site.remetal("init")
    here, back = tmp_path / "here", tmp_path / "back"
    with disks(here) as devices:
        words = [word for device in devices.values() for word in ("--disk", device)]
        names = [device.name for device in devices.values()]
        with mounted_at(top, devices):
            database.make(CLIENTS)
            with database.running(), database.busy(), committing(database.shell(), CLIENTS) as clients:
                site.remetal("backup", *words)
                told = site.remetal("backup", *words, "--json", "--hooks", hooks_that_tell_the_time(tmp_path)).json
                bounds = [each.at(float((tmp_path / "moment").read_text())) for each in clients]
    assert 0 < told["pause"] < 10
    assert [each["way"] for each in told["volumes"]] == ["tracked"] * len(FOLDERS)
    back.mkdir()
    maps = [word for name, disk in zip(FOLDERS, names, strict=True) for word in ("--map", f"{disk}={back / name}.img")]
    site.remetal("restore", "latest", *maps, "--yes")
    look_at("ext4", back)
    look_at("btrfs", back)
    with disks(back) as devices, mounted_at(top, devices), database.running():
        found = check(database.answer())
        database.check()
    look_at("xfs", back)  # whose log mounting has replayed
    for client, (acknowledged, sent) in enumerate(bounds):
        assert 0 < acknowledged <= found[client] <= sent <= acknowledged + 1
