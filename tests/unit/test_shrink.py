"""A btrfs on smaller devices, at the least sizes that the plan allows: everything in it, and everything about it."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.manifest import take_manifest
from remetal.errors import RemetalError
from remetal.image import shrink
from remetal.image.capture import read_batches
from remetal.image.extents import probe_used_spanning
from remetal.image.shrink import Shrinking, restore_shrunk
from remetal.layout.layers.btrfs import least_size, plan_shrinking, probe_groups
from remetal.layout.layers.contract import Content
from remetal.layout.model import FileSystem
from remetal.repository.reader import open_reader
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB, align_down
from tests.real_disks import blank, program
from tests.repositories import Site, make_site


@dataclass(frozen=True)
class Make:
    """Devices of so many MiB, profiles of data and metadata, and the MiB that are taken before anything is written."""

    devices: tuple[int, ...]
    data: str
    metadata: str
    taken: int
    options: tuple[str, ...] = ()


MAKES = {
    "single": Make((1600,), "single", "dup", 900),
    "mixed": Make((1600,), "single", "single", 1450, ("--mixed",)),
    "dup": Make((2000,), "dup", "dup", 850),
    "raid0": Make((1200, 1200), "raid0", "raid1", 1500),
    "raid1": Make((1600, 1600), "raid1", "raid1", 1000),
    "raid1c3": Make((2400, 2400, 2400), "raid1c3", "raid1c3", 1900),
    "raid10": Make((1600,) * 4, "raid10", "raid10", 2000),
    "raid5": Make((1800, 1800, 1800), "raid5", "raid1", 2750),
    "raid6": Make((2000,) * 4, "raid6", "raid1c3", 2000),
    "spread": Make((1800, 2000, 2400), "single", "raid1", 4400),
}


QUICK = {"single", "raid1", "raid5"}


@contextmanager
def opened(spans: Sequence[Span], *options: str) -> Iterator[Path]:
    """Mount a btrfs on all of its devices."""
    with ExitStack() as stack:
        paths = [stack.enter_context(attach_loop(span, writable=True)) for span in spans]
        named = (*options, "subvolid=5", *(f"device={path}" for path in paths))
        try:
            with mounted(paths[0], kind="btrfs", options=named) as folder:
                yield folder
        finally:
            program("btrfs", "device", "scan", "--forget", *paths)


def build(make: Make, folder: Path) -> list[Span]:
    """Make a btrfs whose content lies behind what was taken and given back: subvolumes, a snapshot, shared extents."""
    spans = [Span(blank(folder / f"{index}.img", size * MIB), 0, size * MIB) for index, size in enumerate(make.devices)]
    profiles = (f"--data={make.data}", f"--metadata={make.metadata}")
    program("mkfs.btrfs", "--quiet", "--label=name", *profiles, *make.options, *(span.path for span in spans))
    chance = random.Random(1)
    with opened(spans) as top:
        taken = [top / f"taken{number}" for number in range(make.taken)]
        for path in taken:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, MIB)
        for name in ("@", "@home"):
            program("btrfs", "subvolume", "create", top / name)
        for number in range(20):
            (top / "@" / f"large{number}").write_bytes(chance.randbytes(2 * MIB))
        for number in range(400):
            (top / "@home" / f"small{number}").write_bytes(chance.randbytes(1500))
        program("btrfs", "subvolume", "snapshot", "-r", top / "@", top / "snapshot")
        (top / "@" / "large1").unlink()
        program("cp", "--reflink=always", top / "@" / "large2", top / "@" / "clone")
        program("btrfs", "subvolume", "set-default", top / "@home")
        for path in taken:
            path.unlink()
    with opened(spans) as top:
        program("btrfs", "balance", "start", "-dusage=3", "-musage=3", "-f", top)
    return spans


def describe(spans: Sequence[Span]) -> tuple[FileSystem, list[Span]]:
    """Return what the probe says, and the spans in the order of its parts."""
    with ExitStack() as stack:
        contents = []
        for index, span in enumerate(spans):
            disk = stack.enter_context(open_disk(span.path))
            contents.append(Content(str(index), span, disk.reader(0), "btrfs", ""))
        (found,) = probe_groups(contents)
    assert isinstance(found.layer, FileSystem), found
    return found.layer, [spans[int(part.space)] for part in found.layer.parts]


def capture(site: Site, volume: FileSystem, spans: Sequence[Span]) -> Snapshot:
    used = probe_used_spanning({part.number: span for part, span in zip(volume.parts, spans, strict=True)})
    with open_session(site.repository, site.keys, workers=2) as session:
        for part, span in zip(volume.parts, spans, strict=True):
            extents = used[part.number]
            batches = read_batches(span, extents, session.chunk_size, buffers=session.workers + 1, part=part.space)
            session.write_image(part.space, span.size, batches, previous=None)
        return session.commit(layout=b"{}", hostname="host", tags=())


def tell(spans: Sequence[Span]) -> tuple[object, ...]:
    """Return identity, devices, profiles, subvolumes, default subvolume, and everything in all of them."""
    with opened(spans, "ro") as top:
        shown = program("btrfs", "filesystem", "show", top)
        identity = re.findall(r"uuid: (\S+)", shown), sorted(re.findall(r"devid +(\d+)", shown))
        profiles = sorted(re.findall(r"^(.*):", program("btrfs", "filesystem", "df", top), re.MULTILINE))
        listed = re.findall(r"ID (\d+) .* path (\S+)", program("btrfs", "subvolume", "list", top))
        default = program("btrfs", "subvolume", "get-default", top).split()[1]
        manifests = {name: take_manifest(str(top / name)) for _, name in listed}
        assert "no errors found" in program("btrfs", "scrub", "start", "-B", "-r", top)
    return identity, profiles, listed, default, manifests


def targets_of(volume: FileSystem, sizes: Sequence[int], folder: Path) -> list[Span]:
    return [
        Span(blank(folder / f"target{part.number}.img", size), 0, size)
        for part, size in zip(volume.parts, sizes, strict=True)
    ]


def reaches(volume: FileSystem, spans: Sequence[Span]) -> list[int]:
    """Return where the last chunk ends on each device."""
    used = probe_used_spanning({part.number: span for part, span in zip(volume.parts, spans, strict=True)})
    return [used[part.number][-1].end for part in volume.parts]


def shrinking(volume: FileSystem, snapshot: Snapshot, targets: Sequence[Span]) -> list[Shrinking]:
    rooms = {part.space: span.size for part, span in zip(volume.parts, targets, strict=True)}
    planned = plan_shrinking(volume, rooms)
    assert isinstance(planned, FileSystem), planned
    images = {image.volume: image for image in snapshot.images}
    return [
        Shrinking(part.space, part.number, images[part.space], span, before.size, part.size)
        for before, part, span in zip(volume.parts, planned.parts, targets, strict=True)
    ]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in MAKES]
)
def test_it_is_the_same_on_the_least_devices(name: str, tmp_path: Path) -> None:
    volume, spans = describe(build(MAKES[name], tmp_path))
    before = tell(spans)
    least = [least_size(volume, part) for part in volume.parts]
    assert all(size < part.size for size, part in zip(least, volume.parts, strict=True)), (least, volume)
    assert any(size < reach for size, reach in zip(least, reaches(volume, spans), strict=True)), "nothing has to move"
    targets = targets_of(volume, least, tmp_path)
    site = make_site()
    snapshot = capture(site, volume, spans)
    with open_reader(site.repository, site.key, snapshot) as reader:
        for _ in range(2):
            restore_shrunk(reader, shrinking(volume, snapshot, targets))
            assert tell(targets) == before
            after, _ = describe(targets)
            assert [part.size for part in after.parts] == least
            assert (after.uuid, after.label, after.making) == (volume.uuid, volume.label, volume.making)


def test_an_interrupted_one_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, spans = describe(build(MAKES["raid1"], tmp_path))
    before = tell(spans)
    targets = targets_of(volume, [least_size(volume, part) for part in volume.parts], tmp_path)
    site = make_site()
    snapshot = capture(site, volume, spans)
    shrink_one = shrink._shrink

    def stop_at_the_second(each: Shrinking, folder: Path) -> None:
        if each.number == 2:
            raise RemetalError("stopped")
        shrink_one(each, folder)

    with open_reader(site.repository, site.key, snapshot) as reader:
        monkeypatch.setattr(shrink, "_shrink", stop_at_the_second)
        with pytest.raises(RemetalError, match="stopped"):
            restore_shrunk(reader, shrinking(volume, snapshot, targets))
        monkeypatch.setattr(shrink, "_shrink", shrink_one)
        restore_shrunk(reader, shrinking(volume, snapshot, targets))
    assert tell(targets) == before


def test_what_does_not_shrink_grows_neither(tmp_path: Path) -> None:
    """One device of three becomes smaller, one stays, one gets a larger place."""
    volume, spans = describe(build(MAKES["spread"], tmp_path))
    before = tell(spans)
    largest = max(range(3), key=lambda index: volume.parts[index].size)
    sizes = [part.size for part in volume.parts]
    sizes[largest] = least_size(volume, volume.parts[largest])
    sizes[largest - 1] += 100 * MIB
    targets = targets_of(volume, sizes, tmp_path)
    site = make_site()
    snapshot = capture(site, volume, spans)
    with open_reader(site.repository, site.key, snapshot) as reader:
        restore_shrunk(reader, shrinking(volume, snapshot, targets))
    assert tell(targets) == before
    found, _ = describe(targets)
    assert [part.size for part in found.parts] == [
        min(size, part.size) for size, part in zip(sizes, volume.parts, strict=True)
    ]


def test_the_plan_refuses_what_may_not_fit(tmp_path: Path) -> None:
    volume, _ = describe(build(MAKES["raid1"], tmp_path))
    least = {part.space: least_size(volume, part) for part in volume.parts}
    assert isinstance(plan_shrinking(volume, least), FileSystem)
    for space in least:
        found = plan_shrinking(volume, least | {space: least[space] - 4096})
        assert isinstance(found, str)
        assert f"on {space}" in found
        assert str(align_down(least[space], 4096)) in found or "below" in found
