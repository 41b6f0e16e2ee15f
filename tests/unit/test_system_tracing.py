"""What is written to disks, as the kernel tells."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.system import changes, tracing
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.tracing import WriteTracker, can_track, tracked
from remetal.units import KIB, MIB

GRAIN = 64 * KIB
SIZE = 8 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with attach_loop(Span(path, 0, SIZE), writable=True) as device:
        yield device


def write(device: Path, *places: int) -> None:
    with open_disk(device, writable=True) as disk:
        for place in places:
            disk.write(os.urandom(4096), place)
        disk.sync()


def test_what_is_written_is_told_once_by_its_blocks(device: Path) -> None:
    assert can_track(device)
    spans = {"first": Span(device, 0, 4 * MIB), "second": Span(device, 4 * MIB, 4 * MIB)}
    with tracked(spans, GRAIN) as tracker:
        assert tracker.take() == {"first": set(), "second": set()}
        write(device, 0, GRAIN - 4096, 3 * GRAIN, 4 * MIB + 5 * GRAIN)
        assert tracker.take() == {"first": {0, 3}, "second": {5}}
        assert tracker.take() == {"first": set(), "second": set()}
        write(device, 4 * MIB - 4096, SIZE - 4096)
        assert tracker.take() == {"first": {63}, "second": {63}}
        assert tracker.lost == 0


def test_reading_is_no_writing(device: Path) -> None:
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        with open_disk(device, direct=True) as disk:
            disk.read(0, SIZE)
        assert tracker.take() == {"all": set()}


def test_bios_whose_end_is_not_told_count_when_all_is_still(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_events_of", lambda number: tracing._BIOS)  # which a disk that takes requests ends so
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        write(device, 0, GRAIN - 4096, 3 * GRAIN)
        assert tracker.take() == {"all": set()}
        assert tracker.take(still=True) == {"all": {0, 3}}
        assert tracker.take(still=True) == {"all": set()}


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[WriteTracker]:
    """One that nobody tells anything, of 16 blocks of a mapping."""
    os.mkfifo(tmp_path / "trace_pipe")
    (tmp_path / "tracing_on").write_text("1\n")
    tracker = WriteTracker(tmp_path, {"all": (253 << 20, 0, 16 * GRAIN)}, GRAIN)
    yield tracker
    tracker.close()


def bio(event: str, first: int, blocks: float) -> bytes:
    """Return what the kernel writes of a bio; `first` and `blocks` are in blocks of GRAIN bytes."""
    start, size = int(first * GRAIN // 512), int(blocks * GRAIN // 512)
    return b"block_bio_%s: 253,0 WS %d + %d [%s]" % (
        event.encode(),
        start,
        size,
        b"0" if event == "complete" else b"kworker/u4:2",
    )


def told(tracker: WriteTracker, *lines: bytes, still: bool = False) -> set[int]:
    for line in lines:
        tracker._note(line)
    return tracker.take(still=still)["all"]


def test_a_bio_counts_once_it_is_completed(tracker: WriteTracker) -> None:
    assert told(tracker, bio("queue", 2, 3)) == set()
    assert told(tracker, bio("complete", 2, 3)) == {2, 3, 4}
    assert told(tracker, still=True) == set()


def test_of_a_bio_that_was_cut_up_the_last_piece_tells(tracker: WriteTracker) -> None:
    assert told(tracker, bio("queue", 2, 4), bio("complete", 4, 2)) == {2, 3, 4, 5}, "only the rest was left of it"
    assert told(tracker, bio("queue", 2, 4), bio("complete", 2, 1)) == {2}
    assert told(tracker, bio("complete", 6, 0)) == {2, 3, 4, 5}, "nothing was left of it"
    assert told(tracker, still=True) == set()


def test_a_bio_of_which_no_end_is_told_counts_when_all_is_still(tracker: WriteTracker) -> None:
    assert told(tracker, bio("queue", 7, 2)) == set()
    assert told(tracker) == set()
    assert told(tracker, still=True) == {7, 8}
    assert told(tracker, still=True) == set()


def test_of_several_bios_that_end_alike_the_longest_is_waited_for(tracker: WriteTracker) -> None:
    assert told(tracker, bio("queue", 3, 1), bio("queue", 1, 3), bio("complete", 3, 1)) == {1, 2, 3}
    assert told(tracker, bio("complete", 1, 3)) == {1, 2, 3}
    assert told(tracker, still=True) == set()


def test_a_bio_from_before_the_beginning_tells_of_itself(tracker: WriteTracker) -> None:
    assert told(tracker, bio("complete", 9, 1)) == {9}


def test_a_program_may_be_called_whatever_it_likes(tracker: WriteTracker, tmp_path: Path) -> None:
    """A name of 15 bytes cannot tell of an event, nor hide one."""
    for number, name in enumerate((b"a\nb", b"\n", b"\nblock_bio_queu", b"\nCPU:0 [LOST 9", b"[0]\n] + 9 [x")):
        lines = bio("queue", number, 1).replace(b"kworker/u4:2", name).split(b"\n")
        assert told(tracker, *lines, bio("complete", number, 1)) == {number}
    assert told(tracker, still=True) == set()
    (tmp_path / "per_cpu/cpu0").mkdir(parents=True)
    (tmp_path / "per_cpu/cpu0/stats").write_text("overrun: 0\nread events: 10\n")
    assert tracker.lost == 0


def test_what_is_discarded_is_not_written(device: Path) -> None:
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        subprocess.run(["blkdiscard", device], check=True)
        assert tracker.take() == {"all": set()}
        subprocess.run(["blkdiscard", "--zeroout", "--length", str(2 * GRAIN), device], check=True)
        assert {0, 1} <= tracker.take()["all"]
        assert tracker.lost == 0


def test_what_the_kernel_could_not_keep_is_counted(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_BUFFER", 4 * KIB)
    monkeypatch.setattr(tracing, "_PAUSE", 3600.0)
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        for _ in range(40):
            write(device, *range(0, SIZE, 128 * KIB))
        tracker.take()
        assert tracker.lost > 0


def instance() -> Path:
    return next((tracing.TRACING / "instances").glob(f"remetal-{os.getpid()}-*"))


def test_who_takes_events_away_is_noticed(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_PAUSE", 3600.0)
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        write(device, 0, GRAIN)
        assert tracker.take()["all"] == {0, 1}
        assert tracker.lost == 0
        write(device, 2 * GRAIN)
        for path in instance().glob("per_cpu/cpu*/trace_pipe_raw"):
            pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            with suppress(BlockingIOError):
                os.read(pipe, 4096)
            os.close(pipe)
        assert tracker.lost > 0


def test_who_empties_the_buffer_is_noticed(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_PAUSE", 3600.0)
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        write(device, 0, GRAIN)
        assert tracker.take()["all"] == {0, 1}
        write(device, 2 * GRAIN)
        (instance() / "trace").write_text("")
        assert tracker.lost > 0
        assert tracker.take()["all"] == set()


@pytest.mark.parametrize("switch", ["tracing_on", "events/block/block_rq_complete/enable"])
def test_who_switches_it_off_is_noticed(device: Path, switch: str) -> None:
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        assert tracker.lost == 0
        (instance() / switch).write_text("0")
        assert tracker.lost > 0


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        ("tracing_on", "0", "1"),
        ("events/block/block_rq_complete/enable", "0", "1"),
        ("events/block/block_rq_complete/filter", "nr_sector == 0", "0"),
        ("events/enable", "0", "1"),
        ("set_event", "!block:block_rq_complete", "block:block_rq_complete"),
        ("tracing_cpumask", "1", "3"),
        ("set_event_pid", "1", ""),
    ],
)
def test_who_switches_it_off_for_a_moment_is_noticed(device: Path, name: str, off: str, on: str) -> None:
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        assert tracker.lost == 0
        if name == "events/block/block_rq_complete/enable":
            subprocess.run(["sysctl", "-q", "vm.drop_caches=2"], check=True)  # which forgets such files
        (instance() / name).write_text(off)
        write(device, 0)
        (instance() / name).write_text(on)
        assert tracker.lost > 0
        assert tracker.lost > 0, "it stays so"


def test_where_that_cannot_be_watched_it_is_tracked_all_the_same(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_checked", no_room)
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN) as tracker:
        write(device, 0)
        assert tracker.take() == {"all": {0}}
        assert tracker.lost == 0
        (instance() / "tracing_on").write_text("0")
        assert tracker.lost > 0


def no_room(result: int) -> int:
    os.close(result)
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_nothing_stays_behind(device: Path) -> None:
    left = tracing.TRACING / "instances" / "remetal-999999999-1"
    left.mkdir()
    with tracked({"all": Span(device, 0, SIZE)}, GRAIN):
        assert not left.exists(), "what a killed process has left is removed"
        assert list((tracing.TRACING / "instances").glob(f"remetal-{os.getpid()}-*"))
    assert not list((tracing.TRACING / "instances").glob(f"remetal-{os.getpid()}-*"))


def test_a_kernel_that_does_not_tell_is_refused(device: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracing, "TRACING", tmp_path / "nowhere")
    assert not can_track(device)
    with pytest.raises(RefusedError, match="does not tell"), tracked({"all": Span(device, 0, SIZE)}, GRAIN):
        pytest.fail("nobody tracks")
