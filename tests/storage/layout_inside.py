"""What the storage ring runs inside its own kernel: real block devices, scanned partitions, arrays and mappings."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from remetal.errors import RefusedError
from remetal.layout.apply import apply_step, need_step_programs, opened_site
from remetal.layout.disks import check_capturable, describe_use, find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.model import FileSystem, Layout, Raw, Swap
from remetal.layout.plan import Plan, PlanOptions, plan_restore
from remetal.layout.probe import probe_layout
from remetal.layout.steps import WriteImage
from remetal.layout.targets import probe_target
from remetal.layout.uses import disks_of_number
from remetal.system.blockdev import flush_cache, open_disk
from remetal.system.mounts import mounted
from tests.real_disks import Source

SOURCE, TARGET = Path("/dev/ubda"), Path("/dev/ubdb")
PARTITIONS = """label: gpt
size=2MiB, type=21686148-6449-6E6F-744E-656564454649
size=40MiB, type=uefi, name=ESP
size=60MiB, type=linux, name=root
size=16MiB, type=swap
"""


def program(*argv: str | Path) -> str:
    """Run a program and return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def partition(disk: Path, text: str) -> None:
    """Write a partition table and wait for its devices."""
    subprocess.run(["sfdisk", "--quiet", "--wipe=always", disk], input=text, text=True, check=True)
    program("udevadm", "settle")


def refusal(work: Callable[[], object]) -> str:
    """Return the sentence with which something is refused."""
    try:
        work()
    except RefusedError as error:
        return error.message
    raise AssertionError("it was not refused")


def make_source() -> Layout:
    """Make a small machine's disk, with a file on its root."""
    partition(SOURCE, PARTITIONS)
    program("mkfs.vfat", "-n", "ESP", f"{SOURCE}2")
    program("mkfs.ext4", "-q", "-L", "root", f"{SOURCE}3")
    program("mkswap", "-q", "-L", "swap", f"{SOURCE}4")
    with mounted(Path(f"{SOURCE}3")) as place:
        (place / "file").write_bytes(b"content" * 100_000)
    return probe_layout([SOURCE])


def restore_onto_larger_disk() -> None:
    """A disk that was a volume group's becomes the source's twin; the kernel sees it without a reboot."""
    layout = make_source()
    assert [type(each) for each in layout.volumes()] == [Raw, FileSystem, FileSystem, Swap]
    source = Source(SOURCE, layout)
    program("pvcreate", "--quiet", "--yes", TARGET)
    target = probe_target(TARGET, size_if_missing=0)
    assert (target.content, target.uses, target.is_file) == ("LVM physical volume", (), False)
    plan = make_plan(source)
    assert any("LVM physical volume" in text for text in plan.warnings)
    need_step_programs(plan.steps)
    assert source.apply(plan, TARGET) > 0
    program("udevadm", "settle")
    assert "No problems found" in program("sgdisk", "--verify", TARGET)
    assert program("blkid", "-p", "-o", "value", "-s", "TYPE", f"{TARGET}3").strip() == "ext4"
    assert program("blkid", "-p", "-o", "value", "-s", "LABEL", f"{TARGET}4").strip() == "swap"
    assert "LVM2_member" not in program("wipefs", TARGET)
    assert plan.grown == ("ubda:3",)
    program("e2fsck", "-fn", f"{TARGET}3")
    with mounted(Path(f"{TARGET}3"), options=["ro"]) as place:
        assert (place / "file").read_bytes() == b"content" * 100_000
        assert sum(1 for line in Path("/proc/partitions").read_text().splitlines() if "ubdb" in line) == 5
    size = int(Path("/sys/class/block/ubdb3/size").read_text()) * 512
    assert size == plan.result.place("ubda:3")[2] > layout.place("ubda:3")[2]
    flush_cache(TARGET)
    assert make_plan(source).id == plan.id
    rest = [step for step in plan.steps if not isinstance(step, WriteImage)]
    with opened_site(plan.result, {"ubda": TARGET}) as site:
        assert sum(apply_step(step, site) for step in rest) == 0, "a second run wrote something"


def make_plan(source: Source) -> Plan:
    """Plan the source onto the target."""
    target = probe_target(TARGET, size_if_missing=0)
    return plan_restore(
        source.layout, source.images(), {"ubda": target}, snapshot="s", options=PlanOptions(), overwrite=[str(TARGET)]
    )


def uses_through_every_layer() -> None:
    """Mounts are found through partitions, MD and LVM; swap by its device; each refuses capture and target."""
    layout = make_source()
    paths = {"ubda": SOURCE}
    check_capturable(layout, paths)
    root = Path(f"{SOURCE}3")
    with mounted(root, options=["ro"]):
        check_capturable(layout, paths)
        assert "read-only" in refusal(lambda: make_plan_onto_source(layout))
    with mounted(root) as place:
        said = refusal(lambda: check_capturable(layout, paths))
        assert f"ubda:3: /dev/ubda3 is mounted read-write at {place}" in said
    program("swapon", f"{SOURCE}4")
    check_capturable(layout, paths)
    assert [str(use) for use in describe_use(SOURCE)] == ["/dev/ubda4 is active swap space"]
    program("swapoff", f"{SOURCE}4")
    assert describe_use(SOURCE) == []
    through_mappings()


def make_plan_onto_source(layout: Layout) -> Plan:
    """Plan the source onto itself, as a rollback does."""
    source = Source(SOURCE, layout)
    target = probe_target(SOURCE, size_if_missing=0)
    return plan_restore(layout, source.images(), {"ubda": target}, snapshot="s", options=PlanOptions())


def through_mappings() -> None:
    """LVM on MD on two partitions of two disks: one mount uses both disks."""
    partition(SOURCE, "label: dos\nsize=64MiB\n")
    partition(TARGET, "label: gpt\nsize=64MiB\n")
    members = [f"{SOURCE}1", f"{TARGET}1"]
    array = ["--level=1", "--raid-devices=2", "--metadata=1.2", "--assume-clean", "--run"]
    program("mdadm", "--quiet", "--create", "/dev/md7", *array, *members)
    program("pvcreate", "--quiet", "/dev/md7")
    program("vgcreate", "--quiet", "vg", "/dev/md7")
    program("lvcreate", "--quiet", "--yes", "--zero=n", "--size=32M", "--name=lv", "vg")
    layout = probe_layout([SOURCE, TARGET])
    paths = {"ubda": SOURCE, "ubdb": TARGET}
    found = {each.on: getattr(each, "type", "") for each in layout.volumes() if not each.on.endswith(":boot")}
    assert found == {"ubda:1": "linux_raid_member", "ubdb:1": "linux_raid_member"}
    program("mkfs.ext4", "-q", "/dev/vg/lv")
    with mounted(Path("/dev/vg/lv")) as place:
        number = Path(place).stat().st_dev
        assert disks_of_number((number >> 8, number & 0xFF)) == {"ubda", "ubdb"}
        said = refusal(lambda: check_capturable(layout, paths))
        assert f"ubda:1: /dev/dm-0 is mounted read-write at {place}" in said
        assert "ubdb:1: /dev/dm-0" in said
        assert probe_target(TARGET, size_if_missing=0).uses
    with mounted(Path("/dev/vg/lv"), options=["ro"]):
        check_capturable(layout, paths)
    assert [use.what for use in describe_use(SOURCE)] == ["busy"]
    program("vgchange", "--quiet", "--activate=n", "vg")
    program("mdadm", "--quiet", "--stop", "/dev/md7")
    assert describe_use(SOURCE) == []


def disks_of_this_kernel() -> None:
    """Only the two disks are disks, and they can be opened."""
    assert find_disks() == [SOURCE, TARGET]
    assert [(disk.name, disk.bus) for disk in probe_inventory().disks] == [("ubda", "uml"), ("ubdb", "uml")]
    with open_disk(SOURCE) as disk:
        assert disk.size() == probe_inventory().disks[0].size
