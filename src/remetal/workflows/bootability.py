"""Whether what a snapshot holds would boot on some hardware: images shown as files, looked into, judged.

Nothing is restored, and only what is looked at is fetched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from remetal.adapt.kernels.drivers import opened_drivers
from remetal.adapt.kernels.predict import Prediction, predict_systems
from remetal.adapt.kernels.survey import Hardware
from remetal.adapt.restored import Restored
from remetal.adapt.roots import can_look_into
from remetal.errors import UsageError
from remetal.events import Report, silent
from remetal.image.served import served_image
from remetal.layout.inventory import probe_inventory
from remetal.layout.machine import read_machine
from remetal.layout.model import Inventory, Layout, SpaceId, spaces_of
from remetal.layout.record import decode_layout
from remetal.repository.reader import Reader, open_reader
from remetal.repository.repository import open_repository
from remetal.repository.snapshots import Snapshot
from remetal.system.loop import need_loops
from remetal.workflows.access import Secret, open_records, select_snapshot, unlock
from remetal.workflows.stores import opened_store


@dataclass(frozen=True, slots=True)
class BootabilityRequest:
    """Which snapshot would boot where: on the machine with this record, or, without one, on this machine.

    `drivers` is a folder of drivers that would be added.
    """

    repository: str
    snapshot: str = "latest"
    machine: str | None = None
    inventory: Path | None = None
    drivers: Path | None = None


@dataclass(frozen=True, slots=True)
class Bootability:
    """What becomes of the systems of a snapshot on a machine."""

    snapshot: Snapshot
    hardware: Inventory
    systems: tuple[Prediction, ...]


def predict_snapshot(request: BootabilityRequest, secret: Secret, report: Report = silent) -> Bootability:
    """Say what would become of a snapshot's systems. Needs root, since it mounts file systems.

    Raises UsageError for a record that is none, RefusedError without the rights of root, DamagedError if the
    repository lacks what has to be read.
    """
    need_loops()
    hardware = read_inventory(request.inventory) if request.inventory is not None else probe_inventory()
    with opened_drivers(request.drivers) as drivers, opened_store(request.repository, read_only=True) as opened:
        repository = open_repository(opened.store)
        key = unlock(repository, secret)
        catalogs = open_records(repository, key)
        snapshot = select_snapshot(
            [each for catalog in catalogs for each in catalog.snapshots()],
            request.snapshot,
            request.machine,
            catalogs[0].retired,
            [problem for catalog in catalogs for problem in catalog.problems],
        )
        layout = decode_layout(snapshot.layout)
        reader = open_reader(repository, key, snapshot, report=report)
        with shown_images(reader, snapshot, layout, layout) as restored:
            return Bootability(snapshot, hardware, predict_systems(restored, Hardware(hardware), report, drivers))


def read_inventory(path: Path) -> Inventory:
    """Read the hardware from a machine's record. Raises UsageError if it is none, or says nothing of the hardware."""
    inventory = read_machine(path).inventory
    if inventory is None:
        raise UsageError(
            f"{path} is the record of disk files, which are part of no machine yet",
            hint="Make one on the machine itself: remetal probe --json > FILE.",
        )
    return inventory


@contextmanager
def shown_images(
    reader: Reader,
    snapshot: Snapshot,
    source: Layout,
    result: Layout,
    *,
    moved: Mapping[SpaceId, SpaceId] = MappingProxyType({}),
    kept: Collection[SpaceId] = (),
) -> Iterator[Restored]:
    """Show the images of all file systems that can be looked into, as if they were restored to `result`.

    `moved` and `kept` are as in `Restored`.
    """
    images = {image.volume: image for image in snapshot.images}
    plain = Restored(source=source, result=result, devices={}, moved=moved, kept=frozenset(kept))
    with ExitStack() as stack:
        shown = {}
        for volume in result.volumes():
            if not can_look_into(volume) or plain.kept & set(spaces_of(volume)):
                continue
            for space in spaces_of(volume):
                image = images.get(plain.before(space))
                if image is not None:
                    shown[space] = stack.enter_context(served_image(reader, image, part=space))
        yield dataclasses.replace(plain, shown=shown)
