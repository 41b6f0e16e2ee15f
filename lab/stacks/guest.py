"""What runs inside User Mode Linux: building and capturing a stack, restoring it, and looking at it.

The host starts `main` with a job file. Whatever fails is left in `failure.json` with the phase in which it did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.stacks.catalog import STACKS
from lab.stacks.contents import Bytes
from lab.stacks.findings import Findings
from lab.stacks.machine import LabFailedError, Machine, isolate_host
from lab.stacks.model import SAME, Layer, Variant, disk_places
from lab.stacks.words import backup_words, restore_words
from lab.uml import disk_device

REMETAL = Path(sys.executable).with_name("remetal")
REFUSED = 3


@dataclass(frozen=True)
class Job:
    """One boot's work. `folder` keeps what belongs to the stack, `out` what this boot finds.

    `work` is `build`, `capture` (build, then back up), `reopen` or `restore` (then reopen).
    """

    stack: str
    variant: str
    work: str
    folder: str
    out: str


@dataclass
class Report:
    """What happened in one boot: what remetal said and did, and seconds by phase."""

    refused: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    written: int = 0
    again: int = 0
    captured: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class RefusedByRemetalError(Exception):
    """The program refused, with exit code 3; the message is its sentence."""


def main(path: str) -> int:
    """Do the job that the file describes, and return an exit code."""
    job = Job(**json.loads(Path(path).read_text()))
    work = _Work(job)
    try:
        work.run()
    except Exception as error:
        text = str(error) if isinstance(error, LabFailedError) else f"{type(error).__name__}: {error}"
        (work.out / "failure.json").write_text(json.dumps({"phase": work.phase, "said": text}))
        if not isinstance(error, LabFailedError):
            raise
        return 1
    return 0


class _Work:
    """One job being done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stack = STACKS[job.stack]
        self.folder, self.out = Path(job.folder), Path(job.out)
        self.machine = Machine(self.folder)
        self.report = Report()
        self.phase = "start"

    @property
    def variant(self) -> Variant:
        return self.stack.variant(self.job.variant) if self.job.variant else Variant("", self.stack.disks)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.variant.layers or self.stack.layers

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Note what is being done, for the report and in case that the kernel dies over it."""
        self.phase = name
        (self.out / "phase").write_text(name)
        began = time.monotonic()
        yield
        self.report.seconds[name] = round(time.monotonic() - began, 1)

    def run(self) -> None:
        isolate_host()
        with self.in_phase("attach the disks"):
            self.machine.release_all()
            for index, (letter, disk) in enumerate(disk_places(self.stack, self.variant)):
                self.machine.attach_disk(letter, Path(disk_device(index)), disk.sector)
            self.machine.settle()
        try:
            if self.job.work in {"build", "capture"}:
                self.build()
                if self.job.work == "capture":
                    self.capture()
            elif self.job.work == "reopen" or self.restore():
                self.reopen()
        except RefusedByRemetalError as error:
            if self.phase not in {"remetal backup", "remetal plan"}:
                raise LabFailedError(f"remetal refused what it had planned: {error}") from error
            self.report.refused = str(error)
        self.machine.detach_disks()
        (self.out / "report.json").write_text(json.dumps(asdict(self.report)))

    def build(self) -> None:
        findings = Findings()
        with self.in_phase("build"):
            for layer in self.layers:
                layer.build(self.machine)
                layer.fill(self.machine)
        with self.in_phase("list files"):
            for layer in self.layers:
                findings.describe(layer, self.machine)
        findings.save(self.folder / "before.json")
        names = {letter: device.name for letter, device in self.machine.disks.items()}
        (self.folder / "names.json").write_text(json.dumps(names))
        self.close()

    def close(self) -> None:
        with self.in_phase("close"):
            for layer in reversed(self.layers):
                layer.close(self.machine)

    def capture(self) -> None:
        names = {letter: device.name for letter, device in self.machine.disks.items()}
        with self.in_phase("remetal backup"):
            disks = [word for device in self.machine.disks.values() for word in ("--disk", str(device))]
            words = backup_words(self.stack, self.machine, names)
            self.report.captured = self.remetal("backup", "--machine", self.stack.name, *disks, *words)

    def restore(self) -> bool:
        """Plan and restore."""
        names = json.loads((self.folder / "names.json").read_text())
        words = restore_words(self.stack, self.variant, self.machine, names)
        with self.in_phase("remetal plan"):
            self.report.plan = self.remetal("plan", "latest", *words)
        words += ["--kit-file", str(self.folder / "kit")]
        confirm = ("--confirm", self.report.plan["id"])
        with self.in_phase("remetal restore"):
            self.report.written = self.remetal("restore", "latest", *words, *confirm)["written"]
        if self.variant.name == SAME:
            with self.in_phase("remetal restore again"):
                again = self.remetal("restore", "latest", *words, *confirm, *self.named_twice())
                self.report.again = again["written"]
        self.machine.settle()
        return True

    def named_twice(self) -> list[str]:
        """Return the option for disks full of bytes that nobody knows: what is on them cannot be told from others'."""
        disks = [layer.on for layer in self.layers if isinstance(layer, Bytes) and layer.on in self.machine.disks]
        return [word for disk in disks for word in ("--overwrite", str(self.machine.disks[disk]))]

    def reopen(self) -> None:
        findings = Findings()
        with self.in_phase("open"):
            for layer in self.layers:
                findings.checks += layer.check_closed(self.machine)
                layer.open(self.machine)
        with self.in_phase("check"):
            for layer in self.layers:
                findings.checks += layer.check(self.machine)
        with self.in_phase("list files"):
            for layer in self.layers:
                findings.describe(layer, self.machine)
        self.close()
        findings.save(self.out / "after.json")

    def remetal(self, command: str, *words: str) -> dict[str, Any]:
        """Run the program and return its result. Raises RefusedByRemetalError, LabFailedError."""
        argv = [str(REMETAL), command, "--json", *words]
        environment = os.environ | {
            "REMETAL_REPO": str(self.folder / "repository"),
            "REMETAL_STATE": str(self.folder / "state"),
        }
        log = self.out / f"remetal-{command}.log"
        with log.open("a") as errors:
            print(*argv, file=errors, flush=True)
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment, check=False
            )
        if done.returncode == REFUSED:
            error = json.loads(done.stdout)["error"]
            raise RefusedByRemetalError(f"{error['message']}. {error['hint']}")
        if done.returncode:
            raise LabFailedError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{log.read_text()}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result
