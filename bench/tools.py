"""remetal and its peers, each as the commands that an administrator would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.data import Volume, opened
from bench.timing import pipe, run
from lab.cache import cache_folder
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop

REMETAL = Path(sys.executable).with_name("remetal")
_PASSPHRASE = "correct horse battery staple"


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder, or of a file."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def forget(*paths: Path) -> None:
    """Drop files from the page cache, so that reading them means reading the disk."""
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Remetal:
    """remetal with a repository in a folder: hashing, encryption, authentication and fsync are always included."""

    name = "remetal"

    def __init__(self, folder: Path, *, constants: Sequence[str] = (), chunk_size: int = 0) -> None:
        """`constants` are settings of bench.varied, `chunk_size` is in bytes; by default all is as it is."""
        self.folder = folder / "remetal"
        self.repository = self.folder / "repository"
        self.secret = self.folder / "passphrase"
        self._program = [sys.executable, "-m", "bench.varied", *constants, "--"] if constants else [REMETAL]
        self._chunks = ("--chunk-size", str(chunk_size)) if chunk_size else ()

    def fresh(self) -> None:
        """Start from an empty repository and a machine that was never enrolled."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.secret.write_text(_PASSPHRASE + "\n")
        self.call("init", "--passphrase-file", self.secret, *self._chunks)

    def capture(self, disk: Path) -> None:
        """Back up a disk file."""
        self.call("backup", "--disk", disk)

    def restore(self, target: Path) -> None:
        """Bring the last backup to a disk file."""
        self.call("restore", "latest", "--map", target, "--yes", "--passphrase-file", self.secret)

    def call(self, *words: str | Path) -> None:
        """Run one command."""
        run([*self._program, *words, "--quiet"], env=self._environment())

    def snapshots(self) -> None:
        """List what is there."""
        run([REMETAL, "snapshots"], env=self._environment())

    def _environment(self) -> dict[str, str]:
        """Besides where things are: as in an installed program, modules are compiled once, not at every start."""
        return {
            "REMETAL_REPO": str(self.repository),
            "REMETAL_STATE": str(self.folder / "state"),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(cache_folder() / "bench-bytecode"),
        }


class Partclone:
    """partclone into zstd: the used blocks, compressed by all cores, neither hashed nor encrypted."""

    name = "partclone | zstd -1 -T0"

    def __init__(self, folder: Path) -> None:
        self.image = folder / "partclone.zst"
        self._log = folder / "partclone.log"

    def capture(self, volume: Volume) -> None:
        """Save the volume's used blocks."""
        save = f"partclone.{volume.partclone} -c -q -L {self._log} -s {volume.path} -o -"
        pipe(f"{save} | zstd -q -f -1 -T0 -o {self.image}")

    def restore(self, target: Path) -> None:
        """Write them to a disk file."""
        with attach_loop(Span(target, 0, target.stat().st_size), writable=True) as device:
            pipe(
                f"zstd -q -d -c {self.image} | partclone.restore -C -q -L {self._log} -s - -o {device} && sync {device}"
            )


class Fsarchiver:
    """fsarchiver with zstd at level 1 on all cores: files, neither deduplicated nor encrypted."""

    name = "fsarchiver"

    def __init__(self, folder: Path) -> None:
        self.archive = folder / "archive.fsa"

    def capture(self, volume: Volume) -> None:
        """Save the volume's files."""
        with attach_loop(Span(volume.path, 0, volume.path.stat().st_size)) as device:
            run(["fsarchiver", "savefs", "-o", "-Z1", f"-j{os.cpu_count()}", self.archive, device])


class Restic:
    """restic, which deduplicates, compresses and encrypts as remetal does."""

    name = "restic"

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "restic"
        self._environment = {
            "RESTIC_REPOSITORY": str(self.repository),
            "RESTIC_PASSWORD": _PASSPHRASE,
            "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
        }

    def fresh(self) -> None:
        """Start from an empty repository."""
        shutil.rmtree(self.repository, ignore_errors=True)
        self._call("init")

    def capture_files(self, volume: Volume) -> None:
        """Save all files of the volume."""
        with opened(volume) as folder:
            self._call("backup", folder)

    def capture_image(self, image: Path) -> None:
        """Save a disk file as it is."""
        self._call("backup", image)

    def restore(self, target: Path) -> None:
        """Restore the last backup below a folder."""
        self._call("restore", "latest", "--target", target)

    def _call(self, *words: str | Path) -> None:
        run(["restic", "--quiet", *words], env=self._environment)


class Borg:
    """BorgBackup, with zstd at level 1 and its faster kind of encryption."""

    name = "borg"

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "borg"
        self._number = 0
        self._environment = {
            "BORG_PASSPHRASE": _PASSPHRASE,
            "BORG_BASE_DIR": str(folder / "borg-base"),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }

    def fresh(self) -> None:
        """Start from an empty repository."""
        shutil.rmtree(self.repository, ignore_errors=True)
        self._call("init", "--encryption=repokey-blake2", self.repository)

    def capture_files(self, volume: Volume) -> None:
        """Save all files of the volume."""
        with opened(volume) as folder:
            self._create(folder)

    def capture_image(self, image: Path) -> None:
        """Save a disk file as it is."""
        self._create(image)

    def _create(self, path: Path) -> None:
        self._call("create", "--compression=zstd,1", f"{self.repository}::{{now:%Y%m%dT%H%M%S%f}}", path)

    def _call(self, *words: str | Path) -> None:
        run(["borg", *words], env=self._environment)


def drop_caches() -> None:
    """Let the kernel forget the files of mounted volumes, too."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
