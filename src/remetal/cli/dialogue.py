"""The dialogue of the recovery medium: plain questions, each with its possible answers in sight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING

from remetal import __version__
from remetal.cli.luks_options import type_luks_passphrase
from remetal.cli.options import Output
from remetal.cli.output import clean, print_error, reporting
from remetal.cli.recovery import as_failure, end_machine, frame, logged, say
from remetal.errors import RefusedError, RemetalError
from remetal.ids import short
from remetal.media.answer import Answer
from remetal.media.volumes import (
    AttachedDisk,
    AttachedVolume,
    opened_volume,
    probe_disks,
    probe_volumes,
)
from remetal.system.run import find_program, run
from remetal.units import format_bytes, format_duration
from remetal.workflows.recover import Found, Recovery, leave_log, recover

if TYPE_CHECKING:
    from remetal.layout.model import Disk, Layout, Luks
    from remetal.layout.plan import Target
    from remetal.repository.snapshots import Snapshot
    from remetal.workflows.restore import Prepared

_SEARCH_DEPTH = 2
"""How many folders deep repositories are looked for on a volume."""


class _BackError(Exception):
    """The person wants to go back to the menu."""


def hold_dialogue(log: Path, output: Output) -> int:
    """Ask what to do until the machine ends or the person wants a shell; returns 0 then."""
    repositories = _show_machine()
    while True:
        choice = _choose(
            "What shall be done?",
            [
                "Restore a machine",
                "Look at the disks again",
                "Set the keyboard layout",
                "Shell",
                "Reboot",
                "Power off",
            ],
        )
        try:
            match choice:
                case 0:
                    _restore(repositories, log, output)
                case 1:
                    repositories = _show_machine()
                case 2:
                    _set_keyboard()
                case 3:
                    return 0
                case 4 | 5:
                    end_machine("reboot" if choice == 4 else "poweroff")
                    return 0
        except _BackError:
            say("Back to the menu; nothing was touched.")
        except RemetalError as error:
            print_error(error, as_json=False)


def _show_machine() -> list[tuple[AttachedVolume, str]]:
    """Show this machine, its disks and the repositories on them; return (volume, path on it) of each repository."""
    from remetal.layout.inventory import probe_inventory

    inventory = probe_inventory()
    say("", f"-- remetal {__version__} recovery " + "-" * 45, "")
    name = " ".join(filter(None, (inventory.vendor, inventory.product))) or "unknown make"
    say(f"Machine       {name}, {inventory.firmware.upper()}, {format_bytes(inventory.memory)} of memory")
    for number, disk in enumerate(probe_disks()):
        say(f"{'Disks' if number == 0 else '':<13} {describe_disk(disk)}")
    repositories = find_repositories(probe_volumes())
    for number, (volume, path) in enumerate(repositories):
        say(f"{'Repositories' if number == 0 else '':<13} /{path} on {volume}")
    if not repositories:
        say("Repositories  none on the attached volumes")
    say("")
    return repositories


def describe_disk(disk: AttachedDisk) -> str:
    """Return one line by which a person knows a disk."""
    words = [f"{disk.path!s:<14}", f"{format_bytes(disk.size):>9}", disk.bus, disk.model]
    return " ".join(filter(None, [*words, f"serial {disk.serial}" if disk.serial else ""]))


def find_repositories(volumes: Sequence[AttachedVolume]) -> list[tuple[AttachedVolume, str]]:
    """Return (volume, path on it) of every repository that is not buried deep. Volumes stay untouched."""
    found = []
    for volume in volumes:
        try:
            with opened_volume(volume) as top:
                found += [(volume, path) for path in _search_repositories(top)]
        except (RemetalError, OSError):
            continue
    return found


def _search_repositories(top: Path) -> list[str]:
    found = []
    level = [top]
    for _ in range(_SEARCH_DEPTH + 1):
        deeper: list[Path] = []
        for folder in level:
            if (folder / "config").is_file() and (folder / "keys").is_dir():
                found.append(str(folder.relative_to(top)).removeprefix("."))
            else:
                deeper += _subfolders(folder)
        level = deeper
    return found


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    except OSError:
        return []


def _restore(repositories: Sequence[tuple[AttachedVolume, str]], log: Path, output: Output) -> None:
    """Lead a person from the repository to a restored machine."""
    answer = _make_answer(repositories)
    recovery = Recovery(Found(answer, "the dialogue"))
    with logged(log), reporting(output) as report:
        try:
            recover(recovery, _agree, report, ask=_ask_passphrase)
        except (RemetalError, KeyboardInterrupt) as error:
            say("", *frame("Recovery failed", as_failure(error), recovery), "")
            leave_log(recovery, log.read_bytes(), report)
            return
        assert recovery.report is not None
        say("", f"Restored: {format_bytes(recovery.report.written)} written in {format_duration(recovery.seconds)}.")
        leave_log(recovery, log.read_bytes(), report)
    say("Remove the recovery medium, then choose Reboot.", "")


def _make_answer(repositories: Sequence[tuple[AttachedVolume, str]]) -> Answer:
    if not repositories:
        raise RefusedError(
            "there is no repository on the attached volumes",
            hint="Attach the disk that holds it, then choose 'Look at the disks again'. One on the network is restored "
            "from a shell: remetal restore latest --repo nfs://SERVER/FOLDER (or smb://, sftp://, s3://, https://).",
        )
    names = [f"/{path} on {volume}" for volume, path in repositories]
    volume, path = repositories[_choose("Restore from which repository?", names, back=True)]
    place = f"uuid:{volume.uuid}/{path}"
    say("The repository opens with its passphrase; or press Enter to give the recovery kit.")
    passphrase = getpass("Passphrase: ")
    kit = None if passphrase else _ask("File with the recovery kit (usb:LABEL/path, or a path): ")
    snapshot = _choose_snapshot(volume, path, passphrase, kit)
    targets = _choose_targets(snapshot, volume)
    return Answer(
        repository=place,
        snapshot=snapshot.id,
        map=targets.mapping,
        without=tuple(targets.without),
        overwrite=tuple(targets.overwrite),
        passphrase=passphrase or None,
        kit_file=kit,
        pause=0,
        repeat=True,
    )


def _choose_snapshot(volume: AttachedVolume, path: str, passphrase: str, kit: str | None) -> Snapshot:
    from remetal.media.volumes import opened_places
    from remetal.workflows.access import Secret, open_records, opened_repository, unlock

    with opened_places(probe_volumes(), volume) as places:
        secret = Secret(passphrase=passphrase) if kit is None else Secret(kit=places.path(kit).read_text())
        with opened_repository(str(places.path(path))) as repository:
            key = unlock(repository, secret)
            snapshots = [each for catalog in open_records(repository, key) for each in catalog.snapshots()]
    if not snapshots:
        raise RefusedError("the repository has no snapshot")
    latest = list(reversed(snapshots))
    lines = [f"{each.machine:<20} {each.time}  {short(each.id)}  {' '.join(each.tags)}" for each in latest]
    return latest[_choose("Restore which snapshot? The newest comes first.", lines, back=True)]


@dataclass(slots=True)
class _Targets:
    """Source disk = path of its target, source disks that are left out, and targets that were named twice."""

    mapping: dict[str, str] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    overwrite: list[str] = field(default_factory=list)


def _choose_targets(snapshot: Snapshot, repository: AttachedVolume) -> _Targets:
    """Ask for a target for every disk of the snapshot that is not blank. The repository's disks are not offered."""
    from remetal.layout.record import decode_layout
    from remetal.layout.targets import probe_target

    layout = decode_layout(snapshot.layout)
    sources = [disk for disk in layout.disks if layout.layer_on(disk.name) is not None]
    kept = _disks_of_volume(repository)
    disks = {disk.path: disk for disk in probe_disks()}
    free = {path: probe_target(path, size_if_missing=0) for path in disks if path.name not in kept}
    chosen = _Targets()
    for source in sources:
        title = f"Onto which disk shall '{source.name}' ({format_bytes(source.size)}, {source.model or 'no model'}) go?"
        lines = [f"{describe_disk(disks[path])}, {target.content or 'blank'}" for path, target in free.items()]
        if len(chosen.without) < len(sources) - 1:
            lines.append("None: leave it out")
        if not lines:
            raise RefusedError(
                f"this machine has no disk for '{source.name}'",
                hint="Attach one, then choose 'Restore a machine' again.",
            )
        number = _choose(title, lines, back=True)
        if number == len(free):
            chosen.without.append(source.name)
            continue
        path = list(free)[number]
        target = free.pop(path)
        if _must_be_named_twice(layout, source, target):
            _ask_for_name(path)
            chosen.overwrite.append(str(path))
        chosen.mapping[source.name] = str(path)
    return chosen


def _disks_of_volume(volume: AttachedVolume) -> set[str]:
    """Return the kernel names of the disks that a volume is on."""
    from remetal.layout.uses import disks_of_number

    number = volume.device.stat().st_rdev
    return disks_of_number((os.major(number), os.minor(number)))


def _must_be_named_twice(layout: Layout, source: Disk, target: Target) -> bool:
    """Say what would be lost on a target, and whether there is such. Raises RefusedError for one that must not be."""
    from remetal.layout.matching import find_refusals, is_own

    own = is_own(layout, source, target)
    for reason, hint in find_refusals(target, [target.path], own=own):
        raise RefusedError(reason, hint=hint)
    reasons = [reason for reason, _ in find_refusals(target, [], own=own)]
    say(*(f"{clean(reason)}." for reason in reasons))
    return bool(reasons)


def _ask_for_name(disk: Path) -> None:
    """Let a person name a disk a second time. Raises _BackError if they do not."""
    typed = _ask(f"If all of it may be lost, type the disk's name, {disk.name}; anything else goes back: ")
    if typed not in {disk.name, str(disk)}:
        raise _BackError


def _ask_passphrase(container: Luks, wrong: int) -> bytes:
    """Ask for the passphrase of an encrypted container. Raises _BackError if there is none."""
    typed = type_luks_passphrase(container, wrong, enter="go back")
    if typed is None:
        raise _BackError
    return typed


def _agree(prepared: Prepared) -> None:
    from remetal.cli.layouts import plan_view
    from remetal.cli.output import result_console

    for each in plan_view(prepared):
        result_console().print(each)
    typed = _ask("Type 'yes' or the plan's id to overwrite what stands there now; anything else goes back: ")
    if typed != "yes" and not (len(typed) >= 8 and prepared.plan.id.startswith(typed.lower())):
        raise _BackError


def _set_keyboard() -> None:
    if find_program("loadkeys") is None:
        raise RefusedError("this medium cannot change the keyboard layout")
    name = _ask("Layout (us, de, fr, uk, es, it, …): ")
    run(["loadkeys", name])
    say(f"The keyboard of the screen is now '{name}'.")


def _choose(title: str, choices: Sequence[str], *, back: bool = False) -> int:
    """Ask for one of the choices and return its index. Raises _BackError if `back` and the person wants that."""
    if not choices:
        raise RefusedError("there is nothing to choose from")
    say(clean(title))
    for number, choice in enumerate(choices, start=1):
        say(f"  {number:>2}  {clean(choice)}")
    if back:
        say("   0  Back")
    while True:
        typed = _ask("> ")
        if back and typed == "0":
            raise _BackError
        if typed.isdecimal() and 1 <= int(typed) <= len(choices):
            return int(typed) - 1
        say(f"Please type a number from {0 if back else 1} to {len(choices)}.")


def _ask(prompt: str) -> str:
    """Return the line that a person types; Ctrl-C and Ctrl-D lead back to the menu."""
    while True:
        try:
            return input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            raise _BackError from None
