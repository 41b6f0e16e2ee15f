"""Backing up a machine: probe → layout → used extents → chunks → packs → index → signed snapshot."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from remetal.errors import UsageError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.image.capture import capture_volume
from remetal.layout.disks import check_capturable, find_system_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.model import FileSystem, Layout, encode_layout
from remetal.layout.probe import probe_layout
from remetal.repository import (
    ImageRecord,
    MachineKeys,
    Repository,
    Session,
    Snapshot,
    check_machine_name,
    check_state,
    enroll_machine,
    list_keys,
    load_machine_keys,
    open_session,
    save_machine_keys,
)
from remetal.system.blockdev import Span, is_block_device
from remetal.units import format_bytes
from remetal.workflows.access import machines_folder, opened_repository

MAX_TAG = 200
"""Characters that a tag may have."""


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to capture: `disks` empty means all that the running system uses; `machine` None means this host."""

    repository: str
    disks: tuple[Path, ...] = ()
    machine: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did; sizes in bytes, time in seconds."""

    snapshot: Snapshot
    used: int
    stored: int
    seconds: float


def back_up(request: BackupRequest, report: Report = silent) -> BackupResult:
    """Capture disks into a new snapshot.

    Nothing is listed in the repository until everything is durable there. Raises RefusedError if a disk is
    mounted read-write, UnavailableError if the repository is locked, full or out of reach, RemetalError if a
    disk cannot be read.
    """
    began = time.monotonic()
    _check_tags(request.tags)
    disks = request.disks or tuple(find_system_disks())
    report(Step(f"Looking at {', '.join(map(str, disks))}"))
    layout = probe_layout(disks, report=report)
    paths = dict(zip((disk.name for disk in layout.disks), disks, strict=True))
    check_capturable(layout, paths)
    if any(is_block_device(path) for path in disks):
        layout = _with_inventory(layout)
    with opened_repository(request.repository) as repository:
        keys = _own_keys(repository, request.machine or socket.gethostname(), report)
        with open_session(repository, keys, report=report) as session:
            images = _capture(session, layout, paths, report)
            snapshot = session.commit(layout=encode_layout(layout), hostname=socket.gethostname(), tags=request.tags)
    return BackupResult(
        snapshot=snapshot,
        used=sum(image.used for image in images),
        stored=session.statistics.stored_bytes,
        seconds=time.monotonic() - began,
    )


def _capture(session: Session, layout: Layout, paths: dict[str, Path], report: Report) -> Sequence[ImageRecord]:
    before = {image.volume: image for image in session.previous.images} if session.previous else {}
    images = []
    for volume in layout.captured():
        disk, start, size = layout.place(volume.on)
        kind = volume.type or "unknown content"
        report(Step(f"Capturing {volume.on} ({kind}, {format_bytes(size)})"))
        previous = before.get(volume.on)
        images.append(
            capture_volume(
                session,
                Span(paths[disk.name], start, size),
                volume=volume.on,
                kind=volume.type if isinstance(volume, FileSystem) else "",
                previous=previous if previous is not None and previous.size == size else None,
                report=report,
            )
        )
    return images


def _check_tags(tags: tuple[str, ...]) -> None:
    for tag in tags:
        if not tag.strip() or not tag.isprintable() or len(tag) > MAX_TAG:
            raise UsageError(f"{tag!r} cannot be a tag", hint=f"Use up to {MAX_TAG} printable characters.")


def _own_keys(repository: Repository, name: str, report: Report) -> MachineKeys:
    """Return the keys of the machine of that name on this host, enrolling it at its first backup."""
    check_machine_name(name)
    folder = machines_folder() / name
    keys = load_machine_keys(folder, repository)
    if keys is None:
        check_state(folder)
        if any(each.kind == "machine" and each.name == name for each in list_keys(repository)):
            report(
                Warn(
                    f"the repository has a machine '{name}', whose keys are not in {folder}: this is a new one",
                    hint="If they were lost, all is well, and older snapshots stay good; "
                    "if it is another computer, give this one its own name with --machine.",
                )
            )
        keys = enroll_machine(repository, name)
        save_machine_keys(folder, keys)
        sealed = ", ".join(each.id for each in keys.stored.recipients)
        report(Note(f"enrolled machine '{name}'; its backups are sealed to recipient {sealed}"))
    return keys


def _with_inventory(layout: Layout) -> Layout:
    return msgspec.structs.replace(layout, inventory=probe_inventory())
