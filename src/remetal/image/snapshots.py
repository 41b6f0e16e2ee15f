"""One consistent image of volumes in use of which some are read from LVM snapshots, the others as `image.live` does.

One moment is the law. To take a snapshot, LVM suspends the volume, for which the kernel freezes its file system, so
what the snapshot shows is of one moment within that. If everything else that is captured is held still meanwhile,
nothing of it changes between the moment at which it was held and that of the snapshot: all of it is of the snapshot's
moment, though the one file system is not held by us. Two snapshots are of two moments, so then their file systems have
to be frozen from before the first until after the last, which the kernel has to let LVM do once more. Before Linux 6.8
it does not (`freezes_nest`): there one volume gets a snapshot, that with most in use. Nobody tries that out, because
LVM leaves an ordinary snapshot half made where the kernel refuses.

Snapshots come last of what is done while file systems are held, and are read when all are let go. How long that takes
matters only because they fill up: that is looked at by a thread of its own from when each is taken until it is dropped,
since who reads may wait for the store, or for other volumes. Before the volumes of a pool have to wait, the snapshot is
taken from whoever reads it. It is looked at once more after the last byte, before anything is believed: a snapshot that
was whole then was whole before.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from remetal.errors import RemetalError
from remetal.events import Note, Report, Step, silent
from remetal.image.capture import read_batches
from remetal.image.extents import probe_used
from remetal.image.live import READ_ONLY_KINDS, LiveVolume, Manner, Moment, Pause, all_held, capture_live
from remetal.image.ranges import Extents
from remetal.pace import Pace
from remetal.repository.session import Batch, Session
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import Span, flush_cache
from remetal.system.freeze import freezes_nest, sync_folders
from remetal.system.lvm_snapshots import LvmSnapshot, Origin, SnapshotFailedError, probe_origins
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError
from remetal.units import MIB, align_up, format_bytes

Policy: TypeAlias = Literal["thin", "all", "none"]
"""Which logical volumes are read from snapshots: thin ones, ordinary ones, too, or none."""
Way: TypeAlias = Literal["tracked", "held", "read-only", "snapshot", "at rest"]
"""How a volume was captured: read while writes were tracked, read while it was held, read while it was read-only, read
from a snapshot, or not in use."""

_KINDS = frozenset({"ext2", "ext3", "ext4", "xfs"})
"""Whose file systems the kernel freezes for a snapshot. It does not know a btrfs by its device, and would take the
snapshot for another device of it."""
_UNTOUCHED = {
    "ext2": ("ro",),
    "ext3": ("ro", "noload"),
    "ext4": ("ro", "noload"),
    "xfs": ("ro", "norecovery", "nouuid"),
}
"""How their snapshots are mounted without anything being written."""
LEAST = 64 * MIB
"""An ordinary snapshot has so much room at least, or a tenth of its volume; and up to half of the volume where that
leaves as much to others."""
POOL_LIMIT = 0.8
"""The part of a thin pool's data or metadata that may be in use for a snapshot to begin."""
_PLAIN = frozenset({"linear", "striped"})
_INTERVAL = 0.5
"""Seconds between two looks at the snapshots."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A volume that could be read from a snapshot, and how many bytes of it are in use."""

    volume: str
    origin: Origin
    used: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Which volumes are read from snapshots, with the bytes of room for each; and why others are not."""

    rooms: Mapping[str, int]
    reasons: Mapping[str, str]


def plan_snapshots(offers: Sequence[Offer], policy: Policy, *, nest: bool) -> Choice:
    """Choose what is read from snapshots; `nest` is whether there can be several.

    What the policy leaves out needs no reason.
    """
    rooms: dict[str, int] = {}
    reasons: dict[str, str] = {}
    free = {offer.origin.group: offer.origin.free for offer in offers}
    for offer in sorted(offers, key=lambda each: each.used, reverse=True):
        origin = offer.origin
        if policy == "none" or (policy == "thin" and origin.pool is None):
            continue
        room = 0 if origin.pool else _room(origin, free[origin.group])
        reason = _obstacle(origin, room, free[origin.group])
        if not reason and rooms and not nest:
            reason = "this kernel (before Linux 6.8) lets only one volume have a snapshot of the moment"
        if reason:
            reasons[offer.volume] = reason
        else:
            rooms[offer.volume] = room
            free[origin.group] -= room
    return Choice(rooms, reasons)


def _room(origin: Origin, free: int) -> int:
    """Return how much room an ordinary snapshot should have, in bytes; more than `free` if there is not enough."""
    room = max(origin.size // 10, LEAST, min(origin.size, free) // 2)
    return align_up(room, origin.extent)


def _obstacle(origin: Origin, room: int, free: int) -> str:
    """Return why a volume cannot have a snapshot, nothing if it can."""
    words = set(origin.layout.split(","))
    if origin.pool is not None:
        if origin.pool.trouble:
            return f"of the thin pool {origin.pool.name}: {origin.pool.trouble}"
        full = origin.pool.usage > POOL_LIMIT
        return f"{origin.pool.usage:.0%} of the thin pool {origin.pool.name} are in use" if full else ""
    if not words <= _PLAIN or "snapshot" in origin.role.split(","):
        return f"it is not a linear, striped or thin volume ({origin.layout}; {origin.role})"
    if room > free:
        return f"it needs {format_bytes(room)} in the volume group {origin.group}, which has {format_bytes(free)} free"
    return ""


def capture_mounted(
    session: Session, volumes: Sequence[LiveVolume], policy: Policy, manner: Manner, report: Report = silent
) -> tuple[list[ImageRecord], Pause, dict[str, Way]]:
    """Capture mounted volumes as they all are at one moment; return images, the pause, and the way of each.

    As `capture_live`, but some are read from snapshots as `policy` says. Raises UnavailableError, too, if one does not
    last until it is read. No snapshot stays, whatever happens.
    """
    origins = _probe_origins(volumes, report) if policy != "none" else {}
    choice = plan_snapshots(
        [Offer(each.volume, origins[each.volume], _used(each)) for each in volumes if each.volume in origins],
        policy,
        nest=freezes_nest(),
    )
    if manner.hooks.has("frozen") and not freezes_nest():
        why = "a program is to run while it is frozen, and before Linux 6.8 LVM takes no snapshot of it then"
        choice = Choice({}, {**choice.reasons, **dict.fromkeys(choice.rooms, why)})
    for volume, reason in choice.reasons.items():
        report(Note(f"{volume} gets no LVM snapshot: {reason}"))
    snapshots = {volume: LvmSnapshot(origins[volume], room) for volume, room in choice.rooms.items()}
    try:
        return _capture(session, volumes, snapshots, manner, report)
    except SnapshotFailedError as error:
        report(Note(f"{error.message}; so nothing is read from snapshots"))
        return _capture(session, volumes, {}, manner, report)


class _Watch:
    """A look at snapshots, again and again, from when each is taken until it is dropped."""

    def __init__(self) -> None:
        self._watched: list[LvmSnapshot] = []
        self._error: RemetalError | None = None
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="snapshots", daemon=True)

    def begin(self, snapshot: LvmSnapshot) -> None:
        """Look at a snapshot that was taken, too."""
        with self._guard:
            self._watched.append(snapshot)
        if self._thread.ident is None:
            self._thread.start()

    def check(self) -> None:
        """Raise UnavailableError if one has not lasted; then there is to be no image of any."""
        if self._error is not None:
            raise self._error

    def end(self, snapshot: LvmSnapshot, report: Report) -> None:
        """Drop a snapshot, and look at it no more."""
        with self._guard:
            if snapshot in self._watched:
                self._watched.remove(snapshot)
        snapshot.drop(report)

    def close(self) -> None:
        """Stop."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _look_on(self) -> None:
        while not self._over.wait(_INTERVAL):
            for each in list(self._watched):
                with self._guard:
                    if each in self._watched:
                        self._look_at(each)

    def _look_at(self, snapshot: LvmSnapshot) -> None:
        try:
            snapshot.check()
        except RemetalError as error:
            self._error = self._error or error  # before anybody reads an error that comes of it
            self._watched.remove(snapshot)
            with suppress(RemetalError):  # who drops it tries again, and tells
                snapshot.give_up()


class _Snapshots(Moment):
    """All snapshots, taken at the moment that is captured, and watched from then on."""

    def __init__(
        self, volumes: Sequence[LiveVolume], snapshots: Sequence[LvmSnapshot], watch: _Watch, limit: float
    ) -> None:
        self.places = [each.folder for each in volumes]
        self.folders = self.places if freezes_nest() else []
        self._volumes = volumes
        self._snapshots = snapshots
        self._watch = watch
        self._limit = limit

    def prepare(self) -> None:
        sync_folders([each.folder for each in self._volumes])

    def take(self) -> None:
        for each in self._snapshots:
            each.take(self._limit)
            self._watch.begin(each)

    def check(self) -> None:
        self._watch.check()


def _capture(
    session: Session,
    volumes: Sequence[LiveVolume],
    snapshots: Mapping[str, LvmSnapshot],
    manner: Manner,
    report: Report,
) -> tuple[list[ImageRecord], Pause, dict[str, Way]]:
    chosen = [each for each in volumes if each.volume in snapshots]
    others = [each for each in volumes if each.volume not in snapshots]
    with ExitStack() as stack:
        watch = stack.enter_context(closing(_Watch()))
        manner = replace(manner, moment=_Snapshots(chosen, list(snapshots.values()), watch, manner.limit))
        for snapshot in snapshots.values():
            stack.callback(watch.end, snapshot, report)
        if others:
            images, pause = capture_live(session, others, manner, report)
        else:
            images, pause = [], _hold(manner, report)
        for each in chosen:
            snapshot = snapshots[each.volume]
            images.append(_read_snapshot(session, each, snapshot, watch, manner.pace, report))
            watch.end(snapshot, report)
    ways = {each.volume: _way(each, pause) for each in others} | dict.fromkeys(snapshots, "snapshot")
    return images, pause, ways


def _hold(manner: Manner, report: Report) -> Pause:
    """Take the moment where nothing else has to be held still for it."""
    with manner.hooks.quiet(manner.moment.places):
        with all_held(manner, []) as held:
            pass
        pause = Pause(time.monotonic() - held.began, 0, True)
    report(Note(f"they were held for less than {pause.seconds:.1f} s"))
    return pause


def _read_snapshot(
    session: Session, volume: LiveVolume, snapshot: LvmSnapshot, watch: _Watch, pace: Pace | None, report: Report
) -> ImageRecord:
    try:
        span = Span(snapshot.open(), 0, volume.span.size)
        report(Step(f"Capturing {volume.volume} from an LVM snapshot ({volume.kind}, {format_bytes(span.size)})"))
        flush_cache(span.path)
        batches = read_batches(
            span,
            _look(volume, span, report),
            session.chunk_size,
            buffers=session.workers + 1,
            part=volume.volume,
            pace=pace,
            report=report,
        )
        with closing(batches):
            image = session.write_image(volume.volume, span.size, _watched(batches, watch), previous=volume.previous)
    except RemetalError:
        watch.check()  # who reads one that is given up, or full, gets errors
        snapshot.check()
        raise
    watch.check()
    snapshot.check()
    return image


def _look(volume: LiveVolume, span: Span, report: Report) -> Extents:
    """Return what is to be captured of a snapshot; what is left out of it is told by its files, as they were then."""
    used = probe_used(span, volume.kind, frozen=True)
    if volume.leave_out is None:
        return used
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(mounted(span.path, kind=volume.kind, options=_UNTOUCHED[volume.kind]))
        except ProgramFailedError as error:
            report(Note(f"nothing is left out of {volume.volume}: its snapshot cannot be mounted: {error.message}"))
            return used
        return volume.leave_out(used, folder)


def _watched(batches: Iterator[Batch], watch: _Watch) -> Iterator[Batch]:
    """Yield batches while all snapshots last. Raises UnavailableError."""
    for batch in batches:
        watch.check()
        yield batch


def _probe_origins(volumes: Sequence[LiveVolume], report: Report) -> dict[str, Origin]:
    """Return the logical volumes that are volumes as a whole, and whose file systems are frozen for a snapshot."""
    paths = {each.span.path: each for each in volumes if each.kind in _KINDS}
    try:
        found = probe_origins(paths)
    except ProgramFailedError as error:
        report(Note(f"nothing is read from LVM snapshots: {error.message}"))
        return {}
    return {
        paths[path].volume: origin
        for path, origin in found.items()
        if (paths[path].span.start, paths[path].span.size) == (0, origin.size)
    }


def _used(volume: LiveVolume) -> int:
    return shutil.disk_usage(volume.folder).used


def _way(volume: LiveVolume, pause: Pause) -> Way:
    if volume.kind in READ_ONLY_KINDS:
        return "read-only"
    return "tracked" if pause.tracked else "held"
