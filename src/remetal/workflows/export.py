"""Exporting one disk of a snapshot to a disk file."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError, UsageError
from remetal.events import Report, Step, silent
from remetal.system.run import need_programs, run
from remetal.workflows.access import Secret
from remetal.workflows.restore import RestoreRequest, apply_restore, prepared_restore

FORMATS = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2"}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Which disk of which snapshot, and the file to make of it."""

    repository: str
    snapshot: str
    disk: str
    output: Path
    machine: str | None = None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The exported disk's size in bytes, and the time it took in seconds."""

    size: int
    seconds: float


def export_disk(request: ExportRequest, secret: Secret, report: Report = silent) -> ExportResult:
    """Write the disk to `<output>.partial` and move it into place when it is whole.

    Raises UsageError for an unknown ending or disk, RefusedError if the file exists, and what a restore raises.
    """
    began = time.monotonic()
    image_format = FORMATS.get(request.output.suffix)
    if image_format is None:
        raise UsageError(f"{request.output} does not end in a known format", hint=f"Use one of {', '.join(FORMATS)}.")
    if os.path.lexists(request.output):
        raise RefusedError(f"{request.output} exists already", hint="Remove it, or choose another name.")
    if image_format != "raw":
        need_programs("qemu-img")
    partial = request.output.with_name(f"{request.output.name}.partial")
    restore = RestoreRequest(
        request.repository,
        request.snapshot,
        request.machine,
        mapping=(f"{request.disk}={partial}",),
        keep_sizes=True,
        only=(request.disk,),
    )
    with prepared_restore(restore, secret, report) as prepared:
        apply_restore(prepared, adapt=False, report=report)
        size = prepared.layout.disk(request.disk).size
    if image_format == "raw":
        partial.rename(request.output)
    else:
        report(Step(f"Converting to {image_format}"))
        converted = request.output.with_name(f"{request.output.name}.converting")
        run(["qemu-img", "convert", "-f", "raw", "-O", image_format, partial, converted])
        converted.rename(request.output)
        partial.unlink()
    return ExportResult(size, time.monotonic() - began)
