"""Backing up a machine: probe → layout → used extents → chunks → packs → index → signed snapshot."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from remetal.errors import RefusedError, UsageError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.image.capture import capture_bytes, capture_volume
from remetal.image.extents import Extent, probe_used_spanning
from remetal.layout.disks import check_capturable, find_system_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.keys import Key
from remetal.layout.layers import luks
from remetal.layout.model import Captured, FileSystem, Layer, Layout, Luks, Raw, SpaceId
from remetal.layout.opened import span_of
from remetal.layout.probe import Probed
from remetal.layout.record import encode_layout
from remetal.repository.machines import MachineKeys, check_machine_name, check_state
from remetal.repository.repository import Repository, enroll_machine, list_keys, load_machine_keys, save_machine_keys
from remetal.repository.session import Session, open_session
from remetal.repository.snapshots import ImageRecord, Snapshot
from remetal.system.blockdev import Span, is_block_device
from remetal.units import format_bytes
from remetal.workflows.access import machines_folder, opened_repository
from remetal.workflows.passphrases import AskPassphrase, opened_disks

MAX_TAG = 200
"""Characters that a tag may have."""


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to capture: `disks` empty means all that the running system uses; `machine` None means this host."""

    repository: str
    disks: tuple[Path, ...] = ()
    machine: str | None = None
    tags: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    """What opens encrypted containers."""
    escrow: bool = False
    """Whether their volume keys are captured as well, so that the repository's recipients can open them."""


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did; sizes in bytes, time in seconds."""

    snapshot: Snapshot
    used: int
    stored: int
    seconds: float


def back_up(request: BackupRequest, report: Report = silent, *, ask: AskPassphrase | None = None) -> BackupResult:
    """Capture disks into a new snapshot.

    `ask` is called for encrypted containers that no key in the request opens; without an answer they are captured as
    they are. Nothing is listed in the repository until everything is durable there. Raises RefusedError if a disk is
    mounted read-write, UnavailableError if the repository is locked, full or out of reach, RemetalError if a disk
    cannot be read.
    """
    began = time.monotonic()
    _check_tags(request.tags)
    disks = request.disks or tuple(find_system_disks())
    report(Step(f"Looking at {', '.join(map(str, disks))}"))
    with opened_disks(disks, request.keys, ask, need_all=request.escrow, report=report) as (probed, keys):
        _check_whole(probed)
        check_capturable(probed.layout, probed.devices)
        layout, volume_keys = _with_escrow(probed, keys) if request.escrow else (probed.layout, {})
        if any(is_block_device(path) for path in disks):
            layout = _with_inventory(layout)
        with opened_repository(request.repository) as repository:
            own = _own_keys(repository, request.machine or socket.gethostname(), report)
            with open_session(repository, own, report=report) as session:
                images = _Capture(session, layout, probed.devices, volume_keys, report).run()
                snapshot = session.commit(
                    layout=encode_layout(layout), hostname=socket.gethostname(), tags=request.tags
                )
    return BackupResult(
        snapshot=snapshot,
        used=sum(image.used for image in images),
        stored=session.statistics.stored_bytes,
        seconds=time.monotonic() - began,
    )


def _check_whole(probed: Probed) -> None:
    """Raise RefusedError if a container lacks members: what is on it could not be read, nor be used after a restore."""
    if probed.problems:
        raise RefusedError(
            "; ".join(problem for problem, _ in probed.problems),
            hint=" ".join(dict.fromkeys(hint for _, hint in probed.problems if hint)),
        )


def _with_escrow(probed: Probed, keys: Sequence[Key]) -> tuple[Layout, dict[SpaceId, bytes]]:
    """Return the layout that says which containers' volume keys are in escrow, and these volume keys."""
    found: dict[SpaceId, bytes] = {}
    layers: list[Layer] = []
    for layer in probed.layout.layers:
        if isinstance(layer, Luks):
            span = span_of(layer.on, probed.layout, probed.devices)
            found[layer.key] = luks.read_volume_key(layer, span, keys)
            layer = msgspec.structs.replace(layer, escrowed=True)
        layers.append(layer)
    return msgspec.structs.replace(probed.layout, layers=tuple(layers)), found


class _Capture:
    """Captures one volume after the other."""

    def __init__(
        self,
        session: Session,
        layout: Layout,
        devices: Mapping[SpaceId, Path],
        volume_keys: Mapping[SpaceId, bytes],
        report: Report,
    ) -> None:
        self.session = session
        self.layout = layout
        self.devices = devices
        self.volume_keys = volume_keys
        self.report = report
        self.before = {image.volume: image for image in session.previous.images} if session.previous else {}
        self.spanning = self._probe_spanning()

    def run(self) -> Sequence[ImageRecord]:
        """Capture everything that has an image."""
        return [self._capture(each) for each in self.layout.captured()]

    def _probe_spanning(self) -> dict[SpaceId, list[Extent]]:
        """Return the used extents of file systems that span several spaces, by space."""
        found: dict[SpaceId, list[Extent]] = {}
        for volume in self.layout.volumes():
            if isinstance(volume, FileSystem) and volume.parts:
                spans = {part.number: self._span(part.space) for part in volume.parts}
                used = probe_used_spanning(spans, report=self.report)
                found |= {part.space: used[part.number] for part in volume.parts}
        return found

    def _span(self, space: SpaceId) -> Span:
        return span_of(space, self.layout, self.devices)

    def _capture(self, captured: Captured) -> ImageRecord:
        volume = captured.volume
        if volume in self.volume_keys:
            self.report(Step(f"Putting the volume key {volume} into escrow"))
            return capture_bytes(self.session, self.volume_keys[volume], volume=volume)
        span = self._span(volume)
        self.report(Step(f"Capturing {volume} ({self._content(captured)}, {format_bytes(span.size)})"))
        previous = self.before.get(volume)
        return capture_volume(
            self.session,
            span,
            volume=volume,
            kind=captured.type,
            extents=self.spanning.get(volume),
            previous=previous if previous is not None and previous.size == span.size else None,
            report=self.report,
        )

    def _content(self, captured: Captured) -> str:
        layer = self.layout.layer_on(captured.volume)
        kind = layer.type if isinstance(layer, Raw) else captured.type
        return kind or ("unknown content" if layer else "LUKS header")


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
