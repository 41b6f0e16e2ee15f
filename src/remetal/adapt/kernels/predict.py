"""What will become of the systems of a snapshot on some hardware, before anything is restored."""

from __future__ import annotations

from dataclasses import dataclass

from remetal.adapt.kernels.bootability import Outcome, Verdict
from remetal.adapt.kernels.drivers import NONE, Drivers, describe_misfits
from remetal.adapt.kernels.modules import list_versions
from remetal.adapt.kernels.survey import INNER, Hardware, examine_kernels
from remetal.adapt.restored import Restored
from remetal.adapt.roots import System, find_systems, open_root
from remetal.errors import RemetalError
from remetal.events import Report, Step, Warn, silent
from remetal.layout.model import SpaceId


@dataclass(frozen=True, slots=True)
class Prediction:
    """What becomes of one installed system: the volume of its root, its name, and each of its kernels, newest first.

    `problem` says why nothing can be told; else it is empty. `notes` are sentences without a full stop.
    """

    root: SpaceId
    name: str
    kernels: tuple[Verdict, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome | None:
        """The best that becomes of any of its kernels; None if nothing can be told."""
        if self.problem:
            return None
        best = (Outcome.BOOTS, Outcome.ADAPTED)
        return next((each for each in best if any(each is found.outcome for found in self.kernels)), Outcome.CANNOT)


def predict_systems(
    restored: Restored, hardware: Hardware, report: Report = silent, drivers: Drivers = NONE
) -> tuple[Prediction, ...]:
    """Return what becomes of each system on the volumes that can be reached, with these drivers added to it."""
    report(Step("Looking for installed systems and their kernels"))
    return tuple(_predict(system, restored, hardware, drivers, report) for system in find_systems(restored, report))


def _predict(system: System, restored: Restored, hardware: Hardware, drivers: Drivers, report: Report) -> Prediction:
    try:
        with open_root(system, restored, inner=INNER) as root:
            examined = examine_kernels(system, restored, root, hardware, drivers)
            notes = describe_misfits(drivers, list_versions(root))
    except RemetalError as error:
        report(Warn(f"nothing can be told of the kernels of {system.name}: {error.message}", error.hint))
        return Prediction(system.root, system.name, problem=error.message)
    if not examined:
        return Prediction(system.root, system.name, problem="it has no kernel in /boot or where its firmware looks")
    return Prediction(system.root, system.name, tuple(each.verdict for each in examined), notes=notes)
