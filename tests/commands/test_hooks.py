"""Applications are told of a backup, as a person asks for it; and whatever they do, the machine goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.disk import fresh_disk
from remetal.errors import RefusedError, RemetalError, UnavailableError, UsageError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import REMETAL, Site

ALL = '["before-freeze", "frozen", "after-thaw", "after-backup"]'


class Machine:
    """A site that backs up an ext4 on a disk of its own, which is mounted at `folder`, with hooks."""

    def __init__(self, site: Site, device: Path, folder: Path) -> None:
        self.site = site
        self.device = device
        self.folder = folder
        self.file = site.folder / "hooks.toml"
        self.log = site.folder / "log"
        self.command: tuple[str | Path, ...] = ("backup", "--disk", device, "--machine", "web1", "--hooks", self.file)

    def hook(self, text: str, phases: str = ALL, more: str = "") -> None:
        """Add a program to the hooks."""
        program = self.site.folder / f"program-{len(list(self.site.folder.glob('program-*')))}"
        program.write_text(f'#!/bin/sh\necho "{program.name} $REMETAL_PHASE" >> {self.log}\n{text}\n')
        program.chmod(0o755)
        with self.file.open("a") as file:
            file.write(f'[[hook]]\nrun = ["{program}"]\nat = {phases}\n{more}\n')

    @property
    def told(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for_told(self, line: str) -> None:
        """Wait until a program has been called."""
        until = time.monotonic() + 30
        while not self.log.exists() or line not in self.told:
            assert time.monotonic() < until, f"{line} did not come"
            time.sleep(0.05)

    def goes_on(self, seconds: float = 10) -> None:
        """Write a file; it must not wait for longer."""
        code = f"open({str(self.folder / 'after')!r}, 'w').write('after')"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=seconds)

    def lists(self) -> int:
        """Return how many snapshots there are."""
        return len(self.site.remetal("snapshots", "--json").json)


@pytest.fixture
def machine(site: Site, tmp_path: Path) -> Iterator[Machine]:
    with fresh_disk(tmp_path / "disk.img", 64 * MIB) as device, mounted(device) as folder:
        yield Machine(site, device, folder)


def test_programs_are_told_what_goes_on(machine: Machine) -> None:
    machine.hook(f"env > {machine.site.folder}/env-$REMETAL_PHASE; echo done; echo odd >&2")
    done = machine.site.remetal(*machine.command, AWS_SECRET_ACCESS_KEY="secret")
    told = [f"program-0 {each}" for each in ("before-freeze", "frozen", "after-thaw", "after-backup")]
    assert machine.told == told
    assert done.err.count("hook 1 (program-0): done") == done.err.count("hook 1 (program-0): odd") == 4
    assert "==> Making ready: program-0" in done.err
    seen = (machine.site.folder / "env-after-backup").read_text().splitlines()
    names = {each.partition("=")[0] for each in seen} - {"PWD", "_", "SHLVL", "OLDPWD"}
    own = {"REMETAL_PHASE", "REMETAL_MACHINE", "REMETAL_FOLDERS", "REMETAL_RESULT", "REMETAL_SNAPSHOT"}
    assert names == {"PATH", "LANG", *own}
    (snapshot,) = machine.site.remetal("snapshots", "--json").json
    said = {"REMETAL_MACHINE=web1", f"REMETAL_FOLDERS={machine.folder}", "REMETAL_RESULT=complete"}
    assert {*said, f"REMETAL_SNAPSHOT={snapshot['id']}"} <= set(seen)


def test_what_is_written_before_the_freeze_is_in_the_backup_and_what_after_it_is_not(machine: Machine) -> None:
    machine.hook(f"head -c 40000000 /dev/urandom > {machine.folder}/ready; sync", '["before-freeze"]')
    machine.hook(f"touch {machine.folder}/late", '["after-thaw"]')
    done = machine.site.remetal(*machine.command)
    assert re.search(r"held for .* s, and [0-9.]+ KiB were read meanwhile", done.err), "it was to be read before"
    target = machine.site.folder / "target.img"
    machine.site.remetal("restore", "latest", "--map", target, "--yes")
    with attach_loop(Span(target, 0, 64 * MIB)) as copy, mounted(copy, options=("ro",)) as found:
        assert (found / "ready").read_bytes() == (machine.folder / "ready").read_bytes()
        assert not (found / "late").exists()


def test_in_the_frozen_phase_they_are_frozen(machine: Machine) -> None:
    machine.hook(f"sleep 0.2; fsfreeze -f {machine.folder} 2>&1 && fsfreeze -u {machine.folder}; true", '["frozen"]')
    done = machine.site.remetal(*machine.command, "--json")
    assert "Device or resource busy" in done.err
    assert done.json["pause"] > 0.2, "what is done while they are frozen counts"


@pytest.mark.parametrize("phase", ["before-freeze", "frozen", "after-thaw"])
def test_a_failure_ends_the_backup(machine: Machine, phase: str) -> None:
    machine.hook("")
    machine.hook(f'[ "$REMETAL_PHASE" != {phase} ] || {{ echo no room >&2; exit 7; }}')
    said = machine.site.remetal(*machine.command, code=RemetalError.exit_code).err
    assert (
        f"hook 2 (program-1) failed at {phase}: {machine.site.folder}/program-1 failed with exit code 7: no room"
        in said
    )
    assert "Nothing is listed of this backup" in said
    assert machine.lists() == 0
    assert machine.told[-4:] == [
        f"program-{number} {phase}" for phase in ("after-thaw", "after-backup") for number in (1, 0)
    ]
    machine.goes_on()


def test_a_failure_may_be_a_warning(machine: Machine) -> None:
    machine.hook("exit 7", more='on-failure = "continue"')
    said = machine.site.remetal(*machine.command).err
    assert said.count("warning: hook 1 (program-0) failed at ") == 4
    assert machine.lists() == 1


def test_a_failure_after_the_backup_is_told_and_the_backup_stands(machine: Machine) -> None:
    machine.hook("exit 7", '["after-backup"]')
    said = machine.site.remetal(*machine.command, code=RemetalError.exit_code).err
    (snapshot,) = machine.site.remetal("snapshots", "--json").json
    assert f"The backup is complete: snapshot {snapshot['id']}." in said


def test_the_end_of_a_backup_that_failed_is_told(machine: Machine) -> None:
    machine.hook(f"echo $REMETAL_RESULT $REMETAL_SNAPSHOT >> {machine.log}", '["after-backup"]')
    none = machine.site.folder / "none"
    machine.site.remetal(*machine.command, "--repo", none, code=None)
    assert machine.told == ["program-0 after-backup", "failed"]


def test_one_that_waits_for_what_is_frozen_holds_up_nobody(machine: Machine) -> None:
    machine.hook(f"echo x > {machine.folder}/frozen", '["frozen"]', "limit = 1")
    began = time.monotonic()
    with machine.site.start(*machine.command, "--freeze-limit", "300") as process:
        assert process.wait(60) == RemetalError.exit_code
    assert time.monotonic() - began < 30
    machine.goes_on()
    assert machine.lists() == 0


def test_one_that_takes_too_long_ends_with_the_hold(machine: Machine) -> None:
    machine.hook("sleep 60", '["frozen"]', 'limit = 3\non-failure = "continue"')
    said = machine.site.remetal(*machine.command, "--freeze-limit", "1", code=UnavailableError.exit_code).err
    assert "were to be held for longer than 1 seconds" in said
    machine.goes_on()


@pytest.mark.parametrize("phase", ["before-freeze", "frozen"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_backup_that_is_interrupted_tells_so(machine: Machine, phase: str, how: signal.Signals) -> None:
    machine.hook("")
    machine.hook(f'[ "$REMETAL_PHASE" != {phase} ] || sleep 60', more="limit = 100")
    with machine.site.start(*machine.command, "--freeze-limit", "100") as process:
        machine.wait_for_told(f"program-1 {phase}")
        process.send_signal(how)
        machine.goes_on()
        assert process.wait(30) == RemetalError.exit_code
    assert machine.told[-4:] == [
        f"program-{number} {phase}" for phase in ("after-thaw", "after-backup") for number in (1, 0)
    ]
    assert machine.lists() == 0


@pytest.mark.parametrize("phase", ["before-freeze", "frozen"])
def test_who_began_is_told_after_even_if_remetal_is_killed(machine: Machine, phase: str) -> None:
    machine.hook("")
    machine.hook(f'[ "$REMETAL_PHASE" != {phase} ] || sleep 60', more="limit = 100")
    with machine.site.start(*machine.command, "--freeze-limit", "100") as process:
        machine.wait_for_told(f"program-1 {phase}")
        process.send_signal(signal.SIGKILL)
    machine.goes_on()
    for number in range(2):
        machine.wait_for_told(f"program-{number} after-thaw")
    assert machine.lists() == 0


def test_no_hooks_are_no_hooks(machine: Machine) -> None:
    machine.hook("exit 7")
    without = machine.command[:-2]
    machine.site.remetal(*without, "--no-hooks")
    assert not machine.log.exists()
    said = machine.site.remetal(*machine.command, "--no-hooks", code=UsageError.exit_code).err
    assert "--hooks and --no-hooks exclude one another" in said


def test_the_hooks_of_the_machine_are_found(machine: Machine) -> None:
    machine.hook("")
    own = machine.site.folder / "etc/remetal/hooks.toml"
    own.parent.mkdir(parents=True)
    machine.file.rename(own)
    # /etc with such a file in it, which nobody else sees
    command = f'mount -t overlay none -o lowerdir={machine.site.folder / "etc"}:/etc /etc && exec "$@"'
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", REMETAL, *machine.command[:-2]],
        env=machine.site.environment,
        check=True,
    )
    assert len(machine.told) == 4


def test_a_file_that_others_may_change_is_refused(machine: Machine) -> None:
    machine.hook("")
    os.chown(machine.file, 65534, 65534)
    said = machine.site.remetal(*machine.command, code=RefusedError.exit_code).err
    assert f"{machine.file} belongs to user 65534" in said
    assert not machine.log.exists()
