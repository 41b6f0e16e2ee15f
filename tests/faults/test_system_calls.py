"""A full disk, a broken one, a read-only one, no descriptors left: at every system call of the real commands.

The commands are those that a person types, on a real folder; `tests.faults.calls` makes one call after the other fail.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from remetal.cli.app import run_command
from remetal.errors import EXIT_CODES, DamagedError, RefusedError, UnavailableError, UnfinishedError
from remetal.repository import encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.machines import MachineKeys
from remetal.repository.repository import (
    load_machine_keys,
    open_repository,
    unlock_with_passphrase,
)
from remetal.storage import LocalStore
from tests.faults.calls import AFTER, ERRORS, Calls, Fault, bad_sector, unplugged_disk, watched_calls
from tests.faults.campaign import World, need_listed, need_sound
from tests.faults.counting import Count, StartCount
from tests.faults.schedule import InlineExecutor
from tests.repositories import CHUNK, PASSPHRASE, Site, noise, restore

_DISKS = [noise("s1", 3), noise("s2", 1) + noise("s1", 1), noise("s3", 2) + noise("s1", 1)]
_SHARE = 113
"""Of so many cases one is tried, unless it is the full campaign."""


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Make packs small and passphrases quick, and let everything run in one thread: the same calls in every run."""
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    for module in ("session", "encoder", "copy", "check"):
        patch.setattr(f"remetal.repository.{module}.ThreadPoolExecutor", InlineExecutor)
    patch.setattr("remetal.image.restore.ThreadPoolExecutor", InlineExecutor)
    yield
    patch.undo()


@dataclass
class Place:
    """A folder with a repository, the keys of the machine that is backed up from here, and what its snapshots hold."""

    folder: Path
    expected: dict[str, bytes] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.folder / "repository"

    def run(self, *words: str) -> tuple[int, str]:
        """Run a command as a person does; return its exit code and what it says on standard error, or else at all."""
        said, shown = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), redirect_stdout(shown):
            patch.setenv("REMETAL_REPO", str(self.root))
            patch.setenv("REMETAL_STATE", str(self.folder / "state"))
            patch.setenv("REMETAL_PASSPHRASE_FILE", str(self.folder / "passphrase"))
            code = run_command([*words, "--quiet"])
        return code, said.getvalue() or shown.getvalue()

    def need(self, *words: str) -> None:
        code, said = self.run(*words)
        assert code == 0, said

    def backup(self, number: int) -> tuple[int, str]:
        disk = self.folder / "disk.img"
        disk.write_bytes(_DISKS[number])
        return self.run("backup", "--machine", "web", "--disk", str(disk))

    def copied(self, folder: Path) -> Place:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return Place(folder, dict(self.expected))

    def site(self, root: Path | None = None, machine: str = "web") -> Site:
        store = LocalStore(root or self.root)
        repository = open_repository(store)
        keys = load_machine_keys(self.folder / "state" / "machines" / machine, repository)
        try:
            key = unlock_with_passphrase(repository, PASSPHRASE)
        except RefusedError:
            key = unlock_with_passphrase(repository, "new")
        stored = keys.stored if keys is not None else None
        return Site(store, repository, MachineKeys(stored), key)  # type: ignore[arg-type]

    def listed(self, machine: str = "web") -> dict[str, bytes]:
        """Return what the snapshots of a machine hold, by their ids."""
        site = self.site()
        snapshots = open_catalog(site.repository, site.key).snapshots()
        return {each.id: restore(site, each) for each in snapshots if each.machine == machine}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A repository with two snapshots, on a file system in memory where there is one: fsync(2) costs nothing there."""
    shared = Path("/dev/shm")
    folder = (shared if shared.is_dir() else tmp_path_factory.getbasetemp()) / f"remetal-calls-{os.getpid()}"
    place = Place(folder / "start")
    place.folder.mkdir(parents=True)
    (place.folder / "passphrase").write_text(PASSPHRASE + "\n")
    (place.folder / "new").write_text("new\n")
    place.need("init", "--chunk-size", "64K")
    for number in (0, 1):
        assert place.backup(number)[0] == 0
        place.expected |= {each: data for each, data in place.listed().items() if each not in place.expected}
    yield place
    shutil.rmtree(folder)


Work = Callable[[Place], tuple[int, str]]
"""Runs a command."""
Look = Callable[[Place, int], None]
"""Looks at the invariants after it ended with this code."""


def faults_of(names: list[str]) -> Iterator[Fault]:
    """Yield each error of each call of a run: once, from then on, after the call took effect, or torn, in turn."""
    turn = 0
    for at, name in enumerate(names, start=1):
        for number in ERRORS[name]:
            variants = [Fault(at, number), Fault(at, number, lasting=True)]
            if name in AFTER:
                variants += [Fault(at, number, after=True), Fault(at, number, after=True, lasting=True)]
            if name == "writev":
                variants.append(Fault(at, number, torn=True))
            yield variants[turn % len(variants)]
            turn += 1


def run_campaign(
    place: Place,
    work: Work,
    look: Look,
    count: Count,
    *,
    share: int,
    offset: int = 0,
    without_links: bool = False,
    look_again: Look | None = None,
) -> None:
    """Run a command with every fault, or with one in `share` of them, and look at what is left after each.

    `look_again` looks instead of `look` where one object could not be read once, and can be when it is read again.
    """
    folder = place.folder.with_name("case")

    def watched() -> tuple[Place, Calls, int, str]:
        case = place.copied(folder)
        with watched_calls(case.root, case.root.with_name("copy"), without_links=without_links) as calls:
            calls.fault = fault
            code, said = work(case)
            assert calls.left_open() == [], "a descriptor is left open"
        return case, calls, code, said

    fault: Fault | None = None
    case, calls, code, said = watched()
    assert code == 0, said
    look(case, code)
    every = list(faults_of(calls.names))
    assert len(calls.names) > 20
    for fault in every[offset % share :: share]:
        case, calls, code, said = watched()
        with count.case(f"{calls.names[fault.at - 1]} {errno.errorcode[fault.number]} {fault}"):
            assert calls.hits
            assert code in EXIT_CODES
            assert code == 0 or said.startswith(("remetal: ", "damaged: ")), said
            assert "error in remetal itself" not in said, said
            misread = calls.names[fault.at - 1] == "pread" and fault.number == errno.EIO and not fault.lasting
            (look_again if look_again is not None and misread else look)(case, code)
        if code:
            count.told()


def look_after(place: Place, code: int, *, new: bytes | None = None, gone: str = "") -> None:
    """What was acknowledged restores, and nothing else is listed but for a backup or forget that did not end well."""
    expected = dict(place.expected)
    maybe = {"": new} if new is not None and code else {}
    if gone:
        data = expected.pop(gone)
        maybe |= {gone: data} if code else {}
    listed = place.listed()
    fresh = {identity: data for identity, data in listed.items() if identity not in place.expected}
    if new is not None and not code:
        assert list(fresh.values()) == [new], "an acknowledged snapshot is not there"
        expected |= fresh
    site = place.site()
    need_sound(World(site, expected, maybe), store=site.store)
    assert {each.name for each in (place.root / ".tmp").iterdir()} <= {"reserve", "lock"}


BOTH = pytest.mark.parametrize(
    "share", [_SHARE, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(7200)])], ids=["some", "all"]
)
_CAMPAIGN = "errors of the system, "


@BOTH
@pytest.mark.parametrize("without_links", [False, True], ids=["links", "vfat"])
def test_backup(place: Place, share: int, without_links: bool, counts: StartCount) -> None:
    count = counts(_CAMPAIGN + "backup")

    def look(case: Place, code: int) -> None:
        look_after(case, code, new=_DISKS[2])

    run_campaign(place, lambda case: case.backup(2), look, count, share=share, without_links=without_links)


@BOTH
def test_forget(place: Place, share: int, counts: StartCount) -> None:
    first = next(iter(place.expected))

    def look(case: Place, code: int) -> None:
        look_after(case, code, gone=first)

    run_campaign(place, lambda case: case.run("forget", first), look, counts(_CAMPAIGN + "forget"), share=share)


@BOTH
def test_prune(place: Place, share: int, counts: StartCount) -> None:
    forgotten = place.copied(place.folder.with_name("forgotten"))
    first = next(iter(place.expected))
    forgotten.need("forget", first)
    del forgotten.expected[first]
    count = counts(_CAMPAIGN + "prune")
    words = ("prune", "--grace", "0s", "--max-unused", "0")
    run_campaign(forgotten, lambda case: case.run(*words), look_after, count, share=share)


@BOTH
def test_repair(place: Place, share: int, counts: StartCount) -> None:
    bare = place.copied(place.folder.with_name("bare"))
    for path in bare.root.glob("index/*/*"):
        path.unlink()

    def look(case: Place, code: int) -> None:
        if code:
            shutil.rmtree(case.root / "locks", ignore_errors=True)  # as a dead process's: ours stand while we live
            case.need("repair")
        look_after(case, 0)

    run_campaign(bare, lambda case: case.run("repair"), look, counts(_CAMPAIGN + "repair"), share=share)


@BOTH
@pytest.mark.parametrize("command", ["change-passphrase", "add-recipient", "remove-passphrase"])
def test_keys(place: Place, command: str, share: int, counts: StartCount) -> None:
    start = place
    words = ["key", command]
    if command == "remove-passphrase":
        start = place.copied(place.folder.with_name("two"))
        start.need("key", "add-passphrase", "--new-passphrase-file", str(start.folder / "new"))
    else:
        words += ["--new-passphrase-file"]

    def work(case: Place) -> tuple[int, str]:
        return case.run(*words, *([str(case.folder / "new")] if len(words) > 2 else []))

    def look(case: Place, code: int) -> None:
        if command != "add-recipient" and not code:
            with pytest.raises(RefusedError):
                unlock_with_passphrase(case.site().repository, PASSPHRASE)
        look_after(case, 0)

    run_campaign(start, work, look, counts(_CAMPAIGN + "key change"), share=share)


@BOTH
def test_init(place: Place, share: int, counts: StartCount) -> None:
    empty = place.copied(place.folder.with_name("empty"))
    shutil.rmtree(empty.root)
    empty.expected.clear()

    def look(case: Place, code: int) -> None:
        again, said = case.run("init", "--chunk-size", "64K")
        assert again == (0 if code and "already" not in said else RefusedError.exit_code), said
        assert check_repository(case.site().repository, keys=case.site().key).problems == []
        assert case.backup(0)[0] == 0
        assert list(case.listed().values()) == [_DISKS[0]]

    words = ("init", "--chunk-size", "64K")
    run_campaign(empty, lambda case: case.run(*words), look, counts(_CAMPAIGN + "init"), share=share)


@BOTH
def test_copy(place: Place, share: int, counts: StartCount) -> None:
    def work(case: Place) -> tuple[int, str]:
        return case.run("copy", "--to", str(case.folder / "copy"))

    def look(case: Place, code: int) -> None:
        target = case.folder / "copy"
        if (target / "config").exists():
            told = code == DamagedError.exit_code  # what could not be read at the source is lacking
            need_listed(case.site(target), {} if told else case.expected, case.expected if told else {})
        if code:
            case.need("copy", "--to", str(target))
        site = case.site(target)
        assert [(e.name, site.store.get(e.name)) for e in site.store.entries("")] == [
            (e.name, case.site().store.get(e.name)) for e in case.site().store.entries("")
        ]
        need_sound(World(site, case.expected), store=site.store)

    run_campaign(place, work, look, counts(_CAMPAIGN + "copy"), share=share)


@BOTH
def test_restore(place: Place, share: int, counts: StartCount, tmp_path: Path) -> None:
    """Whatever fails, each chunk of the target is what it was before or what it should become."""
    first, data = next(iter(place.expected.items()))
    old = noise("what stood there", len(data) // CHUNK)
    target = tmp_path / "target.img"
    words = ("restore", first, "--map", f"disk.img={target}", "--yes", "--overwrite", str(target))

    def work(case: Place) -> tuple[int, str]:
        target.write_bytes(old)
        return case.run(*words)

    def look(case: Place, code: int) -> None:
        found = target.read_bytes()
        pieces = [slice(start, start + 4096) for start in range(0, len(data), 4096)]
        assert all(found[each] in {data[each], old[each]} for each in pieces), "a wrong byte has reached the target"
        assert code or found == data
        assert not code or case.run(*words)[0] == 0
        assert target.read_bytes() == data

    run_campaign(place, work, look, counts(_CAMPAIGN + "restore"), share=share)


@BOTH
def test_check(place: Place, share: int, counts: StartCount) -> None:
    """A check that could not look does not say that all is well, unless it has looked again."""

    def look(case: Place, code: int) -> None:
        if fine:
            assert code == 0
            fine.pop()
        else:
            assert code

    def look_again(case: Place, code: int) -> None:
        assert code in {0, DamagedError.exit_code, UnavailableError.exit_code}

    fine = [True]
    words = ("check", "--read-data")
    count = counts(_CAMPAIGN + "check")
    run_campaign(place, lambda case: case.run(*words), look, count, share=share, look_again=look_again)


def test_short_writes_and_reads(place: Place, counts: StartCount) -> None:
    """The kernel may move less than it was asked for."""
    count = counts(_CAMPAIGN + "short writes and reads")
    for size in (1, 4095, 70_000):
        case = place.copied(place.folder.with_name("case"))
        with watched_calls(case.root, short=max(size, 4095)) as calls, count.case(size, faults=0):
            assert case.backup(2)[0] == 0
            look_after(case, 0, new=_DISKS[2])
        assert calls.count > 100


def test_a_write_whose_sync_failed_is_written_anew(place: Place) -> None:
    """The kernel calls pages clean that it could not write: another fsync(2) of that file may say that all is well."""
    case = place.copied(place.folder.with_name("case"))
    store = LocalStore(case.root)
    with watched_calls(case.root) as calls:
        store.put("packs/aa", [b"x"])
        calls.names.clear()
        before = calls.count
        store.put("packs/ab", [b"x"])
        at = before + calls.names.index("fsync") + 1
        calls.fault = Fault(calls.count + at - before, errno.EIO)
        with pytest.raises(UnavailableError, match="Input/output error"):
            store.put("packs/ac", [b"y"])
        assert not (case.root / "packs/ac").exists()
        calls.names.clear()
        store.put("packs/ac", [b"y"])
        assert {"make", "writev", "fsync", "link"} <= set(calls.names)


def objects_of(root: Path, *prefixes: str) -> dict[str, bytes]:
    """Return the objects of a repository below prefixes, by name."""
    found = {str(each.relative_to(root)): each for each in root.rglob("*") if each.is_file()}
    return {name: each.read_bytes() for name, each in found.items() if name.startswith(prefixes or "")}


def count_restored(case: Place, target: Path, *words: str) -> int:
    """Restore all snapshots by the command, and return how many came back; none comes back otherwise than it was."""
    count = 0
    for identity, data in case.expected.items():
        code, said = case.run("restore", identity, "--map", f"disk.img={target}", "--yes", *words)
        assert code in {0, DamagedError.exit_code}, said
        assert code or target.read_bytes() == data
        count += not code
        target.unlink(missing_ok=True)
    return count


def test_a_check_tells_of_every_bad_sector(place: Place, counts: StartCount) -> None:
    count = counts("bad sectors")
    for name in sorted(objects_of(place.root)):
        if not name.startswith((".tmp/", "locks/")):
            with count.case(name), bad_sector(place.root / name):
                code, said = place.run("check")
                assert code == (UnavailableError.exit_code if name == "config" else DamagedError.exit_code), said
            count.told()


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_bad_sector_in_a_pack(place: Place, where: float, counts: StartCount, tmp_path: Path) -> None:
    """Every command goes through it, because parity tells what the pack was, and a repair puts it in place again."""
    count = counts("bad sectors")
    good = objects_of(place.root)
    target = tmp_path / "target.img"
    for name in sorted(objects_of(place.root, "packs/")):
        case = place.copied(place.folder.with_name("case"))
        start = int(where * (len(good[name]) - 512))
        with count.case(name), bad_sector(case.root / name, start):
            assert case.run("check", "--read-data")[0] == DamagedError.exit_code
            assert check_repository(case.site().repository).repairable == 1
            assert count_restored(case, target) == 2
            copy = case.folder / "copy"
            assert case.run("copy", "--to", str(copy))[0] == DamagedError.exit_code
            assert objects_of(copy, "packs/", "history/") == objects_of(place.root, "packs/", "history/")
            assert count_restored(case, target, "--repo", str(copy)) == 2
            case.need("repair")
            case.need("check", "--read-data")
            case.need("repair", "--undo")
            assert {**objects_of(case.root), name: good[name]} == good
            case.need("repair")
            look_after(case, 0)
        count.told()


@pytest.mark.parametrize("kind", ["parity/", "index/"])
def test_a_bad_sector_in_what_can_be_made_anew(place: Place, kind: str, counts: StartCount, tmp_path: Path) -> None:
    count = counts("bad sectors")
    for name in sorted(objects_of(place.root, kind)):
        case = place.copied(place.folder.with_name("case"))
        with count.case(name), bad_sector(case.root / name):
            assert case.run("check")[0] == DamagedError.exit_code
            assert count_restored(case, tmp_path / "target.img") == 2 or kind == "index/"
            case.need("repair")
            assert count_restored(case, tmp_path / "target.img") == 2
            look_after(case, 0)
        count.told()


@pytest.mark.parametrize("kind", ["packs/", "index/", "maps/", "history/"])
def test_a_backup_goes_on_whatever_cannot_be_read(place: Place, kind: str, counts: StartCount, tmp_path: Path) -> None:
    count = counts("bad sectors")
    for name in sorted(objects_of(place.root, kind)):
        case = place.copied(place.folder.with_name("case"))
        with count.case(name), bad_sector(case.root / name):
            code, said = case.backup(2)
            assert code == 0, said
            case.need("restore", "latest", "--map", f"disk.img={tmp_path / 'target.img'}", "--yes")
            assert (tmp_path / "target.img").read_bytes() == _DISKS[2]
        (tmp_path / "target.img").unlink()


@pytest.mark.parametrize("command", ["check", "repair", "copy", "restore"])
def test_a_disk_that_is_gone_is_not_taken_for_damage(
    place: Place, command: str, counts: StartCount, tmp_path: Path
) -> None:
    """However far a command has come when the disk is unplugged, it says that, and nothing is repaired or set aside."""
    count = counts("unplugged disks")
    words = {
        "copy": ("--to", str(tmp_path / "copy")),
        "restore": (next(iter(place.expected)), "--map", f"disk.img={tmp_path / 'target.img'}", "--yes"),
    }
    before = objects_of(place.root)
    code = after = 0
    while code or not after:
        case = place.copied(place.folder.with_name("case"))
        with count.case(after), unplugged_disk(after):
            code, said = case.run(command, *words.get(command, ()))
            assert code in {0, UnavailableError.exit_code, UnfinishedError.exit_code}, said
            assert "Input/output error" in said or not code, said
        if code:
            count.told()
        shutil.rmtree(case.root / "locks", ignore_errors=True)
        assert objects_of(case.root) == before
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        (tmp_path / "target.img").unlink(missing_ok=True)
        after += 1
    assert after > 15
