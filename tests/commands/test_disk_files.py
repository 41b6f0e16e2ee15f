"""The whole main job on disk files, as plain commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import (
    DISK_SIZE,
    PARTITIONS,
    Site,
    hash_file,
    list_tree,
    list_volume,
    span,
)


def sfdisk(disk: Path) -> list[dict[str, object]]:
    """Return the partitions as sfdisk sees them."""
    done = subprocess.run(["sfdisk", "--json", disk], check=True, capture_output=True)
    found: list[dict[str, object]] = json.loads(done.stdout)["partitiontable"]["partitions"]
    return [{key: value for key, value in entry.items() if key != "node"} for entry in found]


def blkid(place: Span) -> str:
    """Return what blkid finds on a place of a disk."""
    argv: list[str | Path]
    argv = ["blkid", "--probe", "--offset", str(place.start), "--size", str(place.size), "-o", "export", place.path]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode in {0, 2}, "2 means that nothing was recognised"
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("DEVNAME"))


def assert_clean(disk: Path) -> None:
    """Let each file system's own checker read its volume, writing nothing."""
    with attach_loop(span(disk, 5)) as device:
        subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)
    with attach_loop(span(disk, 3)) as device:
        subprocess.run(["xfs_repair", "-n", device], check=True, capture_output=True)
    with attach_loop(span(disk, 2)) as device:
        subprocess.run(["fsck.vfat", "-n", device], check=True, capture_output=True)


def test_a_disk_file_comes_back_identical(site: Site, machine_disk: Path) -> None:
    made = site.remetal("backup", "--disk", machine_disk, "--json").json
    new = site.folder / "new.img"
    done = site.remetal("restore", "latest", "--map", f"m.img={new}", "--yes", "--verify", "--json").json
    assert done["snapshot"] == made["snapshot"]
    assert new.stat().st_size == DISK_SIZE
    assert sfdisk(new) == sfdisk(machine_disk)
    subprocess.run(["sgdisk", "--verify", new], check=True, capture_output=True)
    assert_clean(new)
    for number in PARTITIONS:
        assert blkid(span(new, number)) == blkid(span(machine_disk, number))
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    assert list_volume(span(new, 3), ("norecovery",)) == list_volume(span(machine_disk, 3), ("norecovery",))
    with machine_disk.open("rb") as old, new.open("rb") as restored:
        assert old.read(440) == restored.read(440)
        old.seek(PARTITIONS[1][0])
        restored.seek(PARTITIONS[1][0])
        assert old.read(MIB) == restored.read(MIB)


def test_a_second_restore_writes_nothing(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = site.folder / "new.img"
    first = site.remetal("restore", "latest", "--map", str(new), "--yes", "--json").json
    before = hash_file(new), new.stat().st_mtime_ns
    second = site.remetal("restore", "latest", "--map", str(new), "--yes", "--json").json
    assert first["written"] > 50 * MIB
    assert second["written"] == 0
    assert (hash_file(new), new.stat().st_mtime_ns) == before


def test_a_second_backup_stores_next_to_nothing(site: Site, machine_disk: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in site.repository.rglob("*") if path.is_file())

    site.remetal("backup", "--disk", machine_disk)
    first = size()
    site.remetal("backup", "--disk", machine_disk)
    assert size() - first < first / 1000


def test_garbage_on_the_target_does_not_matter(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = site.folder / "new.img"
    with new.open("wb") as file:
        for _ in range(DISK_SIZE // MIB):
            file.write(b"\xa5garbage" * (MIB // 8))
    site.remetal("restore", "latest", "--map", str(new), "--yes", code=3)
    assert new.read_bytes()[: 8 * MIB] == b"\xa5garbage" * MIB, "refused, and not touched"
    site.remetal("restore", "latest", "--map", str(new), "--overwrite", str(new), "--yes")
    assert_clean(new)
    assert list_volume(span(new, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    assert list_volume(span(new, 3), ("norecovery",)) == list_volume(span(machine_disk, 3), ("norecovery",))


def test_a_larger_target_is_filled(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = site.folder / "large.img"
    with new.open("wb") as file:
        file.truncate(2 * DISK_SIZE)
    site.remetal("restore", "latest", "--map", str(new), "--yes")
    subprocess.run(["sgdisk", "--verify", new], check=True, capture_output=True)
    table = sfdisk(new)
    assert [each for each in table if each["start"] != 418 * 2048] == sfdisk(machine_disk)[:4]
    grown = Span(new, PARTITIONS[5][0], int(str(table[4]["size"])) * 512)
    assert grown.start + grown.size > 2 * DISK_SIZE - 2 * MIB
    with attach_loop(grown) as device:
        subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)
        with mounted(device, options=("ro", "noload")) as folder:
            stat = subprocess.run(["stat", "-f", "-c", "%b %S", folder], check=True, capture_output=True, text=True)
            blocks, block_size = map(int, stat.stdout.split())
            assert blocks * block_size > grown.size * 0.8
            assert list_tree(folder) == list_volume(span(machine_disk, 5), ("noload",))


def test_keep_sizes_grows_nothing(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = site.folder / "large.img"
    with new.open("wb") as file:
        file.truncate(2 * DISK_SIZE)
    site.remetal("restore", "latest", "--map", str(new), "--yes", "--keep-sizes")
    assert sfdisk(new) == sfdisk(machine_disk)
    subprocess.run(["sgdisk", "--verify", new], check=True, capture_output=True)


def test_rollback_writes_only_what_changed(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    disk = site.folder / "copy.img"
    site.remetal("restore", "latest", "--map", disk, "--yes")
    with attach_loop(span(disk, 5), writable=True) as device, mounted(device) as folder:
        (folder / "encrypted-by-an-attacker").write_bytes(b"!" * MIB)
        (folder / "folder-1" / "text-1").write_bytes(b"gone")
    done = site.remetal("restore", "latest", "--map", disk, "--yes", "--json").json
    assert 0 < done["written"] < 15 * MIB, "the file, the folders, the journal"
    assert list_volume(span(disk, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))


def test_plan_is_stable_and_confirms(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = site.folder / "new.img"
    plans = [site.remetal("plan", "latest", "--map", str(new), "--json").json for _ in range(2)]
    assert plans[0]["id"] == plans[1]["id"]
    assert plans[0]["steps"] == plans[1]["steps"]
    assert not new.exists()
    text = site.remetal("plan", "latest", "--map", str(new)).out
    assert plans[0]["id"][:12] in text
    site.remetal("restore", "latest", "--map", str(new), "--confirm", plans[0]["id"][:12])
    assert new.exists()
    with machine_disk.open("rb") as file:
        assert file.read(1)


def test_show_and_snapshots_and_probe(site: Site, machine_disk: Path) -> None:
    made = site.remetal("backup", "--disk", machine_disk, "--machine", "web1", "--tag", "weekly", "--json").json
    listed = site.remetal("snapshots", "--json").json
    assert [each["id"] for each in listed] == [made["snapshot"]]
    assert "weekly" in site.remetal("snapshots", "--machine", "web1").out
    shown = site.remetal("show", made["snapshot"][:10]).out
    for word in ("xfs", "ext4", "vfat", "swap", "swappy", "GPT"):
        assert word in shown
    probed = site.remetal("probe", "--disk", machine_disk, "--json").json
    assert probed["disks"][0]["size"] == DISK_SIZE
    assert "HELLO" not in site.remetal("probe", "--disk", machine_disk).out


def test_export_raw_and_qcow2(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    raw, qcow = site.folder / "one.raw", site.folder / "one.qcow2"
    site.remetal("export", "latest", "m.img", "--output", raw)
    site.remetal("export", "latest", "m.img", "--output", qcow)
    assert_clean(raw)
    assert list_volume(span(raw, 5), ("noload",)) == list_volume(span(machine_disk, 5), ("noload",))
    subprocess.run(["qemu-img", "compare", raw, qcow], check=True, capture_output=True)
    assert not list(site.folder.glob("*.partial"))
    assert site.remetal("export", "latest", "m.img", "--output", raw, code=3).err.count("exists already") == 1
    site.remetal("export", "latest", "m.img", "--output", site.folder / "one.vhd", code=2)
    site.remetal("export", "latest", "sdz", "--output", site.folder / "other.raw", code=2)
