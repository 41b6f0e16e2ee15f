"""One consistent image of volumes in use of which some are read from LVM snapshots, the others as `image.live` does.

One moment is the law. To take a snapshot, LVM suspends the volume, for which the kernel freezes its file system, so
what the snapshot shows is of one moment within that. If everything else that is captured is held still meanwhile,
nothing of it changes between the moment at which it was held and that of the snapshot: all of it is of the snapshot's
moment, though the one file system is not held by us. Two snapshots are of two moments, so then their file systems have
to be frozen from before the first until after the last, which the kernel has to let LVM do once more. Before Linux 6.8
it does not (`freezes_nest`): there one volume gets a snapshot, that with most in use. Nobody tries that out, because
LVM leaves an ordinary snapshot half made where the kernel refuses.

Snapshots come last of what is done while file systems are held, and are read when all are let go. How long that takes
matters only because they fill up: that is looked at while they are read, and after the last byte, before anything is
believed. A snapshot that was whole then was whole before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
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
_INTERVAL = 2.0
"""Seconds between two looks at a snapshot while it is read."""


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


class _Snapshots(Moment):
    """All snapshots, taken at the moment that is captured."""

    def __init__(self, volumes: Sequence[LiveVolume], snapshots: Sequence[LvmSnapshot], limit: float) -> None:
        self.places = [each.folder for each in volumes]
        self.folders = self.places if freezes_nest() else []
        self._volumes = volumes
        self._snapshots = snapshots
        self._limit = limit

    def prepare(self) -> None:
        sync_folders([each.folder for each in self._volumes])

    def take(self) -> None:
        for each in self._snapshots:
            each.take(self._limit)


def _capture(
    session: Session,
    volumes: Sequence[LiveVolume],
    snapshots: Mapping[str, LvmSnapshot],
    manner: Manner,
    report: Report,
) -> tuple[list[ImageRecord], Pause, dict[str, Way]]:
    chosen = [each for each in volumes if each.volume in snapshots]
    others = [each for each in volumes if each.volume not in snapshots]
    manner = replace(manner, moment=_Snapshots(chosen, list(snapshots.values()), manner.limit))
    with ExitStack() as stack:
        for snapshot in snapshots.values():
            stack.callback(snapshot.drop, report)
        if others:
            images, pause = capture_live(session, others, manner, report)
        else:
            images, pause = [], _hold(manner, report)
        for each in chosen:
            snapshot = snapshots[each.volume]
            images.append(_read_snapshot(session, each, snapshot, manner.pace, report))
            snapshot.drop(report)
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
    session: Session, volume: LiveVolume, snapshot: LvmSnapshot, pace: Pace | None, report: Report
) -> ImageRecord:
    span = Span(snapshot.open(), 0, volume.span.size)
    report(Step(f"Capturing {volume.volume} from an LVM snapshot ({volume.kind}, {format_bytes(span.size)})"))
    flush_cache(span.path)
    try:
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
            image = session.write_image(volume.volume, span.size, _watched(batches, snapshot), previous=volume.previous)
    except RemetalError:
        snapshot.check()  # one that is full cannot be read
        raise
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


def _watched(batches: Iterator[Batch], snapshot: LvmSnapshot) -> Iterator[Batch]:
    """Yield batches while the snapshot is whole. Raises UnavailableError."""
    due = time.monotonic()
    for batch in batches:
        if time.monotonic() >= due:
            snapshot.check()
            due = time.monotonic() + _INTERVAL
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
