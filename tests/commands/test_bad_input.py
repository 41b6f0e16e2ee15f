"""What goes wrong is refused or resumed: the documented exit code, a sentence that helps, no wrong byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import DISK_SIZE, Site, hash_file, list_volume, span


@pytest.fixture
def backed_up(site: Site, machine_disk: Path) -> Site:
    """A site with one snapshot of the machine's disk."""
    site.remetal("backup", "--disk", machine_disk)
    return site


def test_usage_errors_end_with_2(site: Site, machine_disk: Path) -> None:
    assert "--help" in site.remetal("backup", "--nonsense", code=2).err
    assert "no snapshot yet" in site.remetal("plan", "latest", "--map", "x.img", code=2).err
    site.remetal("backup", "--disk", machine_disk)
    assert "no snapshot starts with" in site.remetal("show", "ffffffffffff", code=2).err
    assert "m.img" in site.remetal("plan", "latest", "--map", "sda=x.img", code=2).err
    assert site.remetal("show", "zz", "--json", code=2).json["error"]["exit_code"] == 2


def test_no_repository_there(site: Site) -> None:
    told = site.remetal("snapshots", "--repo", site.folder / "empty", code=None)
    assert told.code in {3, 6}
    assert "remetal init" in told.err


def test_init_twice_is_refused(site: Site) -> None:
    before = {path: path.stat().st_mtime_ns for path in site.repository.rglob("*")}
    site.remetal("init", code=3)
    assert {path: path.stat().st_mtime_ns for path in site.repository.rglob("*")} == before


def test_wrong_passphrase(backed_up: Site) -> None:
    wrong = backed_up.folder / "wrong"
    wrong.write_text("not it\n")
    new = backed_up.folder / "new.img"
    told = backed_up.remetal("restore", "latest", "--map", new, "--yes", "--passphrase-file", wrong, code=3)
    assert "passphrase" in told.err
    assert not new.exists()


def test_no_secret_and_nobody_to_ask(backed_up: Site) -> None:
    del backed_up.environment["REMETAL_PASSPHRASE_FILE"]
    told = backed_up.remetal("restore", "latest", "--map", backed_up.folder / "new.img", "--yes", code=3)
    assert "--passphrase-file" in told.err


def test_the_recovery_kit_opens_the_repository(tmp_path: Path, machine_disk: Path) -> None:
    site = Site(tmp_path)
    kit = site.remetal("init", "--json").json["kit"]
    site.remetal("backup", "--disk", machine_disk)
    del site.environment["REMETAL_PASSPHRASE_FILE"]
    (site.folder / "kit").write_text(kit)
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes", "--kit-file", site.folder / "kit")
    assert list_volume(span(tmp_path / "new.img", 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))


def test_a_restore_nobody_confirmed(backed_up: Site) -> None:
    new = backed_up.folder / "new.img"
    assert "--confirm" in backed_up.remetal("restore", "latest", "--map", new, code=3).err
    backed_up.remetal("restore", "latest", "--map", new, "--confirm", "0123456789ab", code=3)
    backed_up.remetal("restore", "latest", "--map", new, "--confirm", "", code=3)
    assert not new.exists()


def test_a_plan_is_void_when_the_target_changed(backed_up: Site) -> None:
    new = backed_up.folder / "new.img"
    with new.open("wb") as file:
        file.truncate(DISK_SIZE)
    plan = backed_up.remetal("plan", "latest", "--map", new, "--json").json["id"]
    with new.open("r+b") as file:
        file.truncate(DISK_SIZE + 100 * MIB)
    told = backed_up.remetal("restore", "latest", "--map", new, "--confirm", plan, code=3)
    assert "changed" in told.err


def test_too_small_a_target_is_refused_with_the_numbers(backed_up: Site) -> None:
    new = backed_up.folder / "small.img"
    with new.open("wb") as file:
        file.truncate(300 * MIB)
    before = hash_file(new)
    told = backed_up.remetal("restore", "latest", "--map", new, "--yes", code=3)
    assert "300 MiB" in told.err
    assert hash_file(new) == before


def test_a_mounted_target_is_refused(backed_up: Site, machine_disk: Path) -> None:
    new = backed_up.folder / "new.img"
    backed_up.remetal("restore", "latest", "--map", new, "--yes")
    with attach_loop(span(new, 5), writable=True) as device, mounted(device) as folder:
        told = backed_up.remetal("restore", "latest", "--map", new, "--yes", code=3)
        assert str(folder) in told.err


def test_a_target_inside_the_repository_is_refused(backed_up: Site) -> None:
    pack = next(path for path in (backed_up.repository / "packs").rglob("*") if path.is_file())
    before = hash_file(pack)
    told = backed_up.remetal("restore", "latest", "--map", pack, "--yes", code=3)
    assert "repository" in told.err
    assert hash_file(pack) == before


def test_a_disk_that_holds_the_repository_is_refused(site: Site, machine_disk: Path) -> None:
    """The repository lies on a volume of a loop device, and that device is named as the target."""
    usb = site.folder / "usb.img"
    with usb.open("wb") as file:
        file.truncate(800 * MIB)
    with attach_loop(Span(usb, 0, 800 * MIB), writable=True) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        with mounted(device) as folder:
            site.environment["REMETAL_REPO"] = str(folder / "backup")
            site.remetal("init", "--quiet")
            site.remetal("backup", "--disk", machine_disk)
            told = site.remetal("restore", "latest", "--map", device, "--yes", code=3)
            assert "repository" in told.err
            site.remetal("restore", "latest", "--map", usb, "--yes", code=3)
            site.remetal("check")


def test_a_volume_mounted_read_write_is_not_captured(site: Site, machine_disk: Path) -> None:
    copy = site.folder / "copy.img"
    subprocess.run(["cp", "--sparse=always", machine_disk, copy], check=True)
    with attach_loop(span(copy, 5), writable=True) as device, mounted(device) as folder:
        told = site.remetal("backup", "--disk", copy, code=3)
        assert str(folder) in told.err
        assert "recovery medium" in told.err
    with attach_loop(span(copy, 5)) as device, mounted(device, options=("ro", "noload")):
        site.remetal("backup", "--disk", copy)
    assert len(site.remetal("snapshots", "--json").json) == 1


def test_a_full_disk_while_backing_up(tmp_path: Path, machine_disk: Path) -> None:
    site = Site(tmp_path)
    small = tmp_path / "small.img"
    with small.open("wb") as file:
        file.truncate(40 * MIB)
    with attach_loop(Span(small, 0, 40 * MIB), writable=True) as device:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", device], check=True)
        with mounted(device) as folder:
            site.environment["REMETAL_REPO"] = str(folder / "backup")
            site.remetal("init", "--quiet")
            told = site.remetal("backup", "--disk", machine_disk, code=6)
            assert "space" in told.err or "full" in told.err
            assert site.remetal("snapshots", "--json").json == []
            site.remetal("check")


def test_two_backups_at_once(site: Site, machine_disk: Path) -> None:
    first = site.start("backup", "--disk", machine_disk)
    codes = []
    while first.poll() is None:
        codes.append(site.remetal("backup", "--disk", machine_disk, "--quiet", code=None).code)
    assert first.returncode in {0, 6}
    assert set(codes) <= {0, 6}
    listed = site.remetal("snapshots", "--json").json
    assert len(listed) == codes.count(0) + (first.returncode == 0)
    site.remetal("check")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_backup_that_was_stopped_loses_nothing(site: Site, machine_disk: Path, how: signal.Signals) -> None:
    site.remetal("backup", "--disk", machine_disk, "--machine", "before")
    for delay in (0.2, 0.4, 0.6, 0.9, 1.3):
        running = site.start("backup", "--disk", machine_disk)
        time.sleep(delay)
        running.send_signal(how)
        running.wait()
    site.remetal("check")
    done = site.remetal("backup", "--disk", machine_disk, "--json").json
    new = site.folder / "new.img"
    site.remetal("restore", done["snapshot"], "--map", new, "--yes")
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    site.remetal("check", "--read-data")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_restore_that_was_stopped_goes_on(backed_up: Site, machine_disk: Path, how: signal.Signals) -> None:
    new = backed_up.folder / "new.img"
    chance = random.Random(7)
    codes = []
    for _ in range(5):
        running = backed_up.start("restore", "latest", "--map", new, "--yes")
        time.sleep(chance.uniform(0.3, 1.5))
        running.send_signal(how)
        codes.append(running.wait())
    if how == signal.SIGINT:
        assert set(codes) <= {0, 1, 4, -signal.SIGINT}, "the last one while Python itself was still starting"
    backed_up.remetal("restore", "latest", "--map", new, "--yes", "--verify")
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    assert list_volume(span(new, 3), ("norecovery",)) == list_volume(span(machine_disk, 3), ("norecovery",))
    assert backed_up.remetal("restore", "latest", "--map", new, "--yes", "--json").json["written"] == 0


def objects(site: Site, folder: str) -> list[Path]:
    """Return the objects of one kind, the largest first."""
    found = [path for path in (site.repository / folder).rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def flip(path: Path) -> None:
    """Change one bit in the middle of an object."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 0x10]))


def truncate(path: Path) -> None:
    """Cut off the second half of an object."""
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("kind", ["packs", "index", "maps", "history"])
def test_damage_is_found_and_never_restored(backed_up: Site, kind: str, damage: object) -> None:
    assert callable(damage)
    for path in objects(backed_up, kind) + (objects(backed_up, "parity") if kind == "packs" else []):
        damage(path)
    told = backed_up.remetal("check", code=5)
    assert "damaged" in told.out
    new = backed_up.folder / "new.img"
    told = backed_up.remetal("restore", "latest", "--map", new, "--yes", code=None)
    assert told.code in {2, 4, 5}
    assert told.err.strip()


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_one_damaged_pack_costs_nothing(backed_up: Site, machine_disk: Path, damage: object) -> None:
    """The machine comes back without a repair; the repair takes no key, and can be taken back."""
    assert callable(damage)
    pack = objects(backed_up, "packs")[0]
    good = pack.read_bytes()
    damage(pack)
    bad = pack.read_bytes() if pack.exists() else None
    told = backed_up.remetal("check", "--json", code=5).json
    assert (told["repairable"], told["unprotected"]) == (1, 0)
    new = backed_up.folder / "new.img"
    told = backed_up.remetal("restore", "latest", "--map", new, "--yes")
    assert f"{pack.name} is damaged or missing; what it held is rebuilt from parity" in told.err
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    assert (pack.read_bytes() if pack.exists() else None) == bad
    assert backed_up.remetal("repair", "--json").json["rebuilt"] == 1
    assert pack.read_bytes() == good
    backed_up.remetal("check", "--read-data")
    assert "objects removed: 1," in backed_up.remetal("repair", "--undo").out
    assert (pack.read_bytes() if pack.exists() else None) == bad
    backed_up.remetal("repair")
    assert "Accepted 1 repair" in backed_up.remetal("repair", "--accept").out
    backed_up.remetal("repair", "--undo", code=3)


@pytest.mark.parametrize("kind", ["maps", "history", "keys/secrets"])
def test_what_no_repair_can_mend_is_told(backed_up: Site, kind: str) -> None:
    flip(objects(backed_up, kind)[0])
    told = backed_up.remetal("repair", code=5)
    assert f"damaged: the object {kind}" in told.out
    assert "Repaired: nothing." in told.out


def test_a_damaged_index_is_told_where_no_key_is_at_hand(backed_up: Site) -> None:
    flip(objects(backed_up, "index")[0])
    assert "damaged: the object index" in backed_up.remetal("repair", code=5, REMETAL_PASSPHRASE_FILE="").out
    backed_up.remetal("repair")
    assert "nothing to do" in backed_up.remetal("repair", REMETAL_PASSPHRASE_FILE="").out


def test_a_lost_index_is_made_anew(backed_up: Site, machine_disk: Path) -> None:
    for path in objects(backed_up, "index"):
        path.unlink()
    backed_up.remetal("check", code=5)
    assert backed_up.remetal("repair", "--json").json["indexed"] > 0
    backed_up.remetal("check", "--read-data")
    assert backed_up.remetal("repair", "--json").json["indexed"] == 0
    new = backed_up.folder / "new.img"
    backed_up.remetal("restore", "latest", "--map", new, "--yes")
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))


def test_a_newer_format_is_refused(backed_up: Site) -> None:
    config = backed_up.repository / "config"
    text = config.read_text()
    config.chmod(0o600)
    assert '"format":1' in text.replace(" ", "")
    config.write_text(text.replace('"format":1', '"format":9').replace('"format": 1', '"format": 9'))
    told = backed_up.remetal("snapshots", code=3)
    assert "9" in told.err
    assert "Update remetal" in told.err
