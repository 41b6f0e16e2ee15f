"""Which parts of disks are written to, as the kernel's own tracepoints tell: no module, and no program to compile.

An instance of the tracer of its own records every request that a disk has completed but reads and discards. A thread
takes them out of the kernel's buffer all the time. What it could not keep is counted by the kernel, so nothing is lost
unnoticed; nor is what was not recorded because somebody switched the recording off and on again, since whoever writes
to any of the instance's files is noticed.

Mappings and arrays take no requests: they pass bios on. Of these the kernel tells when one is queued, and when it is
completed, but not always in one piece: who cuts one up tells of the end of its last piece, and a few drivers tell of no
end at all. So a bio counts as written when one is completed that ends where it does, and as being written until then.

Source: Documentation/trace/ftrace.rst and events.rst, include/trace/events/block.h; bio_endio() and bio_split() in
block/bio.c, dm_split_and_process_bio() in drivers/md/dm.c.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from remetal.errors import RefusedError, RemetalError
from remetal.system.blockdev import Span
from remetal.system.changes import Changes
from remetal.system.run import run
from remetal.units import KIB, MIB

TRACING = Path("/sys/kernel/tracing")
_REQUESTS = ("block_rq_complete",)
_BIOS = ("block_bio_queue", "block_bio_complete")
"""The events of disks that take requests, and of what stands on them."""
_LINE = re.compile(rb"(block_[a-z_]+): (\d+),(\d+) \S+ (?:\(.*?\) )?(\d+) \+ (\d+) ")
"""How a line begins that tells of an event. Behind it may stand a program's name, with whatever it likes to have in it,
line feeds, too; but that is too short to look like the beginning of another one."""
_LOST = re.compile(r"^(?:overrun|commit overrun|dropped events): (\d+)$", re.MULTILINE)
_TAKEN = re.compile(r"^read events: (\d+)$", re.MULTILINE)
_READS = ("R", "RA", "RS", "RM", "RSM", "RAM", "RAS")
_DISCARDS = ("D", "DS", "DM", "DSM", "DE", "DES", "DEM", "DESM")
"""What is discarded holds nothing that a file system would read before it has written there again."""
_SECTOR = 512
_BUFFER, _BUFFERS = 8 * MIB, 256 * MIB
"""Of the kernel's buffer for each processor, and for all of them."""
_PAUSE = 0.05
_TRIES = 20
_PREFIX = "remetal-"
_PIECE = 64 * KIB


class WriteTracker:
    """What was written to since somebody asked last, as numbers of blocks of `grain` bytes of each span."""

    def __init__(
        self, folder: Path, spans: Mapping[str, tuple[int, int, int]], grain: int, events: Collection[str] = ()
    ) -> None:
        """`spans` are by name: the number of the disk as the kernel has it, first byte, and size.

        `events` are recorded in the tracer's instance at `folder`.
        """
        self._folder = folder
        self._events = events
        self._spans = spans
        self._grain = grain
        self._written: dict[str, set[int]] = {name: set() for name in spans}
        self._under_way: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        """Where bios begin that were queued, by disk and end."""
        self._guard = threading.Lock()
        self._rest = b""
        self._events_read = 0
        self._changes = _watch(folder, events)
        self._pipe = os.open(folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracker", daemon=True)
        self._thread.start()

    def take(self, *, still: bool = False, grain: int = 0) -> dict[str, set[int]]:
        """Return what was written to, and begin anew. All that was completed before the call is in it.

        If everything is held `still`, so that nothing can be under way, then what seems to be is taken for written.
        With a `grain`, what is written from now on is told in blocks of so many bytes.
        """
        with self._guard:
            self._drain()
            if still:
                for (disk, end), starts in self._under_way.items():
                    self._mark(disk, min(starts), end)
                self._under_way.clear()
            written, self._written = self._written, {name: set() for name in self._spans}
            self._grain = grain or self._grain
        return written

    @property
    def lost(self) -> int:
        """How many requests were not recorded, or not understood, since it began.

        Somebody else may have taken some out of the buffer, emptied it, or switched the recording off, if only for a
        moment: then it is one at least.
        """
        with self._guard:
            self._drain()
            text = "".join(path.read_text() for path in self._folder.glob("per_cpu/cpu*/stats"))
            taken = sum(map(int, _TAKEN.findall(text))) - self._events_read
        lost = sum(map(int, _LOST.findall(text)))
        return lost + abs(taken) + (not self._is_on()) + self._is_touched()

    def _is_touched(self) -> bool:
        return self._changes is not None and self._changes.seen

    def _is_on(self) -> bool:
        switches = [
            self._folder / "tracing_on",
            *(self._folder / "events/block" / each / "enable" for each in self._events),
        ]
        return all(each.read_text().strip() == "1" for each in switches)

    def close(self) -> None:
        """Stop."""
        self._ended.set()
        self._thread.join()
        os.close(self._pipe)
        if self._changes is not None:
            self._changes.close()

    def _follow(self) -> None:
        while not self._ended.wait(_PAUSE):
            with self._guard:
                self._drain()

    def _drain(self) -> None:
        while not self._is_touched():  # there is no end if somebody has all recorded, what we do included
            try:
                data = os.read(self._pipe, _PIECE)
            except BlockingIOError:
                return
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._note(line)

    def _note(self, line: bytes) -> None:
        found = _LINE.match(line)
        if found is None:
            return
        self._events_read += 1
        disk = int(found[2]) << 20 | int(found[3])
        start = int(found[4]) * _SECTOR
        end = start + int(found[5]) * _SECTOR
        match found[1]:
            case b"block_bio_queue":
                if end > start:
                    self._under_way[disk, end].append(start)
            case b"block_bio_complete":
                self._mark(disk, min(start, self._completed(disk, end)), end)
            case _:
                self._mark(disk, start, end)

    def _completed(self, disk: int, end: int) -> int:
        """Return where what was queued and ends there begins: of several the longest, which also stays the longest."""
        starts = self._under_way.get((disk, end))
        if not starts:
            return end
        first = min(starts)
        starts.remove(max(starts))
        if not starts:
            del self._under_way[disk, end]
        return first

    def _mark(self, disk: int, start: int, end: int) -> None:
        for name, (number, first, length) in self._spans.items():
            low, high = max(start, first), min(end, first + length)
            if number == disk and low < high:
                blocks = range((low - first) // self._grain, (high - 1 - first) // self._grain + 1)
                self._written[name].update(blocks)


def _watch(folder: Path, events: Collection[str]) -> Changes | None:
    """Begin to notice who writes to the files of an instance; None where the kernel has no more room for that."""
    block = folder / "events/block"
    folders = [folder, folder / "options", folder / "events", block, *(block / each for each in events)]
    with suppress(OSError):
        return Changes(each for each in [*folders, *folder.glob("per_cpu/cpu*")] if each.is_dir())
    return None


@contextmanager
def tracked(spans: Mapping[str, Span], grain: int) -> Iterator[WriteTracker]:
    """Record what is written to spans of disks, in blocks of `grain` bytes, while the block runs.

    Of each of the disks, mappings and arrays `can_track` must be true. Raises RefusedError if the kernel does not let
    us.
    """
    _mount()
    _remove_old()
    folder = TRACING / "instances" / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    places = {name: (_number_of(span), span.start, span.size) for name, span in spans.items()}
    with ExitStack() as stack:
        try:
            folder.mkdir()
            stack.callback(_remove, folder)
            events = _begin(folder, spans.values())
        except OSError as error:
            raise RefusedError(
                f"the kernel does not tell what is written ({error.strerror})",
                hint="It needs root, and tracefs at /sys/kernel/tracing; a kernel that is locked down "
                "(confidentiality) never tells.",
            ) from error
        tracker = WriteTracker(folder, places, grain, events)
        try:
            yield tracker
        finally:
            (folder / "tracing_on").write_text("0")
            tracker.close()


def can_track(device: Path) -> bool:
    """Whether this kernel tells what is written to a disk that takes requests, a mapping, or an array."""
    _mount()
    return all((TRACING / "events/block" / each).is_dir() for each in _events_of(device.stat().st_rdev))


def _mount() -> None:
    if TRACING.is_dir() and not (TRACING / "instances").is_dir():
        with suppress(RemetalError):
            run(["mount", "-t", "tracefs", "tracefs", TRACING])


def _events_of(number: int) -> tuple[str, ...]:
    """Return which events tell of a device, by its number; none is known of what is no disk, mapping or array.

    Nor of memory that programs write to by themselves (DAX), through a mapping or not.
    """
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    with suppress(FileNotFoundError):
        if (folder / "queue/dax").read_text().strip() == "1":
            return ("unknown",)
    if (folder / "mq").is_dir():
        return _REQUESTS
    return _BIOS if (folder / "dm").is_dir() or (folder / "md").is_dir() else ("unknown",)


def _begin(folder: Path, spans: Collection[Span]) -> Collection[str]:
    """Begin to record, and return which events are."""
    buffer = min(_BUFFER, _BUFFERS // (os.cpu_count() or 1))
    (folder / "buffer_size_kb").write_text(str(buffer // KIB))
    (folder / "options" / "context-info").write_text("0")  # in front of an event would stand a program's name
    disks: defaultdict[str, set[int]] = defaultdict(set)
    for span in spans:
        for event in _events_of(span.path.stat().st_rdev):
            disks[event].add(_number_of(span))
    writes = " && ".join(f'rwbs != "{each}"' for each in (*_READS, *_DISCARDS))
    for event, numbers in disks.items():
        which = " || ".join(f"dev == {number}" for number in sorted(numbers))
        some = "" if event == "block_bio_complete" else " && nr_sector > 0"  # at its end a bio may have none left
        settings = folder / "events/block" / event
        (settings / "filter").write_text(f"({which}) && {writes}{some}")
        (settings / "enable").write_text("1")
    return tuple(disks)


def _number_of(span: Span) -> int:
    """Return the number of a span's disk as the kernel has it within (MKDEV, <linux/kdev_t.h>)."""
    number = span.path.stat().st_rdev
    return os.major(number) << 20 | os.minor(number)


def _remove(folder: Path) -> None:
    """Remove an instance. A program that is just being started has what it inherits open for a moment longer."""
    for _ in range(_TRIES):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(_PAUSE)
        else:
            return


def _remove_old() -> None:
    """Remove what processes left that were killed."""
    for folder in (TRACING / "instances").glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", process).exists():
            _remove(folder)
