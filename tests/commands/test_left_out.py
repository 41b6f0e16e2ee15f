"""What a backup leaves out: by itself, because somebody names it, or not at all; and everybody is told."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remetal.errors import RefusedError, UsageError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import REMETAL, Site

SIZE = 96 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A disk with an ext4 on all of it, which may stand for /var."""
    with a_disk(tmp_path / "disk.img", "mkfs.ext4", "-q") as device:
        with mounted(device) as folder:
            for name in (
                "tmp/one",
                "tmp/deep/two",
                "cache/apt/archives/p.deb",
                "cache/apt/archives/lock",
                "cache/pacman/pkg/p.zst",
                "cache/other",
                "lib/data",
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(os.urandom(MIB))
        yield device


def a_disk(path: Path, *make: str) -> Any:
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([*make, path], check=True, capture_output=True)
    return attach_loop(Span(path, 0, SIZE), writable=True)


def in_var(site: Site, device: Path, *words: str | Path, options: str = "rw") -> dict[str, Any]:
    """Run a backup where the disk is mounted at /var, and nobody else sees that; return what it says as JSON."""
    script = 'mount -o "$1" "$2" /var && shift 2 && exec "$@"'
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-ec",
            script,
            "-",
            options,
            device,
            REMETAL,
            "backup",
            "--disk",
            device,
            "--json",
            *words,
        ],
        capture_output=True,
        text=True,
        env=site.environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"said": done.stderr}


def restored(site: Site) -> dict[str, bool]:
    """Restore the newest snapshot, and return of each file whether it has content."""
    target = site.folder / "target.img"
    target.unlink(missing_ok=True)
    site.remetal("restore", "latest", "--map", target, "--yes", "--verify")
    subprocess.run(["e2fsck", "-fn", target], check=True, capture_output=True)
    with attach_loop(Span(target, 0, SIZE)) as copy, mounted(copy, options=("ro",)) as folder:
        files = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert {len(data) for data in files.values()} == {MIB}
    return {name: data.count(b"\0") < MIB // 2 for name, data in files.items()}


@pytest.mark.parametrize("options", ["rw", "ro"])
def test_the_running_systems_own_temporary_files_are_left_out(site: Site, device: Path, options: str) -> None:
    made = in_var(site, device, options=options)
    assert made["left_out"] == [
        {"volume": device.name, "path": path, "bytes": size * MIB}
        for path, size in {"/var/tmp": 2, "/var/cache/apt/archives": 1, "/var/cache/pacman/pkg": 1}.items()
    ]
    told = f"left out of {device.name}: /var/tmp (2.00 MiB), /var/cache/apt/archives (1.00 MiB), /var/cache/pacman/pkg"
    assert told in made["said"]
    assert restored(site) == {
        "tmp/one": False,
        "tmp/deep/two": False,
        "cache/apt/archives/p.deb": False,
        "cache/apt/archives/lock": True,
        "cache/pacman/pkg/p.zst": False,
        "cache/other": True,
        "lib/data": True,
    }
    assert told in site.remetal("show", "latest").out
    assert site.remetal("show", "latest", "--json").json["left_out"] == made["left_out"]
    plan = site.remetal("plan", "latest", "--map", site.folder / "other.img")
    assert f"{told} (1.00 MiB); they come back without their content" in plan.out
    noted = site.remetal("plan", "latest", "--map", site.folder / "other.img", "--json").json["notes"]
    assert [each for each in noted if told in each]


def test_the_same_disk_elsewhere_is_somebodys_data(site: Site, device: Path) -> None:
    with mounted(device):
        assert site.remetal("backup", "--disk", device, "--json").json["left_out"] == []
    assert all(restored(site).values())
    assert "left out" not in site.remetal("show", "latest").out
    assert "left out" not in site.remetal("plan", "latest", "--map", site.folder / "other.img").out
    assert site.remetal("backup", "--disk", device, "--json").json["left_out"] == [], "nothing is mounted for it"


def test_what_is_named_is_left_out(site: Site, device: Path) -> None:
    with mounted(device) as folder:
        (folder / "link").symlink_to("lib")
        named = (folder / "link", folder / "tmp" / "one", folder / "cache", folder / "lost+found")
        words = [f"--leave-out={path}" for path in named]
        made = site.remetal("backup", "--disk", device, "--json", *words)
        assert {each["path"]: each["bytes"] for each in made.json["left_out"]} == {
            str(folder / "link"): MIB,
            str(folder / "tmp" / "one"): MIB,
            str(folder / "cache"): 4 * MIB,
        }
        assert f"nothing of {folder / 'lost+found'} could be left out" in made.err
    assert restored(site) == {
        "tmp/one": False,
        "tmp/deep/two": True,
        "cache/apt/archives/p.deb": False,
        "cache/apt/archives/lock": False,
        "cache/pacman/pkg/p.zst": False,
        "cache/other": False,
        "lib/data": False,
    }


def test_all_is_kept_but_what_is_named(site: Site, device: Path) -> None:
    assert in_var(site, device, "--keep-all")["left_out"] == []
    made = in_var(site, device, "--keep-all", "--leave-out", "/var/lib")
    assert [each["path"] for each in made["left_out"]] == ["/var/lib"]
    assert [name for name, kept in restored(site).items() if not kept] == ["lib/data"]


def test_a_path_that_makes_no_sense_is_refused(site: Site, device: Path) -> None:
    with mounted(device) as folder:
        for path, code, said in (
            ("tmp", UsageError.exit_code, "tmp is no path from the root"),
            (str(folder / "nowhere"), UsageError.exit_code, "there is no folder or file"),
            ("/dev/null", UsageError.exit_code, "there is no folder or file"),
            ("/proc/self", RefusedError.exit_code, "is on no volume that is captured"),
            (str(site.folder), RefusedError.exit_code, "is on no volume that is captured"),
            ("/etc", RefusedError.exit_code, "no system would start without /etc"),
            (f"{folder}/../../usr", RefusedError.exit_code, "no system would start without"),
        ):
            assert said in site.remetal("backup", "--disk", device, "--leave-out", path, code=code).err
    assert site.remetal("snapshots", "--json").json == []


def test_too_many_files_are_kept_and_that_is_said(site: Site, device: Path) -> None:
    with mounted(device) as folder:
        many = folder / "many"
        many.mkdir()
        for number in range(20_100):
            (many / str(number)).touch()
        made = site.remetal("backup", "--disk", device, "--leave-out", folder / "tmp", "--leave-out", many, "--json")
        assert [each["path"] for each in made.json["left_out"]] == [str(folder / "tmp")], made.err
        assert f"{many} is captured: it has too many files" in made.err


def test_nothing_is_left_out_of_a_btrfs(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "btrfs.img"
    with path.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", path], check=True)
    with attach_loop(Span(path, 0, 256 * MIB), writable=True) as device, mounted(device) as folder:
        (folder / "out").mkdir()
        made = site.remetal("backup", "--disk", device, "--leave-out", folder / "out", "--json")
        assert made.json["left_out"] == []
        assert f"nothing can be left out of a btrfs: {folder / 'out'}" in made.err


def test_the_page_file_of_a_windows_at_rest_is_left_out(site: Site, tmp_path: Path) -> None:
    with a_disk(tmp_path / "disk.img", "mkfs.ntfs", "-Q", "-q", "-F") as device:
        with mounted(device, kind="ntfs-3g") as folder:
            for name in ("pagefile.sys", "other.sys"):
                (folder / name).write_bytes(os.urandom(2 * MIB))
            other = (folder / "other.sys").read_bytes()
        made = site.remetal("backup", "--disk", device, "--json").json
        name = device.name
        assert made["left_out"] == [{"volume": name, "path": "/pagefile.sys", "bytes": 2 * MIB}]
        whole = site.remetal("backup", "--disk", device, "--json", "--keep-all").json
        assert whole["left_out"] == []
        assert whole["used"] - made["used"] > MIB
    target = site.folder / "target.img"
    site.remetal("restore", made["snapshot"], "--map", target, "--yes", "--verify")
    assert subprocess.run(["ntfs-3g.probe", "--readwrite", target], check=False).returncode == 0
    found = {each: program("ntfscat", target, f"/{each}") for each in ("pagefile.sys", "other.sys")}
    assert found["other.sys"] == other
    assert len(found["pagefile.sys"]) == 2 * MIB
    assert found["pagefile.sys"].count(b"\0") > MIB


def program(*argv: str | Path) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True).stdout
