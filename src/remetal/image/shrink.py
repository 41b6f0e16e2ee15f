"""Restoring a btrfs onto devices that are too small for its blocks, by letting it shrink on the way.

The front of every image is written to its target. For each device that becomes smaller the kernel is then shown a file
of the former size: the target, and behind its end the rest of the image. On these the file system is mounted and told
to shrink; whatever it had in the rest moves onto the targets. Identity, device ids, subvolumes, snapshots and what they
share are kept, which no copy of files could do. Source: btrfs-filesystem(8), `resize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RemetalError
from remetal.events import Report, silent
from remetal.image.restore import Written, restore_image
from remetal.image.served import served_image
from remetal.repository.reader import Reader
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import Span, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, run

PROGRAMS: tuple[str, ...] = ("btrfs",)

_OPTIONS = ("noatime", "nodev", "nosuid", "noexec", "subvolid=5", "skip_balance")


@dataclass(frozen=True, slots=True)
class Shrinking:
    """One device of the file system: its id there, its image, and where it goes.

    It has `before` bytes and shall get `size`, which is no more.
    """

    part: str
    """Its name in progress events."""
    number: int
    image: ImageRecord
    span: Span
    before: int
    size: int

    @property
    def shrinks(self) -> bool:
        """Whether it does not fit as it is."""
        return self.size < self.before


def restore_shrunk(reader: Reader, devices: Sequence[Shrinking], *, report: Report = silent) -> Written:
    """Bring the btrfs in the images of all its devices onto their spans, each with the size that it shall have.

    What the file system writes to what is left of the images is forgotten. Running it again starts anew, whatever is on
    the spans. Raises RemetalError if the file system does not fit or this kernel cannot mount it, and what
    `restore_image` and `served_image` raise.
    """
    result = Written()
    for each in devices:
        span = Span(each.span.path, each.span.start, min(each.span.size, each.size)) if each.shrinks else each.span
        result += restore_image(reader, each.image, span, part=each.part, cut=each.shrinks, report=report)
    with ExitStack() as stack:
        paths = [stack.enter_context(_shown(reader, each, report)) for each in devices]
        before = sum(map(probe_written, paths))
        _forget(paths)
        try:
            # All are named: else the kernel may take the others from another copy of the same file system.
            options = (*_OPTIONS, *(f"device={path}" for path in paths))
            with mounted(paths[0], kind="btrfs", options=options) as folder:
                run(["btrfs", "balance", "cancel", folder], allowed=range(256))  # a paused one is in the way
                for each in devices:
                    if each.shrinks:
                        _shrink(each, folder)
        finally:
            _forget(paths)
        return result + Written(written=sum(map(probe_written, paths)) - before)


@contextmanager
def _shown(reader: Reader, each: Shrinking, report: Report) -> Iterator[Path]:
    """Yield a device of the former size."""
    with ExitStack() as stack:
        span = each.span
        if each.shrinks:
            head = Span(span.path, span.start, each.size)
            path = stack.enter_context(served_image(reader, each.image, part=each.part, head=head, report=report))
            span = Span(path, 0, each.image.size)
        yield stack.enter_context(attach_loop(span, writable=True))


def _shrink(each: Shrinking, folder: Path) -> None:
    try:
        run(["btrfs", "filesystem", "resize", f"{each.number}:{each.size}", folder])
    except ProgramFailedError as error:
        raise RemetalError(
            f"the btrfs does not shrink to {each.size} bytes on {each.span}: {error.message}",
            hint="If there is no space left, choose a larger target.",
        ) from error


def _forget(devices: Sequence[Path]) -> None:
    """Let the kernel forget what it knows of these devices, which are there for a moment only."""
    for device in devices:
        run(["btrfs", "device", "scan", "--forget", device], allowed=range(256))
