"""What every layer's file promises. A new layer is a further entry in the tables of fixtures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from remetal.layout.layers import GROWING, TABLES, VOLUMES, encode_table, plan_growth, probe_volume
from remetal.layout.layers.contract import Content, VolumeKind
from remetal.layout.model import FileSystem, Layout, Raw
from remetal.layout.probe import probe_layout
from remetal.layout.record import check_layout
from remetal.layout.signatures import probe_signature
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from tests.real_disks import MIB, Source, blank, make_gpt_disk, make_mbr_disk, program

START = 3 * MIB


@dataclass(frozen=True)
class Sample:
    """How to make one kind of volume, and how its own program checks it."""

    size: int
    make: tuple[str, ...]
    check: tuple[str, ...] = ("true",)
    group: int = 1
    """Bytes that growth may leave unused."""


VOLUME_SAMPLES = {
    "ext2": Sample(16 * MIB, ("mkfs.ext2", "-q", "-L", "name"), ("e2fsck", "-fn")),
    "ext3": Sample(16 * MIB, ("mkfs.ext3", "-q", "-L", "name"), ("e2fsck", "-fn")),
    "ext4": Sample(16 * MIB, ("mkfs.ext4", "-q", "-L", "name"), ("e2fsck", "-fn")),
    "vfat": Sample(16 * MIB, ("mkfs.vfat", "-n", "NAME"), ("fsck.vfat", "-n")),
    "xfs": Sample(300 * MIB, ("mkfs.xfs", "-q", "-L", "name"), ("xfs_repair", "-n"), 64 * 4096),
    "ntfs": Sample(16 * MIB, ("mkfs.ntfs", "-Q", "-q", "-L", "name"), ("ntfsfix", "-n")),
    "exfat": Sample(16 * MIB, ("mkfs.exfat", "-L", "name"), ("fsck.exfat", "-n")),
    "f2fs": Sample(64 * MIB, ("mkfs.f2fs", "-q", "-l", "name"), ("fsck.f2fs", "--dry-run", "-f")),
    "swap": Sample(MIB, ("mkswap", "-q", "-L", "name")),
}
TABLE_SAMPLES: dict[str, Callable[[Path], Path]] = {"gpt": make_gpt_disk, "dos": make_mbr_disk}


@dataclass(frozen=True)
class Made:
    """A volume of one kind in a disk file, with room behind it."""

    sample: Sample
    span: Span
    content: Content


@pytest.fixture(params=VOLUME_SAMPLES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    sample = VOLUME_SAMPLES[request.param]
    disk = blank(tmp_path / "disk.img", START + 4 * sample.size)
    span = Span(disk, START, sample.size)
    with attach_loop(span, writable=True) as device:
        program(*sample.make, device)
    found = probe_signature(span)
    assert found.type == request.param
    return Made(sample, span, Content("disk:1", span, reader(span), found.type, found.label))


def reader(span: Span, patch: Callable[[bytearray, int], None] | None = None) -> Read:
    def read(offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= span.size, "a probe looks beyond its space"
        with span.path.open("rb") as disk:
            disk.seek(span.start + offset)
            data = bytearray(disk.read(size))
        if patch is not None:
            patch(data, offset)
        return bytes(data)

    return read


def test_every_kind_has_a_sample() -> None:
    assert set(VOLUME_SAMPLES) == set(VOLUMES) - {"swsuspend"}
    assert set(TABLE_SAMPLES) == {kind.NAME for kind in TABLES}
    assert set(GROWING) <= set(VOLUMES)


def test_a_volume_is_described_as_blkid_does(made: Made) -> None:
    volume = probe_volume(made.content)
    assert not isinstance(volume, Raw)
    said = probe_signature(made.span)
    assert (volume.on, volume.uuid, volume.label) == ("disk:1", said.uuid, said.label)
    assert 0 < volume.size <= made.sample.size
    if isinstance(volume, FileSystem):
        assert volume.type == said.type
        assert 0 < volume.used < volume.size
        assert volume.size % volume.block_size == 0


def test_damaged_volumes_are_refused_with_the_one_error(made: Made) -> None:
    kind: VolumeKind = VOLUMES[made.content.type]
    with pytest.raises(BadStructureError):
        kind.probe_volume(Content("disk:1", made.span, lambda offset, size: bytes(size), made.content.type))
    for place in range(0, 2048, 3):

        def patch(data: bytearray, offset: int, place: int = place) -> None:
            if offset <= place < offset + len(data):
                data[place - offset] ^= 0xFF

        damaged = Content("disk:1", made.span, reader(made.span, patch), made.content.type)
        with suppress(BadStructureError):
            kind.probe_volume(damaged)


def test_growth(made: Made) -> None:
    volume = probe_volume(made.content)
    if not isinstance(volume, FileSystem):
        assert made.content.type not in GROWING
        return
    larger = 3 * made.sample.size + 12345 // 512 * 512
    size = plan_growth(volume, {volume.on: larger}).size
    assert plan_growth(volume, {volume.on: made.sample.size}) == volume
    assert volume.size <= size <= larger
    if made.content.type not in GROWING:
        assert size == volume.size
        return
    assert size > volume.size
    span = Span(made.span.path, START, larger)
    kind = GROWING[made.content.type]
    assert kind.apply_growth(span, size) > 0
    with attach_loop(span) as device:
        program(*made.sample.check, device)
    grown = kind.probe_volume(Content("disk:1", span, reader(span), made.content.type, made.content.label))
    assert isinstance(grown, FileSystem)
    assert (grown.uuid, grown.label) == (volume.uuid, volume.label)
    assert 0 <= size - grown.size < made.sample.group
    assert kind.apply_growth(span, size) == 0, "growing again writes nothing"


@pytest.mark.parametrize("name", TABLE_SAMPLES)
def test_a_table_survives(name: str, tmp_path: Path) -> None:
    disk = TABLE_SAMPLES[name](tmp_path / "disk.img")
    (kind,) = (kind for kind in TABLES if name == kind.NAME)
    size = disk.stat().st_size
    found = kind.probe_table(reader(Span(disk, 0, size)), size, 512, "disk.img")
    assert found is not None
    table, problems = found
    assert problems == ()
    layout = probe_layout([disk])
    check_layout(Layout(disks=layout.disks, layers=(table,)))
    data = disk.read_bytes()
    for piece in encode_table(table, size, 512):
        assert data[piece.offset : piece.offset + len(piece.data)] == piece.data
    with pytest.raises(BadStructureError):
        encode_table(table, 16 * MIB, 512)
    assert kind.probe_table(lambda offset, length: bytes(length), size, 512, "disk.img") is None
    assert Source(disk, layout).images()
