"""Copying the files of an image onto a file system that was made anew, where its blocks do not fit.

rsync copies names, contents, owners, modes, times, hard links, access lists, extended attributes, device nodes; our
own `carry` adds flags, project ids and allocation. What no program can set stays out: inode numbers, the time of the
last change (ctime) and of birth, and that of the last access.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec.json

from remetal.errors import RemetalError
from remetal.events import Report, Warn, silent
from remetal.image import carry
from remetal.image.restore import Written
from remetal.image.served import served_image
from remetal.repository.reader import Reader
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import Span, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, find_program, run

PROGRAMS: tuple[str, ...] = ("rsync",)

_PLAIN = ("nodev", "nosuid", "noexec", "noatime")
_FAT = ("utf8", "shortname=mixed", "tz=UTC", "umask=0077")
_OPTIONS = {"xfs": ("nouuid",), "vfat": _FAT, "exfat": ("umask=0077",)}
_WITHOUT_OWNERS = {"vfat", "exfat"}

_RSYNC = (
    "rsync",
    "--recursive",
    "--links",
    "--times",
    "--modify-window=-1",
    "--inplace",
    "--whole-file",
    "--sparse",
    "--delete",
)
_METADATA = ("--perms", "--owner", "--group", "--numeric-ids", "--devices", "--specials")
_LINKED = ("--hard-links", "--acls", "--xattrs")


@contextmanager
def mounted_image(
    reader: Reader, image: ImageRecord, *, kind: str, part: str, report: Report = silent
) -> Iterator[Path]:
    """Mount the file system in an image, read-only, for the length of a block; yield the folder.

    `kind` is blkid's name for it. One that was not unmounted cleanly replays its journal, in memory. The folder is for
    other programs only: see `remetal.system.fuse`. Raises ProgramFailedError if this kernel cannot mount it, and what
    `served_image` raises.
    """
    with (
        served_image(reader, image, part=part, report=report) as path,
        attach_loop(Span(path, 0, image.size), writable=True) as device,
        mounted(device, kind=_driver(kind), options=("ro", *_PLAIN, *_OPTIONS.get(kind, ()))) as folder,
    ):
        yield folder


def target_options(kind: str) -> tuple[str, ...]:
    """Return how a file system of this kind is mounted that files are copied to."""
    # XFS would fill small holes of sparse files with space that it sets aside for what may follow.
    return (*_PLAIN, *_OPTIONS.get(kind, ()), *(("allocsize=4k",) if kind == "xfs" else ()))


def restore_files(
    reader: Reader, image: ImageRecord, span: Span, *, kind: str, part: str, report: Report = silent
) -> Written:
    """Copy the files in an image onto the file system on `span`, which was made anew; durable on return.

    `kind` is blkid's name for both. Running it again goes on, and writes nothing where nothing differs. Raises what
    `mounted_image` and `copy_files` raise.
    """
    with (
        mounted_image(reader, image, kind=kind, part=part, report=report) as source,
        attach_loop(span, writable=True) as device,
    ):
        before = probe_written(device)
        with mounted(device, kind=_driver(kind), options=target_options(kind)) as target:
            copy_files(source, target, kind=kind, report=report)
        return Written(compared=image.used, written=probe_written(device) - before)


def copy_files(source: Path, target: Path, *, kind: str, report: Report = silent) -> None:
    """Make the files below `target` those below `source`, and remove what does not belong there.

    `kind` is blkid's name for the file system on both sides, `source` a mounted one. A target with files in it, as
    after an interruption, is compared by content, so that nothing half-written stays; one that is the same already is
    left as it is. What the target's file system does not take is reported. Raises RemetalError if the files do not
    fit, or cannot be read.
    """
    again = any(path.name != "lost+found" for path in target.iterdir())
    if again:
        _carry("release", target)
    words = [*_RSYNC, *(() if kind in _WITHOUT_OWNERS else (*_METADATA, *_LINKED)), *(("--checksum",) if again else ())]
    try:
        run([*words, "--", f"{source}/", f"{target}/"])
    except ProgramFailedError as error:
        raise _not_copied(error) from error
    lost = msgspec.json.decode(_carry("carry", source, target), type=_Lost)
    if lost.flags:
        report(
            Warn(
                f"{lost.flags} files or folders have flags that the file system made anew does not take, such as "
                f"{lost.example!r}",
                hint="Compare them with `lsattr` on the source, and set them with `chattr` if they matter.",
            )
        )


def _driver(kind: str) -> str:
    """Return what mount(8) calls the file system: where the kernel has no exFAT, a program may know it."""
    if kind != "exfat" or find_program("mount.exfat-fuse") is None:
        return kind
    known = "exfat" in Path("/proc/filesystems").read_text().split()
    return kind if known or run(["modprobe", "--quiet", "exfat"], allowed=range(256)).returncode == 0 else "exfat-fuse"


class _Lost(msgspec.Struct):
    flags: int
    example: str


def _carry(*words: str | Path) -> bytes:
    """Run our own program with this Python."""
    try:
        return run([sys.executable, "-I", carry.__file__, *words]).stdout
    except ProgramFailedError as error:
        raise _not_copied(error) from error


def _not_copied(error: ProgramFailedError) -> RemetalError:
    if "No space left on device" in error.stderr:
        return RemetalError(
            "the files do not fit onto the file system made anew",
            hint="Some of them share blocks, which copies cannot: choose a larger target.",
        )
    return RemetalError(f"the files could not be copied: {error.message}", hint=error.hint)
