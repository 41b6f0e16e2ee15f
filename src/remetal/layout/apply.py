"""Carrying out the steps of a plan, all but images. Every step looks first and may be repeated at any time."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from remetal.errors import RefusedError, RemetalError
from remetal.events import Report, Warn, silent
from remetal.events import Step as Title
from remetal.layout.layers import GROWING, encode_table, swap
from remetal.layout.model import Swap
from remetal.layout.signatures import probe_signature
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    CreateFile,
    GrowFileSystem,
    MakeSwap,
    Step,
    WriteBootCode,
    WriteImage,
    WriteTable,
)
from remetal.ondisk.regions import Piece
from remetal.system.blockdev import DiskIO, Span, open_disk, reread_partitions
from remetal.system.loop import attach_loop, probe_written
from remetal.system.run import ProgramFailedError, need_programs, run
from remetal.units import KIB, format_bytes

_BOOT_CODE = 440
_PIECE = 64 * KIB
_REREAD_SECONDS = 10.0


def need_step_programs(steps: Iterable[Step]) -> None:
    """Raise ProgramMissingError unless every program is there that these steps will call."""
    programs = {"blkid", "losetup"}
    for step in steps:
        if isinstance(step, ClearSignatures):
            programs.add("wipefs")
        elif isinstance(step, MakeSwap):
            programs.update(swap.PROGRAMS)
        elif isinstance(step, GrowFileSystem):
            programs.update(GROWING[step.type].PROGRAMS)
    need_programs(*sorted(programs))


def apply_step(step: Step, targets: Mapping[str, Path], *, report: Report = silent) -> int:
    """Carry out one step on the targets, which are given by the source disks' names; return the bytes written.

    Zero if everything stood as it should. A file system that its own programs cannot let grow is reported and
    left as it was restored. Raises RemetalError if a target cannot be read or written. Images are not applied
    here: that needs the repository.
    """
    path = targets[step.disk]
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
        case WriteImage():
            raise AssertionError("images are written by the image room")


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
    same = (found.type, found.uuid, found.table) == (step.type, step.uuid, "")
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


def _stands(disk: DiskIO, piece: Piece) -> bool:
    return disk.read(piece.offset, len(piece.data)) == piece.data


def _write_changed(disk: DiskIO, piece: Piece) -> int:
    """Write a piece unless it stands there; return the bytes written."""
    if _stands(disk, piece):
        return 0
    disk.write(piece.data, piece.offset)
    return len(piece.data)
