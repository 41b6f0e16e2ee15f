"""The lab machine's own word that it has booted: what makes it say so, and how the lab listens.

After each boot `lab-proof.service` writes a line on the serial console. With a proof disk attached, the machine
also writes its own manifest there: everything it finds on itself, read by its own kernel.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lab import CHECKOUT
from lab.manifest import Manifest, decode_manifest
from remetal.errors import RemetalError
from remetal.units import MIB
from remetal.vm.machine import Drive
from remetal.vm.qemu import Running

BOOTED = r"lab-proof: booted name=(\S+) firmware=(\S+) state=(\S+) seconds=([\d.]+)"
DONE = r"lab-proof: done sha256=([0-9a-f]{64}) size=(\d+) seconds=([\d.]+)"

CHANGED_BY_BOOT = (
    "/tmp",  # systemd-tmpfiles empties it and makes folders for X and for services of their own
    "/var/tmp",  # the same
    "/var/log/journal",  # systemd-journald writes what happens
    "/var/log/wtmp",  # each boot is recorded
    "/var/lib/systemd",  # the random seed
)
"""Paths that a boot itself changes."""

_BLOCK = 4096
_SIZE = 64 * MIB


@dataclass(frozen=True, slots=True)
class Boot:
    """What the booted machine said of itself: its name, systemd's verdict, seconds since its kernel began."""

    name: str
    firmware: str
    state: str
    seconds: float


def install_proof(root: Path) -> None:
    """Install the service into the machine whose root is mounted at `root`."""
    guest, place = CHECKOUT / "lab" / "guest", root / "usr/lib/lab"
    place.mkdir()
    for source in (guest / "proof.py", CHECKOUT / "lab" / "manifest.py"):
        shutil.copyfile(source, place / source.name)
    (place / "proof.py").chmod(0o755)
    unit = root / "etc/systemd/system/lab-proof.service"
    shutil.copyfile(guest / unit.name, unit)
    wants = unit.parent / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit.name).symlink_to(f"/etc/systemd/system/{unit.name}")


def make_proof_disk(path: Path, *, power_off: bool) -> Drive:
    """Make a proof disk and return it as a drive; `power_off` asks the machine to switch itself off afterwards."""
    request = f"lab-proof end={'poweroff' if power_off else 'stay'}\n".encode()
    with path.open("wb") as file:
        file.write(request.ljust(_BLOCK, b"\0"))
        file.truncate(_SIZE)
    return Drive(path, serial="proof", durable=False)


def wait_for_boot(running: Running, timeout: float) -> Boot:
    """Wait until the machine says that it has booted. Raises MachineFailedError if it does not, within seconds."""
    found = running.wait_for(BOOTED, timeout)
    return Boot(found[1], found[2], found[3], float(found[4]))


def wait_for_manifest(running: Running, disk: Path, timeout: float) -> Manifest:
    """Wait until the machine has written its manifest, and return it.

    Raises MachineFailedError if that takes more than `timeout` seconds, RemetalError if the disk holds another
    manifest than the console speaks of.
    """
    found = running.wait_for(DONE, timeout)
    digest, size = found[1], int(found[2])
    with disk.open("rb") as file:
        head = file.read(_BLOCK).split(b"\0")[0].decode("ascii", "replace")
        text = file.read(size)
    if not re.fullmatch(rf"lab-proof size={size} sha256={digest}\n", head) or sha256(text).hexdigest() != digest:
        raise RemetalError(f"the proof disk {disk} does not hold what the machine's console said: {head!r}")
    return decode_manifest(text)
