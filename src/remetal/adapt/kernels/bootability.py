"""Whether a kernel of an installed system would find its root on some hardware, and what its initramfs lacks for that.

Pure. What the kernel has built in is there; a module has to be in the initramfs with all that it needs, and the
initramfs has to load it: by itself for a device that it sees, or by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from remetal.adapt.kernels.initramfs import Initramfs
from remetal.adapt.kernels.modules import Modules, module_name
from remetal.adapt.kernels.needs import Need


class Outcome(Enum):
    """What becomes of a kernel on this hardware."""

    BOOTS = "boots as it is"
    ADAPTED = "boots after adaptation"
    CANNOT = "cannot boot"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one kernel, and why.

    `missing` are the modules that its initramfs lacks, with all that they need, as they have to be loaded; `unloaded`
    those that would be there and are not loaded by themselves. `reasons` are sentences without a full stop; `notes`,
    too, of what does not keep it from booting.
    """

    kernel: str
    outcome: Outcome
    missing: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def judge(modules: Modules, initramfs: Initramfs | None, needs: Sequence[Need], wishes: Sequence[Need] = ()) -> Verdict:
    """Return what becomes of a kernel that has these modules and this initramfs, where `needs` have to be driven.

    `wishes` is what is driven once it has booted: what it cannot drive of that is noted.
    """
    present = initramfs.modules.get(modules.version, frozenset[str]()) if initramfs is not None else frozenset[str]()
    missing: dict[str, None] = {}
    unloaded: dict[str, None] = {}
    lacking: list[str] = []
    reasons: list[str] = []
    for need in needs:
        for choices in _alternatives(modules, need):
            if not choices:
                if need.certain:
                    lacking.append(_describe_lack(modules, need))
                continue
            if any(each in modules.builtin for each in choices):
                continue
            chosen = _choose(modules, choices, present)
            wanted = modules.closure([chosen], soft=False)
            absent = [each for each in wanted if each not in present]
            if absent:
                missing |= dict.fromkeys(absent)
                reasons.append(f"{need.what} needs {chosen}, which its initramfs lacks")
            hidden = modules.hidden.get(chosen, "") if need.modalias else ""
            loaded = initramfs is not None and (
                chosen in initramfs.loads or (bool(need.modalias) and initramfs.loads_for_devices and not hidden)
            )
            if need.modalias and not loaded:
                unloaded[chosen] = None
                why = f"it is blacklisted in {hidden}" if hidden else "its initramfs does not look for devices"
                reasons.append(f"{need.what} needs {chosen}, which is not loaded by itself: {why}")
    kernel, notes = modules.version, tuple(_describe_wishes(modules, wishes))
    if lacking:
        return Verdict(kernel, Outcome.CANNOT, reasons=tuple(dict.fromkeys(lacking)), notes=notes)
    if initramfs is None and (missing or unloaded):
        why = f"it has no initramfs, and what it needs is not built in: {', '.join(missing or unloaded)}"
        return Verdict(kernel, Outcome.CANNOT, reasons=(why,), notes=notes)
    outcome = Outcome.ADAPTED if missing or unloaded else Outcome.BOOTS
    return Verdict(kernel, outcome, tuple(missing), tuple(unloaded), tuple(dict.fromkeys(reasons)), notes)


def _describe_wishes(modules: Modules, wishes: Sequence[Need]) -> Iterator[str]:
    for wish in wishes:
        found = modules.find_drivers(wish.modalias)
        if not found and wish.certain:
            yield _describe_lack(modules, wish)
        elif found and all(each in modules.hidden for each in found):
            yield f"{wish.what} needs {found[0]}, which is blacklisted in {modules.hidden[found[0]]}"


def _alternatives(modules: Modules, need: Need) -> Iterator[tuple[str, ...]]:
    """Yield, for each thing that a need takes, the modules of which any one will do."""
    if need.modalias:
        found = modules.find_drivers(need.modalias)
        own = tuple(each for each in found if each == module_name(need.seen))
        yield own or found
    for name in need.names:
        yield modules.resolve(name)


def _choose(modules: Modules, choices: Sequence[str], present: frozenset[str]) -> str:
    """Return one of several modules: one that is in the initramfs with all that it needs, else the first."""
    whole = (each for each in choices if all(part in present for part in modules.closure([each], soft=False)))
    return next(whole, choices[0])


def _describe_lack(modules: Modules, need: Need) -> str:
    seen = module_name(need.seen)
    if seen and (seen in modules.files or seen in modules.builtin):
        return f"its {seen} does not know {need.what} ({need.modalias}): it is older than that"
    which = need.modalias or ", ".join(name for name in need.names if not modules.resolve(name))
    return f"it has no driver for {need.what}: {which}"
