"""Backing up a machine: probe → layout → used extents → chunks → packs → index → signed snapshot."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from remetal.applications.hooks import Hooks
from remetal.applications.settings import read_hooks
from remetal.errors import RefusedError, UsageError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.ids import short
from remetal.image.live import Manner
from remetal.image.snapshots import Policy
from remetal.layout.disks import check_capturable
from remetal.layout.inventory import probe_inventory
from remetal.layout.keys import Key
from remetal.layout.layers import luks
from remetal.layout.model import Layer, Layout, Luks, SpaceId
from remetal.layout.opened import span_of
from remetal.layout.probe import Probed
from remetal.layout.record import encode_layout
from remetal.layout.system_disks import find_system_disks
from remetal.pace import Pace
from remetal.repository.catalog import read_vouched
from remetal.repository.machines import MachineKeys, check_machine_name, check_state
from remetal.repository.recipients import RecipientRecord
from remetal.repository.repository import (
    Repository,
    enroll_machine,
    list_keys,
    load_machine_keys,
    open_repository,
    save_machine_keys,
)
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from remetal.system.blockdev import is_block_device
from remetal.system.lvm_snapshots import remove_left_behind
from remetal.system.priority import IoClass, set_priority
from remetal.workflows.access import machines_folder
from remetal.workflows.in_use import VolumesInUse
from remetal.workflows.leftout import plan_leaving_out
from remetal.workflows.passphrases import AskPassphrase, opened_disks
from remetal.workflows.stores import opened_store
from remetal.workflows.volumes import CapturedVolume, VolumeCapture

FREEZE_LIMIT = 10.0
"""Seconds for which mounted file systems may be held still, where nobody says otherwise."""
MAX_TAG = 200
"""Characters that a tag may have."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the machine a backup takes from others; None leaves it as it is.

    `read` and `store` are bytes a second, of all disks together and of the repository; `nice` and `disk` are what
    `remetal.system.priority` takes. While file systems are held still, nothing but `store` counts.
    """

    read: float | None = None
    store: float | None = None
    nice: int | None = None
    disk: IoClass | None = None


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
    leave_out: tuple[Path, ...] = ()
    """Files and folders, as the running system sees them, whose content is left out."""
    keep_all: bool = False
    """Whether nothing else is left out."""
    freeze_limit: float = FREEZE_LIMIT
    """For how many seconds at most the file systems that are mounted may be held still."""
    hooks: Path | None = None
    """The file that says which applications are told what goes on, and how."""
    limits: Limits = Limits()
    lvm_snapshots: Policy = "thin"
    """Which of the logical volumes that are mounted are read from snapshots."""


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did; sizes in bytes, time in seconds."""

    snapshot: Snapshot
    used: int
    stored: int
    seconds: float
    pause: float | None = None
    """For how many seconds file systems were held still, if any were."""
    volumes: tuple[CapturedVolume, ...] = ()


def back_up(request: BackupRequest, report: Report = silent, *, ask: AskPassphrase | None = None) -> BackupResult:
    """Capture disks into a new snapshot.

    `ask` is called for encrypted containers that no key in the request opens; without an answer they are captured as
    they are. File systems that are mounted read-write are captured as they are at one moment (`remetal.image.live`).
    Nothing is listed in the repository until everything is durable there. Raises RefusedError if a disk is written to
    by something that cannot be held still, UnavailableError if the repository is locked, full or out of reach, or more
    is written than can be captured, RemetalError if a disk cannot be read, HookFailedError if an application without
    which there is to be no backup was not ready.
    """
    _check_tags(request.tags)
    set_priority(request.limits.nice, request.limits.disk)
    machine = request.machine or socket.gethostname()
    hooks = Hooks(read_hooks(request.hooks) if request.hooks else (), machine=machine, report=report)
    with hooks.backup():
        result = _back_up(request, machine, hooks, report, ask)
        hooks.snapshot = result.snapshot.id
    return result


def _back_up(
    request: BackupRequest, machine: str, hooks: Hooks, report: Report, ask: AskPassphrase | None
) -> BackupResult:
    began = time.monotonic()
    # The repository comes first: where it has to be mounted, its disk is then seen to be in use.
    with opened_store(request.repository, rate=request.limits.store) as opened:
        disks = request.disks or tuple(find_system_disks(opened.folder, report))
        repository = open_repository(opened.store)
        report(Step(f"Looking at {', '.join(map(str, disks))}"))
        remove_left_behind(report)
        with opened_disks(disks, request.keys, ask, need_all=request.escrow, report=report) as (probed, keys):
            _check_whole(probed)
            live = VolumesInUse(probed)
            check_capturable(probed.layout, probed.devices, live.will_hold)
            live.need_elsewhere(opened)
            leaving = plan_leaving_out(probed, request.leave_out, keep_all=request.keep_all, report=report)
            layout, volume_keys = _with_escrow(probed, keys) if request.escrow else (probed.layout, {})
            if any(is_block_device(path) for path in disks):
                layout = _with_inventory(layout)
            own = _own_keys(repository, machine, report)
            with live.spooling() as waits, open_session(repository, own, report=report) as session:
                pace = Pace(request.limits.read) if request.limits.read is not None else None
                manner = Manner(request.freeze_limit, hooks, pace, spools_wait=waits)
                capture = VolumeCapture(
                    session, layout, probed.devices, volume_keys, live.folders, leaving, manner, report
                )
                images, pause = capture.run(request.lvm_snapshots)
                leaving.tell(report)
                snapshot = session.commit(
                    layout=encode_layout(layout),
                    hostname=socket.gethostname(),
                    tags=request.tags,
                    left_out=leaving.records(),
                )
    return BackupResult(
        snapshot=snapshot,
        used=sum(image.used for image in images),
        stored=session.statistics.stored_bytes,
        seconds=time.monotonic() - began,
        pause=pause.seconds if pause is not None else None,
        volumes=capture.volumes(images),
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


def _check_tags(tags: tuple[str, ...]) -> None:
    for tag in tags:
        if not tag.strip() or not tag.isprintable() or len(tag) > MAX_TAG:
            raise UsageError(f"{tag!r} cannot be a tag", hint=f"Use up to {MAX_TAG} printable characters.")


def _own_keys(repository: Repository, name: str, report: Report) -> MachineKeys:
    """Return the keys of the machine of that name on this host, enrolling it at its first backup."""
    check_machine_name(name)
    folder = machines_folder() / name
    keys = load_machine_keys(folder, repository)
    pinned: tuple[RecipientRecord, ...] = ()
    if keys is not None and keys.machine_id in read_vouched(repository).retired:
        report(
            Warn(
                f"the keys of machine '{name}' ({short(keys.machine_id)}) were retired, so it gets new ones",
                hint="Let the new machine follow the retired one: remetal key retire-machine OLD --successor NEW",
            )
        )
        pinned, keys = keys.stored.recipients, None
    if keys is None:
        check_state(folder)
        if not pinned and any(each.kind == "machine" and each.name == name for each in list_keys(repository)):
            report(
                Warn(
                    f"the repository has a machine '{name}', whose keys are not in {folder}: this is a new one",
                    hint="If they were lost, all is well, and older snapshots stay good; "
                    "if it is another computer, give this one its own name with --machine.",
                )
            )
        keys = enroll_machine(repository, name, pinned=pinned)
        save_machine_keys(folder, keys)
        sealed = ", ".join(each.id for each in keys.stored.recipients)
        report(Note(f"enrolled machine '{name}' as {keys.machine_id}; its backups are sealed to recipient {sealed}"))
    return keys


def _with_inventory(layout: Layout) -> Layout:
    return msgspec.structs.replace(layout, inventory=probe_inventory())
