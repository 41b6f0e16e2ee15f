"""File systems that are made anew on the least space that the plan names, and everything about them compared."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from lab.manifest import compare_manifests, take_manifest
from remetal.image.capture import read_batches
from remetal.image.copy import copy_files, target_options
from remetal.image.ranges import Extent
from remetal.layout.layers import probe_volume
from remetal.layout.layers.contract import Content
from remetal.layout.layers.remaking import Remake
from remetal.layout.model import FileSystem
from remetal.layout.remake import apply_remake, is_remade, plan_remake
from remetal.layout.signatures import probe_signature
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from tests.real_disks import blank, program
from tests.repositories import Site

NOWHERE_NEAR = 1 << 45
CHECKS = {
    "btrfs": ("btrfs", "check"),
    "xfs": ("xfs_repair", "-n"),
    "vfat": ("fsck.vfat", "-n"),
    "exfat": ("fsck.exfat", "-n"),
    "f2fs": ("fsck.f2fs", "--dry-run"),
}
PLAIN = {"vfat", "exfat"}
DRIVERS = {"exfat": "exfat-fuse"}
"""How the tests mount what their kernels do not know."""


@dataclass(frozen=True)
class Style:
    """What a tree consists of: up to `files`, of `size` bytes in the mean, until `share` of the space is full."""

    files: int
    size: int
    share: float
    folders: float = 0.05
    name: int = 12
    sparse: float = 0.02
    attributes: float = 0.03


STYLES = {
    "small": Style(files=3000, size=600, share=0.2),
    "usual": Style(files=800, size=60_000, share=0.5, folders=0.1, name=30),
    "large": Style(files=60, size=4_000_000, share=0.6),
    "empty": Style(files=3000, size=0, share=0.1, folders=0.001, name=180, attributes=0),
    "attributes": Style(files=1500, size=2000, share=0.4, attributes=0.7),
    "sparse": Style(files=150, size=40_000, share=0.3, sparse=0.8),
}


def grow_tree(folder: Path, seed: int, style: Style, space: int, *, plain: bool = False) -> None:
    """Fill a folder with files, links and attributes, and remove some again; the same for the same seed."""
    chance = random.Random(seed)
    folders, files, used = [folder], 0, 0
    while used < space * style.share and files < style.files:
        files += 1
        if chance.random() < style.folders:
            folders.append(chance.choice(folders) / f"{'d' * chance.randrange(1, style.name)}{files}")
            folders[-1].mkdir()
        path = chance.choice(folders) / f"{'f' * chance.randrange(1, style.name)}{files}"
        used += _write(path, chance, style)
        if chance.random() < 0.1:
            old = chance.choice([each for each in sorted(path.parent.iterdir()) if not each.is_dir()])
            old.unlink()
        if not plain and path.exists():
            _decorate(path, chance, style)


def _write(path: Path, chance: random.Random, style: Style) -> int:
    size = int(chance.expovariate(1 / style.size)) if style.size else 0
    with path.open("wb") as file:
        if chance.random() < style.sparse and size > 10_000:
            for place in range(0, size * 20, max(size // 3, 4096)):
                file.seek(place)
                file.write(b"y" * chance.randrange(1, 9000))
        else:
            file.write(chance.randbytes(size))
    return size


def _decorate(path: Path, chance: random.Random, style: Style) -> None:
    if chance.random() < 0.03:
        path.with_name(f"{path.name}-hard").hardlink_to(path)
    if chance.random() < 0.03:
        path.with_name(f"{path.name}-soft").symlink_to("t" * chance.randrange(1, 200))
    if chance.random() < style.attributes:
        os.setxattr(path, "user.a", chance.randbytes(chance.randrange(1, 900)))


def capture(site: Site, span: Span) -> Snapshot:
    """Back a disk file up as the only image of a snapshot; what is a hole in the file is one in the image."""
    extents, position = [], 0
    with span.path.open("rb") as file, suppress(OSError):  # the last search for data finds none
        while True:
            start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            extents.append(Extent(start, position - start))
    with open_session(site.repository, site.keys, workers=2) as session:
        batches = read_batches(span, extents, session.chunk_size, buffers=session.workers + 1, part="x")
        session.write_image("sda:1", span.size, batches, previous=None)
        return session.commit(layout=b"{}", hostname="host", tags=())


def describe(span: Span) -> FileSystem:
    """Return what the probe says of the file system on a span."""
    found = probe_signature(span)
    with open_disk(span.path) as disk:
        volume = probe_volume(Content("disk:1", span, disk.reader(span.start), found.type, found.label))
    assert isinstance(volume, FileSystem), volume
    return volume


def plan_least(volume: FileSystem, sector: int = 512) -> Remake:
    """Return the plan for the least space onto which the files are sure to fit."""
    wide = plan_remake(volume, volume.making, NOWHERE_NEAR, sector)
    assert isinstance(wide, Remake), wide
    needed = -(-wide.needed // 4096) * 4096
    refusal = plan_remake(volume, volume.making, wide.needed - 4096, sector)
    assert isinstance(refusal, str)
    assert str(wide.needed) in refusal
    plan = plan_remake(volume, volume.making, needed, sector)
    assert isinstance(plan, Remake), plan
    return msgspec.structs.replace(plan, needed=needed)


def make_filled(path: Path, size: int, make: tuple[str, ...], style: Style, seed: int = 1) -> Span:
    """Make a file system in a disk file and let a tree grow in it."""
    span = Span(blank(path, size), 0, size)
    program(*make, path)
    kind = probe_signature(span).type
    with attach_loop(span, writable=True) as device, mounted(device, kind=DRIVERS.get(kind, kind)) as folder:
        grow_tree(folder, seed, style, size, plain=kind in PLAIN)
    return span


def make_empty(target: Path, volume: FileSystem, plan: Remake) -> Span:
    """Make the file system anew on a disk file of the least size, full of garbage."""
    span = Span(target, 0, plan.needed)
    noise = random.Random(1).randbytes((1 << 20) + 77)
    with target.open("wb") as file:
        for start in range(0, plan.needed, len(noise)):
            file.write(noise[: plan.needed - start])
    assert apply_remake(span, volume, plan) > 0
    assert is_remade(span, volume, plan)
    return span


def copy_between(source: Span, target: Span, kind: str) -> None:
    """Copy the files of one file system to the other, both in disk files."""
    options = {"xfs": ("ro", "nouuid")}.get(kind, ("ro",))
    with (
        attach_loop(source) as one,
        attach_loop(target, writable=True) as other,
        mounted(one, kind=kind, options=options) as here,
        mounted(other, kind=kind, options=target_options(kind)) as there,
    ):
        copy_files(here, there, kind=kind)


def compare(source: Span, target: Span, kind: str) -> list[str]:
    """Return the differences between two file systems, after their own checker was content with the second."""
    program(*CHECKS.get(kind, ("e2fsck", "-fn")), target.path)
    options = {"xfs": ("ro", "nouuid"), "vfat": ("ro", "utf8", "tz=UTC")}.get(kind, ("ro",))
    with ExitStack() as stack:
        manifests = []
        for span in (source, target):
            device = stack.enter_context(attach_loop(span))
            folder = stack.enter_context(mounted(device, kind=DRIVERS.get(kind, kind), options=options))
            manifests.append(take_manifest(str(folder), plain=kind in PLAIN))
    return compare_manifests(manifests[0], manifests[1])
