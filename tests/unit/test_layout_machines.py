"""Recorded machines: the probe says of each what its sysfs shows; each onto each is planned, or refused and why."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec.structs
import pytest

from remetal.errors import RefusedError, UsageError
from remetal.layout.inventory import probe_inventory
from remetal.layout.machine import read_machine, select_target, targets_of_machine
from remetal.layout.matching import find_marks, match_targets
from remetal.layout.model import FileSystem, Layout, Raw, Swap, Volume
from remetal.layout.plan import ImageFacts, Plan, PlanOptions, Target, plan_restore
from remetal.layout.probe import probe_layout
from remetal.layout.record import check_layout, decode_layout, encode_layout
from remetal.layout.targets import probe_target
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from tests.machines.make import FOLDER, MACHINES, render_readme
from tests.machines.parts import Machine
from tests.machines.record import rebuild
from tests.machines.sysfs import tree_of
from tests.real_disks import MIB, blank, make_gpt_disk

LAYOUTS = {machine.name: machine.layout() for machine in MACHINES}
NAMES = list(LAYOUTS)
by_name = pytest.mark.parametrize("name", NAMES)


def machine(name: str) -> Machine:
    return next(each for each in MACHINES if each.name == name)


def images_of(layout: Layout) -> dict[str, ImageFacts]:
    return {
        each.volume: ImageFacts(size=layout.place(each.volume)[2], used=each.size // 4, digest="d")
        for each in layout.captured()
    }


def plan_onto(layout: Layout, targets: dict[str, Target]) -> Plan:
    twice = [target.path for target in targets.values()]
    return plan_restore(layout, images_of(layout), targets, snapshot="s", options=PlanOptions(), overwrite=twice)


def test_there_is_a_file_and_a_line_for_every_machine() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES), "run `python -m tests.machines.make`"
    assert (FOLDER / "README.md").read_text() == render_readme()
    assert len(NAMES) >= 25


@by_name
def test_every_record_can_be_read(name: str) -> None:
    layout = read_machine(FOLDER / f"{name}.json")
    assert layout == LAYOUTS[name], "run `python -m tests.machines.make`"
    assert decode_layout(encode_layout(layout)) == layout
    assert layout.inventory is not None
    assert layout.inventory.disks == layout.disks


@by_name
def test_the_probe_says_of_sysfs_what_the_record_says(name: str, tmp_path: Path) -> None:
    """Out of everything that the kernel shows, paths and members and loops and all, the disks and nothing else."""
    rebuild(tree_of(machine(name)), tmp_path)
    expected = LAYOUTS[name].inventory
    assert expected is not None
    found = probe_inventory(tmp_path / "sys", tmp_path / "proc")
    assert sorted(found.disks, key=lambda disk: disk.name) == sorted(expected.disks, key=lambda disk: disk.name)
    own = {"architecture": expected.architecture, "disks": expected.disks}
    assert msgspec.structs.replace(found, **own) == msgspec.structs.replace(
        expected,
        modaliases=tuple(sorted(expected.modaliases)),
        nics=tuple(sorted(expected.nics, key=lambda nic: nic.name)),
    )


@by_name
def test_targets_of_a_recorded_machine(name: str) -> None:
    layout = LAYOUTS[name]
    targets = targets_of_machine(layout)
    assert [target.path for target in targets] == [f"/dev/{disk.name}" for disk in layout.disks]
    for target, disk in zip(targets, layout.disks, strict=True):
        assert (target.size, target.logical_sector, target.wwn, target.serial) == (
            disk.size,
            disk.logical_sector,
            disk.wwn,
            disk.serial,
        )
        assert bool(target.content) == (layout.layer_on(disk.name) is not None)


def test_what_is_on_the_disks_is_named() -> None:
    found = {name: [each.content for each in targets_of_machine(LAYOUTS[name])] for name in NAMES}
    assert found["laptop-bitlocker"] == [
        "GPT table with 4 partitions (vfat 'SYSTEM', unknown content, BitLocker volume, ntfs)"
    ]
    assert found["desktop-imsm-members"] == ["Intel RAID member", "Intel RAID member"]
    assert found["mail-drbd"] == ["DOS table with 3 partitions (ext4 'root', swap)", "DRBD device"]
    assert found["nas-synology"] == ["GPT table with 3 partitions (3 Linux RAID member)"] * 4
    assert found["server-blank"] == ["", "", ""]
    assert found["vm-xen"] == ["ext4 'root'", "swap"]
    assert "VMware datastore" in found["esxi-host"][0]


@by_name
def test_a_machine_is_matched_to_itself(name: str) -> None:
    """By its identity, or where hardware has none, by what it carries, under any name."""
    layout = LAYOUTS[name]
    targets = [
        msgspec.structs.replace(target, path=f"/dev/x{index}", name=f"x{index}")
        for index, target in enumerate(reversed(targets_of_machine(layout)))
    ]
    unknown = [disk.name for disk in layout.disks if not (disk.wwn or disk.serial or find_marks(layout, disk.name))]
    unknown = [disk for disk in unknown if layout.layer_on(disk) is not None]
    if unknown:
        with pytest.raises(RefusedError, match=f"not clear onto which disk {' and '.join(unknown)} should go"):
            match_targets(layout, targets)
        return
    found = match_targets(layout, targets)
    for disk in layout.disks:
        if layout.layer_on(disk.name) is not None:
            reason = "same world-wide name" if disk.wwn else "same serial number" if disk.serial else "it carries what"
            assert found[disk.name].reason.startswith(reason)
            assert find_marks(layout, disk.name) == set(found[disk.name].target.marks)


@by_name
def test_a_machine_is_planned_onto_itself(name: str) -> None:
    layout = LAYOUTS[name]
    targets = {target.name: target for target in targets_of_machine(layout)}
    plan = plan_onto(layout, targets)
    assert plan.result.layers == layout.layers
    assert len([text for text in plan.warnings if "will be overwritten" in text]) == len(
        [target for target in targets.values() if target.content]
    )


@by_name
def test_every_machine_onto_every_other_plans_or_refuses_with_a_sentence(name: str) -> None:
    """Once as the program would choose, once mapped by size: the largest disk onto the largest, and so on."""
    layout = LAYOUTS[name]
    planned = 0
    for other in NAMES:
        targets = targets_of_machine(LAYOUTS[other])
        with suppress(RefusedError):
            chosen = {source: match.target for source, match in match_targets(layout, targets).items()}
            check_plan(layout, chosen)
        disks = sorted(layout.disks, key=lambda disk: (-disk.size, disk.name))
        by_size = sorted(targets, key=lambda target: (-target.size, target.name))
        planned += check_plan(layout, {disk.name: target for disk, target in zip(disks, by_size, strict=False)})
    assert planned >= 1, "at least onto itself"


def check_plan(layout: Layout, targets: dict[str, Target]) -> bool:
    """Whether there is a plan: a sound one, whose steps stay on its targets, or a refusal that says why."""
    plan = find_plan(layout, targets)
    if isinstance(plan, RefusedError):
        assert len(plan.message.split()) > 4
        assert plan.hint
        return False
    check_layout(plan.result)
    assert plan.steps or not layout.layers
    assert {name: target.path for name, target in plan.targets.items()} == {
        name: target.path for name, target in targets.items()
    }
    kept = {volume_mark(volume) for volume in plan.result.volumes()}
    assert kept == {volume_mark(volume) for volume in layout.volumes()}
    assert plan_onto(layout, targets).id == plan.id
    return True


def find_plan(layout: Layout, targets: dict[str, Target]) -> Plan | RefusedError:
    try:
        return plan_onto(layout, targets)
    except RefusedError as error:
        return error


def volume_mark(volume: Volume) -> tuple[str, str, str]:
    match volume:
        case FileSystem() | Swap():
            return volume.on, getattr(volume, "type", "swap"), volume.uuid
        case Raw():
            return volume.on, volume.type, ""


def test_onto_a_new_server_of_which_only_the_record_is_known() -> None:
    targets = targets_of_machine(LAYOUTS["server-blank"])
    with pytest.raises(RefusedError) as caught:
        match_targets(LAYOUTS["laptop-bitlocker"], targets)
    assert caught.value.message.startswith(
        "it is not clear onto which disk nvme0n1 should go (nvme0n1: a system disk of 477 GiB on nvme): "
        "/dev/nvme0n1 (894 GiB) could take it; /dev/nvme1n1 (894 GiB) could take it; /dev/sda (10.9 TiB) could take it"
    )
    large = match_targets(LAYOUTS["laptop-dual-boot"], targets)["nvme0n1"]
    assert (large.target.path, large.reason) == ("/dev/sda", "the only disk that is free, blank and large enough")


def test_a_record_says_the_same_as_the_disk(tmp_path: Path) -> None:
    """A plan onto a record has the id that it has on the machine: nothing of a target may differ."""
    disk = make_gpt_disk(tmp_path / "a.img")
    with attach_loop(Span(disk, 0, disk.stat().st_size), writable=True) as device:
        layout = probe_layout([device])
        recorded = msgspec.structs.replace(layout, inventory=LAYOUTS["twins"].inventory)
        assert targets_of_machine(recorded) == (probe_target(device, size_if_missing=0),)


def test_disk_files_that_were_recorded_are_files(tmp_path: Path) -> None:
    disk = blank(tmp_path / "web.img", 8 * MIB)
    (target,) = targets_of_machine(probe_layout([disk]))
    assert (target.path, target.is_file, target.content) == ("web.img", True, "")


def test_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as caught:
        read_machine(tmp_path / "none.json")
    assert "remetal probe --json" in caught.value.hint
    other = tmp_path / "other.json"
    for text in ("", "{}", '{"disks": 1}', '{"disks": [], "layers": [], "version": 2}'):
        other.write_text(text)
        with pytest.raises(UsageError, match="is not the record of a machine") as caught:
            read_machine(other)
        assert "repository" not in caught.value.hint


def test_a_disk_of_a_recorded_machine_is_named_by_path_or_name() -> None:
    targets = targets_of_machine(LAYOUTS["server-san-boot"])
    assert select_target(targets, "mpatha") == select_target(targets, "/dev/mpatha") == targets[0]
    with pytest.raises(UsageError, match="has no disk /dev/sda") as caught:
        select_target(targets, "/dev/sda")
    assert caught.value.hint == "Its disks: /dev/mpatha, /dev/mpathb."
