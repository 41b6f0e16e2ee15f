"""What is mounted where, and mounting for the length of a block. Source: proc(5), /proc/PID/mountinfo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal.system.run import run

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: what is mounted, where, from which device number, and how."""

    source: str
    target: Path
    kind: str
    device: tuple[int, int]
    read_only: bool


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of /proc/self/mountinfo; read-only tells of the file system, not of the one mount."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, options) = before.split(), after.split(" ", 2)
        major, _, minor = fields[2].partition(":")
        mounts.append(
            Mount(
                source=_unescape(source),
                target=Path(_unescape(fields[4])),
                kind=kind,
                device=(int(major), int(minor)),
                read_only="ro" in options.split(","),
            )
        )
    return mounts


def probe_mounts() -> list[Mount]:
    """Return this process's mounts, in the order in which they were made."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def find_mount_of(path: Path) -> Mount:
    """Return the mount that `path` lies on (its nearest existing parent, if it does not exist yet)."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    number = place.stat().st_dev
    device = (os.major(number), os.minor(number))
    mounts = [mount for mount in probe_mounts() if place.is_relative_to(mount.target)]
    same = [mount for mount in mounts if mount.device == device]
    return max(same or mounts, key=lambda mount: len(mount.target.parts))


@contextmanager
def mounted(
    device: Path, *, kind: str | None = None, options: Sequence[str] = (), target: Path | None = None
) -> Iterator[Path]:
    """Mount a device on `target` (a fresh folder if none is given) and yield that folder; unmounted on leaving."""
    with TemporaryDirectory(prefix="remetal-mount-") as fresh:
        folder = target or Path(fresh)
        argv = ["mount", *(["-t", kind] if kind else []), *(["-o", ",".join(options)] if options else [])]
        run([*argv, device, folder])
        try:
            yield folder
        finally:
            run(["umount", folder])


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
