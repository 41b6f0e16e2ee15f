"""MD arrays, made, assembled and checked by mdadm. The machine's own mdadm.conf names them, as on a real one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lab.stacks.machine import LabFailedError, Machine
from lab.stacks.model import Facts, Layer, Space

MISSING = "missing"
"""The member that a degraded array lacks."""

_PATIENCE = 120.0


@dataclass(frozen=True)
class Array(Layer):
    """An array `md/NAME`; a member that is `missing` makes it degraded. `chunk` is in KiB."""

    name: str
    level: str
    members: tuple[Space, ...]
    spares: tuple[Space, ...] = ()
    metadata: str = "1.2"
    bitmap: str = "none"
    layout: str = ""
    chunk: int = 64

    @property
    def _device(self) -> Path:
        return Path("/dev/md", self.name)

    @property
    def _uuid(self) -> str:
        digest = sha256(f"{self.name} {self.members} {self.metadata}".encode()).hexdigest()
        return ":".join(digest[start : start + 8] for start in range(0, 32, 8))

    def build(self, machine: Machine) -> None:
        words = [f"--level={self.level}", f"--raid-devices={len(self.members)}", f"--metadata={self.metadata}"]
        words += [f"--uuid={self._uuid}", f"--name={self.name}", "--homehost=lab", "--assume-clean", "--run"]
        words += [f"--bitmap={self.bitmap}"] if self.level not in {"0", "linear"} else []
        words += [f"--layout={self.layout}"] if self.layout else []
        words += [f"--chunk={self.chunk}"] if self.level not in {"1", "linear"} else []
        words += [f"--spare-devices={len(self.spares)}"] if self.spares else []
        members = [each if each == MISSING else machine.path(each) for each in (*self.members, *self.spares)]
        machine.run("mdadm", "--create", self._device, *words, *members)
        with (machine.folder / "mdadm.conf").open("a") as conf:
            conf.write(f"ARRAY {self._device} UUID={self._uuid}\n")
        machine.settle()
        machine.wait_for(self._device)

    def open(self, machine: Machine) -> None:
        machine.run("mdadm", "--assemble", f"--config={machine.folder / 'mdadm.conf'}", self._device)
        machine.settle()
        machine.wait_for(self._device)

    def check(self, machine: Machine) -> Iterator[str]:
        for member in (*self.members, *self.spares):
            if member != MISSING:
                machine.run("mdadm", "--examine", machine.path(member))
        yield "mdadm --examine"
        self._wait_until_idle(machine)
        state = self._detail(machine).get("State", "")
        if not state.startswith(("clean", "active")) or ("degraded" in state) != (MISSING in self.members):
            raise LabFailedError(f"{self._device} is {state}:\n{machine.run('mdadm', '--detail', self._device)}")
        yield "mdadm --detail"
        if self.level not in {"0", "linear"} and MISSING not in self.members:
            self._compare_copies(machine)
            yield "md sync_action check"

    def _compare_copies(self, machine: Machine) -> None:
        """Let the kernel read every stripe and count what does not fit (Documentation/admin-guide/md.rst)."""
        folder = Path("/sys/block", self._device.resolve().name, "md")
        (folder / "sync_action").write_text("check")
        self._wait_until_idle(machine)
        mismatches = (folder / "mismatch_cnt").read_text().strip()
        if mismatches != "0":
            raise LabFailedError(f"{self._device} has {mismatches} sectors that differ between its members")

    def _wait_until_idle(self, machine: Machine) -> None:
        """Wait for what the kernel does to the array's redundancy: it rebuilds, resynchronises or checks."""
        folder = Path("/sys/block", self._device.resolve().name, "md")
        end = time.monotonic() + _PATIENCE
        while self.level not in {"0", "linear"} and (folder / "sync_action").read_text().strip() != "idle":
            if time.monotonic() > end:
                said = f"{machine.run('mdadm', '--detail', self._device)}\n{Path('/proc/mdstat').read_text()}"
                raise LabFailedError(f"the array {self._device} does not come to rest:\n{said}")
            time.sleep(0.05)

    def _detail(self, machine: Machine) -> dict[str, str]:
        lines = machine.run("mdadm", "--detail", self._device).splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(" : ") for line in lines) if value}

    def describe(self, machine: Machine) -> Facts:
        detail, place = self._detail(machine), f"array {self.name}"
        words = ("Raid Level", "Raid Devices", "Version", "UUID", "Layout", "Chunk Size", "Name", "Consistency Policy")
        kept = {f"{place} {word}": detail[word] for word in words if word in detail}
        for word in ("Active Devices", "Working Devices", "Spare Devices"):
            kept[f"{place} {word}"] = detail[word]
        exact = {f"{place} Array Size": detail["Array Size"]}
        return Facts(kept, exact | self._roles(machine))

    def _roles(self, machine: Machine) -> dict[str, str]:
        """Return which member has which place in the array."""
        roles = {}
        folder = Path("/sys/block", self._device.resolve().name, "md")
        for member in (*self.members, *self.spares):
            if member != MISSING:
                slot = (folder / f"dev-{machine.path(member).resolve().name}" / "slot").read_text().strip()
                roles[f"array {self.name} place of {member}"] = slot
        return roles

    def close(self, machine: Machine) -> None:
        machine.run("mdadm", "--quiet", "--stop", self._device)
        machine.settle()
