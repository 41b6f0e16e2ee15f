"""What cannot be held still is refused before anything is, and named; and so is a system whose disks are another's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab.disk import fresh_disk
from remetal.errors import RefusedError
from remetal.layout import uses
from remetal.layout.disks import check_capturable
from remetal.layout.probe import Probed, probe_layout
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import Mount, mounted, mounted_by_server, probe_mounts
from remetal.units import MIB
from remetal.workflows.in_use import VolumesInUse
from tests.commands.site import REMETAL, Site

SIZE = 64 * MIB
MAKE = {
    "ntfs": ["mkfs.ntfs", "-Q", "-q", "-F"],
    "exfat": ["mkfs.exfat"],
    "f2fs": ["mkfs.f2fs", "-q"],
}
SERVERS = {"ntfs": ["ntfs-3g", "-o", "no_detach"], "exfat": ["mount.exfat-fuse", "-d"]}
"""What serves a file system that this kernel may not have, and stays in the foreground."""


def make(kind: str, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([*MAKE[kind], path], check=True, capture_output=True)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_file_system_that_cannot_be_frozen_is_refused_beside_one_that_can(
    site: Site, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"{kind}.img"
    make(kind, path)
    with (
        fresh_disk(tmp_path / "disk.img", SIZE) as good,
        mounted(good) as folder,
        attach_loop(Span(path, 0, SIZE), writable=True) as device,
    ):
        words = ("backup", "--disk", good, "--disk", device)
        with mounted_by_server(SERVERS[kind], device, options=("rw",)) as other:
            refused = site.remetal(*words, code=RefusedError.exit_code)
            assert f"{device} is mounted read-write at {other}" in refused.err
            assert f"{good} is mounted" not in refused.err
            assert "mount -o remount,ro PLACE" in refused.err
            assert "Holding" not in refused.err
            (other / "after").write_text("after")
            (folder / "after").write_text("after")
        assert site.remetal("snapshots", "--json").json == []
        with mounted_by_server(SERVERS[kind], device, options=("ro",)):
            told = site.remetal(*words, "--json").json
        assert {each["kind"]: each["way"] for each in told["volumes"]} == {"ext4": "tracked", kind: "at rest"}


def test_an_f2fs_that_is_mounted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of our hosts have no f2fs, and nothing else serves one: so the table of mounts is made up."""
    path = tmp_path / "f2fs.img"
    make("f2fs", path)
    with attach_loop(Span(path, 0, SIZE), writable=True) as device:
        layout = probe_layout([device])
        devices = {device.name: device}
        number = Path(f"/sys/class/block/{device.name}/dev").read_text().strip().split(":")
        mount = Mount(str(device), Path("/data"), "f2fs", (int(number[0]), int(number[1])), read_only=False)
        monkeypatch.setattr(uses, "probe_mounts", lambda: [*probe_mounts(), mount])
        live = VolumesInUse(Probed(layout, devices))
        with pytest.raises(RefusedError, match=f"{device} is mounted read-write at /data"):
            check_capturable(layout, devices, live.will_hold)
    assert live.folders == {}


def test_a_system_whose_root_is_an_overlay_is_refused(site: Site, tmp_path: Path) -> None:
    """As in a container, in which a folder of a disk of its host's is mounted, too; or in a live system."""
    (tmp_path / "top").mkdir()
    (tmp_path / "data").mkdir()
    script = f"""
    set -e
    mount -t tmpfs none {tmp_path}/top
    cd {tmp_path}/top
    mkdir upper work whole
    mount -t overlay none -o lowerdir=/,upperdir=upper,workdir=work whole
    for each in /dev /proc /sys; do mount --rbind $each whole$each; done
    for each in /mnt /srv; do mount --bind {tmp_path}/data whole$each; done
    exec chroot whole {REMETAL} backup
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=site.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == RefusedError.exit_code, done.stderr
    assert "the running system uses no disk of its own: its root is of the kind overlay" in done.stderr
    assert "Name the disks to back up with --disk" in done.stderr
    assert site.remetal("snapshots", "--json").json == []
