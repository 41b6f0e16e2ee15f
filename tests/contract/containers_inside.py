"""What containers promise, tried on arrays, volume groups and LUKS that their own tools made; runs in the lab's kernel.

`main` runs every check on one sample and prints what came of each as JSON: an empty text, or what went wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from remetal.layout.keys import Key
from remetal.layout.layers import GROUPS, container_kind
from remetal.layout.layers.contract import CannotOpenError, Content, Found
from remetal.layout.layers.md_sizes import data_gain
from remetal.layout.model import Container, Disk, Layout, Luks, MdArray, SpaceId, VolumeGroup, device_names, provided
from remetal.layout.record import check_layout
from remetal.layout.signatures import probe_signature
from remetal.system.blockdev import DiskIO, Span, flush_cache, open_disk, probe_geometry
from remetal.system.loop import attach_loop
from remetal.system.mapped import find_arrays
from remetal.system.standing import is_made_of
from remetal.units import KIB, MIB, align_down

DISKS = 4
DISK_SIZE = 64 * MIB
START = 4 * MIB
SIZES = (20 * MIB + 512, 21 * MIB, 22 * MIB + 4096, 20 * MIB + 7 * 512)
"""Of the members: odd, so that nothing is aligned by chance."""
PASSPHRASE = b"the passphrase of the lab"
KEYS = (Key(b"a wrong one"), Key(PASSPHRASE))
_EDGE = 256 * KIB


def program(*argv: str | Path, data: bytes = b"") -> str:
    """Run a program and return its output."""
    done = subprocess.run(argv, input=data, capture_output=True, check=False)
    assert done.returncode == 0, f"{argv}: {(done.stdout + done.stderr).decode(errors='replace')}"
    return done.stdout.decode()


def patiently(*argv: str | Path) -> None:
    """Run a program until it succeeds: udev may hold for a moment what has just appeared."""
    end = time.monotonic() + 15
    while (done := subprocess.run(argv, capture_output=True, check=False)).returncode:
        assert time.monotonic() < end, f"{argv}: {(done.stdout + done.stderr).decode(errors='replace')}"
        time.sleep(0.1)


def wait_for(path: Path) -> Path:
    """Wait until a device is there."""
    end = time.monotonic() + 15
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.02)
    return path


Make = Callable[[Sequence[Path]], Mapping[str, Path]]


@dataclass(frozen=True)
class Sample:
    """A container: how many members, how its own tools make it on them, and close it again.

    `make` returns the devices that it provides. `lost` are members that are gone by the time it is looked at.
    """

    members: int
    make: Make
    open: Callable[[Sequence[Path]], None]
    close: Callable[[], None]
    lost: tuple[int, ...] = ()
    expected: Mapping[str, object] = field(default_factory=dict)
    """What its record says, by field."""


def _stop() -> None:
    for array in find_arrays():
        patiently("mdadm", "--stop", array)


def md(members: int, level: str, version: str, *options: str, lost: tuple[int, ...] = (), **expected: object) -> Sample:
    """An array of `members`, some of which may be the word `missing` in the options."""

    def make(devices: Sequence[Path]) -> Mapping[str, Path]:
        words = [f"--level={level}", f"--metadata={version}", "--run", "--quiet", "--force"]
        counts = [] if any(each.startswith("--raid-devices") for each in options) else [f"--raid-devices={members}"]
        named = [] if version == "0.90" else ["--name=lab", "--homehost=host"]
        program("mdadm", "--create", "/dev/md/lab", *words, *counts, *named, *options, *devices)
        (array,) = find_arrays()
        return {"": array}

    def open_again(devices: Sequence[Path]) -> None:
        program("mdadm", "--assemble", "--run", "/dev/md/lab", *devices)

    return Sample(
        members,
        make,
        open_again,
        _stop,
        lost,
        {"level": f"raid{level}" if level.isdigit() else level, "metadata": version, **expected},
    )


_LVM = ("--config", "devices { use_devicesfile = 0 } backup { backup = 0 archive = 0 }")


def _lvm(*argv: str | Path) -> str:
    return program("lvm", *argv, *_LVM)


def lvm(members: int, *volumes: Sequence[str], pv_options: Sequence[str] = (), **expected: object) -> Sample:
    """A volume group with these volumes, which are words of lvcreate."""

    def make(devices: Sequence[Path]) -> Mapping[str, Path]:
        _lvm("pvcreate", "--quiet", "--yes", *pv_options, *devices)
        _lvm("vgcreate", "--quiet", "--physicalextentsize=1M", "labvg", *devices)
        for each in volumes:
            _lvm("lvcreate", "--quiet", "--yes", "--wipesignatures=n", "labvg", *each)
        names = [each[each.index("-n") + 1] for each in volumes if "-n" in each]
        return {f"labvg/{name}": wait_for(Path("/dev/mapper", f"labvg-{name}")) for name in names}

    def close() -> None:
        patiently("lvm", "vgchange", "--quiet", "--activate=n", "labvg", *_LVM)

    def open_again(devices: Sequence[Path]) -> None:
        _lvm("vgchange", "--quiet", "--activate=y", "labvg")

    return Sample(members, make, open_again, close, (), expected)


def luks(version: int, *options: str, **expected: object) -> Sample:
    """A LUKS container with a cheap key slot."""

    def make(devices: Sequence[Path]) -> Mapping[str, Path]:
        cheap = ["--pbkdf=pbkdf2", "--luks2-keyslots-size=1m"] if version == 2 else []
        words = ["cryptsetup", "luksFormat", "--batch-mode", f"--type=luks{version}", "--pbkdf-force-iterations=1000"]
        program(*words, *cheap, *options, "--key-file=-", devices[0], data=PASSPHRASE)
        open_again(devices)
        return {"": wait_for(Path("/dev/mapper/lab"))}

    def open_again(devices: Sequence[Path]) -> None:
        program("cryptsetup", "open", "--key-file=-", devices[0], "lab", data=PASSPHRASE)

    def close() -> None:
        patiently("cryptsetup", "close", "lab")

    return Sample(1, make, open_again, close, (), {"version": version, **expected})


_HALF = ("-l", "4")
SAMPLES: dict[str, Sample] = {
    **{f"raid1-{each}": md(2, "1", each) for each in ("0.90", "1.0", "1.1", "1.2")},
    **{f"linear-{each}": md(2, "linear", each) for each in ("0.90", "1.0", "1.1", "1.2")},
    **{f"raid0-{each}": md(2, "0", each, "--chunk=64", chunk=64 * KIB) for each in ("1.0", "1.1", "1.2")},
    **{f"raid5-{each}": md(3, "5", each, "--chunk=4", "--assume-clean") for each in ("0.90", "1.0", "1.1", "1.2")},
    "raid4-1.2": md(3, "4", "1.2", "--assume-clean"),
    "raid6-1.0": md(4, "6", "1.0", "--assume-clean", "--layout=right-asymmetric", layout="right-asymmetric"),
    "raid10-0.90-n2": md(4, "10", "0.90", "--assume-clean", "--chunk=64", layout="n2"),
    "raid10-1.0-f2": md(3, "10", "1.0", "--assume-clean", "--layout=f2", layout="f2"),
    "raid10-1.2-n2": md(3, "10", "1.2", "--assume-clean", "--layout=n2", layout="n2"),
    "raid10-1.2-o2": md(3, "10", "1.2", "--assume-clean", "--layout=o2", layout="o2"),
    "raid1-bitmap-0.90": md(2, "1", "0.90", "--bitmap=internal", bitmap=True),
    "raid1-bitmap-1.0": md(2, "1", "1.0", "--bitmap=internal", bitmap=True),
    "raid5-bitmap-1.2": md(3, "5", "1.2", "--bitmap=internal", "--bitmap-chunk=4096", bitmap_chunk=4 * MIB),
    "raid1-degraded": md(1, "1", "1.2", "--raid-devices=2", "missing", slots=2),
    "raid5-degraded": md(3, "5", "1.2", "--assume-clean", lost=(1,), slots=3),
    "raid5-bitmap-degraded": md(3, "5", "1.0", "--bitmap=internal", "--assume-clean", lost=(0,)),
    "raid6-degraded": md(4, "6", "1.1", "--assume-clean", lost=(0, 3)),
    "raid1-spare": md(3, "1", "1.2", "--raid-devices=2", "--spare-devices=1", slots=2),
    "raid1-of-one": md(1, "1", "1.2", slots=1),
    "raid1-write-mostly": md(1, "1", "1.2", "--raid-devices=2", "missing", "--write-mostly"),
    "lvm-linear": lvm(1, ("-n", "one", *_HALF), ("-n", "two", "-l", "2")),
    "lvm-linear-on-two": lvm(2, ("-n", "one", "-l", "100%FREE")),
    "lvm-striped": lvm(2, ("-n", "one", "-l", "8", "-i", "2"), ("-n", "two", "-l", "2")),
    "lvm-two-copies": lvm(1, ("-n", "one", *_HALF), pv_options=("--pvmetadatacopies=2",)),
    "lvm-raid1": lvm(2, ("-n", "one", "--type=raid1", "-m", "1", "-l", "4")),
    "lvm-raid5": lvm(3, ("-n", "one", "--type=raid5", "-i", "2", "-l", "8"), ("-n", "two", "-l", "2")),
    "lvm-mirror": lvm(3, ("-n", "one", "--type=mirror", "-m", "1", "-l", "4", "--nosync")),
    "luks1": luks(1),
    "luks2": luks(2, "--sector-size=512", sector_size=512),
    "luks2-4096": luks(2, "--sector-size=4096", sector_size=4096),
    "luks2-with-an-offset": luks(2, "--offset=8192", header_size=4 * MIB),
}


class Bench:
    """The members of one sample, which lie inside of the disks; one sample at a time."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.spans = {f"m{index}": Span(_disk(index), START, SIZES[index]) for index in range(sample.members)}
        self.data: dict[str, bytes] = {}
        self.layer: Container | None = None
        self.header = b""
        """Of a LUKS container: it comes back as an image."""

    def build(self) -> None:
        """Make the container by its own tools and write to what it provides."""
        for index in range(DISKS):
            program("blkdiscard", "--zeroout", _disk(index))
        with ExitStack() as stack:
            loops = [stack.enter_context(attach_loop(span, writable=True)) for span in self.spans.values()]
            for name, device in self.sample.make(loops).items():
                self.data[name] = os.urandom(_EDGE)
                _put(device, self.data[name])
            self.sample.close()
        for index in self.sample.lost:
            del self.spans[f"m{index}"]
        container = self.container
        if isinstance(container, Luks):
            with open_disk(self.spans[container.on].path) as disk:
                self.header = disk.read(self.spans[container.on].start, container.header_size)

    def find(self) -> Found:
        """Let the kinds say what is there."""
        found = []
        with ExitStack() as stack:
            members = []
            for name, span in self.spans.items():
                flush_cache(span.path)
                io = stack.enter_context(open_disk(span.path))
                signature = probe_signature(span)
                members.append(Content(name, span, io.reader(span.start), signature.type, signature.label))
            for kind in GROUPS:
                own = [each for each in members if each.type in kind.TYPES]
                found += kind.probe_groups(own) if own else []
        (only,) = found
        assert set(only.spaces) == set(self.spans), only
        return only

    @property
    def container(self) -> Container:
        """The record of the container, as it was found first."""
        if self.layer is None:
            found = self.find().layer
            assert isinstance(found, (MdArray, VolumeGroup, Luks)), self.find()
            self.layer = found
        return self.layer

    def check_data(self, devices: Mapping[SpaceId, Path]) -> None:
        """Compare what the opened container holds with what was written."""
        for name, data in self.data.items():
            device = devices[name] if name else next(iter(devices.values()))
            flush_cache(device)
            assert _get(device) == data, f"{name or device} holds other bytes"

    def hash(self) -> dict[str, str]:
        """Return the hash of every member, byte for byte."""
        return {name: _hash(span) for name, span in self.spans.items()}


def _disk(index: int) -> Path:
    return Path(f"/dev/ubd{'abcdefgh'[index]}")


def _put(device: Path, data: bytes) -> None:
    """Write to the beginning, the middle and the end of a device."""
    with open_disk(device, writable=True) as disk:
        for place in _places(disk):
            disk.write(data, place)
        os.fsync(disk.fd)


def _get(device: Path) -> bytes:
    with open_disk(device) as disk:
        found = {disk.read(place, _EDGE) for place in _places(disk)}
    assert len(found) == 1, "beginning, middle and end are not the same"
    return found.pop()


def _places(disk: DiskIO) -> tuple[int, int, int]:
    end = align_down(disk.size() - _EDGE, 4096)
    return 0, align_down(end // 2, MIB), end


def _hash(span: Span) -> str:
    flush_cache(span.path)
    with open_disk(span.path) as disk:
        return hashlib.sha256(disk.read(span.start, span.size)).hexdigest()


def _garbage(span: Span) -> None:
    """Overwrite all places where something could have its marks, and some of the others."""
    ends = {0, span.size - MIB}
    with open_disk(span.path, writable=True) as disk:
        for place in sorted({*ends, *range(2 * MIB, span.size - MIB, 3 * MIB)}):
            disk.write(os.urandom(MIB if place in ends else _EDGE), span.start + place)


def layout_of(container: Container, spans: Mapping[SpaceId, Span]) -> Layout:
    """Return a layout in which every member is a disk."""
    disks = tuple(Disk(name=name, size=span.size) for name, span in spans.items())
    return Layout(disks=disks, layers=(container,))


def check_nothing_left() -> None:
    """See that no array, mapping or loop device is there."""
    program("udevadm", "settle", "--timeout=10")
    running = [each for each in find_arrays() if list(Path("/sys/class/block", each.name, "slaves").iterdir())]
    assert running == [], f"{running} are left: {Path('/proc/mdstat').read_text()}"
    assert (mappings := list(Path("/sys/class/block").glob("dm-*"))) == [], f"{mappings} are left"
    loops = [loop.name for loop in Path("/sys/class/block").glob("loop*") if (loop / "loop").exists()]
    assert loops == [], f"{loops} are left"


@contextmanager
def opened(bench: Bench, container: Container, *, writable: bool = False) -> Iterator[Mapping[SpaceId, Path]]:
    kind = container_kind(container)
    with kind.open_container(container, bench.spans, KEYS, writable=writable) as devices:
        yield devices
    check_nothing_left()


def make_again(bench: Bench, container: Container) -> int:
    """Make a container anew; a LUKS container gets its header as an image."""
    if isinstance(container, Luks):
        with open_disk(bench.spans[container.on].path, writable=True) as disk:
            disk.write(bench.header, bench.spans[container.on].start)
        return len(bench.header)
    return container_kind(container).apply_container(container, bench.spans)


def describes(bench: Bench) -> None:
    """What stands there is described as its tools made it, and its record is taken."""
    container = bench.container
    check_layout(layout_of(container, bench.spans))
    for name, value in bench.sample.expected.items():
        assert getattr(container, name) == value, f"{name} is {getattr(container, name)}, not {value}"
    assert bench.find().layer == container
    missing = [each for each in container.members if not each.space] if isinstance(container, MdArray) else []
    assert bench.find().complete == (not missing)
    assert container_kind(container).is_made(container, bench.spans)


def reads_without_a_write(bench: Bench) -> None:
    """Opening to read changes no byte of any member, and shows what is inside, in the size that was described."""
    before = bench.hash()
    with opened(bench, bench.container) as devices:
        assert list(devices) == list(device_names(bench.container))
        check_sizes(bench.container, devices)
        bench.check_data(devices)
    assert bench.hash() == before


def check_sizes(container: Container, devices: Mapping[SpaceId, Path]) -> None:
    """Compare the sizes of opened devices with their record."""
    for device in provided(container, {}):
        real = probe_geometry(devices[device.name]).size
        assert real == device.size, f"{device.name} has {real} bytes instead of {device.size}"


def writes(bench: Bench) -> None:
    """Opened to write, it takes new bytes, which are there the next time."""
    container = bench.container
    with opened(bench, container, writable=True) as devices:
        for name in bench.data:
            bench.data[name] = os.urandom(_EDGE)
            _put(devices[name] if name else next(iter(devices.values())), bench.data[name])
    with opened(bench, container) as devices:
        bench.check_data(devices)
    assert container_kind(container).is_made(container, bench.spans)


@contextmanager
def tool_loops(bench: Bench) -> Iterator[list[Path]]:
    """Attach loop devices as an administrator would, which stay until they are detached."""
    loops = []
    try:
        for span in bench.spans.values():
            where = ["--offset", str(span.start), "--sizelimit", str(span.size)]
            loops.append(Path(program("losetup", "--find", "--show", *where, span.path).strip()))
        yield loops
    finally:
        for loop in loops:
            program("losetup", "--detach", loop)


def is_used_as_it_is_when_open(bench: Bench) -> None:
    """What the system has open already is used, without any key, and left open."""
    kind, container = container_kind(bench.container), bench.container
    with tool_loops(bench) as loops:
        program("udevadm", "settle")  # it may have assembled them already
        if not kind.find_running(container):
            bench.sample.open(loops)
        before = sorted(each.name for each in Path("/sys/class/block").glob("[dm][dm]*"))
        with kind.open_container(container, bench.spans, (), writable=True) as devices:
            check_sizes(container, devices)
            bench.check_data(devices)
        assert sorted(each.name for each in Path("/sys/class/block").glob("[dm][dm]*")) == before
        bench.sample.close()
    check_nothing_left()


def opens_after_a_kill(bench: Bench) -> None:
    """A process that held it open and was killed leaves nothing in the way."""
    for writable in (False, True):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                kind = container_kind(bench.container)
                with kind.open_container(bench.container, bench.spans, KEYS, writable=writable):
                    os.write(writer, b"!")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        told = os.read(reader, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        assert told == b"!", "the container could not be opened in a process of its own"
        with opened(bench, bench.container) as devices:
            bench.check_data(devices)


def is_made_on_garbage(bench: Bench) -> None:
    """Made anew on members full of garbage, twice, it is what it was, but for its content."""
    container = bench.container
    kind = container_kind(container)
    for _ in range(2):
        for span in bench.spans.values():
            _garbage(span)
        assert not kind.is_made(container, bench.spans)
        assert make_again(bench, container) > 0
        check_nothing_left()
        assert kind.is_made(container, bench.spans)
        assert make_again(bench, container) > 0, "it cannot be made where it stands"
        assert kind.is_made(container, bench.spans)
    found = bench.find().layer
    assert _without_text(found) == _without_text(container)
    with opened(bench, container, writable=True) as devices:
        check_sizes(container, devices)
        for name, data in bench.data.items():
            _put(devices[name] if name else next(iter(devices.values())), data)
    assert kind.is_made(container, bench.spans)
    with opened(bench, container) as devices:
        bench.check_data(devices)
    found = bench.find().layer
    assert _without_text(found) == _without_text(container)


def _without_text(container: object) -> object:
    """Return a record without what its tools write anew each time: sequence numbers, dates."""
    if isinstance(container, VolumeGroup):
        return (container.name, container.uuid, container.extent_size, container.members, container.volumes)
    return container


def gets_the_planned_size(bench: Bench) -> None:
    """On members that are larger or smaller it has exactly the planned sizes."""
    container, spans = bench.container, dict(bench.spans)
    odd = 7 * 512
    for changes in ((30, 30, 30, 30), (33, 3, 20, 11), (-5, -5, -5, -5), (9, -6, 0, 1)):
        gains = {name: change * MIB + odd for name, change in zip(spans, changes, strict=False)}
        bench.spans = {name: Span(span.path, span.start, span.size + gains[name]) for name, span in spans.items()}
        check_planned(bench, container, spans, gains)
        odd = 0 if odd else 7 * 512
    bench.spans = spans


def check_planned(
    bench: Bench, container: Container, before: Mapping[SpaceId, Span], gains: Mapping[SpaceId, int]
) -> None:
    kind = container_kind(container)
    names = device_names(container)
    if isinstance(container, MdArray):
        gains = {
            name: data_gain(container.metadata, span.size, bench.spans[name].size) for name, span in before.items()
        }
    if isinstance(container, Luks):
        step, header = container.sector_size, container.header_size
        gains = {
            name: align_down(bench.spans[name].size - header, step) - align_down(span.size - header, step)
            for name, span in before.items()
        }
    wish = next(iter(kind.extensible_devices(container)), "")
    planned = kind.plan_container(container, gains, wish, dict.fromkeys(names, MIB))
    check_layout(layout_of(planned, bench.spans))
    make_again(bench, planned)
    assert kind.is_made(planned, bench.spans)
    with opened(bench, planned, writable=True) as devices:
        check_sizes(planned, devices)
        for device in devices.values():
            _put(device, b"x" * _EDGE)
    assert kind.is_made(planned, bench.spans)
    found = bench.find().layer
    assert _without_text(found) == _without_text(planned), f"{found} is not {planned}"


def is_not_mistaken_for_its_copy(bench: Bench) -> None:
    """While it is open, a copy of its members on other disks is another container, or cannot be opened."""
    container, spans = bench.container, dict(bench.spans)
    taken = {span.path for span in spans.values()}
    free = [disk for disk in map(_disk, range(DISKS)) if disk not in taken]
    if len(free) < len(spans):
        return
    copies = {name: Span(disk, START, span.size) for disk, (name, span) in zip(free, spans.items(), strict=False)}
    for name, span in spans.items():
        with open_disk(span.path) as source, open_disk(copies[name].path, writable=True) as target:
            target.write(source.read(span.start, span.size), START)
    kind = container_kind(container)
    assert kind.find_running(container) == ()
    with kind.open_container(container, spans, KEYS, writable=True) as own:
        running = kind.find_running(container)
        assert bool(running) != isinstance(container, Luks)
        assert all(is_made_of(device, [span.path for span in spans.values()]) for device in running)
        assert not any(is_made_of(device, [span.path for span in copies.values()]) for device in running)
        for writable in (False, True):
            with ExitStack() as stack:
                if running:
                    stack.enter_context(pytest.raises(CannotOpenError))
                others = stack.enter_context(kind.open_container(container, copies, KEYS, writable=writable))
                assert {path.resolve() for path in own.values()}.isdisjoint(path.resolve() for path in others.values())
                for device in others.values() if writable else ():
                    _put(device, b"y" * _EDGE)
        bench.check_data(own)
    check_nothing_left()
    with opened(bench, container) as devices:
        bench.check_data(devices)


CHECKS: dict[str, Callable[[Bench], None]] = {
    check.__name__: check
    for check in (
        describes,
        reads_without_a_write,
        writes,
        is_used_as_it_is_when_open,
        opens_after_a_kill,
        is_not_mistaken_for_its_copy,
        is_made_on_garbage,
        gets_the_planned_size,
    )
}


def prepare() -> None:
    """Load what the kernel needs for the samples."""
    program("modprobe", "--all", "linear", "raid0", "raid1", "raid456", "raid10", "dm-crypt", "dm-raid")


def clean_up() -> None:
    """Take down whatever a failed check has left."""
    for _ in range(3):
        for argv in (["dmsetup", "remove_all", "--force"], ["mdadm", "--stop", "--scan"], ["losetup", "-D"]):
            subprocess.run(argv, capture_output=True, check=False)
        subprocess.run(["udevadm", "settle", "--timeout=5"], check=False)
    shutil.rmtree("/dev/labvg", ignore_errors=True)


def main(name: str) -> None:
    """Run every check on a sample and print the outcome."""
    prepare()
    bench = Bench(SAMPLES[name])
    bench.build()
    outcome: dict[str, str] = {}
    for word, check in CHECKS.items():
        began = time.monotonic()
        try:
            check(bench)
            outcome[word] = ""
        except Exception:  # noqa: BLE001 - told in the outcome
            outcome[word] = traceback.format_exc()
            clean_up()
            bench = Bench(SAMPLES[name])
            bench.build()
        print(f"{name}: {word}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(outcome))
