"""The whole main job, for real: a machine is backed up, its disk destroyed, and it comes back on another one.

Everything that a person would type is typed here as well: the program is run as a command, and the recovery
medium does its work alone, told by an answer file on the disk with the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lab.cache import cache_folder
from lab.disk import take_disk_manifest
from lab.machine import Recipe, copy_machine
from lab.manifest import Manifest, compare_manifests
from lab.proof import CHANGED_BY_BOOT, Boot, make_proof_disk, wait_for_boot, wait_for_manifest
from remetal.errors import RemetalError
from remetal.events import Report, Step
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import GIB, MIB
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import start_machine

REMETAL = Path(sys.executable).with_name("remetal")
PASSPHRASE = "a passphrase that a person can remember"
SERIAL = "REPLACEMENT-1"
LARGER = 1 * GIB
"""How much larger the new disk is than the old one, in bytes."""

RECOVERED = r"remetal: recovery finished"
FAILED = r"remetal: recovery failed|Kernel panic"

ANSWER = f"""repository = "backup"
passphrase = "{PASSPHRASE}"
map = "serial:{SERIAL}"
end = "poweroff"
pause = 2
"""
"""What the recovery medium finds on the disk with the repository. (Yours keeps the passphrase elsewhere.)"""


@dataclass
class Story:
    """What happened and how long it took; sizes in bytes, times in seconds."""

    firmware: str
    used: int = 0
    stored: int = 0
    capture_seconds: float = 0.0
    medium_size: int = 0
    medium_seconds: float = 0.0
    prompt_seconds: float = 0.0
    restore_seconds: float = 0.0
    boot_seconds: float = 0.0
    boot: Boot | None = None
    files: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def power_on_to_login(self) -> float:
        """From power-on of the empty machine to the login of the restored one."""
        return self.restore_seconds + self.boot_seconds


@dataclass(frozen=True)
class Stage:
    """Where everything of one run lies: large files in `work`, what a person may look at in `out`."""

    work: Path
    out: Path
    firmware: Literal["bios", "uefi"]

    @property
    def disk(self) -> Path:
        """The machine's own disk."""
        return self.work / "phoenix.img"

    @property
    def usb(self) -> Path:
        """The USB disk with the repository."""
        return self.work / "usb.img"

    @property
    def replacement(self) -> Path:
        """The disk of the machine that takes over."""
        return self.work / "replacement.img"

    @property
    def medium(self) -> Path:
        """The recovery medium."""
        return self.work / "recovery.iso"


@contextmanager
def opened_stage(out: Path, firmware: Literal["bios", "uefi"]) -> Iterator[Stage]:
    """Prepare the folders of a run; the large files are removed when the block is left."""
    work = cache_folder() / f"recovery-{firmware}-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    for folder in (work, out):
        folder.mkdir(parents=True)
    try:
        yield Stage(work, out, firmware)
    finally:
        shutil.rmtree(work)


def recover_machine(stage: Stage, recipe: Recipe, report: Report) -> Story:
    """Play the whole story on a stage, and return what happened. Raises RemetalError where it goes wrong."""
    story = Story(stage.firmware)
    copy_machine(recipe, stage.disk, report)
    report(Step("Listing the files of the machine"))
    before = take_disk_manifest(stage.disk)
    back_up(stage, story, report)
    report(Step("Destroying the machine's disk: every byte is overwritten"))
    size = stage.disk.stat().st_size
    destroy(stage.disk)
    build_medium(stage, story, report)
    run_medium(stage, story, size + LARGER, report)
    report(Step("Comparing the replacement disk, file by file, before its first boot"))
    restored = take_disk_manifest(stage.replacement)
    story.differences = compare_manifests(before, restored)
    story.files = len(before)
    after = boot_replacement(stage, story, report)
    story.differences += compare_manifests(before, after, without=CHANGED_BY_BOOT)
    (stage.out / "differences.txt").write_text("".join(f"{line}\n" for line in story.differences))
    return story


def back_up(stage: Stage, story: Story, report: Report) -> None:
    """Make the USB disk, a repository on it, and a snapshot of the machine's disk."""
    report(Step("Making a USB disk, and a repository on it"))
    with stage.usb.open("wb") as file:
        file.truncate(2 * GIB)
    span = Span(stage.usb, 0, 2 * GIB)
    with attach_loop(span, writable=True) as device:
        run(["mkfs.ext4", "-q", "-L", "BACKUP", device])
        with mounted(device) as folder:
            secret = stage.work / "passphrase"
            secret.write_text(f"{PASSPHRASE}\n")
            (folder / "remetal-answer.toml").write_text(ANSWER)
            repository = folder / "backup"
            remetal(stage, "init", "--repo", repository, "--passphrase-file", secret, "--quiet")
            report(Step("Backing up the machine"))
            result = json.loads(
                remetal(stage, "backup", "--repo", repository, "--disk", stage.disk, "--machine", "phoenix", "--json")
            )
            story.stored = sum(file.stat().st_size for file in repository.rglob("*") if file.is_file())
    story.used, story.capture_seconds = result["used"], result["seconds"]


def destroy(disk: Path) -> None:
    """Overwrite a whole disk file with noise."""
    noise = os.urandom(4 * MIB)
    with disk.open("r+b") as file:
        left = disk.stat().st_size
        while left > 0:
            left -= file.write(noise[: min(left, len(noise))])
    if run(["blkid", "--probe", disk], allowed=(0, 2)).text:
        raise RemetalError(f"something can still be recognised on {disk}")


def build_medium(stage: Stage, story: Story, report: Report) -> None:
    """Build the recovery medium as a person would."""
    report(Step("Building the recovery medium"))
    result = json.loads(remetal(stage, "media", "build", "--output", stage.medium, "--json"))
    story.medium_size, story.medium_seconds = result["size"], result["seconds"]


def run_medium(stage: Stage, story: Story, size: int, report: Report) -> None:
    """Power on an empty machine with the medium in it, and let it recover by itself."""
    report(Step(f"Powering on an empty machine ({stage.firmware.upper()}) with a blank, larger disk"))
    with stage.replacement.open("wb") as file:
        file.truncate(size)
    machine = Machine(
        firmware=stage.firmware,
        memory=2 * GIB,
        drives=(
            Drive(stage.replacement, serial=SERIAL, durable=False),
            Drive(stage.usb, bus="usb", serial="USB-1", durable=False),
        ),
        cdrom=stage.medium,
        boot="firmware" if stage.firmware == "uefi" else "cdrom",
    )
    with start_machine(machine, stage.out / "vm") as running:
        began = time.monotonic()
        running.wait_for(r"Recovering unattended", 600, unless=FAILED)
        story.prompt_seconds = time.monotonic() - began
        report(Step(f"The recovery medium is up after {story.prompt_seconds:.0f} s and recovers by itself"))
        running.wait_for(r"==> Restoring .*:5", 600, unless=FAILED)
        time.sleep(5)
        running.screendump(stage.out / "recovery.png")
        running.wait_for(RECOVERED, 1200, unless=FAILED)
        running.wait_for_shutdown(120)
        story.restore_seconds = time.monotonic() - began
    report(Step(f"Recovered and powered off, {story.restore_seconds:.0f} s after power-on"))
    with attach_loop(Span(stage.usb, 0, 2 * GIB)) as device, mounted(device, options=("ro", "noload")) as folder:
        for left in sorted((folder / "remetal-log").glob("*/*")):
            shutil.copyfile(left, stage.out / left.name)


def boot_replacement(stage: Stage, story: Story, report: Report) -> Manifest:
    """Power on the machine with the new disk alone, and return the manifest that it makes of itself."""
    report(Step("Power cycle: the machine starts from its new disk alone"))
    proof = stage.work / "proof.img"
    machine = Machine(
        firmware=stage.firmware,
        memory=2 * GIB,
        drives=(
            Drive(stage.replacement, serial=SERIAL, durable=False),
            make_proof_disk(proof, power_off=False),
        ),
        boot="firmware" if stage.firmware == "uefi" else "disk",
    )
    with start_machine(machine, stage.out / "vm") as running:
        began = time.monotonic()
        story.boot = wait_for_boot(running, 600)
        story.boot_seconds = time.monotonic() - began
        report(Step(f"The machine is back: {story.boot.name}, state {story.boot.state}; it lists its own files"))
        running.screendump(stage.out / "login.png")
        manifest = wait_for_manifest(running, proof, 600)
        running.powerdown()
        running.wait_for_shutdown(180)
    return manifest


def remetal(stage: Stage, *words: str | Path) -> str:
    """Run the program as a person would, its messages passed through, and return its standard output."""
    shown = " ".join(str(word).replace(f"{stage.work}/", "") for word in words)
    print(f"    $ remetal {shown}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [REMETAL, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=_environment(stage),
    )
    if done.returncode != 0:
        raise RemetalError(f"`remetal {shown}` ended with exit code {done.returncode}")
    return done.stdout


def _environment(stage: Stage) -> dict[str, str]:
    return os.environ | {"REMETAL_STATE": str(stage.work / "state"), "REMETAL_CACHE": str(cache_folder())}


def story_rows(story: Story) -> Sequence[tuple[str, str]]:
    """Return the story as a table: what was measured, and its value."""
    from remetal.units import format_bytes, format_duration, format_rate

    return (
        ("used bytes", format_bytes(story.used)),
        ("repository bytes", format_bytes(story.stored)),
        ("capture", f"{story.capture_seconds:.1f} s, {format_rate(story.used, story.capture_seconds)}"),
        ("recovery medium", f"{format_bytes(story.medium_size)} in {format_duration(story.medium_seconds)}"),
        ("power-on to recovery", format_duration(story.prompt_seconds)),
        ("power-on to restored", format_duration(story.restore_seconds)),
        ("power-on to login of the restored machine", format_duration(story.power_on_to_login)),
        ("its state, in its own words", story.boot.state if story.boot else "never booted"),
        ("files compared", str(story.files)),
        ("differences", str(len(story.differences))),
    )
