"""What the storage ring runs inside its own kernel: mounted logical volumes are read from LVM snapshots."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from lab import CHECKOUT
from remetal.errors import RemetalError, UnavailableError
from remetal.events import Event, Note, Progress, Step, Warn
from remetal.image import snapshots
from remetal.image.snapshots import Policy
from remetal.system.freeze import freezes_nest
from remetal.system.lvm_snapshots import parse_pool
from remetal.system.tracing import can_track
from remetal.units import MIB
from remetal.workflows.backup import BackupRequest, BackupResult, back_up
from tests.storage.layout_inside import partition, program

DISK, VAULT = Path("/dev/ubda"), Path("/run/vault")
REPOSITORY, SECRET = VAULT / "repository", Path("/run/secret")
REMETAL = Path(sys.executable).with_name("remetal")
LOAD = CHECKOUT / "lab/guest/load.py"
STOP = Path("/run/stop")
PARTITIONS = "label: gpt\nsize=600MiB\nsize=500MiB\nsize=100MiB\n"
PLACES = {"vg/linear": "vg/linear", "vg/striped": "vg/striped", "vg/thin": "vg/thin", "ubda:3": "ubda3"}
"""Devices of the volumes, below /dev."""


def prepare() -> None:
    """Make a disk with a group of linear, striped and thin volumes and a partition, and a repository in memory."""
    os.environ |= {"REMETAL_REPO": str(REPOSITORY), "REMETAL_STATE": "/run/state"}
    partition(DISK, PARTITIONS)
    program("vgcreate", "-q", "vg", f"{DISK}1", f"{DISK}2")
    program("lvcreate", "-qy", "-n", "linear", "-L", "120M", "vg")
    program("lvcreate", "-qy", "-n", "striped", "-i2", "-L", "320M", "vg")
    program("lvcreate", "-qy", "--type", "thin-pool", "-n", "pool", "-L", "120M", "vg")
    program("lvchange", "-q", "--errorwhenfull", "y", "vg/pool")
    program("lvcreate", "-qy", "-n", "thin", "-V", "150M", "--thinpool", "vg/pool")
    for volume, kind in {"vg/linear": "ext4", "vg/striped": "xfs", "vg/thin": "ext4", "ubda:3": "ext4"}.items():
        program(f"mkfs.{kind}", "-q", f"/dev/{PLACES[volume]}")
        place_of(volume).mkdir(parents=True)
    VAULT.mkdir()
    program("mount", "-t", "tmpfs", "none", VAULT)
    SECRET.write_text("the repository's\n")
    program(REMETAL, "init", "--quiet", "--passphrase-file", SECRET)


def place_of(volume: str) -> Path:
    """Return where a volume is mounted."""
    return Path("/run/mounted", volume.replace("/", "-"))


@contextmanager
def in_use(*volumes: str) -> Iterator[None]:
    """Mount volumes, all if none is named."""
    mounted = volumes or tuple(PLACES)
    for each in mounted:
        program("mount", f"/dev/{PLACES[each]}", place_of(each))
    try:
        yield
    finally:
        for each in mounted:
            program("umount", place_of(each))


@contextmanager
def loaded(*volumes: str) -> Iterator[None]:
    """Write to volumes that are mounted, to one after the other, all the time."""
    STOP.unlink(missing_ok=True)
    with subprocess.Popen([sys.executable, LOAD, "run", *map(place_of, volumes)], stdout=subprocess.PIPE) as load:
        time.sleep(1)
        yield
        STOP.touch()
        assert load.wait(60) == 0


class Told:
    """What a backup tells while it runs; what is asked for is done when an event comes."""

    def __init__(
        self, when: Callable[[Event], bool] = lambda event: False, do: Callable[[], object] = lambda: None
    ) -> None:
        self.notes: list[str] = []
        self.done = 0
        self._when, self._do = when, do

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        if self._when(event):
            self.done += 1
            self._do()


def backup(policy: Policy, told: Told, *leave_out: Path) -> BackupResult:
    request = BackupRequest(
        str(REPOSITORY), (DISK,), "one", freeze_limit=120, lvm_snapshots=policy, leave_out=leave_out
    )
    return back_up(request, told)


def ways(result: BackupResult) -> dict[str, str]:
    return {each.volume: each.way for each in result.volumes if each.volume in PLACES}


def way_without() -> str:
    """Return how this kernel lets a volume be captured without a snapshot."""
    return "tracked" if can_track(DISK) and can_track(Path("/dev/vg/linear")) else "held"


def check_nothing_is_left() -> None:
    """Neither volumes nor mappings are there that were not before, and nothing is suspended."""
    assert "remetal" not in program("lvs", "-a", "--noheadings", "-o", "lv_name,lv_tags"), program("lvs", "-a")
    names = program("dmsetup", "info", "-c", "--noheadings", "-o", "name,attr")
    assert "remetal" not in names, names
    assert not [line for line in names.split() if ":" in line and "s" in line.split(":")[1]], names


def listed() -> int:
    return len(json.loads(program(REMETAL, "snapshots", "--json")))


def by_uuid() -> dict[str, str]:
    """Return where udev's links by UUID lead."""
    program("udevadm", "settle")
    return {each.name: str(each.resolve()) for each in Path("/dev/disk/by-uuid").iterdir()}


def check_links(links: dict[str, str]) -> None:
    assert by_uuid() == links


def reading(volume: str) -> Callable[[Event], bool]:
    """Return what tells when a volume's snapshot is about to be read."""
    return lambda event: isinstance(event, Step) and event.title.startswith(f"Capturing {volume} from an LVM snapshot")


def read(volume: str) -> Callable[[Event], bool]:
    """Return what tells when all of a volume has been read."""
    return lambda event: isinstance(event, Progress) and event.part == volume and event.done == event.total > 0


def all_are_of_one_moment() -> None:
    """One is read from a snapshot, thin or not, while the others are held; udev's links stay with the volumes.

    What is left out is left out of snapshots, too, as its files lie at that moment.
    """
    taken = []
    with in_use():
        write_to("vg/striped", 24)  # so that most is in use there
        for volume in PLACES:
            scratch_of(volume).mkdir()
            (scratch_of(volume) / "file").write_bytes(os.urandom(SCRATCH))
        for policy, volume in CASES:
            links = by_uuid()
            told = Told(reading(volume), partial(check_links, links))
            with loaded(*PLACES):
                result = backup(policy, told, *map(scratch_of, PLACES))
            left = {each.volume: each.bytes for each in result.snapshot.left_out}
            assert left == dict.fromkeys(PLACES, SCRATCH), (left, told.notes)
            expected = dict.fromkeys(PLACES, way_without()) | {volume: "snapshot"}
            if policy == "all" and freezes_nest():
                expected |= dict.fromkeys(("vg/linear", "vg/striped", "vg/thin"), "snapshot")
            elif policy == "all":
                assert len([each for each in told.notes if "lets only one volume" in each]) == 2, told.notes
            assert ways(result) == expected, (ways(result), told.notes)
            assert told.done == 1
            check_nothing_is_left()
            taken.append(result.snapshot.id)
    for snapshot in taken:
        restore_and_check(snapshot)


def scratch_of(volume: str) -> Path:
    return place_of(volume) / "scratch"


SCRATCH = 3 * MIB
CASES: tuple[tuple[Policy, str], ...] = (("thin", "vg/thin"), ("all", "vg/striped"))


def restore_and_check(snapshot: str) -> None:
    """Restore a snapshot onto the disk, and let the load say whether it is of one moment."""
    program("vgchange", "-q", "-an", "vg")
    program(REMETAL, "restore", snapshot, "--map", f"ubda={DISK}", "--yes", "--passphrase-file", SECRET)
    program("udevadm", "settle")
    program("vgchange", "-q", "-ay", "vg")
    for each in ("vg/linear", "vg/thin", "ubda:3"):
        program("e2fsck", "-fp", f"/dev/{PLACES[each]}")
    with in_use():
        assert int(program(sys.executable, LOAD, "check", *map(place_of, PLACES))) > 0
        assert {(scratch_of(each) / "file").stat().st_size for each in PLACES} == {SCRATCH}


def write_to(volume: str, megabytes: int) -> None:
    """Write a new file, as far as there is room."""
    with suppress(OSError), (place_of(volume) / os.urandom(4).hex()).open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())


def fill_pool() -> None:
    """Write to the thin volume until its pool is nearly full."""
    while parse_pool(program("dmsetup", "status", "vg-pool-tpool"))[0] < 0.96:
        write_to("vg/thin", 2)


def fill_pool_while_nobody_reads() -> None:
    """Fill it as long as who reads the snapshot waits for this; it is removed all the same, and there is room again."""
    fill_pool()
    until = time.monotonic() + 60
    while "remetal-" in program("lvs", "-a", "--noheadings", "-o", "lv_name"):
        assert time.monotonic() < until, program("dmsetup", "info", "-c")
        time.sleep(0.2)


def one_that_overflows_is_no_image() -> None:
    """It is told whether that happens while it is read, or after its last byte; nothing is listed, nothing left."""
    with pytest.MonkeyPatch.context() as patch, in_use("vg/linear"):
        patch.setattr(snapshots, "_room", lambda origin, free: 8 * MIB)
        write_to("vg/linear", 8)
        for when in (reading("vg/linear"), read("vg/linear")):
            told = Told(when, lambda: write_to("vg/linear", 12))
            with pytest.raises(UnavailableError, match="the LVM snapshot of vg/linear is full"):
                backup("all", told)
            assert told.done > 0
            check_nothing_is_left()
            assert listed() == 0


def a_pool_that_fills_up_ends_it() -> None:
    """Its volumes come first; and from one that is nearly full nothing is read at all."""
    with in_use("vg/thin"):
        told = Told(reading("vg/thin"), fill_pool_while_nobody_reads)
        with pytest.raises(UnavailableError, match="the thin pool vg/pool is not fit"):
            backup("thin", told)
        assert told.done == 1
        check_nothing_is_left()
        assert listed() == 0
        told = Told()
        assert ways(backup("thin", told))["vg/thin"] == way_without()
        assert [each for each in told.notes if "of the thin pool vg/pool are in use" in each]


def where_there_is_no_room_it_is_captured_without() -> None:
    """The same where LVM refuses, which leaves nothing of it behind."""
    with in_use("vg/linear"):
        program("lvcreate", "-qy", "-n", "filler", "-l", "100%FREE", "vg")
        told = Told()
        assert ways(backup("all", told))["vg/linear"] == way_without()
        assert [each for each in told.notes if "in the volume group vg, which has 0 bytes free" in each], told.notes
        program("lvremove", "-qy", "vg/filler")
    with pytest.MonkeyPatch.context() as patch, in_use("vg/linear", "vg/thin"):
        patch.setattr(snapshots, "freezes_nest", lambda: True)
        told = Told()
        expected = "snapshot" if freezes_nest() else way_without()
        found = ways(backup("all", told))
        assert {found["vg/linear"], found["vg/thin"]} == {expected}, told.notes
        assert bool([each for each in told.notes if "LVM takes no snapshot of vg/" in each]) != freezes_nest()
        check_nothing_is_left()


def one_that_vanishes_is_no_image() -> None:
    """It ends the backup, whether it goes while it is read or before it is held; the others do not stay held."""
    with in_use("vg/linear"):
        backup("none", Told())
    before = listed()
    for begins in ("Reading vg/linear while it is in use", "this kernel does not tell"):
        with in_use("vg/linear", "ubda:3"):
            write_to("vg/linear", 16)
            told = Told(partial(_says, begins), partial(program, "dmsetup", "wipe_table", "--force", "vg-linear"))
            with pytest.raises(RemetalError) as raised:
                backup("none", told)
            assert told.done == 1
            assert re.search(r"/dev/dm-\d|vg-linear", raised.value.message), raised.value
            write_to("ubda:3", 1)  # would wait for ever
            assert listed() == before
            check_nothing_is_left()
        program("lvchange", "-q", "--refresh", "vg/linear")
        mended = subprocess.run(["e2fsck", "-fy", f"/dev/{PLACES['vg/linear']}"], capture_output=True, check=False)
        assert mended.returncode <= 1, mended.stdout
    with in_use("vg/linear"):
        assert listed() == before
        backup("none", Told())
    assert listed() == before + 1


def _says(begins: str, event: Event) -> bool:
    return (isinstance(event, Step) and event.title.startswith(begins)) or (
        isinstance(event, Warn) and event.text.startswith(begins)
    )


def who_is_ended_leaves_nothing_for_long() -> None:
    """One that is interrupted removes its snapshot; that of one that is killed is removed by the next."""
    for volume in ("vg/linear", "vg/thin"):
        with in_use(volume):
            write_to(volume, 8)
            for how in (signal.SIGINT, signal.SIGKILL):
                words = ["--disk", str(DISK), "--lvm-snapshots", "all", "--limit-read", "1M", "--freeze-limit", "120"]
                with subprocess.Popen(
                    [REMETAL, "backup", "--machine", "one", *words], stderr=subprocess.PIPE
                ) as process:
                    assert process.stderr is not None
                    while b"from an LVM snapshot" not in (line := process.stderr.readline()):
                        assert line, "it has ended"
                    process.send_signal(how)
                    process.communicate(timeout=120)
                    assert process.returncode != 0
                if how == signal.SIGINT:
                    check_nothing_is_left()
            assert "remetal-" in program("lvs", "--noheadings", "-o", "lv_name")
            told = Told()
            backup("none", told)
            assert [each for each in told.notes if "which a backup left that was killed" in each]
            check_nothing_is_left()
