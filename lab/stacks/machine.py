"""The machine inside User Mode Linux: its disks by letter, the devices of its spaces, and the standard tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from remetal.units import MIB

_MOUNTS = Path("/run/lab")
_EDGE = 1 * MIB
"""What a disk with large sectors leaves free of the device under it at both ends, so that nothing shows through."""

_PATIENCE = 20.0


class LabFailedError(Exception):
    """A tool failed or found a fault; the message holds its output."""


@dataclass
class Machine:
    """A running machine. `disks` are its disks' devices by letter; `folder` keeps what outlives the machine."""

    folder: Path
    disks: dict[str, Path] = field(default_factory=dict)
    loops: dict[str, Path] = field(default_factory=dict)
    """Loop devices over volumes whose partitions the kernel does not scan, by space."""

    def run(self, *argv: str | Path, allowed: Sequence[int] = (0,), text: str | None = None) -> str:
        """Run a tool and return its standard output. Raises LabFailedError for an exit code that is not allowed."""
        try:
            done = subprocess.run(
                argv,
                input=text,
                stdin=subprocess.DEVNULL if text is None else None,
                capture_output=True,
                text=True,
                errors="surrogateescape",
                check=False,
            )
        except OSError as error:
            raise LabFailedError(f"{argv[0]} cannot be started: {error}") from error
        if done.returncode not in allowed:
            words = " ".join(map(str, argv))
            raise LabFailedError(f"`{words}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def path(self, space: str) -> Path:
        """Return the device of a space, by the name that the kernel gives it where it is a partition."""
        if space in self.disks:
            return self.disks[space]
        parent, _, part = space.rpartition(":")
        if part in {"luks", "integrity"}:
            return Path("/dev/mapper", mapping_name(space))
        if part.isdigit():
            device = self.loops.get(parent) or self.path(parent).resolve()
            return Path(f"{device}{'p' if device.name[-1].isdigit() else ''}{part}")
        return Path("/dev", space)

    def secret(self, name: str) -> Path:
        """Return the file that holds a passphrase, without a line end."""
        path = self.folder / "secrets" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"the {name} passphrase of the lab")
        return path

    def settle(self) -> None:
        """Wait until udev has seen everything; it may drop a question that comes while it answers another one."""
        try:
            self.run("udevadm", "settle")
        except LabFailedError:
            time.sleep(0.5)
            self.run("udevadm", "settle")

    def wait_for(self, path: Path) -> None:
        """Wait until a device is there. Raises LabFailedError after a while."""
        end = time.monotonic() + _PATIENCE
        while not path.exists():
            if time.monotonic() > end:
                raise LabFailedError(f"{path} did not appear")
            time.sleep(0.02)

    @contextmanager
    def mounted(self, source: Path, *options: str, kind: str = "", program: str = "mount") -> Iterator[Path]:
        """Mount a device for the length of a block and yield the folder."""
        place = _MOUNTS / source.name
        place.mkdir(parents=True, exist_ok=True)
        words = [*(["-t", kind] if kind else []), *(["-o", ",".join(options)] if options else [])]
        self.run(program, *words, source, place)
        try:
            yield place
        finally:
            self.run("umount", place)

    def release_all(self) -> None:
        """Take apart what this kernel has put together by itself when it started."""
        self.settle()
        for _ in range(2):
            self.run("vgchange", "--quiet", "--activate=n", allowed=(0, 5))
            self.run("mdadm", "--quiet", "--stop", "--scan", allowed=(0, 1))
        self.settle()

    def attach_disk(self, letter: str, device: Path, sector: int) -> None:
        """Take a device as a disk; one with large sectors is a loop device over it."""
        self.disks[letter] = device
        if sector != 512:
            size = int(self.run("blockdev", "--getsize64", device)) - 2 * _EDGE
            geometry = ["--sector-size", str(sector), "--offset", str(_EDGE), "--sizelimit", str(size)]
            argv = ["losetup", "--find", "--show", "--partscan", "--direct-io=on", *geometry]
            self.disks[letter] = Path(self.run(*argv, device).strip())

    def detach_disks(self) -> None:
        """Let go of the loop devices."""
        for device in self.disks.values():
            if device.name.startswith("loop"):
                self.run("losetup", "--detach", device)

    def is_mapped(self, space: str) -> bool:
        """Whether a space is a device-mapper device, whose partitions the kernel does not scan."""
        return self.path(space).resolve().name.startswith("dm-")


def mapping_name(space: str) -> str:
    """Return the device-mapper name under which the container of a space is opened."""
    return space.replace("/", "-").replace(":", "-")


def file_size(size: int, sector: int) -> int:
    """Return how large the file must be that a disk of `size` bytes stands on."""
    return size if sector == 512 else size + 2 * _EDGE


def _reload_udev(limit: float = 60.0) -> None:
    """Let udev read its rules again; on a busy host it may not listen yet."""
    end = time.monotonic() + limit
    while subprocess.run(["udevadm", "control", "--reload"], check=False).returncode != 0:
        if time.monotonic() > end:
            raise TimeoutError(f"udev did not listen for {limit:.0f} s")
        time.sleep(0.5)


def isolate_host() -> None:
    """Keep what the tools note about this machine out of the host's files, which are the root in here.

    As on the recovery medium, nothing is assembled, activated or registered by itself.
    """
    run = subprocess.run
    private = Path("/run/private")
    private.mkdir(exist_ok=True)
    shutil.copytree("/etc/lvm", private / "lvm")
    (private / "lvm" / "lvmlocal.conf").write_text("activation { auto_activation_volume_list = [] }\n")
    (private / "mdadm.conf").write_text("AUTO -all\nHOMEHOST lab\n")
    run(["mount", "--bind", private / "lvm", "/etc/lvm"], check=True)
    run(["mount", "--bind", private / "mdadm.conf", "/etc/mdadm/mdadm.conf"], check=True)
    run(["mount", "-t", "tmpfs", "-o", "mode=755", "lib", "/var/lib"], check=True)
    run(["mount", "--bind", "/dev/null", "/usr/lib/udev/rules.d/69-bcache.rules"], check=True)
    _reload_udev()
    run(["modprobe", "md-mod"], check=True)
    Path("/proc/sys/dev/raid/speed_limit_min").write_text("200000")  # arrays on one disk would fill theirs in turn
    os.environ["PATH"] += ":/usr/sbin:/sbin"
