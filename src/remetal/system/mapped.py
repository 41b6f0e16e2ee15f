"""Devices that the kernel makes out of others: device-mapper's and MD's. What there is, and of what it is made.

Source: Linux Documentation/ABI (sysfs-block-dm), Documentation/admin-guide/md.rst.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from remetal.system.blockdev import Span, probe_geometry
from remetal.system.loop import attach_loop
from remetal.system.run import ProgramFailedError, run
from remetal.system.udev import kept_from_udev
from remetal.units import MIB

_BLOCK = Path("/sys/class/block")
_PATIENCE = 10.0
"""Seconds: how long somebody else may look at an array that we want to stop."""
_OVERLAY = 256 * MIB
"""Bytes that may be written to an overlay; only what is really written takes memory."""


def find_mapping(uuid: str) -> Path | None:
    """Return the device-mapper device whose DM UUID is `uuid`, or None."""
    return next((device for device in find_mappings(uuid) if _text(_BLOCK / device.name / "dm/uuid") == uuid), None)


def find_mappings(prefix: str) -> Iterator[Path]:
    """Yield the device-mapper devices whose DM UUIDs begin with `prefix`."""
    for folder in sorted(_BLOCK.glob("dm-*")):
        if _text(folder / "dm/uuid").startswith(prefix):
            yield Path("/dev", folder.name)


def find_arrays() -> Iterator[Path]:
    """Yield the MD arrays that the kernel has assembled, those that are not started yet included."""
    for folder in sorted(_BLOCK.glob("md*")):
        if (folder / "md").is_dir():
            yield Path("/dev", folder.name)


@contextmanager
def claimed_device(device: Path) -> Iterator[Path]:
    """Yield an array or a mapping that was just made, for us alone: what udev began to make out of it is undone."""
    with kept_from_udev(device):
        drop_holders(device)
        yield device


def mapping_name(device: Path) -> str:
    """Return the name by which dmsetup(8) knows a device-mapper device."""
    return _text(_BLOCK / device.name / "dm/name")


@contextmanager
def overlaid_device(device: Path) -> Iterator[Path]:
    """Yield a device that reads as `device` does and takes writes, which go into memory and are forgotten.

    For what has to write before it can be read, such as thin pools. Source: dm-snapshot in the kernel's
    Documentation/admin-guide/device-mapper/snapshot.rst.
    """
    name = f"remetal-{token_hex(6)}"
    memory = Path("/dev/shm")  # noqa: S108 - memory is the point; the folder has a random name and mode 0700
    with TemporaryDirectory(prefix="remetal-", dir=memory if memory.is_dir() else None) as folder:
        store = Path(folder, "written")
        with store.open("wb") as file:
            file.truncate(_OVERLAY)
        with attach_loop(Span(store, 0, _OVERLAY), writable=True) as loop:
            sectors = probe_geometry(device).size // 512
            run(["dmsetup", "create", name, "--table", f"0 {sectors} snapshot {device} {loop} N 8"])
            try:
                yield Path("/dev/mapper", name).resolve()
            finally:
                run(["dmsetup", "remove", "--retry", name])


def mapping_uuid(device: Path) -> str:
    """Return a device-mapper device's DM UUID, empty for another device."""
    return _text(_BLOCK / device.resolve().name / "dm/uuid")


def is_started(array: Path) -> bool:
    """Whether an MD array runs, or is still being put together and holds its members for nobody (md.rst)."""
    return _text(_BLOCK / array.name / "md/array_state") not in {"", "clear", "inactive"}


def is_left_behind(device: Path) -> bool:
    """Whether an array or a mapping stands on nothing but loop devices that a killed run of ours left behind."""
    folder = _BLOCK / device.name
    below = sorted((folder / "slaves").glob("*"))
    if not below:
        return _text(folder / "loop/autoclear") == "1"
    return all(is_left_behind(Path("/dev", each.name)) for each in below)


def drop_holders(device: Path) -> None:
    """Take down the arrays and mappings that stand on a device. Raises ProgramFailedError if one is in use."""
    for folder in sorted((_BLOCK / device.name / "holders").glob("*")):
        drop_mapping(Path("/dev", folder.name))


def drop_mapping(device: Path) -> None:
    """Take down an array or a mapping and all that stands on it. Raises ProgramFailedError if it is in use."""
    drop_holders(device)
    name = mapping_name(device)
    if name:
        run(["dmsetup", "remove", "--retry", name])
    else:
        stop_array(device)


def drop_left_behind(device: Path) -> None:
    """Take down what a killed run left: an array or a mapping, all on it, and the mappings that it alone stands on."""
    below = [Path("/dev", each.name) for each in sorted((_BLOCK / device.name / "slaves").glob("*"))]
    drop_mapping(device)
    for each in below:
        if mapping_name(each) and not list((_BLOCK / each.name / "holders").glob("*")):
            drop_left_behind(each)


def stop_array(array: Path) -> None:
    """Stop an MD array, with patience: udev may look at it for a moment. Raises ProgramFailedError if it is in use."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            run(["mdadm", "--stop", array])
        except ProgramFailedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
