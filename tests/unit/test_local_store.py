"""A folder as a store: what is left by crashes, what real file systems answer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from remetal.errors import UnavailableError, UsageError
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.prune import prune_machine
from remetal.repository.repository import open_repository
from remetal.storage import AlreadyExistsError, LocalStore, NotFoundError, UnreadableError, local, open_store
from remetal.storage.local import rename_new
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import find_mount_of, mounted
from remetal.system.run import run
from remetal.units import MIB
from tests.repositories import Site, backup, make_site, restore

_HANGING_WRITER = """
import os, sys, time
from pathlib import Path
from remetal.storage import LocalStore

store = LocalStore(Path(sys.argv[1]))
with store._temporary() as (path, fd):
    os.write(fd, b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(folder: Path) -> subprocess.Popen[bytes]:
    (folder / ".tmp").mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", _HANGING_WRITER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def test_what_a_killed_writer_leaves_is_not_listed_and_swept_by_the_next(tmp_path: Path) -> None:
    with start_writer(tmp_path) as writer:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(list((tmp_path / ".tmp").iterdir())) == 1
    assert list(LocalStore(tmp_path).entries("")) == []
    LocalStore(tmp_path).put("config", [b"x"])
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == ["reserve"]
    assert [entry.name for entry in LocalStore(tmp_path).entries("")] == ["config"]


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    with start_writer(tmp_path) as writer:
        LocalStore(tmp_path).put("config", [b"x"])
        assert len([path for path in (tmp_path / ".tmp").iterdir() if path.name != "reserve"]) == 1
        writer.kill()


def test_objects_are_private_and_leave_nothing_else(tmp_path: Path) -> None:
    LocalStore(tmp_path / "store").put("packs/ab/cd", [b"x"])
    assert (tmp_path / "store/packs/ab/cd").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "store/packs/ab/cd").stat().st_nlink == 1
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "store/.tmp").iterdir()] == ["reserve"]


def test_foreign_files_and_links_are_passed_over(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("packs/aa", [b"x"])
    (tmp_path / "packs/README.txt").write_text("hello")
    (tmp_path / "packs/link").symlink_to("/etc/passwd")
    (tmp_path / "keys").symlink_to("/etc")
    (tmp_path / "lost+found").mkdir()
    os.mkfifo(tmp_path / "packs/pipe")
    assert [entry.name for entry in store.entries("")] == ["packs/aa"]
    with pytest.raises(NotFoundError):
        store.get("packs/pipe")
    with pytest.raises(UnavailableError):
        store.get("packs/link")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError) as caught:
        LocalStore(tmp_path / "file").put("config", [b""])
    assert "not a folder" in caught.value.hint


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(8 * MIB)
    run(["mkfs.ext4", "-q", disk])
    return disk


def fill(store: LocalStore, stored: list[str]) -> None:
    for number in range(100):
        store.put(f"packs/{number:02x}", [os.urandom(MIB // 2)])
        stored.append(f"packs/{number:02x}")


def test_a_full_disk_leaves_whole_objects_and_says_what_is_free(small_disk: Path, tmp_path: Path) -> None:
    with attach_loop(Span(small_disk, 0, 8 * MIB), writable=True) as device, mounted(device) as folder:
        store = LocalStore(folder)
        stored: list[str] = []
        with pytest.raises(UnavailableError) as caught:
            fill(store, stored)
        assert stored
        assert "free there" in caught.value.hint
        assert [(entry.name, entry.size) for entry in store.entries("")] == [(name, MIB // 2) for name in stored]
        assert [path.name for path in (folder / ".tmp").iterdir()] == ["reserve"]
        store.delete(stored.pop())
        store.put("packs/ff", [b"there is room again"])


def test_a_full_disk_can_be_pruned(small_disk: Path) -> None:
    """Not a byte is free: what is held in reserve is enough for the lock and for what the prune writes."""
    with attach_loop(Span(small_disk, 0, 8 * MIB), writable=True) as device, mounted(device) as folder:
        memory = make_site()
        store = LocalStore(folder / "repo")
        for name, content in memory.store.objects.items():
            store.put(name, [content])
        site = Site(store, open_repository(store), memory.keys, memory.key)  # type: ignore[arg-type]
        old, new = os.urandom(2 * MIB), os.urandom(MIB)
        first, second = backup(site, old), backup(site, new)
        with suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with suppress(OSError):
            for number in range(10_000):
                (folder / f"{number}").write_bytes(b"x")
        assert os.statvfs(folder).f_bavail == 0
        with pytest.raises(UnavailableError, match="No space left"):
            prune_machine(site.repository, site.key, site.keys.machine_id, grace=0)
        urgent = Site(LocalStore(store.root, urgent=True), site.repository, site.keys, site.key)  # type: ignore[arg-type]
        repository = open_repository(urgent.store)
        forget_snapshots(repository, site.key, [first.id])
        result = prune_machine(repository, site.key, site.keys.machine_id, grace=0)
        assert result.deleted_bytes > 2 * MIB
        assert restore(site, second) == new
        assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
        backup(site, os.urandom(MIB))
        assert (folder / "repo/.tmp").is_dir()


def test_a_read_only_disk_says_so(small_disk: Path) -> None:
    with attach_loop(Span(small_disk, 0, 8 * MIB)) as device, mounted(device, options=["ro"]) as folder:
        with pytest.raises(UnavailableError) as caught:
            LocalStore(folder).put("config", [b""])
        assert "read-only" in caught.value.hint


@pytest.mark.parametrize("config", [None, "whole", "bad"])
@pytest.mark.parametrize("large", [None, "whole", "bad"])
def test_what_alone_cannot_be_read_is_told_from_a_disk_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None, large: str | None
) -> None:
    store, bad = LocalStore(tmp_path), {"packs/ab"}
    for name, state in (("packs/ab", "bad"), ("config", config), ("packs/aa", large)):
        if state is not None:
            store.put(name, [bytes(100_000)])
            store.get(name)
        bad |= {name} if state == "bad" else set()
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)) in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    alive = (large or config) == "whole"
    with pytest.raises(UnreadableError if alive else UnavailableError, match=r"packs/ab.*Input/output") as told:
        store.get("packs/ab")
    assert ("remetal repair" in told.value.hint) == alive


def test_renaming_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "a", tmp_path / "b")
    rename_new(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        rename_new(tmp_path / "missing", tmp_path / "d")


def test_the_last_resort_for_file_systems_without_links_never_replaces(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("config", [b"first"])
    with store._temporary() as (path, fd):
        os.write(fd, b"second")
        assert not store._rename_locked(path, tmp_path / "config")
        assert store._rename_locked(path, tmp_path / "config2")
    assert store.get("config") == b"first"
    assert store.get("config2") == b"second"


@pytest.mark.parametrize("location", ["", "ftp://x/y", "file://elsewhere/path", "file://relative", "gopher://x"])
def test_locations_that_no_store_is_for(location: str) -> None:
    with pytest.raises(UsageError):
        open_store(location)


def test_locations_of_folders(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a")).put("config", [b"1"])
    assert open_store(f"file://{tmp_path}/a").get("config") == b"1"
    assert open_store(f"file://localhost{tmp_path}/a").get("config") == b"1"


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of NFS may be asked twice for one link, and then says that it is there already: so it is."""
    whole = os.link

    def link(source: Path, target: Path) -> None:
        whole(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    store = LocalStore(tmp_path)
    store.put("config", [b"x"])
    monkeypatch.undo()
    assert store.get("config") == b"x"
    with pytest.raises(AlreadyExistsError):
        LocalStore(tmp_path).put("config", [b"y"])


def test_where_others_write_too_only_what_is_old_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_file_system", lambda folder: 0x6969)
    (tmp_path / ".tmp").mkdir()
    for name in ("fresh", "old"):
        (tmp_path / ".tmp" / name).write_bytes(b"half")
    os.utime(tmp_path / ".tmp" / "old", (0, time.time() - 2 * local._ABANDONED))
    LocalStore(tmp_path).put("config", [b"x"])
    assert sorted(path.name for path in (tmp_path / ".tmp").iterdir()) == ["fresh", "reserve"]


def test_the_kind_of_a_file_system(tmp_path: Path) -> None:
    kinds = {"ext4": 0xEF53, "tmpfs": 0x01021994, "overlay": 0x794C7630, "xfs": 0x58465342, "btrfs": 0x9123683E}
    assert local._file_system(tmp_path) == kinds[find_mount_of(tmp_path).kind]
    assert local._file_system(tmp_path / "absent") == 0
