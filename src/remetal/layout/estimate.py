"""How long a plan will take, roughly, so that somebody can decide what to do in the meantime. Pure.

What is read from the repository and written is taken at a rate that disks on the same kind of bus usually keep up;
nobody knows the network, the processor and the disks of a machine that is being recovered. It errs on the slow side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from remetal.layout.model import Layout
from remetal.layout.steps import (
    CopyFiles,
    GrowFileSystem,
    GrowSpanning,
    OpenContainer,
    ShrinkFileSystem,
    Step,
    WriteImage,
)
from remetal.units import MIB

_RATES = {"usb": 40 * MIB, "mmc": 30 * MIB, "nvme": 400 * MIB, "virtio": 200 * MIB}
_USUAL = 120 * MIB
"""Bytes per second: what a hard disk writes, and one core unpacks and decrypts."""
_FILES = 25 * MIB
"""Bytes per second where files are copied one by one."""
_MOVED = 50 * MIB
"""Bytes per second where a file system moves what it holds, at most all that it has to give up."""
_START, _OPEN, _GROW = 5.0, 3.0, 5.0
"""Seconds for reading the repository's index, for opening a container, and for growing a file system."""


def estimate_seconds(steps: Iterable[Step], result: Layout, buses: Mapping[str, str]) -> int:
    """Return the seconds that the steps will take; `buses` are those of the targets, by source disk."""
    seconds = _START
    for step in steps:
        match step:
            case WriteImage():
                seconds += step.used / min(_rate(buses.get(disk, "")) for disk in result.disks_under(step.device))
            case CopyFiles():
                seconds += step.used / _FILES
            case ShrinkFileSystem():
                seconds += sum(each.used for each in step.parts) / _slowest(step, result, buses)
                seconds += sum(min(each.before - each.size, each.used) for each in step.parts) / _MOVED
            case OpenContainer():
                seconds += _OPEN
            case GrowFileSystem() | GrowSpanning():
                seconds += _GROW
            case _:
                pass
    return round(seconds)


def _slowest(step: ShrinkFileSystem, result: Layout, buses: Mapping[str, str]) -> int:
    return min(_rate(buses.get(disk, "")) for each in step.parts for disk in result.disks_under(each.device))


def _rate(bus: str) -> int:
    return _RATES.get(bus, _USUAL)
