"""One case from the beginning to the end: a database at work, its machine backed up, lost, restored, and booted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.live.cases import KEY, TABLE, LiveCase, expected_way, plan_database, plan_storage
from lab.live.clients import find_shell, look_for_damage, make_tables, making_noise, read_ledger
from lab.live.guest import Guest, find_ports, make_disk, make_tools, plan_tools, started_guest
from lab.live.ledger import Client, check, committing
from lab.live.moment import HOOKS, find_phases, noting, plan_moment
from lab.recovery import FAILED, PASSPHRASE, RECOVERED
from remetal.events import Report, Step
from remetal.image.live import FROZEN_KINDS
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import GIB, MIB
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import start_machine

CLIENTS = 3
FREEZE_LIMIT = 60
"""Seconds for which an emulated machine may be held."""
GENTLE = "--limit-read 8M --nice 5 --ionice idle"
"""How a backup is told to leave an emulated machine to others."""
_DATA, _VAULT = 2560 * MIB, 5 * GIB
_SAMPLE = 60.0
"""Seconds in which transactions are counted before the backups, and behind them again."""

_ANSWER = f"""repository = "backup"
passphrase = "{PASSPHRASE}"
map = {{ vda = "serial:NEW-1", vdb = "serial:NEW-2" }}
luks-key-file = "lab.key"
end = "poweroff"
pause = 1
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a case. Times in seconds, sizes in bytes.

    Transactions a second: `alone`, before and behind the backups, `during` the first one of everything, and during
    another one that was `gentle`.
    At the moment of the last backup `least` transactions had been acknowledged and `most` were sent (as lab.live.moment
    knows it), and `found` are those that came back: of all clients together. `waited` is the longest that one of them
    waited. `ways` are how each backup captured each volume that has a file system.
    """

    case: str
    pause: float
    seconds: float
    gentle_seconds: float
    used: int
    stored: int
    alone: float
    during: float
    gently: float
    waited: float
    least: int
    found: int
    most: int
    checked_by: str
    ways: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Backup:
    """What was told of the backups, what each client had acknowledged and sent at the last's moment, and the rates."""

    first: dict[str, Any]
    gentle: dict[str, Any]
    second: dict[str, Any]
    acknowledged: tuple[int, ...]
    sent: tuple[int, ...]
    alone: float
    during: float
    gently: float
    waited: float
    ways: tuple[dict[str, str], ...]


def run_case(case: LiveCase, work: Path, medium: Path, report: Report) -> Seen:
    """Play a case in a new folder. Raises RemetalError, CalledProcessError or AssertionError where it goes wrong."""
    work.mkdir(parents=True)
    disk, data, vault, tools, key = (work / name for name in ("disk.img", "data.img", "vault.img", "tools.img", "key"))
    make_disk(case, disk, key, report)
    _make_empty(data, _DATA)
    run(["sfdisk", "--quiet", data], input=TABLE.encode())
    _make_vault(vault)
    make_tools(tools)
    drives = (
        Drive(disk, serial="OLD-1", durable=False),
        Drive(data, serial="OLD-2", durable=False),
        Drive(vault, serial="VAULT", durable=False),
        Drive(tools, serial="TOOLS", read_only=True),
    )
    ports = find_ports()
    with started_guest(case, drives, work / "vm", key, ports, report) as guest:
        backup = _back_up(case, guest, report)
        guest.running.quit()  # the machine is lost
    for path in (disk, data):
        _make_empty(path, path.stat().st_size)
    new = (Drive(disk, serial="NEW-1", durable=False), Drive(data, serial="NEW-2", durable=False))
    _recover(new, vault, medium, work / "vm", report)
    with started_guest(case, new, work / "vm", key, ports, report) as guest:
        report(Step("Holding what came back against what was acknowledged"))
        found = check(read_ledger(find_shell(case, guest.database_port)))
        checked_by = look_for_damage(case, guest.database_port)
        state = guest.call("systemctl is-system-running --wait || systemctl --failed").strip()
        guest.running.powerdown()
        guest.running.wait_for_shutdown(180)
    assert state == "running", f"the restored machine is {state}"
    for client in range(CLIENTS):
        least, most = backup.acknowledged[client], backup.sent[client]
        assert least <= found[client] <= most, f"client {client}: {found[client]} is not within {least} and {most}"
    return Seen(
        case=case.name,
        pause=backup.second["pause"],
        seconds=backup.first["seconds"],
        gentle_seconds=backup.gentle["seconds"],
        used=backup.first["used"],
        stored=backup.first["stored"],
        alone=backup.alone,
        during=backup.during,
        gently=backup.gently,
        waited=backup.waited,
        least=sum(backup.acknowledged),
        found=sum(found.values()),
        most=sum(backup.sent),
        checked_by=checked_by,
        ways=backup.ways,
    )


def _back_up(case: LiveCase, guest: Guest, report: Report) -> _Backup:
    """Set the machine to work, and back it up, all of it; one that is emulated is held for longer than others."""
    report(Step("Making its storage, and the database"))
    for script in (plan_tools("/dev/vdd"), plan_storage(case), plan_database(case), plan_moment(case)):
        guest.call("bash -s", text=script)
    remetal = "REMETAL_REPO=/vault/backup remetal"
    backup = f"{remetal} backup --json --freeze-limit {FREEZE_LIMIT}"
    guest.call("mkdir /vault && mount /dev/vdc /vault")
    guest.call("umask 077; cat > /run/phrase", text=PASSPHRASE + "\n")
    for repository in ("backup", "gentle"):
        guest.call(f"{remetal} init --repo /vault/{repository} --passphrase-file /run/phrase")
    shell = find_shell(case, guest.database_port)
    make_tables(case, shell, guest.database_port, CLIENTS)
    with making_noise(case, shell, guest.database_port), committing(shell, CLIENTS) as clients:
        time.sleep(_SAMPLE)  # a machine that has just started has other things to do
        before = _rate(clients, lambda: time.sleep(_SAMPLE))
        report(Step(f"Backing it up while it does {before:.1f} transactions a second"))
        told: list[str] = []
        during = _rate(clients, lambda: told.append(guest.call(backup)))
        report(Step(f"Backing it up gently; meanwhile there were {during:.1f} transactions a second"))
        gently = _rate(clients, lambda: told.append(guest.call(f"{backup} {GENTLE} --repo /vault/gentle")))
        report(Step(f"Backing it up again; meanwhile there were {gently:.1f} transactions a second"))
        with noting(guest, clients) as notes:
            told.append(guest.call(f"{backup} --hooks {HOOKS}"))
        behind = _rate(clients, lambda: time.sleep(_SAMPLE))
        waited = max(each.waited for each in clients)
    first, gentle, second = map(json.loads, told)
    ways = tuple(_find_ways(case, each) for each in (first, gentle, second))
    phases = tuple(each.phase for each in notes)
    assert phases == find_phases(case), f"the last backup told of these phases: {phases}"
    alone = (before + behind) / 2
    return _Backup(first, gentle, second, notes[0].acknowledged, notes[-1].sent, alone, during, gently, waited, ways)


def _find_ways(case: LiveCase, told: dict[str, Any]) -> dict[str, str]:
    """Return how a backup captured each volume with a file system. Raises AssertionError if it should be otherwise."""
    ways = {each["volume"]: each["way"] for each in told["volumes"] if each["kind"] in FROZEN_KINDS}
    expected = {volume: expected_way(case, volume) for volume in ways}
    assert ways == expected, f"the volumes were captured as {ways}, not {expected}"
    assert len(ways) > len(case.places), f"these are not all volumes: {ways}"
    return ways


def _rate(clients: list[Client], work: Callable[[], object]) -> float:
    """Do some work, and return how many transactions a second were acknowledged meanwhile."""
    count, began = sum(each.acknowledged for each in clients), time.monotonic()
    work()
    return (sum(each.acknowledged for each in clients) - count) / (time.monotonic() - began)


def _make_empty(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _make_vault(path: Path) -> None:
    """Make the disk that the repository will lie on, with all that an unattended recovery is told."""
    _make_empty(path, _VAULT)
    with attach_loop(Span(path, 0, _VAULT), writable=True) as device:
        run(["mkfs.ext4", "-q", "-L", "BACKUP", device])
        with mounted(device) as folder:
            (folder / "remetal-answer.toml").write_text(_ANSWER)
            (folder / "lab.key").write_text(KEY)


def _recover(new: tuple[Drive, ...], vault: Path, medium: Path, folder: Path, report: Report) -> None:
    """Let the recovery medium restore the machine onto blank disks by itself."""
    report(Step("Recovering the machine onto blank disks"))
    drives = (*new, Drive(vault, bus="usb", serial="VAULT", durable=False))
    machine = Machine(memory=2 * GIB, drives=drives, cdrom=medium, boot="cdrom")
    with start_machine(machine, folder) as running:
        running.wait_for(RECOVERED, 3600, unless=FAILED)
        running.wait_for_shutdown(180)
