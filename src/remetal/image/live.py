"""One consistent image of volumes whose file systems are in use: read while they are, then held still for the rest.

The file systems are frozen together, for a look at what is in use. Then all of that is read and stored while writes are
tracked; what was written meanwhile is read again, in rounds that take less each time, the last one into memory. They
are frozen once more, the blocks that were written since are read into memory, too, and they are let go before any of it
is stored. Nothing is written anywhere while they are frozen, since whatever lies on them would wait.

Applications are made ready right before the freeze that counts, and what they write then is read before it.

Where nobody can tell what was written, or it is too much for the memory, they are held still for as long as it takes to
read all that is in use once more; most of it is stored by then, so nearly nothing has to be compressed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from remetal.applications.hooks import Hooks
from remetal.errors import RefusedError, RemetalError, UnavailableError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.image.ahead import BLOCK, Ahead
from remetal.image.cached import CachedMaps
from remetal.image.capture import read_batches
from remetal.image.ranges import Extent, Extents
from remetal.pace import Pace
from remetal.repository.session import Batch, Known, Session
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import Span, flush_cache, probe_geometry
from remetal.system.freeze import Held, held_still, sync_folders
from remetal.system.memory import probe_available
from remetal.system.priority import normal_priority
from remetal.system.run import ProgramMissingError
from remetal.system.tracing import WriteTracker, can_track, tracked
from remetal.units import MIB, format_bytes

FROZEN_KINDS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs"})
"""File systems, by blkid's names, whose map of used blocks can be read while they are frozen."""

READ_ONLY_KINDS = frozenset({"vfat"})
"""File systems that cannot be frozen, and are made read-only for the moment."""

SMALL = 1024 * MIB
"""How large a volume of such a kind may be."""

_KINDS = FROZEN_KINDS | READ_ONLY_KINDS
_FEW = 32 * MIB
"""So little is read at once before the file systems are held still, without another round."""
_MOST = 1024 * MIB
"""At most so much is held in memory of what is read."""
_ROUNDS = 9
_SHRINKING = 0.7
"""A round that leaves more than this part of what the one before left is the last: writing is as fast as reading."""


@dataclass(frozen=True, slots=True)
class LiveVolume:
    """A volume with a file system that is mounted at `folder`; `kind` is blkid's name for it.

    `look` returns what is used of it once all volumes are held still and no device has a cache; see `probe_used`.
    """

    volume: str
    span: Span
    kind: str
    folder: Path
    look: Callable[[], Extents]
    previous: ImageRecord | None = None
    leave_out: Callable[[Extents, Path], Extents] | None = None
    """Takes from what is used what `look` leaves out, where a snapshot of the volume is mounted at a folder instead."""


class Moment:
    """What else has to be done at the moment that is captured: nothing."""

    places: Sequence[Path] = ()
    """Where further file systems are mounted that are captured."""
    folders: Sequence[Path] = ()
    """Those of them that have to be frozen for it."""

    def prepare(self) -> None:
        """Do what makes it short."""

    def take(self) -> None:
        """Do it, while everything is held still. It is the last thing that is done, and so is done once only."""

    def check(self) -> None:
        """Raise UnavailableError if what was done does not last until it is needed."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How volumes in use are captured.

    They are held still for at most `limit` seconds, of which `hooks` are told, and read at `pace` at most until then,
    if that keeps up with what is written; `moment` is taken meanwhile. `spools_wait` tells that the session's temporary
    files lie on one of them, so that nothing can be stored until they are let go.
    """

    limit: float
    hooks: Hooks = field(default_factory=Hooks)
    pace: Pace | None = None
    spools_wait: bool = False
    moment: Moment = field(default_factory=Moment)


@contextmanager
def all_held(manner: Manner, frozen: Sequence[Path], read_only: Sequence[Path] = ()) -> Iterator[Held]:
    """Hold the file systems at these folders and at the moment's, tell that they are, and take the moment at the end.

    Raises what `held_still` does, and HookFailedError.
    """
    manner.moment.prepare()
    every = [*frozen, *manner.moment.folders]
    with normal_priority(), held_still(every, limit=manner.limit, read_only=read_only) as held:
        manner.hooks.frozen()
        yield held
        manner.moment.take()


@dataclass(frozen=True, slots=True)
class Pause:
    """How long the file systems were held for what was written meanwhile, in seconds, and how many bytes were read.

    `tracked` is whether only these had to be read, because it was known what was written.
    """

    seconds: float
    bytes: int
    tracked: bool


class _Reading(Ahead):
    """What was read of a live volume."""

    def __init__(self, volume: LiveVolume, chunk_size: int) -> None:
        super().__init__(volume.span, chunk_size)
        self.volume = volume
        self.device = volume.folder.stat().st_dev
        self.size = probe_geometry(volume.span.path).size


class _CannotFollowError(RemetalError):
    """What was written meanwhile is not known, or more than can be held in memory."""


def capture_live(
    session: Session, volumes: Sequence[LiveVolume], manner: Manner, report: Report = silent
) -> tuple[list[ImageRecord], Pause]:
    """Capture volumes whose file systems are mounted as they all are at one moment; return images and the pause.

    Raises RefusedError if a file system cannot be held; UnavailableError if it would take longer than it may, or a disk
    is gone; HookFailedError; and what the session raises. Nothing stays held, whatever happens.
    """
    capture = _Capture(session, {each.volume: _Reading(each, session.chunk_size) for each in volumes}, manner, report)
    try:
        maps, pause = capture.tracked()
    except _CannotFollowError as error:
        if manner.spools_wait:
            raise UnavailableError(
                f"{error.message}, and temporary files lie on what would have to be held still",
                hint="Set TMPDIR to a folder elsewhere, or in memory, and run it again; or back up when less is "
                "written.",
            ) from error
        report(Warn(f"{error.message}: the file systems are held still until all that is in use is read again"))
        maps, pause = capture.held()
    images = []
    for name, each in capture.read.items():
        volume = each.volume
        batches = _while_it_lasts(each.image(maps[name]), manner.moment)
        images.append(session.write_image(name, volume.span.size, batches, previous=volume.previous))
    return images, pause


def _while_it_lasts(batches: Iterator[Batch | Known], moment: Moment) -> Iterator[Batch | Known]:
    for batch in batches:
        moment.check()
        yield batch


class _Capture:
    """The volumes of one backup, and what was read of them. The maps that are returned are of what is in use."""

    def __init__(self, session: Session, read: Mapping[str, _Reading], manner: Manner, report: Report) -> None:
        self.read = read
        self._session = session
        self._manner = manner
        self._report = report
        self._cached = CachedMaps({name: (each.span, each.volume.kind) for name, each in read.items()})
        self._grain = session.chunk_size

    def tracked(self) -> tuple[dict[str, Extents], Pause]:
        """Store what is in use, and read into memory what was written meanwhile.

        Raises _CannotFollowError once all was stored that was in use at first, if that is not known.
        """
        spans = {name: each.span for name, each in self.read.items()}
        untold = [name for name, span in spans.items() if not can_track(span.path)]
        if untold:
            self._read_ahead(None)
            raise _CannotFollowError(f"this kernel does not tell what is written to {', '.join(untold)}")
        with ExitStack() as stack:
            try:
                tracker = stack.enter_context(tracked(spans, self._session.chunk_size))
            except RefusedError as error:
                self._read_ahead(None)
                raise _CannotFollowError(error.message) from error
            self._read_ahead(tracker)
            left = self._read_rounds(tracker)
            with self._manner.hooks.quiet(self._every_folder()):
                self._read_into_memory(tracker, left)
                return self._hold(tracker)

    def held(self) -> tuple[dict[str, Extents], Pause]:
        """Hold the file systems and store all that is in use, most of which is stored already."""
        with self._manner.hooks.quiet(self._every_folder()):
            with self._everything_held() as held:
                self._flush_caches()
                maps = _look_at_all(self.read)
                for name, each in self.read.items():
                    each.held.clear()
                    # What shows how far it is may wait for what is held.
                    self._store(each, maps[name], None, lambda _: held.check())
            return maps, self._pause(held, sum(each.size for used in maps.values() for each in used), tracked=False)

    def _read_ahead(self, tracker: WriteTracker | None) -> None:
        """Store all that is in use, while it is.

        They are frozen for a look before: on the disk of a file system that is not, what is in use may be seconds old.
        Of a small one that cannot be, that is good enough to begin with.
        """
        if tracker is not None:
            self._report(Step("Reading what tells what is in use"))
            self._flush_caches()
            self._cached.fill()
        self._report(Step(f"Holding {', '.join(map(str, self._folders(_KINDS)))} still for a look at what is in use"))
        with normal_priority(), held_still(self._folders(FROZEN_KINDS), limit=self._manner.limit) as held:
            self._check_places()
            self._drop_caches(tracker)
            frozen = {name: each for name, each in self.read.items() if each.volume.kind in FROZEN_KINDS}
            for name, hint in _look_at_all(frozen).items():
                self.read[name].hint = hint
        self._report(Note(f"they were held for {time.monotonic() - held.began:.1f} s"))
        sync_folders(self._folders(READ_ONLY_KINDS))
        self._drop_caches(tracker)
        for each in self.read.values():
            if each.volume.kind in READ_ONLY_KINDS:
                with suppress(RemetalError):
                    each.hint = each.volume.look()
        for name, each in self.read.items():
            if each.hint:
                size = format_bytes(each.span.size)
                self._report(Step(f"Reading {name} while it is in use ({each.volume.kind}, {size})"))
                self._store(each, each.hint, self._manner.pace, self._report)

    def _read_rounds(self, tracker: WriteTracker) -> dict[str, set[int]]:
        """Read again what was written meanwhile, until it is little; return what is left.

        If that is too much for the memory because more is written than may be read, it is read as fast as can be.
        """
        left = self._read_rounds_at(self._manner.pace, tracker, self._take(tracker))
        if self._manner.pace is not None and (size := self._size(left)) > _most_in_memory():
            self._report(
                Note(
                    f"{format_bytes(size)} were written meanwhile, too much for the memory, because so little is read "
                    "a second; so what is left is read as fast as it can be"
                )
            )
            left = self._read_rounds_at(None, tracker, left)
        return left

    def _read_rounds_at(
        self, pace: Pace | None, tracker: WriteTracker, written: dict[str, set[int]]
    ) -> dict[str, set[int]]:
        before = float("inf")
        for _ in range(_ROUNDS):
            size = self._size(written)
            if size <= _FEW or size > _SHRINKING * before:
                break
            self._report(Step(f"Reading {format_bytes(size)} again that were written meanwhile"))
            for name, chunks in written.items():
                each = self.read[name]
                self._store(each, [each.extent(chunk) for chunk in sorted(chunks)], pace, self._report)
                each.whole |= chunks
            before, written = size, self._take(tracker)
        return written

    def _size(self, chunks: Mapping[str, set[int]]) -> int:
        return sum(map(len, chunks.values())) * self._session.chunk_size

    def _read_into_memory(self, tracker: WriteTracker, left: Mapping[str, set[int]]) -> None:
        """Read the chunks that are left, and what syncing writes; of what is written after that, blocks are told.

        Applications wait for it already, so nothing of it is stored yet.
        """
        sync_folders(self._folders(FROZEN_KINDS))
        for name, chunks in self._take(tracker, grain=BLOCK).items():
            self._read_now(self.read[name], left[name] | chunks, {})

    def _hold(self, tracker: WriteTracker) -> tuple[dict[str, Extents], Pause]:
        """Freeze the file systems, and read into memory what of this moment is neither there nor stored yet."""
        self._report(Step("Holding them still for what was written meanwhile"))
        size = 0
        with self._everything_held() as held:
            written = self._take(tracker, still=True)
            self._drop_stale()
            maps = _look_at_all(self.read)
            for name, each in self.read.items():
                size += self._read_now(each, *each.missing(maps[name], written[name]))
        return maps, self._pause(held, size, tracked=True)

    def _read_now(self, read: _Reading, chunks: set[int], blocks: Mapping[int, Sequence[int]]) -> int:
        most = _most_in_memory()
        room = most - sum(len(buffer) for each in self.read.values() for buffer in each.held.values())
        if sum(read.extent(chunk).size for chunk in chunks) > room:
            raise _CannotFollowError(f"more than {format_bytes(most)} was written meanwhile")
        with _still_there(read.volume):
            return read.read(chunks, blocks)

    @contextmanager
    def _everything_held(self) -> Iterator[Held]:
        """Hold all file systems, if they are where they were."""
        self._check_places()
        with all_held(self._manner, self._folders(FROZEN_KINDS), self._folders(READ_ONLY_KINDS)) as held:
            self._check_places()
            yield held

    def _pause(self, held: Held, size: int, *, tracked: bool) -> Pause:
        pause = Pause(time.monotonic() - held.began, size, tracked)
        self._report(Note(f"they were held for {pause.seconds:.1f} s, and {format_bytes(size)} were read meanwhile"))
        return pause

    def _check_places(self) -> None:
        """Raise UnavailableError if a disk is gone, or something else was held, because it is mounted there now."""
        for each in self.read.values():
            with _still_there(each.volume):
                size = probe_geometry(each.span.path).size
            if _device_at(each.volume.folder) != each.device:
                raise UnavailableError(
                    f"{each.volume.volume} is not mounted at {each.volume.folder} any more",
                    hint="Nothing is kept of this backup; run it again.",
                )
            if size != each.size:
                raise UnavailableError(
                    f"{each.volume.volume} has another size now than when this backup began",
                    hint="Nothing is kept of this backup; run it again.",
                )

    def _take(self, tracker: WriteTracker, *, still: bool = False, grain: int = 0) -> dict[str, set[int]]:
        """Return what was written, as the tracker does. Raises _CannotFollowError if it does not know all of it."""
        written = tracker.take(still=still, grain=grain)
        if tracker.lost:
            raise _CannotFollowError("more was written than the kernel could record")
        self._cached.note(written, self._grain)
        self._grain = grain or self._grain
        return written

    def _drop_caches(self, tracker: WriteTracker | None) -> None:
        """Let nothing be read that is stale. What was written is of no other use yet: nothing was read before."""
        if tracker is not None:
            with suppress(_CannotFollowError):  # it will be told when it matters
                self._take(tracker)
                self._drop_stale()
                return
        self._flush_caches()

    def _drop_stale(self) -> None:
        for name, each in self.read.items():
            with _still_there(each.volume):
                self._cached.drop_stale(name)

    def _flush_caches(self) -> None:
        for volume in {each.span.path: each.volume for each in self.read.values()}.values():
            with _still_there(volume):
                flush_cache(volume.span.path)

    def _every_folder(self) -> list[Path]:
        return [*self._folders(_KINDS), *self._manner.moment.places]

    def _folders(self, kinds: Collection[str]) -> list[Path]:
        found = (each.volume.folder for each in self.read.values() if each.volume.kind in kinds)
        return list(dict.fromkeys(found))

    def _store(self, read: _Reading, extents: Sequence[Extent], pace: Pace | None, report: Report) -> None:
        batches = read_batches(
            read.span,
            extents,
            read.chunk_size,
            buffers=self._session.workers + 1,
            part=read.volume.volume,
            pace=pace,
            flush=False,
            report=report,
        )
        with closing(batches):
            self._session.store(read.volume.volume, read.span.size, _reached(read.volume, batches), read.keep)


def _look_at_all(read: Mapping[str, _Reading]) -> dict[str, Extents]:
    """Return the maps of what is used; each takes a program or two, so they are made beside each other.

    If one fails, or somebody presses Ctrl-C, nobody waits for the others: everything is still held.
    """
    pool = ThreadPoolExecutor(max(len(read), 1), thread_name_prefix="look")
    try:
        return dict(zip(read, pool.map(lambda each: _look(each.volume), read.values()), strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _look(volume: LiveVolume) -> Extents:
    with _still_there(volume):
        return volume.look()


def _reached(volume: LiveVolume, batches: Iterator[Batch]) -> Iterator[Batch]:
    with _still_there(volume):
        yield from batches


@contextmanager
def _still_there(volume: LiveVolume) -> Iterator[None]:
    """Raise UnavailableError for a disk that cannot be opened any more: it could be when the backup began."""
    try:
        yield
    except ProgramMissingError:
        raise
    except RefusedError as error:
        raise UnavailableError(
            f"{volume.volume} cannot be reached any more: {error.message}",
            hint="See whether its disk is still there, and what the kernel says of it (dmesg). Nothing is kept of this "
            "backup; run it again.",
        ) from error


def _device_at(folder: Path) -> int | None:
    """Return the number of the file system at a folder, None if nothing can be found there."""
    try:
        return folder.stat().st_dev
    except OSError:
        return None


def _most_in_memory() -> int:
    """Return how many bytes of what is read may be in memory."""
    return min(_MOST, probe_available() // 4)
