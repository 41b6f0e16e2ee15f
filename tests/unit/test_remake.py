"""File systems made anew: the planned space is always enough, and nothing that a copy can keep is lost."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import msgspec.structs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.awkward import make_awkward
from remetal.errors import RemetalError
from remetal.events import Event, Warn
from remetal.image.copy import copy_files, target_options
from remetal.layout.layers.remaking import Remake
from remetal.layout.making import BtrfsMaking, ExtMaking, FatMaking, Making, XfsMaking, is_possible_making
from remetal.layout.model import FileSystem
from remetal.layout.remake import apply_remake, is_remade, plan_remake
from remetal.ondisk.btrfs import CHUNK_KINDS
from remetal.ondisk.ext import count_in_blocks
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import GIB, KIB, MIB, TIB
from tests.real_disks import blank, program
from tests.remaking import (
    STYLES,
    compare,
    copy_between,
    describe,
    make_empty,
    make_filled,
    plan_least,
)

EXT4 = ("mkfs.ext4", "-q")
MAKES = {
    "ext4": EXT4,
    "ext4-1k": (*EXT4, "-b", "1024", "-L", "-rf $(x)"),
    "ext4-inline": (*EXT4, "-O", "inline_data,^resize_inode,meta_bg"),
    "ext4-odd": (*EXT4, "-O", "sparse_super2,^has_journal,metadata_csum_seed,mmp", "-N", "9000"),
    "ext3": ("mkfs.ext3", "-q", "-b", "1024", "-I", "128"),
    "ext2": ("mkfs.ext2", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
    "xfs-1k": ("mkfs.xfs", "-q", "-m", "rmapbt=1", "-b", "size=1024", "-L", "-rf $(x)"),
    "xfs-large": ("mkfs.xfs", "-q", "-i", "size=1024", "-n", "size=16384", "-d", "agcount=5"),
}
CASES = [
    ("ext4", "usual", 512),
    ("ext4-1k", "small", 4096),
    ("ext4-inline", "small", 512),
    ("ext3", "attributes", 512),
    ("ext2", "sparse", 4096),
    ("xfs", "usual", 512),
    ("xfs-1k", "sparse", 512),
]
MORE = [
    (make, style, sector)
    for make in MAKES
    for style in STYLES
    for sector in (512, 4096)
    if (make, style, sector) not in CASES
]


def counted(volume: FileSystem, span: Span) -> FileSystem:
    """Return the description of an ext file system with its files counted for blocks of 4096 bytes."""
    if not isinstance(volume.making, ExtMaking) or volume.block_size == 4096:
        return volume
    with open_disk(span.path) as disk:
        pages = count_in_blocks(disk.reader(span.start), span.size, 4096)
    return msgspec.structs.replace(volume, making=msgspec.structs.replace(volume.making, in_pages=pages))


@pytest.mark.parametrize(
    ("make", "style", "sector"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MORE)],
)
def test_the_least_space_is_enough(tmp_path: Path, make: str, style: str, sector: int) -> None:
    """Not one byte more than planned, on a target full of garbage; then once more, as after an interruption."""
    size = 340 * MIB if make.startswith("xfs") else 100 * MIB
    source = make_filled(tmp_path / "source.img", size, MAKES[make], STYLES[style])
    volume = counted(describe(source), source)
    plan = plan_least(volume, sector)
    target = make_empty(tmp_path / "target.img", volume, plan)
    copy_between(source, target, volume.type)
    differences = compare(source, target, volume.type)
    assert [each for each in differences if not each.endswith("sparse True became (none)")] == []
    found = describe(target)
    assert (found.uuid, found.label, found.block_size) == (volume.uuid, volume.label, max(volume.block_size, sector))
    assert set(volume.features) - {"needs_recovery"} <= set(found.features)
    apply_remake(target, volume, plan)
    copy_between(source, target, volume.type)
    assert len(compare(source, target, volume.type)) == len(differences)


def settings(path: Path) -> dict[str, str]:
    """Return what dumpe2fs tells that does not depend on size and use."""
    wanted = (
        "Filesystem UUID|Filesystem volume name|Default mount options|Mount options|Errors behavior|"
        "Maximum mount count|Check interval|Reserved blocks uid|Reserved blocks gid|Inode size|"
        "Default directory hash|Flex block group size"
    )
    text = subprocess.run(["dumpe2fs", "-h", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(rf"^({wanted}):\s+(.*)$", text, re.MULTILINE))
    numbers = {
        name: int(value) for name, value in re.findall(r"^(.* block count|Block count):\s+(\d+)$", text, re.MULTILINE)
    }
    found["reserved"] = f"{numbers['Reserved block count'] / numbers['Block count']:.3f}"
    return found


def test_settings_of_ext_are_kept(tmp_path: Path) -> None:
    size = 120 * MIB
    source = Span(blank(tmp_path / "source.img", size), 0, size)
    program(*EXT4, "-I", "512", "-m", "7", "-G", "8", "-L", "name", source.path)
    program(
        *(
            "tune2fs",
            "-c",
            "33",
            "-i",
            "5d",
            "-e",
            "remount-ro",
            "-u",
            "7",
            "-g",
            "8",
            "-o",
            "journal_data_writeback,^user_xattr",
        ),
        *("-E", "mount_opts=nodelalloc,hash_alg=tea", source.path),
    )
    volume = describe(source)
    target = make_empty(tmp_path / "target.img", volume, plan_least(volume))
    assert settings(target.path) == settings(source.path)


def test_settings_of_xfs_are_kept(tmp_path: Path) -> None:
    size = 600 * MIB
    source = Span(blank(tmp_path / "source.img", size), 0, size)
    options = ("-m", "bigtime=0,rmapbt=1,inobtcount=0", "-i", "size=1024,maxpct=40,nrext64=0", "-n", "size=8192")
    program("mkfs.xfs", "-q", *options, "-L", "name", source.path)
    volume = describe(source)
    target = make_empty(tmp_path / "target.img", volume, plan_least(volume))
    told = [program("xfs_info", span.path) for span in (source, target)]
    kept = [
        re.findall(r"(isize|crc|finobt|sparse|rmapbt|reflink|bigtime|inobtcount|nrext64|ftype|imaxpct)=(\d+)", each)
        for each in told
    ]
    kept += [re.findall(r"naming.*bsize=(\d+)", each) for each in told]
    assert kept[0] == kept[1]
    assert kept[2] == kept[3] == ["8192"]


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Span, Span]:
    """Two empty file systems of a kind that takes everything awkward."""
    make = {"ext4": (*EXT4, "-I", "1024", "-b", "4096"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}
    spans = []
    for name in ("source.img", "target.img"):
        spans.append(Span(blank(tmp_path / name, 320 * MIB), 0, 320 * MIB))
        program(*make[request.param], spans[-1].path)
    return request.param, spans[0], spans[1]


def make_strange(folder: Path) -> None:
    """Add to the awkward files what only systems in use have."""
    make_awkward(folder / "awkward")
    (folder / "swapfile").write_bytes(bytes(8 * MIB))
    (folder / "swapfile").chmod(0o600)
    program("fallocate", "-l", "5M", folder / "allocated")
    for name in ("link", "pipe", "null", "socket", "sticky"):
        os.setxattr(folder / "awkward" / name, "trusted.note", name.encode(), follow_symlinks=False)
        os.setxattr(
            folder / "awkward" / name, "security.selinux", b"system_u:object_r:etc_t:s0\0", follow_symlinks=False
        )
    program("chattr", "+S", folder / "awkward" / "sticky")
    program("chattr", "+a", folder / "awkward" / "block")
    program("chattr", "+i", folder / "awkward" / "crowd")
    os.chown(folder, 33, 44)
    folder.chmod(0o751)
    os.utime(folder, ns=(1, 1_234_567_890_123_456_789))


def flags(folder: Path) -> str:
    """Return the flags and project ids of everything, as lsattr shows them."""
    done = subprocess.run(
        ["lsattr", "-apR", "."], cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    return "\n".join(sorted(done.stdout.splitlines()))


def test_awkward_files_are_copied_whole(pair: tuple[str, Span, Span]) -> None:
    """And again after whatever an interruption, or somebody else, may have left on the target."""
    kind, source, target = pair
    with attach_loop(source, writable=True) as device, mounted(device) as folder:
        make_strange(folder)
        if kind == "xfs":
            program("chattr", "-p", "77", folder / "awkward" / "empty")
    with (
        attach_loop(source) as one,
        attach_loop(target, writable=True) as other,
        mounted(one, options=("ro", "nouuid") if kind == "xfs" else ("ro",)) as here,
        mounted(other, options=target_options(kind)) as there,
    ):
        told: list[Event] = []
        copy_files(here, there, kind=kind, report=told.append)
        assert told == []
        assert flags(there) == flags(here)
        _disturb(there)
        copy_files(here, there, kind=kind, report=told.append)
        assert flags(there) == flags(here)
        assert (there / "swapfile").stat().st_blocks * 512 >= 8 * MIB
        assert (there / "allocated").stat().st_blocks * 512 >= 5 * MIB
    assert compare(source, target, kind) == []


def _disturb(folder: Path) -> None:
    """Leave strangers, wrong types, and a file of the right size and time with other content; some immutable."""
    (folder / "stranger").mkdir()
    (folder / "stranger" / "inside").write_text("x")
    program("chattr", "+i", folder / "stranger" / "inside")
    block = folder / "awkward" / "block"
    program("chattr", "-a", block)
    before = block.stat()
    block.write_bytes(b"\1" * before.st_size)
    os.utime(block, ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "awkward" / "pipe").unlink()
    (folder / "awkward" / "pipe").mkdir()
    (folder / "awkward" / "empty").unlink()
    (folder / "awkward" / "names" / "Case").rename(folder / "awkward" / "names" / "other")
    program("chattr", "+i", folder / "awkward" / "names")


def test_what_a_file_system_does_not_take_is_told(tmp_path: Path) -> None:
    """Project ids that ext4 was not made for."""
    spans = [Span(blank(tmp_path / name, 320 * MIB), 0, 320 * MIB) for name in ("a.img", "b.img")]
    program("mkfs.xfs", "-q", spans[0].path)
    program(*EXT4, spans[1].path)
    with (
        attach_loop(spans[0], writable=True) as one,
        attach_loop(spans[1], writable=True) as other,
        mounted(one) as here,
        mounted(other) as there,
    ):
        (here / "file").write_text("x")
        program("chattr", "-p", "7", here / "file")
        told: list[Event] = []
        copy_files(here, there, kind="ext4", report=told.append)
    (warning,) = told
    assert isinstance(warning, Warn)
    assert "1 files" in warning.text
    assert "'file'" in warning.text


def test_too_little_space_is_said_so(tmp_path: Path) -> None:
    spans = [Span(blank(tmp_path / name, size), 0, size) for name, size in (("a.img", 64 * MIB), ("b.img", 16 * MIB))]
    for span in spans:
        program(*EXT4, span.path)
    with attach_loop(spans[0], writable=True) as one, mounted(one) as folder:
        (folder / "large").write_bytes(random.Random(1).randbytes(30 * MIB))
    with pytest.raises(RemetalError, match="do not fit"):
        copy_between(spans[0], spans[1], "ext4")


def test_one_of_other_features_is_made_anew(tmp_path: Path) -> None:
    size = 60 * MIB
    source = make_filled(tmp_path / "a.img", size, (*EXT4, "-L", "name"), STYLES["large"])
    volume = describe(source)
    plan = plan_least(volume)
    target = Span(blank(tmp_path / "b.img", plan.needed), 0, plan.needed)
    program(*EXT4, "-O", "^metadata_csum", "-L", "name", "-U", volume.uuid, target.path)
    assert not is_remade(target, volume, plan)
    assert apply_remake(target, volume, plan) > 0
    assert is_remade(target, volume, plan)
    assert not is_remade(target, msgspec.structs.replace(volume, uuid="1" * 8), plan)
    with open_disk(target.path, writable=True) as disk:
        disk.write(bytes(64 * KIB), 0)
    assert not is_remade(target, volume, plan)


EXT = FileSystem(
    on="a",
    type="ext4",
    size=10 * GIB,
    used=4 * GIB,
    block_size=4096,
    features=("has_journal", "extent", "64bit", "sparse_super", "resize_inode"),
    making=ExtMaking(
        clean=True,
        inodes=655_360,
        inodes_used=100_000,
        inode_size=256,
        reserved=GIB // 2,
        reserved_user=0,
        reserved_group=0,
        journal=64 * MIB,
        external_journal=False,
        flex_groups=16,
        errors="continue",
        max_mounts=-1,
        check_interval=0,
        mount_options=("user_xattr", "acl"),
        mount_text="",
        hash_algorithm="half_md4",
    ),
)
XFS = FileSystem(
    on="a",
    type="xfs",
    size=10 * GIB,
    used=4 * GIB,
    block_size=4096,
    features=("crc", "finobt", "reflink", "ftype", "sparse"),
    making=XfsMaking(
        sector_size=512,
        inode_size=512,
        inodes=100_032,
        inodes_used=100_000,
        inode_percent=25,
        directory_block=4096,
        log=64 * MIB,
        groups=4,
        group_size=10 * GIB // 4,
        file_types=True,
        ignores_case=False,
        shared=0,
    ),
)


def plan(volume: FileSystem, space: int = TIB, sector: int = 512) -> Remake | str:
    return plan_remake(volume, volume.making, space, sector)


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (msgspec.structs.replace(EXT, making=None), "back it up again"),
        (msgspec.structs.replace(EXT, features=("encrypt",)), "keys"),
        (msgspec.structs.replace(EXT, features=("FEATURE_I25",)), "FEATURE_I25"),
        (msgspec.structs.replace(EXT, label="\ufffd" * 7), "label"),
        (msgspec.structs.replace(XFS, features=("needsrepair",)), "repair"),
        (msgspec.structs.replace(XFS, features=("FEATURE_I6",)), "FEATURE_I6"),
        (msgspec.structs.replace(EXT, type="ntfs"), "shrink it there"),
        (msgspec.structs.replace(EXT, type="reiserfs"), "reiserfs"),
        (msgspec.structs.replace(EXT, type="f2fs", features=("compression",)), "compressed"),
        (msgspec.structs.replace(EXT, type="exfat", features=("texfat",)), "TexFAT"),
    ],
)
def test_what_cannot_be_made_anew_is_said_so(volume: FileSystem, words: str) -> None:
    found = plan(volume)
    assert isinstance(found, str)
    assert words in found


def test_an_unclean_ext_is_refused() -> None:
    assert isinstance(EXT.making, ExtMaking)
    for changes, words in (({"clean": False}, "cleanly"), ({"external_journal": True}, "another device")):
        found = plan(msgspec.structs.replace(EXT, making=msgspec.structs.replace(EXT.making, **changes)))
        assert isinstance(found, str)
        assert words in found


def test_the_bound_is_near_what_is_used() -> None:
    """A bound that asks for twice the space would refuse what fits."""
    for volume in (EXT, XFS):
        found = plan(volume)
        assert isinstance(found, Remake)
        assert 0.9 * volume.used < found.needed < 1.15 * volume.used


counts = st.integers(0, 1 << 62)
powers = st.integers(0, 40).map(lambda bit: 1 << bit)
words = st.text("az09_-", min_size=1, max_size=32)
makings: st.SearchStrategy[Making] = st.one_of(
    st.builds(
        ExtMaking,
        inodes=st.integers(1 << 20, (1 << 32) - 1),
        inodes_used=st.integers(0, 1 << 20),
        inode_size=powers.map(lambda size: 128 * size),
        flex_groups=powers,
        reserved=counts,
        journal=counts,
        in_pages=counts,
        errors=words,
        mount_options=st.lists(words, max_size=3).map(tuple),
        mount_text=st.text("az, $(", max_size=40),
        hash_algorithm=st.sampled_from(["", "half_md4", "tea"]),
        hash_seed=st.sampled_from(["", "01234567-89ab-cdef-0123-456789abcdef"]),
    ),
    st.builds(
        XfsMaking,
        sector_size=powers,
        inode_size=powers,
        directory_block=powers,
        inodes=st.integers(1 << 40, 1 << 62),
        inodes_used=st.integers(0, 1 << 40),
        groups=st.integers(1, 1 << 40),
        group_size=st.integers(1, 1 << 40),
        inode_percent=st.integers(0, 100),
        log=counts,
        shared=counts,
    ),
    st.builds(FatMaking, chains=counts, root_entries=counts),
    st.builds(BtrfsMaking, chunks=st.lists(st.sampled_from(sorted(CHUNK_KINDS)), unique=True).map(tuple)),
).filter(is_possible_making)


@given(
    volume=st.builds(
        FileSystem,
        on=st.just("a"),
        type=st.sampled_from(["ext2", "ext4", "xfs", "vfat", "exfat", "f2fs", "btrfs"]),
        size=st.integers(1, 1 << 62),
        used=st.integers(0, 1 << 62),
        block_size=st.integers(1, 1 << 20),
        uuid=st.text("0123456789abcdef-", max_size=40),
        label=st.text(max_size=20),
        features=st.lists(st.sampled_from(["extent", "has_journal", "64bit", "resize_inode", "rmapbt", "fat16"])).map(
            tuple
        ),
        parts=st.just(()),
        sector=st.just(0),
    ),
    making=makings,
    space=st.integers(1, 1 << 62),
    sector=st.sampled_from([512, 4096]),
)
def test_any_record_gives_a_plan_or_a_sentence(volume: FileSystem, making: Making, space: int, sector: int) -> None:
    for block in (volume.block_size, 1024, 4096):
        found = plan_remake(msgspec.structs.replace(volume, block_size=block), making, space, sector)
        if isinstance(found, Remake):
            assert found.needed <= space
            assert 0 < found.size <= space
            assert all(isinstance(word, str) for command in found.commands for word in command)
        else:
            assert found
