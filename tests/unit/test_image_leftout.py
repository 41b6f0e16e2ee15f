"""What is left out of an image: the content of those files and of no others, and the file systems stay sound."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from remetal.image import leftout
from remetal.image.extents import probe_used
from remetal.image.leftout import Budget, Omission, Place
from remetal.image.live import LiveVolume, Manner, capture_live
from remetal.image.ranges import Extent, Extents, subtract
from remetal.repository.session import Batch, Known, Session, open_session
from remetal.system.blockdev import Span, flush_cache
from remetal.system.fiemap import open_inside
from remetal.system.freeze import held_still
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import MIB
from tests.repositories import Site, make_site, restore

SMALL, LARGE = 64 * MIB, 320 * MIB
"""XFS is no smaller."""
MAKE = {
    "ext2": ["mkfs.ext2", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
    "ext4 with clusters": ["mkfs.ext4", "-q", "-O", "bigalloc", "-C", "65536"],
    "ext4 with small blocks": ["mkfs.ext4", "-q", "-b", "1024", "-O", "inline_data", "-I", "512"],
    "xfs": ["mkfs.xfs", "-q"],
}
_SITE = make_site()


def size_of(kind: str) -> int:
    return LARGE if kind == "xfs" else SMALL


class Volume:
    """A file system that is mounted; in it a folder `out`, which is to be left out, and a folder `in` with files."""

    def __init__(self, kind: str, device: Path, folder: Path) -> None:
        self.kind = kind.split()[0]
        self.span = Span(device, 0, size_of(kind))
        self.folder = folder
        self.out, self.kept = folder / "out", folder / "in"
        self.out.mkdir()
        self.kept.mkdir()
        (self.kept / "large").write_bytes(os.urandom(3 * MIB))
        (self.kept / "small").write_text("small")

    def place(self, inside: str = "out", *, suffix: str = "", keep: int = 0) -> Place:
        return Place(self.folder / inside, self.folder, inside, suffix, keep)

    def omission(self, *places: Place) -> Omission:
        return Omission(self.folder.stat().st_dev, os.statvfs(self.folder).f_frsize, places or [self.place()])

    def look(self) -> Extents:
        return probe_used(self.span, self.kind, frozen=True)

    def live(self, omission: Omission) -> LiveVolume:
        def look() -> Extents:
            return omission.take_from(self.look(), held=True)

        return LiveVolume("disk", self.span, self.kind, self.folder, look)

    def files(self) -> dict[str, bytes]:
        return read_files(self.folder)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files, by their names."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {os.fsencode(path.relative_to(folder)).decode("latin-1"): path.read_bytes() for path in paths}


@contextmanager
def made(kind: str, tmp_path: Path) -> Iterator[Volume]:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(size_of(kind))
    subprocess.run([*MAKE[kind], path], check=True)
    with attach_loop(Span(path, 0, size_of(kind)), writable=True) as device, mounted(device) as folder:
        yield Volume(kind, device, folder)


@pytest.fixture(params=MAKE)
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Volume]:
    with made(request.param, tmp_path) as found:
        yield found


@pytest.fixture(params=["ext4", "xfs"])
def usual(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Volume]:
    with made(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Volume]:
    with made("xfs", tmp_path) as found:
        yield found


def bring_back(volume: Volume, omission: Omission, tmp_path: Path) -> Path:
    """Capture the volume while it is mounted, restore it, let its own program look at it, and return the disk file."""
    site: Site = _SITE.copy()
    with open_session(site.repository, site.keys) as session:
        capture_live(session, [volume.live(omission)], Manner(60))
        snapshot = session.commit(layout=b'{"version": 1}', hostname="web.example")
    path = tmp_path / "restored.img"
    path.write_bytes(restore(site, snapshot))
    if volume.kind != "xfs":
        subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
        return path
    with attach_loop(Span(path, 0, volume.span.size), writable=True) as device:
        with mounted(device, options=("nouuid",)):
            pass  # its log is replayed
        flush_cache(device)
        subprocess.run(["xfs_repair", "-n", device], check=True, capture_output=True)
    return path


@contextmanager
def mounted_again(volume: Volume, path: Path) -> Iterator[Path]:
    options = ("nouuid",) if volume.kind == "xfs" else ()
    with (
        attach_loop(Span(path, 0, volume.span.size), writable=True) as device,
        mounted(device, options=options) as folder,
    ):
        yield folder


def lost(volume: Volume, omission: Omission, tmp_path: Path) -> set[str]:
    """Bring the volume back, and return the files that have lost content; their sizes are what they were."""
    with mounted_again(volume, bring_back(volume, omission, tmp_path)) as folder:
        found = read_files(folder)
    before = volume.files()
    assert {name: len(data) for name, data in found.items()} == {name: len(data) for name, data in before.items()}
    return {name for name, data in before.items() if found[name] != data}


def test_the_content_of_a_folder_is_left_out_and_all_else_comes_back(volume: Volume, tmp_path: Path) -> None:
    deep = volume.out / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "large").write_bytes(os.urandom(5 * MIB))
    (deep / b"latin-\xe9\xff".decode("utf-8", "surrogateescape")).write_bytes(os.urandom(MIB))
    (volume.out / "linked").symlink_to(volume.kept)
    (volume.out / "pointer").symlink_to(volume.kept / "large")
    os.mkfifo(volume.out / "pipe")
    with (volume.out / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(10 * MIB)
        file.write(os.urandom(300_000))
    with (volume.kept / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(5 * MIB)
        file.write(b"island")
    omission = volume.omission()
    gone = lost(volume, omission, tmp_path)
    assert gone == {"out/a/b/c/large", "out/a/b/c/latin-\xe9\xff", "out/sparse"}
    assert list(omission.sizes) == [volume.out]
    assert 6 * MIB + 290_000 <= omission.sizes[volume.out] <= 6 * MIB + 400_000


def test_whatever_is_left_out_is_in_use_and_the_rest_is_as_before(volume: Volume) -> None:
    """What ext2 with its map blocks, and clusters of several blocks, hold is told by the kernel's map as well."""
    (volume.out / "large").write_bytes(os.urandom(MIB + 5000))
    with held_still([volume.folder], limit=60):
        flush_cache(volume.span.path)
        used = volume.look()
        rest = volume.omission().take_from(used, held=True)
    gone = sum(each.size for each in subtract(used, rest))
    assert list(subtract(rest, used)) == []
    assert gone == sum(each.size for each in used) - sum(each.size for each in rest)
    assert MIB + 4000 <= gone <= MIB + 70_000


def test_space_that_was_only_set_aside_is_left_out(usual: Volume, tmp_path: Path) -> None:
    with (usual.out / "reserved").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
        file.write(os.urandom(MIB))
    omission = usual.omission()
    assert lost(usual, omission, tmp_path) == {"out/reserved"}
    assert omission.sizes[usual.out] == 8 * MIB


def test_what_files_share_is_kept(xfs: Volume, tmp_path: Path) -> None:
    for name in ("copy", "changed"):
        subprocess.run(["cp", "--reflink=always", xfs.kept / "large", xfs.out / name], check=True)
    (xfs.out / "alone").write_bytes(os.urandom(MIB))
    with (xfs.out / "changed").open("r+b") as file:
        file.seek(MIB)
        file.write(os.urandom(MIB))
    omission = xfs.omission()
    assert lost(xfs, omission, tmp_path) == {"out/alone", "out/changed"}
    assert omission.sizes[xfs.out] == 2 * MIB, "two thirds of one are shared, and still there"


def test_a_file_with_another_name_elsewhere_is_kept(usual: Volume, tmp_path: Path) -> None:
    second = usual.folder / "second"
    second.mkdir()
    for name in ("outside", "inside", "both", "named"):
        (usual.out / name).write_bytes(os.urandom(MIB))
    os.link(usual.out / "outside", usual.kept / "outside")
    os.link(usual.out / "inside", usual.out / "again")
    os.link(usual.out / "both", second / "both.deb")
    os.link(usual.out / "named", second / "named.txt")
    places = usual.place(), usual.place("second", suffix=".deb")
    gone = {"out/inside", "out/again", "out/both", "second/both.deb"}
    assert lost(usual, usual.omission(*places), tmp_path) == gone
    assert lost(usual, usual.omission(usual.place(), usual.place("out/again")), tmp_path) == gone - {
        "out/both",
        "second/both.deb",
    }, "a name that is met twice is one"


def test_a_file_by_itself_is_left_out_from_where_it_is_to_stay(usual: Volume, tmp_path: Path) -> None:
    (usual.out / "other").write_bytes(os.urandom(MIB))
    with (usual.out / "one").open("wb") as file:
        file.write(b"head" * 2048 + os.urandom(MIB))
    omission = usual.omission(usual.place("out/one", keep=4096))
    assert lost(usual, omission, tmp_path) == {"out/one"}
    assert omission.sizes == {usual.out / "one": MIB + 4096}
    with mounted_again(usual, bring_back(usual, omission, tmp_path)) as folder:
        assert (folder / "out" / "one").read_bytes() == (b"head" * 1024).ljust(MIB + 8192, b"\0")


@pytest.mark.parametrize("what", ["folder", "file", "other"])
def test_what_is_mounted_below_is_kept(usual: Volume, tmp_path: Path, what: str) -> None:
    (usual.out / "mine").write_bytes(os.urandom(MIB))
    source, target = {
        "folder": (usual.kept, usual.out / "folder"),
        "file": (usual.kept / "large", usual.out / "file"),
        "other": (Path("tmpfs"), usual.out / "other"),
    }[what]
    if what == "file":
        target.touch()
    else:
        target.mkdir()
    run(["mount", *(["-t", "tmpfs"] if what == "other" else ["--bind"]), source, target])
    try:
        (usual.out / "other" / "file").write_bytes(bytes(5000)) if what == "other" else None
        omission = usual.omission()
        with held_still([usual.folder], limit=60):
            flush_cache(usual.span.path)
            omission.take_from(usual.look(), held=True)
    finally:
        run(["umount", target])
    assert omission.sizes == {usual.out: MIB}


def test_a_link_in_the_way_is_not_followed(usual: Volume) -> None:
    (usual.out / "link").symlink_to(usual.kept)
    omission = usual.omission(usual.place("out/link"), usual.place("out/link/large"), usual.place("nowhere"))
    assert list(omission.take_from([Extent(0, usual.span.size)], held=False)) == [Extent(0, usual.span.size)]
    folder = os.open(usual.folder, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Too many levels"):
            open_inside(folder, "out/link/large")
    finally:
        os.close(folder)


def test_another_file_system_at_the_same_folder_is_left_alone(usual: Volume) -> None:
    (usual.out / "mine").write_bytes(os.urandom(MIB))
    omission = usual.omission()
    run(["mount", "-t", "tmpfs", "tmpfs", usual.folder])
    try:
        (usual.folder / "out").mkdir()
        (usual.folder / "out" / "mine").write_bytes(bytes(5000))
        assert list(omission.take_from([Extent(0, usual.span.size)], held=False)) == [Extent(0, usual.span.size)]
    finally:
        run(["umount", usual.folder])


def test_active_swap_space_in_a_file_is_swap_space_again(usual: Volume, tmp_path: Path) -> None:
    swap = usual.folder / "swapfile"
    swap.write_bytes(os.urandom(8 * MIB))
    swap.chmod(0o600)
    subprocess.run(["mkswap", "-q", "-L", "mine", swap], check=True, capture_output=True)
    omission = usual.omission(usual.place("swapfile", keep=4096))
    subprocess.run(["swapon", swap], check=True)
    try:
        path = bring_back(usual, omission, tmp_path)
    finally:
        subprocess.run(["swapoff", swap], check=True)
    assert omission.sizes == {swap: 8 * MIB - 4096}
    with mounted_again(usual, path) as folder:
        found = folder / "swapfile"
        data = found.read_bytes()
        assert data[:4096] == swap.read_bytes()[:4096]
        assert data.count(b"\0") > 7 * MIB, "but for chunks in which something else was written meanwhile"
        subprocess.run(["swapon", found], check=True)
        assert str(found) in Path("/proc/swaps").read_text()
        subprocess.run(["swapoff", found], check=True)


def test_a_budget_that_does_not_last_keeps_what_is_left(usual: Volume, tmp_path: Path) -> None:
    many = usual.folder / "many"
    many.mkdir()
    for number in range(100):
        (many / str(number)).write_bytes(os.urandom(5000))
    (usual.out / "mine").write_bytes(os.urandom(MIB))
    os.link(many / "7", usual.out / "seven")
    places = usual.place(), usual.place("many"), usual.place("in")
    omission = usual.omission(*places)
    omission.rehearse(Budget(50))
    assert (omission.places, omission.given_up) == ([places[0]], list(places[1:]))
    assert lost(usual, omission, tmp_path) == {"out/mine"}, "not the one that has a name in what was given up"


def test_a_moment_that_is_over_keeps_all(usual: Volume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (usual.out / "mine").write_bytes(os.urandom(MIB))
    monkeypatch.setattr(leftout, "_MOMENT", 0.0)
    omission = usual.omission()
    assert lost(usual, omission, tmp_path) == set()
    assert (omission.given_up, omission.sizes) == ([usual.place()], {})


def test_a_file_in_many_pieces_takes_its_share_of_the_budget(usual: Volume) -> None:
    with (usual.out / "pieces").open("wb") as file:
        for number in range(1000):
            os.pwrite(file.fileno(), b"x" * 4096, number * 8192)
        os.fsync(file.fileno())
    omission = usual.omission()
    omission.rehearse(Budget(30))
    assert omission.given_up == [usual.place()]
    omission = usual.omission()
    rest = omission.take_from([Extent(0, usual.span.size)], held=False)
    assert omission.sizes[usual.out] >= 1000 * 4096, "XFS sets space aside between them"
    assert sum(each.size for each in rest) == usual.span.size - omission.sizes[usual.out]


def test_files_that_come_go_and_grow_while_they_are_looked_at_do_no_harm(
    usual: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the walk before the file system is held still, however long that takes here."""
    monkeypatch.setattr(leftout, "_MOMENT", 60.0)
    ended = threading.Event()

    def churn() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            folder = usual.out / str(number % 5)
            folder.mkdir(exist_ok=True)
            path = folder / str(number % 50)
            path.write_bytes(b"x" * (number * 1000 % 100_000))
            with suppress(OSError):
                path.rename(usual.out / str((number + 1) % 5) / str(number % 50))
            with suppress(OSError):
                path.unlink()
            if number % 20 == 0:
                subprocess.run(["rm", "-rf", folder], check=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        end = time.monotonic() + 2
        omission = usual.omission()
        while time.monotonic() < end:
            omission.rehearse(Budget(leftout.FEW, 10))
    finally:
        ended.set()
        thread.join()
    assert omission.given_up == []


def test_what_is_moved_into_and_out_of_the_folder_meanwhile_is_of_the_last_moment(
    usual: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (usual.out / "comes").write_bytes(os.urandom(2 * MIB))
    (usual.kept / "goes").write_bytes(os.urandom(2 * MIB))
    subprocess.run(["sync", "-f", usual.folder], check=True)
    moved = False

    def store(self: Session, volume: str, size: int, batches: Iterable[Batch], keep: Callable[[Known], None]) -> None:
        nonlocal moved
        if not moved:
            moved = True
            (usual.out / "comes").rename(usual.kept / "comes")
            (usual.kept / "goes").rename(usual.out / "goes")
        real(self, volume, size, batches, keep)

    real = Session.store
    monkeypatch.setattr(Session, "store", store)
    omission = usual.omission()
    assert lost(usual, omission, tmp_path) <= {"out/goes"}
    assert omission.sizes == {usual.out: 2 * MIB}
