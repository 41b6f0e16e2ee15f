"""Carrying out the steps of a plan, all but images. Every step looks first and may be repeated at any time.

Containers that a step opens stay open for those that follow: a `Site` knows them, and closes them in the end.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from remetal.errors import RefusedError, RemetalError
from remetal.events import Report, Warn, silent
from remetal.events import Step as Title
from remetal.layout.keys import Key
from remetal.layout.layers import GROWING, SPANNING, container_kind, encode_table, lvm, swap
from remetal.layout.model import Container, Layout, SpaceId, Swap, VolumeGroup, device_names
from remetal.layout.opened import members_of, span_of
from remetal.layout.remake import apply_remake
from remetal.layout.signatures import probe_signature
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    CopyFiles,
    CreateFile,
    GrowFileSystem,
    GrowSpanning,
    MakeSwap,
    OpenContainer,
    RemakeFileSystem,
    ShrinkFileSystem,
    Step,
    TakeSnapshot,
    WriteBootCode,
    WriteImage,
    WriteTable,
)
from remetal.ondisk.regions import Piece
from remetal.system.blockdev import DiskIO, Span, is_block_device, open_disk, probe_written, reread_partitions
from remetal.system.loop import attach_loop
from remetal.system.mapped import is_left_behind
from remetal.system.run import ProgramFailedError, need_programs, run
from remetal.system.standing import is_made_of
from remetal.system.udev import kept_from_udev
from remetal.units import KIB, format_bytes

_OnDevice: TypeAlias = (
    CreateFile | WriteTable | ClearRange | ClearSignatures | MakeSwap | GrowFileSystem | WriteBootCode
)

_BOOT_CODE = 440
_PIECE = 64 * KIB
_REREAD_SECONDS = 10.0


def need_step_programs(steps: Iterable[Step]) -> None:
    """Raise ProgramMissingError unless every program is there that these steps will call."""
    programs = {"blkid", "losetup"}
    for step in steps:
        match step:
            case ClearSignatures():
                programs.add("wipefs")
            case MakeSwap():
                programs.update(swap.PROGRAMS)
            case GrowFileSystem():
                programs.update(GROWING[step.type].PROGRAMS)
            case GrowSpanning() | ShrinkFileSystem():
                programs.update(SPANNING[step.volume.type].PROGRAMS)
            case OpenContainer():
                programs.update(container_kind(step.container).PROGRAMS)
                programs.update(_programs_of_pools(step.container))
            case CopyFiles():
                programs.add("rsync")
            case RemakeFileSystem():
                programs.update(step.remake.programs, ("wipefs",))
            case _:
                pass
    need_programs(*sorted(programs))


def need_no_twins(steps: Iterable[Step], targets: Sequence[Path]) -> None:
    """Raise RefusedError if a container to open has a twin at work on this machine, on disks that are no targets."""
    for container in (step.container for step in steps if isinstance(step, OpenContainer)):
        for device in container_kind(container).find_running(container):
            if not is_left_behind(device) and not is_made_of(device, targets):
                name = container.name if isinstance(container, VolumeGroup) else device_names(container)[0]
                raise RefusedError(
                    f"{name} (UUID {container.uuid}) is open on this machine, as {device}, on disks that are not "
                    "restored onto: the kernel takes no second one with the same identity",
                    hint="Close it for the length of the restore (`vgchange -an`, `mdadm --stop`), or restore from "
                    "the recovery medium, with the disks of the old machine unplugged.",
                )


def _programs_of_pools(container: Container) -> tuple[str, ...]:
    thin = isinstance(container, VolumeGroup) and any(each.kind == "thin-pool" for each in container.volumes)
    return ("thin_check", "thin_restore") if thin else ()


class Site:
    """The targets while a plan is applied: the paths of the disks, and of every device that was opened so far."""

    def __init__(self, layout: Layout, disks: Mapping[str, Path], keys: Sequence[Key], stack: ExitStack) -> None:
        self.layout = layout
        self.devices: dict[SpaceId, Path] = dict(disks)
        self.keys = keys
        self._stack = stack

    def open(self, container: Container, *, make: bool) -> int:
        """Make a container unless it stands there, and open it; return the bytes written.

        Raises RefusedError if it does not stand there, and is not to be made.
        """
        kind = container_kind(container)
        members = members_of(container, self.layout, self.devices)
        made = kind.is_made(container, members)
        if not made and not make:
            raise RefusedError(
                f"what should stand on {', '.join(members)} is not there as the snapshot has it",
                hint="Restore the whole disk, without --only.",
            )
        written = 0 if made else kind.apply_container(container, members)
        self.devices |= self._stack.enter_context(kind.open_container(container, members, self.keys, writable=True))
        return written

    def take(self, step: TakeSnapshot) -> None:
        """Make a thin snapshot unless it is there, and open it."""
        if f"{step.group.name}/{step.volume}" not in self.devices:
            self.devices |= self._stack.enter_context(lvm.taken_snapshot(step.group, step.volume))

    def span(self, space: SpaceId) -> Span:
        """Return the bytes of a space."""
        return span_of(space, self.layout, self.devices)


@contextmanager
def opened_site(layout: Layout, disks: Mapping[str, Path], keys: Sequence[Key] = ()) -> Iterator[Site]:
    """Yield the targets for the length of a block; whatever steps open is closed when it is left, the last first.

    Meanwhile udev is kept from activating what appears on them.
    `layout` is as it will stand; `disks` are the targets, by the source disks' names.
    """
    with ExitStack() as stack:
        for path in disks.values():
            if is_block_device(path):
                stack.enter_context(kept_from_udev(path))
        yield Site(layout, disks, keys, stack)


def apply_step(step: Step, site: Site, *, report: Report = silent) -> int:
    """Carry out one step; return the bytes written.

    Zero if everything stood as it should. A file system that its own programs cannot let grow is reported and
    left as it was restored. Raises RemetalError if a target cannot be read or written. Images are not applied
    here: that needs the repository.
    """
    match step:
        case OpenContainer():
            report(Title(f"Opening {', '.join(device_names(step.container))}"))
            return site.open(step.container, make=step.make)
        case TakeSnapshot():
            report(Title(f"Taking the snapshot {step.group.name}/{step.volume}"))
            site.take(step)
            return 0
        case GrowSpanning():
            return _grow_spanning(step, site, report)
        case RemakeFileSystem():
            report(Title(f"Making {step.volume.on} anew as {step.volume.type}"))
            span = Span(site.devices[step.device], step.start, step.size)
            return apply_remake(span, step.volume, step.remake)
        case WriteImage() | CopyFiles() | ShrinkFileSystem():
            raise AssertionError("images are written, and their files copied, by the image room")
        case _:
            return _apply_on_device(step, site.devices[step.device], report)


def _apply_on_device(step: _OnDevice, path: Path, report: Report) -> int:
    match step:
        case CreateFile():
            return _create_file(path, step.size)
        case WriteTable():
            return _write_table(step, path, report)
        case ClearRange():
            return _clear_range(path, step.start, step.size)
        case ClearSignatures():
            return _clear_signatures(step, Span(path, step.start, step.size))
        case MakeSwap():
            return _make_swap(step, path, report)
        case GrowFileSystem():
            return _grow(step, Span(path, step.start, step.size), report)
        case WriteBootCode():
            with open_disk(path, writable=True) as disk:
                return _write_changed(disk, Piece(0, step.code))


def _create_file(path: Path, size: int) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise RemetalError(
            f"cannot make the disk file {path} of {format_bytes(size)}: {os.strerror(error.errno or 0)}",
            hint="Its file system does not take files of this size; choose another place."
            if error.errno == errno.EFBIG
            else "Choose another place for it.",
        ) from error
    return 0


def _write_table(step: WriteTable, path: Path, report: Report) -> int:
    """Write the table with empty boot code, unless the same table is there: then its boot code stays, too."""
    head, *rest = encode_table(step.table, step.size, step.sector)
    with open_disk(path, writable=True) as disk:
        pieces = (Piece(_BOOT_CODE, head.data[_BOOT_CODE:]), *rest)
        if all(_stands(disk, piece) for piece in pieces):
            return 0
        written = _write_changed(disk, Piece(0, bytes(_BOOT_CODE) + head.data[_BOOT_CODE:]))
        written += sum(_write_changed(disk, piece) for piece in rest)
    _reread(path, report)
    return written


def _reread(path: Path, report: Report) -> None:
    """Let the kernel see the new table; udev may hold a partition for a moment. remetal itself does not need it."""
    end = time.monotonic() + _REREAD_SECONDS
    while True:
        try:
            reread_partitions(path)
        except RefusedError as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            report(Warn(f"{error.message}, and so does not see the new ones yet", hint=error.hint))
        return


def _clear_range(path: Path, start: int, size: int) -> int:
    with open_disk(path, writable=True) as disk:
        return sum(
            _write_changed(disk, Piece(place, bytes(min(_PIECE, start + size - place))))
            for place in range(start, start + size, _PIECE)
        )


def _clear_signatures(step: ClearSignatures, span: Span) -> int:
    found = probe_signature(span)
    same = (found.type, found.uuid) == (step.type, step.uuid) and found.is_content
    if not found.ambiguous and (same or not (found.type or found.table)):
        return 0
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        run(["wipefs", "--all", "--force", "--quiet", device])
        return probe_written(device) - before


def _make_swap(step: MakeSwap, path: Path, report: Report) -> int:
    span = Span(path, step.start, step.size)
    wanted = Swap(on=step.volume, size=step.size, page_size=step.page_size, uuid=step.uuid, label=step.label)
    if swap.is_swap(span, wanted) and probe_signature(span).type == "swap":
        return 0
    report(Title(f"Making the swap space {step.volume}"))
    return swap.apply_swap(span, wanted)


def _grow(step: GrowFileSystem, span: Span, report: Report) -> int:
    report(Title(f"Growing {step.volume} from {format_bytes(step.before)} to {format_bytes(step.after)}"))
    try:
        return GROWING[step.type].apply_growth(span, step.after)
    except ProgramFailedError as error:
        report(
            Warn(
                f"{step.volume} is restored but could not grow to {format_bytes(step.after)}: {error.message}",
                hint="Let it grow when the restored system runs.",
            )
        )
        return 0


def _grow_spanning(step: GrowSpanning, site: Site, report: Report) -> int:
    volume = step.volume
    report(Title(f"Growing {volume.on} from {format_bytes(step.before)} to {format_bytes(volume.size)}"))
    try:
        return SPANNING[volume.type].apply_growth(volume, {space: site.span(space) for space in volume.spaces})
    except ProgramFailedError as error:
        report(
            Warn(
                f"{volume.on} is restored but could not grow to {format_bytes(volume.size)}: {error.message}",
                hint="Let it grow when the restored system runs.",
            )
        )
        return 0


def _stands(disk: DiskIO, piece: Piece) -> bool:
    return disk.read(piece.offset, len(piece.data)) == piece.data


def _write_changed(disk: DiskIO, piece: Piece) -> int:
    """Write a piece unless it stands there; return the bytes written."""
    if _stands(disk, piece):
        return 0
    disk.write(piece.data, piece.offset)
    return len(piece.data)
