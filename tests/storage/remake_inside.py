"""What the storage ring runs inside its own kernel: file systems that the host's kernel does not mount, made anew."""

from __future__ import annotations

import os
from pathlib import Path

from remetal.image.copy import restore_files
from remetal.layout.model import FileSystem
from remetal.layout.remake import apply_remake, is_remade
from remetal.repository.reader import open_reader
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.real_disks import program
from tests.remaking import Style, capture, compare, describe, make_empty, make_filled, plan_least
from tests.repositories import make_site

STYLE = Style(files=400, size=20_000, share=0.3)
NAMES = ("Ünï ✓.txt", "UPPER.TXT", "lower.txt", "MiXed Case Name With Blanks.dat", "a" * 200)


def remake(folder: Path, make: tuple[str, ...], size: int, sector: int = 512, style: Style = STYLE) -> FileSystem:
    """Make a file system, fill it, capture it into a repository, make it anew on the least space, copy, compare.

    Copying goes through the image as a file; a second time it finds everything in place.
    """
    source = make_filled(folder / "source.img", size, make, style)
    volume = describe(source)
    _add_names(source, volume.type)
    volume = describe(source)
    plan = plan_least(volume, sector)
    site = make_site()
    snapshot = capture(site, source)
    target = make_empty(folder / "target.img", volume, plan)
    with open_reader(site.repository, site.key, snapshot) as reader:
        for again in (False, True):
            written = restore_files(reader, snapshot.images[0], target, kind=volume.type, part="x").written
            assert written > 0
            assert not again or written < 4 * MIB, "the second time, only what mounting changes"
            assert compare(source, target, volume.type) == []
            assert apply_remake(target, volume, plan) < MIB, "one that holds files is kept"
    assert is_remade(target, volume, plan)
    found = describe(target)
    assert (found.type, found.uuid, found.label) == (volume.type, volume.uuid, volume.label)
    return found


def _add_names(span: Span, kind: str) -> None:
    driver = {"exfat": "exfat-fuse"}.get(kind, kind)
    options = ("utf8",) if kind == "vfat" else ()
    with attach_loop(span, writable=True) as device, mounted(device, kind=driver, options=options) as folder:
        for name in NAMES:
            (folder / name).write_text(name)
        (folder / "empty").mkdir()
        os.utime(folder / "empty", (1_400_000_000, 1_400_000_000))


def fat(folder: Path) -> None:
    """FAT32 as it is, FAT16 that becomes a FAT12, and clusters of one sector that become as large as 4096 bytes."""
    kept = remake(folder, ("mkfs.vfat", "-F", "32", "-n", "EFI"), 100 * MIB)
    assert kept.features == ("fat32",)
    smaller = remake(folder, ("mkfs.vfat", "-F", "16"), 60 * MIB, style=Style(files=40, size=20_000, share=0.3))
    assert smaller.features == ("fat12",)
    larger = remake(folder, ("mkfs.vfat", "-F", "32", "-s", "1"), 100 * MIB, 4096)
    assert larger.block_size == 4096


def fat_attributes(folder: Path) -> None:
    """Hidden and system files stay so."""
    source = make_filled(folder / "source.img", 40 * MIB, ("mkfs.vfat",), STYLE)
    program("mattrib", "-i", source.path, "+h", "+s", "::f*")
    before = program("mattrib", "-i", source.path, "-/", "::")
    volume = describe(source)
    site = make_site()
    snapshot = capture(site, source)
    target = make_empty(folder / "target.img", volume, plan_least(volume))
    with open_reader(site.repository, site.key, snapshot) as reader:
        restore_files(reader, snapshot.images[0], target, kind="vfat", part="x")
    after = program("mattrib", "-i", target.path, "-/", "::")
    assert sorted(before.splitlines()) == sorted(after.splitlines())
    assert "SH" in after


def flash(folder: Path) -> None:
    """f2fs and exFAT."""
    remake(folder, ("mkfs.f2fs", "-q", "-l", "name", "-O", "extra_attr,inode_checksum,sb_checksum"), 300 * MIB)
    remake(folder, ("mkfs.exfat", "-L", "NAME"), 100 * MIB)


def old_xfs(folder: Path) -> None:
    """XFS of version 4, which new kernels no longer mount."""
    found = remake(folder, ("mkfs.xfs", "-q", "-m", "crc=0,finobt=0,reflink=0,bigtime=0", "-L", "old"), 340 * MIB)
    assert "crc" not in found.features
