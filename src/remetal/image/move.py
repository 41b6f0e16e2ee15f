"""Letting a btrfs move itself from its image onto a smaller device, with everything that a copy of files would lose."""

from __future__ import annotations

from remetal.errors import RemetalError
from remetal.events import Report, silent
from remetal.image.restore import Written
from remetal.image.served import served_image
from remetal.repository import ImageRecord, Reader
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop, probe_written
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, run

PROGRAMS: tuple[str, ...] = ("btrfs",)

_OPTIONS = ("noatime", "nodev", "nosuid", "noexec", "subvolid=5", "skip_balance")


def move_btrfs(reader: Reader, image: ImageRecord, span: Span, *, part: str, report: Report = silent) -> Written:
    """Bring the btrfs in an image onto `span`: it becomes a second device of the file system, then the image leaves.

    Identity, subvolumes, snapshots, and what they share are kept. What the file system writes to the image in the
    meantime is forgotten. Running it again starts anew, whatever is on `span`. Raises RemetalError if the file system
    does not fit or this kernel cannot mount it, and what `served_image` raises.
    """
    with (
        served_image(reader, image, part=part, report=report) as path,
        attach_loop(Span(path, 0, image.size), writable=True) as source,
        attach_loop(span, writable=True) as target,
    ):
        before = probe_written(target)
        try:
            with mounted(source, kind="btrfs", options=_OPTIONS) as folder:
                run(["btrfs", "device", "add", "-f", "-K", target, folder])
                try:
                    run(["btrfs", "device", "remove", source, folder])
                except ProgramFailedError as error:
                    raise RemetalError(
                        f"the btrfs does not move onto {span}: {error.message}",
                        hint="If there is no space left, choose a larger target.",
                    ) from error
        finally:
            for device in (source, target):
                run(["btrfs", "device", "scan", "--forget", device], allowed=range(256))
        return Written(compared=image.used, written=probe_written(target) - before)
