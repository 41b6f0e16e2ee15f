"""What several boot tests need: a recovery medium built from this checkout."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.cache import cache_folder
from remetal.media.build import Medium, MediumRequest, build_medium
from tests.commands.site import PASSPHRASE, Site


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Medium:
    """A recovery medium with today's remetal on it; the Debian system in it comes from the lab's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMETAL_CACHE", str(cache_folder()))
        return build_medium(MediumRequest(tmp_path_factory.mktemp("medium") / "recovery.iso"))


@pytest.fixture
def answer_volume(tmp_path: Path) -> Path:
    """An ext4 disk file with the label REMETAL whose answer names a repository that is nowhere."""
    top = tmp_path / "top"
    top.mkdir()
    (top / "remetal-answer.toml").write_text('repository = "nowhere"\npassphrase = "x"\nend = "reboot"\n')
    image = tmp_path / "answer.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-L", "REMETAL", "-d", top, image], check=True)
    return image


@dataclass(frozen=True)
class LostMachine:
    """A machine of which only its backup is left: its former disk to compare with, and the backup's disk."""

    disk: Path
    backup: Path
    passphrase: str


@pytest.fixture
def lost_machine(tmp_path: Path) -> LostMachine:
    """A small backed-up disk with an ext4 file system, and a disk with the label BACKUP that holds the repository."""
    disk, part, content, backup = (tmp_path / name for name in ("sda.img", "part.img", "content", "backup.img"))
    content.mkdir()
    for number in range(40):
        (content / f"file-{number}").write_bytes(bytes([number]) * 100_000)
    subprocess.run(["truncate", "-s", "64M", part], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-L", "data", "-d", content, part], check=True)
    subprocess.run(["truncate", "-s", "66M", disk], check=True)
    subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=2048, size=131072, type=linux\n", check=True)
    with disk.open("r+b") as file:
        file.seek(1 << 20)
        file.write(part.read_bytes())
    (tmp_path / "usb").mkdir()
    site = Site(tmp_path / "usb")
    site.remetal("init")
    site.remetal("backup", "--machine", "lost", "--disk", disk)
    subprocess.run(["truncate", "-s", "64M", backup], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-L", "BACKUP", "-d", site.folder, backup], check=True)
    return LostMachine(disk, backup, PASSPHRASE)
