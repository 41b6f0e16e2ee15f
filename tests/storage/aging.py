"""Images of file systems that have been in use for a while, and the proof that their used blocks are all they need.

Runs on the host, and in a kernel of our own for what the host's kernel lacks. All chance comes from a seed: the same
seed makes the same work.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from lab.manifest import Manifest, compare_manifests, take_manifest
from remetal.events import Event, Report
from remetal.image.extents import probe_used, probe_used_spanning
from remetal.image.ranges import Extent
from remetal.layout.layers import GROWING
from remetal.layout.layers.contract import Content
from remetal.layout.model import FileSystem
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import align_down

KIB, MIB = 1 << 10, 1 << 20
START = 3 * MIB
"""Where the volume lies in its disk file; before and behind it is garbage."""

BEHIND = MIB
ROUNDS = ((60, 140), (60, 140), (1, 7))
"""How much is done while it is mounted once. After little work, f2fs notes what is new only in its journal."""


@dataclass(frozen=True)
class Kind:
    """One kind of file system: how its images are made, aged and checked, by the seed's chance.

    `posix` if it has owners, links and attributes; `plain` if its driver does not even answer when asked for them.
    `oracle` is partclone's program where its map can be trusted, but for a rest of the volume smaller than `rest`;
    `at_home` whether the host mounts it.
    """

    type: str
    make: Callable[[Random], Sequence[str]]
    size: Callable[[Random], int]
    check: tuple[tuple[str, ...], ...]
    mount: str = ""
    options: tuple[str, ...] = ()
    posix: bool = True
    plain: bool = False
    sparse: bool = True
    oracle: str = ""
    rest: int = 1
    at_home: bool = True


def _ext(name: str, *features: str) -> Kind:
    def make(chance: Random) -> list[str]:
        chosen = [each for each in features if chance.random() < 0.4]
        block = chance.choice(["1024", "2048", "4096"])
        return [f"mkfs.{name}", "-q", "-b", block, *(["-O", ",".join(chosen)] if chosen else [])]

    return Kind(
        name,
        make,
        lambda chance: chance.randrange(16, 65) * MIB + chance.randrange(4) * 512,
        (("e2fsck", "-fn"),),
        oracle="partclone.extfs",
    )


def _make_xfs(chance: Random) -> list[str]:
    block = chance.choice([1024, 2048, 4096])
    metadata = ",".join(f"{name}={chance.randrange(2)}" for name in ("rmapbt", "reflink", "finobt"))
    return ["mkfs.xfs", "-q", "-b", f"size={block}", "-m", metadata, "-d", f"agcount={chance.choice([2, 4])}"]


def _vfat(bits: int, clusters: Sequence[int], sizes: tuple[int, int]) -> Kind:
    def make(chance: Random) -> list[str]:
        tables = ["-f", str(chance.choice([1, 2, 2]))]
        return ["mkfs.vfat", "-F", str(bits), "-s", str(chance.choice(clusters)), *tables, "-n", "AGED"]

    return Kind(
        "vfat",
        make,
        lambda chance: chance.randrange(*sizes) * MIB,
        (("fsck.vfat", "-n"),),
        options=("iocharset=utf8",),
        posix=False,
        sparse=False,
        at_home=False,
    )


def _make_ntfs(chance: Random) -> list[str]:
    sector = chance.choice([512, 512, 512, 4096])
    cluster = chance.choice([each for each in (512, 1024, 4096, 4096, 8192, 65536) if each >= sector])
    compression = ["-C"] if cluster <= 4096 and chance.random() < 0.3 else []
    return ["mkfs.ntfs", "-Q", "-q", "-s", str(sector), "-c", str(cluster), "-L", "aged", *compression]


def _make_exfat(chance: Random) -> list[str]:
    return ["mkfs.exfat", "-c", str(512 << chance.randrange(9)), "-L", "aged"]


def _make_f2fs(chance: Random) -> list[str]:
    features = [each for each in ("inode_checksum", "inode_crtime", "flexible_inline_xattr") if chance.random() < 0.5]
    others = [each for each in ("lost_found", "quota", "sb_checksum", "verity", "encrypt") if chance.random() < 0.3]
    chosen = (["extra_attr", *features] if features else []) + others
    return ["mkfs.f2fs", "-q", "-l", "aged", *(["-O", ",".join(chosen)] if chosen else [])]


def _make_btrfs(chance: Random) -> list[str]:
    mixed = chance.random() < 0.3
    node, sector = chance.choice(["4096", "16384"]), ["-s", "4096"]
    profiles = [chance.choice(["single", "dup"])] * 2 if mixed else [chance.choice(["single", "dup"]) for _ in "md"]
    words = ["-M"] if mixed else ["-n", node]
    features = [each for each in ("^no-holes", "^extref", "^skinny-metadata") if chance.random() < 0.3]
    chosen = ["-O", ",".join(features)] if features else []
    return ["mkfs.btrfs", "-q", "-f", *sector, *words, "-m", profiles[0], "-d", profiles[1], *chosen]


_EXT4 = ("^has_journal", "^64bit", "^flex_bg", "^metadata_csum", "inline_data", "sparse_super2", "^resize_inode")

KINDS: dict[str, Kind] = {
    "ext2": _ext("ext2", "^dir_index", "^sparse_super,^resize_inode"),
    "ext3": _ext("ext3", "^dir_index", "^resize_inode"),
    "ext4": _ext("ext4", *_EXT4),
    "xfs": Kind("xfs", _make_xfs, lambda _: 300 * MIB, (("xfs_repair", "-n"),), oracle="partclone.xfs"),
    "fat12": _vfat(12, [4, 8, 16], (4, 8)),
    "fat16": _vfat(16, [4, 8], (20, 60)),
    "fat32": _vfat(32, [1], (40, 65)),
    "ntfs": Kind(
        "ntfs",
        _make_ntfs,
        lambda chance: chance.randrange(16, 65) * MIB + chance.randrange(3) * 4096,
        # The second reads every record of the file table, and compares what they hold with the bitmap.
        (("ntfsfix", "-n"), ("ntfsresize", "--info", "--force", "--no-progress-bar")),
        mount="ntfs-3g",
        options=("permissions", "compression"),
        oracle="partclone.ntfs",
    ),
    "exfat": Kind(
        "exfat",
        _make_exfat,
        lambda chance: chance.randrange(16, 65) * MIB + chance.randrange(3) * 4096,
        (("fsck.exfat", "-n"),),
        mount="exfat-fuse",
        posix=False,
        plain=True,
        sparse=False,
        oracle="partclone.exfat",
    ),
    "f2fs": Kind(
        "f2fs",
        _make_f2fs,
        lambda chance: chance.randrange(100, 161) * MIB + chance.randrange(3) * 4096,
        (("fsck.f2fs", "--dry-run", "-f"),),
        oracle="partclone.f2fs",
        rest=2 * MIB,  # it reads on in the table behind the last segment
        at_home=False,
    ),
    "btrfs": Kind(
        "btrfs",
        _make_btrfs,
        lambda chance: chance.randrange(240, 300) * MIB + chance.randrange(3) * 4096,
        # It reads all trees, and compares all data with their checksums; partclone takes a superblock for a node.
        (("btrfs", "check", "--check-data-csum"),),
    ),
}
"""By the names that the tests give them; one for each file system that has a map of used blocks."""


@dataclass
class _Tree:
    """The files that the work has made so far, where new ones may go, and how many blocks were free at first."""

    root: Path
    kind: Kind
    chance: Random
    folders: list[Path]
    files: list[Path]
    made: int = 0
    room: int = 0

    def new(self) -> Path:
        self.made += 1
        letters = "".join(self.chance.choices("abcdefgh ijk-äß€xyz", k=self.chance.randrange(1, 40))).strip()
        return self.chance.choice(self.folders) / f"{self.made}{letters}"


def prove(name: str, seed: int, folder: Path, *, oracle: bool = False, spoil: bool = False) -> float:
    """Age an image, restore its used blocks alone onto garbage, check it and compare every file; return their share.

    With `oracle`, the map is held against partclone's as well; with `spoil`, one used extent is left out. Raises
    AssertionError if the copy is not sound or not the same.
    """
    kind, chance = KINDS[name], Random(f"{name} {seed}")
    size = kind.size(chance)
    disk, copy = folder / "disk.img", folder / "copy.img"
    place = Span(disk, START, size)
    _make_garbage(disk, START + size + BEHIND, chance)
    with attach_loop(place, writable=True) as device:
        before = _age(kind, device, chance)
    told: list[Event] = []
    extents = _used(place, kind, told.append)
    assert not told, f"{name} {seed}: {told}"
    assert extents[0].start == 0
    assert extents != [Extent(0, size)], "there is no map to prove"
    if oracle and kind.oracle:
        _check_against_oracle(kind, place, extents, folder)
    if spoil:
        extents.remove(max(extents[1:], key=lambda each: each.size))
    _make_garbage(copy, START + size + BEHIND, Random(f"garbage {seed}"))
    target = Span(copy, START, size)
    copy_extents(place, target, extents)
    differences = _check(kind, target, before)
    assert not differences, f"{name} {seed}: {differences[:5]}"
    disk.unlink()
    copy.unlink()
    return sum(each.size for each in extents) / size


def prove_growth(name: str, seed: int, folder: Path, factor: float) -> None:
    """Age an image and let its file system grow into a larger space; it must be sound and hold the same files."""
    kind, chance = KINDS[name], Random(f"{name} {seed}")
    disk, size = folder / "disk.img", kind.size(chance)
    room = align_down(int(size * factor), 4096)
    with disk.open("wb") as file:
        file.truncate(START + room)
    with attach_loop(Span(disk, START, size), writable=True) as device:
        before = _age(kind, device, chance)
    place, layer = Span(disk, START, room), GROWING[kind.type]
    with open_disk(disk) as io:
        read = io.reader(START)
        volume = layer.probe_volume(Content("disk", Span(disk, START, size), read, kind.type))
        assert isinstance(volume, FileSystem)
        after = layer.plan_growth(volume, room)
        assert layer.apply_growth(place, after) > 0
        grown = layer.probe_volume(Content("disk", place, read, kind.type))
    assert isinstance(grown, FileSystem)
    assert (grown.size, grown.uuid, grown.label) == (after, volume.uuid, volume.label)
    assert after > size
    differences = _check(kind, place, before)
    assert not differences, f"{name} {seed}: {differences[:5]}"
    assert layer.apply_growth(place, after) == 0
    disk.unlink()


def _used(place: Span, kind: Kind, report: Report) -> list[Extent]:
    if kind.type == "btrfs":
        return probe_used_spanning({1: place}, report=report)[1]
    return list(probe_used(place, kind.type, report=report))


def _make_garbage(path: Path, size: int, chance: Random) -> None:
    piece = chance.randbytes(MIB)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(piece[: min(MIB, size - start)])


def copy_extents(source: Span, target: Span, extents: Sequence[Extent]) -> None:
    """Copy extents of one span, and nothing else, to the same places of another."""
    with open_disk(source.path) as one, open_disk(target.path, writable=True) as other:
        for each in extents:
            for place in range(each.start, each.end, MIB):
                size = min(MIB, each.end - place)
                other.write(one.read(source.start + place, size), target.start + place)


def _age(kind: Kind, device: Path, chance: Random) -> Manifest:
    """Make the file system and work in it; return what it then holds."""
    _run([*kind.make(chance), device])
    tree = _Tree(Path(), kind, chance, [], [])
    limit = chance.uniform(0.3, 0.95)
    for least, most in ROUNDS:
        with mounted(device, kind=kind.mount or None, options=kind.options) as root:
            tree = _moved(tree, root)
            for _ in range(chance.randrange(least, most)):
                work(tree, limit)
    return _take_tree(kind, device)


def _moved(tree: _Tree, root: Path) -> _Tree:
    """Return the tree as it is mounted on `root`."""
    folders = [root / each.relative_to(tree.root) for each in tree.folders] or [root]
    return replace(tree, root=root, folders=folders, files=[root / each.relative_to(tree.root) for each in tree.files])


def work(tree: _Tree, limit: float) -> None:
    """Do one thing to the tree; once `limit`, a share of the room, is taken, files go."""
    free = os.statvfs(tree.root).f_bavail
    tree.room = tree.room or free
    acts = [_delete, _truncate] if free < (1 - limit) * tree.room and tree.files else _ACTS
    try:
        tree.chance.choice(acts)(tree)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EMLINK}:
            raise


def _create(tree: _Tree) -> None:
    path = tree.new()
    tree.files.append(path)
    size = tree.chance.choice([0, 20, 700, 5000, 60_000, 400_000, 2_000_000])
    path.write_bytes(tree.chance.randbytes(tree.chance.randrange(size + 1)))


def _create_several(tree: _Tree) -> None:
    """Let several files grow in turns, so that their blocks lie among one another's."""
    paths = [tree.new() for _ in range(4)]
    tree.files += paths
    for _ in range(tree.chance.randrange(2, 12)):
        for path in paths:
            with path.open("ab") as file:
                file.write(tree.chance.randbytes(tree.chance.randrange(1, 20_000)))


def _create_folder(tree: _Tree) -> None:
    if len(tree.folders) < 30:
        path = tree.new()
        path.mkdir()
        tree.folders.append(path)


def _fill_folder(tree: _Tree) -> None:
    """Make a folder so large that it is no more a list in one block."""
    path = tree.new()
    path.mkdir()
    tree.folders.append(path)
    for number in range(tree.chance.randrange(20, 60)):
        child = path / f"{number}-{'n' * tree.chance.randrange(60)}"
        child.touch()
        tree.files.append(child)


def _delete(tree: _Tree) -> None:
    for _ in range(min(tree.chance.randrange(1, 15), len(tree.files))):
        path = tree.files.pop(tree.chance.randrange(len(tree.files)))
        path.unlink(missing_ok=True)


def _truncate(tree: _Tree) -> None:
    if (path := _any(tree)) is not None:
        os.truncate(path, tree.chance.randrange(path.stat().st_size + 1))


def _append(tree: _Tree) -> None:
    if (path := _any(tree)) is not None:
        with path.open("ab") as file:
            file.write(tree.chance.randbytes(tree.chance.randrange(1, 300_000)))
            if tree.chance.random() < 0.3:
                os.fsync(file.fileno())


def _overwrite(tree: _Tree) -> None:
    if (path := _any(tree)) is not None:
        with path.open("r+b") as file:
            file.seek(tree.chance.randrange(path.stat().st_size + 1))
            file.write(tree.chance.randbytes(tree.chance.randrange(1, 50_000)))


def _rename(tree: _Tree) -> None:
    if (path := _any(tree)) is not None:
        tree.files.remove(path)
        path = path.rename(tree.new())
        tree.files.append(path)
        os.utime(path, (1e9, 1e9 + 2 * tree.chance.randrange(1 << 28)))


def _make_hole(tree: _Tree) -> None:
    if tree.kind.sparse:
        path = tree.new()
        tree.files.append(path)
        with path.open("wb") as file:
            file.truncate(tree.chance.randrange(1, 4 * MIB))
            file.seek(tree.chance.randrange(4 * MIB))
            file.write(tree.chance.randbytes(tree.chance.randrange(1, 100_000)))


def _decorate(tree: _Tree) -> None:
    """Give a file an attribute, another name, or a link that leads to it."""
    path = _any(tree)
    if path is None or not tree.kind.posix:
        return
    if (way := tree.chance.randrange(3)) == 0:
        os.setxattr(path, "user.note", tree.chance.randbytes(tree.chance.randrange(1, 1500)))
    elif way == 1:
        other = tree.new()
        os.link(path, other)
        tree.files.append(other)
    else:
        link = tree.new()
        link.symlink_to("x" * tree.chance.randrange(1, 400))
        path.chmod(tree.chance.choice([0o600, 0o4755, 0o444]))


_ACTS = (
    *(_create, _create, _create, _create_several, _create_folder, _fill_folder),
    *(_delete, _truncate, _append, _append, _overwrite, _rename, _make_hole, _decorate),
)


def _any(tree: _Tree) -> Path | None:
    return tree.chance.choice(tree.files) if tree.files else None


def _take_tree(kind: Kind, device: Path) -> Manifest:
    """Return the manifest of a volume."""
    with mounted(device, kind=kind.mount or None, options=("ro", *kind.options)) as root:
        found = take_manifest(os.fspath(root), plain=kind.plain)
        for path in root.rglob("*"):
            name = f"/{path.relative_to(root)}"
            found[name.upper() if kind.plain else name]["mtime_ns"] = path.lstat().st_mtime_ns
        return found


def _check(kind: Kind, place: Span, before: Manifest) -> list[str]:
    """Let the file system's checkers look at it, and return in what it differs from what it held before."""
    with attach_loop(place) as device:
        for argv in kind.check:
            told = _run([*argv, device])
            assert "[Fail]" not in told, told
        return compare_manifests(before, _take_tree(kind, device))


def _check_against_oracle(kind: Kind, place: Span, extents: list[Extent], folder: Path) -> None:
    """Raise AssertionError if partclone calls a sector used that the map has not."""
    listed = folder / "map"
    listed.unlink(missing_ok=True)
    with attach_loop(place) as device:
        _run([kind.oracle, "-D", "-s", device, "-o", listed, "--offset_domain=0", "-L", folder / "log"])
    ours = iter(extents)
    mine = next(ours)
    for line in [line for line in listed.read_text().splitlines() if not line.startswith("#")][1:]:
        start, size, state = line.split()
        first, end = int(start, 16), int(start, 16) + int(size, 16)
        if first >= place.size - place.size % kind.rest:
            break
        while state == "+" and mine.end <= first:
            mine = next(ours, Extent(place.size, 1))
        assert state != "+" or mine.start <= first < end <= mine.end, f"{line} is not in {mine}"


def _run(argv: Sequence[str | Path]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
