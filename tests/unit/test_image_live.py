"""Captured while they are in use: volumes come back as all of them were at one moment."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

from lab.disk import fresh_disk
from lab.live import PAIRS, ROUNDS
from remetal.errors import RefusedError, UnavailableError
from remetal.events import Event, Note, Report, Step, silent
from remetal.image import live
from remetal.image.extents import probe_used, probe_used_spanning
from remetal.image.live import LiveVolume, Manner, Pause, capture_live
from remetal.image.ranges import Extents
from remetal.pace import Pace
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from remetal.system import tracing
from remetal.system.blockdev import Span, flush_cache, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.tracing import WriteTracker
from remetal.units import MIB
from tests.repositories import Site, make_site, restore

SIZE = 320 * MIB + 4096
"""No whole number of chunks."""
CHECKS = {"ext4": ["e2fsck", "-fn"], "btrfs": ["btrfs", "check", "--check-data-csum"]}
"""What looks at a file system before it is mounted."""
_SITE = make_site()


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


@contextmanager
def volumes(folder: Path, *kinds: str) -> Iterator[list[LiveVolume]]:
    """Yield volumes of these kinds, each on a disk of its own, and mounted."""
    with ExitStack() as stack:
        found = []
        for number, kind in enumerate(kinds):
            device = stack.enter_context(fresh_disk(folder / f"{kind}-{number}.img", SIZE, kind))
            place = stack.enter_context(mounted(device))
            span = Span(device, 0, SIZE)
            found.append(LiveVolume(f"disk{number}", span, kind, place, look_at(span, kind)))
        yield found


def look_at(span: Span, kind: str) -> Callable[[], Extents]:
    """Return how to learn what is used of a volume."""
    if kind == "btrfs":
        return lambda: Extents(probe_used_spanning({1: span}, frozen=True)[1])
    return partial(probe_used, span, kind, frozen=True)


class Load:
    """Threads that write, overwrite, cut and delete files on all volumes, until the block is left.

    One of them writes growing numbers to the volumes in turn, each one durable before the next.
    """

    def __init__(self, folders: list[Path], seed: int) -> None:
        self.folders = folders
        self.ended = threading.Event()
        self.number = 0
        self.threads = [threading.Thread(target=self.churn, args=(number, seed)) for number in range(2)]
        self.threads.append(threading.Thread(target=self.count))

    def __enter__(self) -> Load:
        for each in self.threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for each in self.threads:
            each.join()

    def wait(self, times: int) -> None:
        """Return when the number has grown by so much: so often, at least, something was written to each volume."""
        least, end = self.number + times, time.monotonic() + 60
        while self.number < least:
            assert time.monotonic() < end, "nothing is written"
            time.sleep(0.001)

    def churn(self, number: int, seed: int) -> None:
        dice = random.Random(seed * 10 + number)
        while not self.ended.wait(0.002):
            path = dice.choice(self.folders) / f"file-{number}-{dice.randrange(12)}"
            with suppress(FileNotFoundError):
                if dice.random() < 0.2:
                    path.unlink()
                    continue
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(dice.randrange(2 * MIB))
                file.write(dice.randbytes(dice.randrange(1, 100_000)))
                if dice.random() < 0.2:
                    file.truncate()
                if dice.random() < 0.2:
                    os.fsync(file.fileno())

    def count(self) -> None:
        files = [os.open(each / "count", os.O_CREAT | os.O_WRONLY | os.O_DSYNC) for each in self.folders]
        while not self.ended.is_set():
            for each in files:
                os.pwrite(each, b"%020d" % (self.number + 1), 0)
            self.number += 1
        for each in files:
            os.close(each)


Copies: TypeAlias = dict[str, tuple[bytes, Extents]]


def copied_while_frozen(volume: LiveVolume, copies: Copies) -> LiveVolume:
    """Return the volume, of which each look leaves a copy of the device, and the map of what is used."""

    def look() -> Extents:
        found = volume.look()
        with open_disk(volume.span.path, direct=True) as disk:
            copies[volume.volume] = disk.read(0, SIZE), found
        return found

    return replace(volume, look=look)


def back_up(site: Site, found: list[LiveVolume], *, spools_wait: bool = False) -> Snapshot:
    """Back up volumes of which the kernel tells what is written to them."""
    snapshot, pause = back_up_and_tell(site, found, spools_wait=spools_wait)
    assert pause.tracked
    return snapshot


def back_up_and_tell(
    site: Site, found: list[LiveVolume], *, spools_wait: bool = False, report: Report = silent
) -> tuple[Snapshot, Pause]:
    with open_session(site.repository, site.keys) as session:
        _, pause = capture_live(session, found, Manner(60, spools_wait=spools_wait), report)
        return session.commit(layout=b'{"version": 1}', hostname="web.example"), pause


def back_up_often(site: Site, found: list[LiveVolume]) -> None:
    for _ in range(20):
        back_up(site, found, spools_wait=True)


def restored(site: Site, snapshot: Snapshot) -> dict[str, bytes]:
    return {image.volume: restore(site, snapshot, number) for number, image in enumerate(snapshot.images)}


def look_into(folder: Path, found: list[LiveVolume], data: dict[str, bytes]) -> list[int]:
    """Check the restored file systems with their own tools, mount them, and return the numbers that they hold."""
    numbers = []
    for each in found:
        path = folder / "restored.img"
        path.write_bytes(data[each.volume])
        if each.kind in CHECKS:
            subprocess.run([*CHECKS[each.kind], path], check=True, capture_output=True)
        with attach_loop(Span(path, 0, SIZE), writable=True) as device:
            with mounted(device, options=("nouuid",) if each.kind == "xfs" else ()) as place:
                numbers.append(int((place / "count").read_text()))
            flush_cache(device)
            if each.kind == "xfs":
                subprocess.run(["xfs_repair", "-n", device], check=True, capture_output=True)
    return numbers


@pytest.mark.parametrize(
    "rounds", [2, pytest.param(ROUNDS, marks=[pytest.mark.matrix, pytest.mark.timeout(7200)])], ids=["some", "many"]
)
@pytest.mark.parametrize(
    ("kinds", "events"),
    list(zip(PAIRS, [tracing._REQUESTS, tracing._REQUESTS, tracing._BIOS], strict=True)),  # whose end is not told
    ids=["ext4-xfs", "xfs-btrfs", "btrfs-ext4-untold"],
)
def test_all_volumes_are_of_one_moment(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[str, ...],
    events: tuple[str, ...],
    rounds: int,
) -> None:
    monkeypatch.setattr(live, "_FEW", 0)  # so that there are rounds
    monkeypatch.setattr(tracing, "_events_of", lambda number: events)
    said: list[Event] = []
    with volumes(tmp_path, *kinds) as found:
        for number in range(rounds):
            copies: Copies = {}
            with Load([each.folder for each in found], number) as load:

                def report(event: Event, load: Load = load) -> None:
                    said.append(event)
                    if isinstance(event, Step) and "while it is in use" in event.title:
                        load.wait(2)

                copied = [copied_while_frozen(each, copies) for each in found]
                snapshot, pause = back_up_and_tell(site, copied, report=report)
            assert pause.tracked, f"round {number}"
            data = restored(site, snapshot)
            for each in found:
                copy, used = copies[each.volume]
                wrong = [e for e in used if data[each.volume][e.start : e.end] != copy[e.start : e.end]]
                assert wrong == [], f"{each.kind}, round {number}"
            first, second = look_into(tmp_path, found, data)
            assert first - second in {0, 1}, "the second volume is of another moment"
            assert first > 0
    again = [each for each in said if isinstance(each, Step) and "again that were written meanwhile" in each.title]
    told = events is tracing._REQUESTS  # else all seems to be under way until they are held
    assert len(again) >= rounds if told else not again, f"{len(again)} times something was read again"


def test_what_is_deleted_is_not_kept(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = os.urandom(6000)
    with volumes(tmp_path, "ext4") as found:
        path = found[0].folder / "secret"

        def look() -> Extents:
            used = found[0].look()
            if not path.exists() and not (found[0].folder / "gone").exists():
                threading.Thread(target=write_and_delete).start()
            return used

        def write_and_delete() -> None:
            path.write_bytes(secret)
            os.sync()
            path.unlink()
            (found[0].folder / "gone").write_text("gone")
            os.sync()

        snapshot = back_up(site, [replace(found[0], look=look)])
        assert secret[:100] in found[0].span.path.read_bytes()
    assert secret[:100] not in restored(site, snapshot)["disk0"]


def test_nothing_that_is_written_while_it_is_read_is_missed_on_a_disk_that_rests(site: Site, tmp_path: Path) -> None:
    with volumes(tmp_path, "ext4") as found:
        (found[0].folder / "count").write_text("7")
        snapshots = [back_up(site, found) for _ in range(2)]
        assert look_into(tmp_path, found, restored(site, snapshots[1])) == [7]
        assert snapshots[0].images[0].used == snapshots[1].images[0].used


def too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MOST", 4096)


def lost_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteTracker, "lost", 1)


def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "can_track", lambda path: False)


@pytest.mark.parametrize("cannot_follow", [too_little_memory, lost_events, untold])
def test_who_cannot_follow_holds_until_all_is_read(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot_follow: Callable[[pytest.MonkeyPatch], None]
) -> None:
    cannot_follow(monkeypatch)
    copies: Copies = {}
    with volumes(tmp_path, "ext4", "btrfs") as found, Load([each.folder for each in found], 1):
        snapshot, pause = back_up_and_tell(site, [copied_while_frozen(each, copies) for each in found])
        (found[0].folder / "after").write_text("thawed")
    assert not pause.tracked
    assert pause.bytes == sum(extent.size for _, used in copies.values() for extent in used)
    data = restored(site, snapshot)
    for name, (copy, used) in copies.items():
        assert [e for e in used if data[name][e.start : e.end] != copy[e.start : e.end]] == []


@pytest.mark.parametrize("cannot_follow", [too_little_memory, lost_events, untold])
def test_who_cannot_follow_nor_store_meanwhile_tells_and_lists_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot_follow: Callable[[pytest.MonkeyPatch], None]
) -> None:
    cannot_follow(monkeypatch)
    with volumes(tmp_path, "ext4") as found, Load([found[0].folder], 1):
        with pytest.raises(UnavailableError, match="temporary files lie on what would have to be held still"):
            back_up(site, found, spools_wait=True)
        (found[0].folder / "after").write_text("thawed")
    assert not [name for name in site.store.objects if name.startswith("history/")]


def test_a_tracker_that_has_lost_something_is_not_believed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remetal.system.tracing._BUFFER", 4096)
    monkeypatch.setattr("remetal.system.tracing._PAUSE", 3600.0)
    with volumes(tmp_path, "ext4") as found, Load([found[0].folder], 1):
        with pytest.raises(UnavailableError, match="than the kernel could record"):
            back_up_often(site, found)
        (found[0].folder / "after").write_text("thawed")


def test_what_cannot_be_frozen_is_refused(site: Site, tmp_path: Path) -> None:
    with volumes(tmp_path, "ext4") as found:
        bad = replace(found[0], volume="proc", folder=Path("/proc"))
        with pytest.raises(RefusedError, match="cannot be held still"):
            back_up(site, [*found, bad])
        (found[0].folder / "after").write_text("thawed")


@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_a_disk_that_is_gone_is_no_refusal(site: Site, tmp_path: Path, when: str) -> None:
    """Unplugged before it is held, in the first hold, or when all that was in use then is to be read."""
    with volumes(tmp_path, "ext4", "ext4") as found:
        node = tmp_path / "node"
        os.mknod(node, 0o600 | stat.S_IFBLK, found[0].span.path.stat().st_rdev)
        span = replace(found[0].span, path=node)

        def unplug(moment: str) -> None:
            if moment == when:
                node.unlink()

        def look() -> Extents:
            unplug("in")
            used = probe_used(span, "ext4", frozen=True)
            unplug("after")
            return used

        def report(event: Event) -> None:
            if isinstance(event, Step) and event.title.startswith("Holding"):
                unplug("before")

        gone = replace(found[0], span=span, look=look)
        with (
            open_session(site.repository, site.keys) as session,
            pytest.raises(UnavailableError, match=r"disk0 cannot be reached any more: cannot open the disk .*/node"),
        ):
            capture_live(session, [gone, found[1]], Manner(60), report)
        (found[1].folder / "after").write_text("thawed")
    assert not [name for name in site.store.objects if name.startswith("history/")]


def test_one_that_is_mounted_elsewhere_now_is_no_refusal(site: Site, tmp_path: Path) -> None:
    with volumes(tmp_path, "ext4") as found:
        place = tmp_path / "place"
        place.mkdir()
        subprocess.run(["mount", "--bind", found[0].folder, place], check=True)

        def report(event: Event) -> None:
            if isinstance(event, Step) and event.title.startswith("Holding"):
                subprocess.run(["umount", place], check=True)

        with (
            open_session(site.repository, site.keys) as session,
            pytest.raises(UnavailableError, match=r"disk0 is not mounted at .*/place any more"),
        ):
            capture_live(session, [replace(found[0], folder=place)], Manner(60), report)


class Behind(Pace):
    """A pace at which more is written than read: whenever anything is read at it, a whole file is written anew."""

    def __init__(self, file: Path, size: int) -> None:
        super().__init__(float("inf"))
        self.file = file
        self.size = size
        self.paid = 0
        file.write_bytes(bytes(size))

    def pay(self, size: int) -> None:
        self.paid += size
        with self.file.open("r+b") as file:
            file.write(os.urandom(self.size))
            os.fsync(file.fileno())


@pytest.mark.parametrize(("most", "hurried"), [(4 * MIB, True), (64 * MIB, False)])
def test_who_reads_too_slowly_to_keep_up_hurries_only_if_it_is_too_much_for_the_memory(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, most: int, hurried: bool
) -> None:
    monkeypatch.setattr(live, "_FEW", MIB)
    monkeypatch.setattr(live, "_MOST", most)
    copies: Copies = {}
    events: list[Event] = []
    with volumes(tmp_path, "ext4") as found:
        pace = Behind(found[0].folder / "log", 8 * MIB)
        with open_session(site.repository, site.keys) as session:
            volume = copied_while_frozen(found[0], copies)
            _, pause = capture_live(session, [volume], Manner(60, pace=pace), events.append)
            snapshot = session.commit(layout=b'{"version": 1}', hostname="web.example")
    assert pace.paid > 0
    assert pause.tracked, events
    told = [each.text for each in events if isinstance(each, Note) and "as fast as it can be" in each.text]
    assert len(told) == hurried
    (copy, used), data = copies["disk0"], restored(site, snapshot)["disk0"]
    assert [e for e in used if data[e.start : e.end] != copy[e.start : e.end]] == []
