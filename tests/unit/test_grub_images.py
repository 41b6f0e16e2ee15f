"""GRUB's images as bytes, against grub-mkimage and grub-bios-setup themselves."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.adapt import grub_images as images
from remetal.adapt.grub_images import SECTOR, CoreImageError, Run
from tests.adapt_disks import BIOS_BOOT, LINUX, PC_MODULES, ROOT_UUID, make_core, partition, setup_grub

MODULES = "biosdisk part_gpt part_msdos ext2 search_fs_uuid"
BOOT = (PC_MODULES / "boot.img").read_bytes()
DISKBOOT = (PC_MODULES / "diskboot.img").read_bytes()


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = f"search.fs_uuid {ROOT_UUID} root hd0,gpt2 \nset prefix=($root)'/boot/grub'\n"
    return make_core(
        tmp_path_factory.mktemp("core") / "core.img", prefix="(,gpt2)/boot/grub", modules=MODULES, config=config
    )


def installed(tmp_path: Path, core: bytes, label: str, *options: str) -> Path:
    """Return a disk file onto which GRUB's own installer has put the core."""
    disk = tmp_path / "disk.img"
    bios = f"start=4096,size=2048,type={BIOS_BOOT}\n" if label == "gpt" else ""
    kind = LINUX if label == "gpt" else "83"
    partition(disk, 32 << 20, f"label: {label}\n{bios}start=8192,type={kind}\n")
    setup_grub(disk, core, tmp_path, *options)
    return disk


def at(disk: Path, sector: int, count: int = 1) -> bytes:
    with disk.open("rb") as file:
        file.seek(sector * SECTOR)
        return file.read(count * SECTOR)


@pytest.mark.parametrize(("label", "place"), [("gpt", 4096), ("dos", 1)])
@pytest.mark.parametrize("options", [(), ("--no-rs-codes",)])
def test_reads_what_grub_installed(
    tmp_path: Path, core: bytes, label: str, place: int, options: tuple[str, ...]
) -> None:
    disk = installed(tmp_path, core, label, *options)
    assert images.find_core_sector(at(disk, 0)) == place
    first = at(disk, place)
    runs = images.parse_runs(first)
    assert runs[0].start == place + 1
    data = first + b"".join(at(disk, run.start, run.count) for run in runs)
    found = images.parse_core(data)
    assert found.prefix == "(,gpt2)/boot/grub"
    assert found.partition == 2
    assert found.uuids == (ROOT_UUID,)


@pytest.mark.parametrize(("label", "place"), [("gpt", 4096), ("dos", 1)])
def test_lays_the_same_bytes_as_grubs_installer(tmp_path: Path, core: bytes, label: str, place: int) -> None:
    disk = installed(tmp_path, core, label, "--no-rs-codes")
    ours = images.plan_core(core, place)
    assert at(disk, place, len(ours) // SECTOR) == ours
    assert images.plan_boot_sector(BOOT, at(disk, 0), place) == at(disk, 0)


def test_keeps_table_and_parameter_block(core: bytes) -> None:
    standing = bytes(range(256)) * 2
    sector = images.plan_boot_sector(BOOT, standing, 99)
    assert sector[0x03:0x5A] == standing[0x03:0x5A]
    assert sector[0x1B8:0x1FE] == standing[0x1B8:0x1FE]
    assert images.find_core_sector(sector) == 99


def test_a_stock_boot_image_is_recognised_and_others_are_not() -> None:
    assert images.find_core_sector(BOOT) == 1
    assert images.find_core_sector(bytes(SECTOR)) is None
    assert images.find_core_sector(BOOT[:510] + b"\0\0") is None
    assert images.find_core_sector(b"\xeb\x48" + BOOT[2:]) is None
    assert images.find_core_sector(b"") is None


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7, 0.9])
def test_a_damaged_core_is_noticed(core: bytes, where: float) -> None:
    spot = int(len(core) * where)
    hurt = core[:spot] + bytes(byte ^ 0x55 for byte in core[spot : spot + 64]) + core[spot + 64 :]
    with pytest.raises(CoreImageError):
        images.parse_core(hurt)


def test_a_core_cut_short_is_noticed(core: bytes) -> None:
    for size in (0, 511, 512, 600, 4096, len(core) - SECTOR):
        with pytest.raises(CoreImageError):
            images.parse_core(core[:size])


def test_an_empty_list_of_runs_is_refused(core: bytes) -> None:
    with pytest.raises(CoreImageError, match="empty"):
        images.parse_runs(core[:500] + bytes(12))
    with pytest.raises(CoreImageError, match="no core image"):
        images.parse_runs(bytes(SECTOR))
    with pytest.raises(CoreImageError, match="pieces"):
        images.patch_runs(DISKBOOT, [])


@given(data=st.binary(max_size=2048))
@settings(max_examples=200)
def test_hostile_bytes_raise_nothing_else(data: bytes) -> None:
    images.find_core_sector(data)
    for hostile in (data, DISKBOOT[:0x150] + data, DISKBOOT[:500] + data):
        for parse in (images.parse_runs, images.parse_core):
            with contextlib.suppress(CoreImageError):
                parse(hostile.ljust(SECTOR, b"\0"))


@given(
    pieces=st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(1, 600)), min_size=1, max_size=12),
    sector=st.just(DISKBOOT),
)
@settings(max_examples=100)
def test_runs_round_trip(pieces: list[tuple[int, int]], sector: bytes) -> None:
    segment, runs = 0x820, []
    for start, count in pieces:
        runs.append(Run(start, count, segment))
        segment = (segment + count * 32) & 0xFFFF
    patched = images.patch_runs(sector, runs)
    assert images.parse_runs(patched) == tuple(runs)
    assert patched[:0x140] == sector[:0x140]
    assert images.parse_runs(images.patch_runs(patched, runs[:1])) == (runs[0],)


@given(shift=st.integers(-1000, 1 << 20), counts=st.lists(st.integers(1, 50), min_size=1, max_size=4))
@settings(max_examples=100)
def test_moving_all_sectors_by_one_shift_keeps_the_runs(shift: int, counts: list[int]) -> None:
    start, segment, runs = 2000, 0x820, []
    for count in counts:
        runs.append(Run(start, count, segment))
        start += count + 7
        segment += count * 32
    moved = images.move_runs(runs, [sector + shift for sector in images.sectors_of(runs)])
    assert moved == tuple(Run(run.start + shift, run.count, run.segment) for run in runs)
