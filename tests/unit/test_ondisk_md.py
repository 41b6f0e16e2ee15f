"""What we read of MD members is what mdadm reads of them, and the sizes are the kernel's.

The arrays are real ones: the kernel of User Mode Linux makes them on loop devices over disk files.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pytest

from lab.uml import run_in_uml
from remetal.ondisk.md import MdSuperblock, array_size, layout_name, level_name, parse_md
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop

pytestmark = pytest.mark.storage

MIB = 1 << 20
JOURNAL, PPL = "it has a journal device", "it keeps a partial parity log"


@dataclass(frozen=True)
class Case:
    """An array: mdadm's options, the members' sizes in MiB, and the problems to be found.

    Members stand in the options as `{0}`, `{1}` …; where none does, all are put behind them.
    """

    name: str
    options: str
    sizes: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def members(self) -> list[str]:
        return [f"{self.name}.{number}" for number in range(len(self.sizes))]


CASES = (
    Case("mirror0", "--metadata=0.90 --level=1 --raid-devices=2 --bitmap=internal", (16, 16)),
    Case("mirror10", "--metadata=1.0 --level=1 --raid-devices=2 --spare-devices=1 --bitmap=none --name=a", (16,) * 3),
    Case("mirror11", "--metadata=1.1 --level=1 --raid-devices=2 --bitmap=none {0} --write-mostly {1}", (16, 17)),
    Case("mirror12", "--level=1 --raid-devices=2 --bitmap=internal --bitmap-chunk=4M --name=größe", (16, 16)),
    Case("moved10", "--metadata=1.0 --level=1 --raid-devices=2 --data-offset=1M --size=8M --bitmap=none", (16, 16)),
    Case("lost", "--level=1 --raid-devices=2 --bitmap=internal --failfast {0} {1}", (16, 16)),
    Case("dirty0", "--metadata=0.90 --level=1 --raid-devices=2 --bitmap=none", (16, 16)),
    Case("dirty12", "--level=1 --raid-devices=2 --bitmap=none", (16, 16)),
    Case("stripe10", "--metadata=1.0 --level=0 --raid-devices=2 --chunk=64", (16, 16)),
    Case("stripe11", "--metadata=1.1 --level=0 --raid-devices=3 --chunk=64 --layout=original", (16, 21, 17)),
    Case("stripe12", "--level=0 --raid-devices=3 --chunk=12 --layout=alternate --homehost= --name=s", (17, 21, 16)),
    Case("linear0", "--metadata=0.90 --level=linear --raid-devices=2 --rounding=64", (17, 16)),
    Case("linear12", "--level=linear --raid-devices=2", (16, 19)),
    Case("parity40", "--metadata=0.90 --level=4 --raid-devices=3 --chunk=128 --bitmap=none", (16,) * 3),
    Case("parity412", "--level=4 --raid-devices=3 --chunk=64 --bitmap=internal", (16,) * 3),
    Case("parity50", "--metadata=0.90 --level=5 --raid-devices=3 --spare-devices=1 --bitmap=none", (16,) * 4),
    Case("parity510", "--metadata=1.0 --level=5 --layout=ra --raid-devices=3 --bitmap=none {0} missing {1}", (16, 16)),
    Case(
        "parity511", "--metadata=1.1 --level=5 --layout=parity-first --raid-devices=3 --bitmap=internal", (16, 18, 16)
    ),
    Case("journal", "--level=5 --raid-devices=3 {0} {1} {2} --write-journal={3}", (16, 16, 16, 24), (JOURNAL,)),
    Case("ppl", "--level=5 --raid-devices=3 --consistency-policy=ppl", (16,) * 3, (PPL,)),
    Case("parity60", "--metadata=0.90 --level=6 --raid-devices=4 --bitmap=internal", (16,) * 4),
    Case("parity612", "--level=6 --layout=ddf-N-continue --raid-devices=5 --bitmap=none --chunk=64", (16,) * 5),
    Case("ten0", "--metadata=0.90 --level=10 --layout=n2 --raid-devices=3 --chunk=64 --bitmap=none", (16,) * 3),
    Case("ten10", "--metadata=1.0 --level=10 --layout=f2 --raid-devices=3 --chunk=256 --bitmap=internal", (16,) * 3),
    Case("ten11", "--metadata=1.1 --level=10 --layout=o2 --raid-devices=5 --chunk=64 --bitmap=none", (16,) * 5),
    Case("ten12", "--level=10 --layout=n3 --raid-devices=4 --spare-devices=1 --bitmap=internal", (16,) * 5),
)
COPIES = ("dirty0.copy", "dirty12.copy")
"""Members as they were in the middle of writing: as after a power cut."""

SCRIPT = """
modprobe -a raid0 raid1 raid456 raid10 linear loop
cd $FOLDER
# mdadm makes its own device nodes then: a few times faster.
udevadm control --exit
export MDADM_NO_UDEV=1
attach() { members=(); for each in "$@"; do members+=($(losetup --find --show $each)); done; }
make() { mdadm --create --quiet --run --homehost=box /dev/md/$name "$@"; }
CREATE
mdadm --wait /dev/md/* || true
mdadm /dev/md/lost --fail ${lost[1]} --remove ${lost[1]}
dd if=/dev/urandom of=/dev/md/lost bs=64K count=1 conv=fsync
for name in dirty0 dirty12; do
  echo 60 >/sys/block/$(basename $(realpath /dev/md/$name))/md/safe_mode_delay
  dd if=/dev/urandom of=/dev/md/$name bs=64K count=1 conv=fsync
  cp $name.0 $name.copy
done
for name in ARRAYS; do
  array=/sys/block/$(basename $(readlink /dev/md/$name))
  echo $name $(<$array/size) $(<$array/md/level) >&3
done
mdadm --stop --scan
# mdadm makes no RAID 0 of version 0.90 any more, but the kernel runs those that are there.
cp linear0.0 stripe0.0
cp linear0.1 stripe0.1
$PYTHON as_raid0.py stripe0.0 stripe0.1
attach stripe0.0 stripe0.1
echo 1 >/sys/module/raid0/parameters/default_layout
mdadm --assemble --quiet --config=none --run /dev/md/stripe0 ${members[@]}
array=/sys/block/$(basename $(readlink /dev/md/stripe0))
echo stripe0 $(<$array/size) $(<$array/md/level) >&3
mdadm --stop --scan
"""
AS_RAID0 = """
import struct, sys
for path in sys.argv[1:]:
    with open(path, "r+b") as file:
        place = file.seek(0, 2) // 65536 * 65536 - 65536
        file.seek(place)
        words = list(struct.unpack("<1024I", file.read(4096)))
        words[7], words[38], words[65] = 0, 0, 65536
        total = sum(words)
        words[38] = (total + (total >> 32)) & 0xFFFFFFFF
        file.seek(place)
        file.write(struct.pack("<1024I", *words))
"""
"""Makes a RAID 0 with 64 KiB chunks of the members of a linear array of version 0.90."""


@dataclass(frozen=True)
class Seen:
    """The members' files, and by array what the kernel said inside: its size and its level."""

    folder: Path
    sizes: dict[str, int]
    levels: dict[str, str]

    def read(self, member: str) -> MdSuperblock:
        with (self.folder / member).open("rb") as file:
            return parse_file(file)

    def content(self, member: str) -> bytes:
        return (self.folder / member).read_bytes()


def parse_file(file: BinaryIO) -> MdSuperblock:
    device_size = file.seek(0, os.SEEK_END)

    def read(offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= device_size
        file.seek(offset)
        return file.read(size)

    return parse_md(read, device_size)


def parse(device: bytes) -> MdSuperblock:
    return parse_file(BytesIO(device))


def create(case: Case) -> str:
    """Return the shell commands that make the array."""
    loops = [f"${{members[{number}]}}" for number in range(len(case.sizes))]
    options = case.options.format(*loops) if "{" in case.options else " ".join([case.options, *loops])
    attach = f"name={case.name}; attach {' '.join(case.members)}; {case.name}=(${{members[@]}})"
    return f"{attach}\nmake {options}"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("md")
    for case in CASES:
        for member, size in zip(case.members, case.sizes, strict=True):
            with (folder / member).open("wb") as file:
                file.truncate(size * MIB)
    (folder / "as_raid0.py").write_text(AS_RAID0)
    script = SCRIPT.replace("CREATE", "\n".join(map(create, CASES)))
    script = script.replace("ARRAYS", " ".join(case.name for case in CASES))
    outcome = run_in_uml("exec 3>&1 >&2\n" + script, timeout=280, env={"FOLDER": str(folder), "PYTHON": sys.executable})
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert [line[0] for line in lines] == [*(case.name for case in CASES), "stripe0"]
    return Seen(folder, {line[0]: 512 * int(line[1]) for line in lines}, {line[0]: line[2] for line in lines})


def mdadm(*argv: str | Path) -> str:
    done = subprocess.run(
        ["mdadm", *argv], capture_output=True, text=True, check=False, env={**os.environ, "TZ": "UTC"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def examine(member: Path) -> dict[str, str]:
    """Return what mdadm says of a member, by its own words; `this` is the line with its place in version 0.90."""
    text = mdadm("--examine", member)
    said = dict(re.findall(r"^ *([A-Z][A-Za-z ]*?) : (.*?) *$", text, re.MULTILINE))
    said.update(re.findall(r"^(this) +(.*?) *$", text, re.MULTILINE))
    if "Internal Bitmap" in said:
        with attach_loop(Span(member, 0, member.stat().st_size), writable=False) as device:
            text = mdadm("--examine-bitmap", device)
        said.update(re.findall(r"^ *(Chunksize) : (.*?) *$", text, re.MULTILINE))
    return said


def first(said: dict[str, str], key: str) -> int:
    """Return the number that a line begins with, 0 if there is no such line."""
    return int(re.split(r"\D", said.get(key, "0"))[0])


def compare(ours: MdSuperblock, said: dict[str, str]) -> None:
    """Compare what both versions have in common."""
    assert ours.version == ".".join(said["Version"].split(".")[:2])
    assert level_name(ours.level) == said["Raid Level"]
    assert ours.raid_disks == first(said, "Raid Devices")
    assert ours.chunk == 1024 * (first(said, "Chunk Size") or first(said, "Rounding"))
    assert ours.events == first(said, "Events")
    updated = datetime.strptime(said["Update Time"], "%a %b %d %H:%M:%S %Y").replace(tzinfo=UTC)
    assert ours.updated == updated.timestamp()
    assert ours.clean == (said["State"] == "clean")
    assert ours.bitmap == ("Internal Bitmap" in said)
    units = {"KB": 1024, "MB": MIB}
    assert ours.bitmap_chunk == (first(said, "Chunksize") * units[said["Chunksize"].split()[1]] if ours.bitmap else 0)
    if ours.level in (5, 6):
        assert layout_name(ours.level, ours.layout) == said["Layout"]
    elif ours.level == 10:
        kind, _, copies = said["Layout"].partition("=")
        assert layout_name(10, ours.layout) == kind[0] + copies
    assert ours.component_size <= ours.data_size
    assert not ours.faulty


def compare_0(ours: MdSuperblock, said: dict[str, str], size: int) -> None:
    assert ours.array_uuid == said["UUID"].split()[0]
    assert (ours.device_uuid, ours.name) == ("", "")
    assert ours.preferred_minor == first(said, "Preferred Minor")
    assert ours.component_size == 1024 * first(said, "Used Dev Size")
    assert (ours.data_offset, ours.data_size) == (0, size // 65536 * 65536 - 65536)
    _, _, _, role, *state = said["this"].split()
    assert ours.slot == (int(role) if "sync" in state else None)
    assert ours.write_mostly == ("write-mostly" in state)
    assert ours.fail_fast == ("failfast" in state)


def compare_1(ours: MdSuperblock, said: dict[str, str]) -> None:
    assert ours.array_uuid == said["Array UUID"]
    assert ours.device_uuid == said["Device UUID"]
    assert ours.name == said["Name"].split("  ")[0]
    assert ours.preferred_minor is None
    assert ours.data_offset == 512 * first(said, "Data Offset")
    assert ours.data_size == 512 * first(said, "Avail Dev Size")
    used = 512 * first(said, "Used Dev Size") or ours.data_size
    assert ours.component_size == (used if ours.level > 0 else 0)
    role = re.match(r"Active device (\d+)", said["Device Role"])
    assert ours.slot == (int(role[1]) if role else None)
    flags = said.get("Flags", "").split()
    assert (ours.write_mostly, ours.fail_fast) == ("write-mostly" in flags, "failfast" in flags)


@pytest.mark.parametrize("member", [*(member for case in CASES for member in case.members), *COPIES])
def test_a_member_is_read_as_mdadm_reads_it(seen: Seen, member: str) -> None:
    ours, said = seen.read(member), examine(seen.folder / member)
    compare(ours, said)
    if ours.version == "0.90":
        compare_0(ours, said, (seen.folder / member).stat().st_size)
    else:
        compare_1(ours, said)
    assert not (ours.clean and member in COPIES)
    assert ours.problems == next((case.problems for case in CASES if member in case.members), ())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_are_those_of_the_kernel(seen: Seen, case: Case) -> None:
    members = [seen.read(member) for member in case.members]
    assert array_size(members) == array_size(members[::-1]) == seen.sizes[case.name]
    assert {level_name(member.level) for member in members} == {seen.levels[case.name]}
    if members[0].level in (-1, 0):
        with pytest.raises(BadStructureError, match="takes all its members"):
            array_size(members[1:])
    else:
        assert array_size(members[:1]) == seen.sizes[case.name]


@pytest.mark.parametrize(
    ("case", "name"), [(case, match[1]) for case in CASES if (match := re.search(r"--layout=(\S{2,})", case.options))]
)
def test_layouts_have_the_names_that_mdadm_took(seen: Seen, case: Case, name: str) -> None:
    member = seen.read(case.members[0])
    assert layout_name(member.level, member.layout) == {"ra": "right-asymmetric"}.get(name, name)


def test_a_member_that_was_lost_is_told_by_its_events(seen: Seen) -> None:
    kept, lost = seen.read("lost.0"), seen.read("lost.1")
    assert (kept.slot, lost.slot) == (0, 1)
    assert kept.array_uuid == lost.array_uuid
    assert kept.events > lost.events + 1


def test_an_old_raid_0(seen: Seen) -> None:
    members = [seen.read("stripe0.0"), seen.read("stripe0.1")]
    assert [(each.version, each.slot, each.chunk, each.problems) for each in members] == [
        ("0.90", 0, 65536, ()),
        ("0.90", 1, 65536, ()),
    ]
    assert array_size(members) == seen.sizes["stripe0"]
    assert level_name(members[0].level) == seen.levels["stripe0"]


def test_flags_of_members(seen: Seen) -> None:
    assert [seen.read(f"mirror11.{number}").write_mostly for number in (0, 1)] == [False, True]
    assert [seen.read(f"{name}.0").fail_fast for name in ("mirror11", "lost")] == [False, True]


def test_names_are_those_stored(seen: Seen) -> None:
    names = {case: seen.read(f"{case}.0").name for case in ("mirror10", "mirror12", "stripe12", "linear12")}
    assert names == {"mirror10": "box:a", "mirror12": "box:größe", "stripe12": "s", "linear12": "box:linear12"}


def test_of_several_superblocks_the_newest_counts(seen: Seen, tmp_path: Path) -> None:
    """The start of one member and the end of another are one device with two superblocks.

    The times of creation are in seconds, so these are arrays with many others made between them.
    """
    mixed = tmp_path / "mixed"
    for start, end, newer in (
        ("ten12.0", "mirror0.0", "ten12.0"),
        ("ten12.0", "mirror10.0", "ten12.0"),
        ("mirror12.0", "ten10.0", "ten10.0"),
    ):
        mixed.write_bytes(seen.content(start)[: 8 * MIB] + seen.content(end)[8 * MIB :])
        assert parse(mixed.read_bytes()) == seen.read(newer)
        assert examine(mixed)["Array UUID"] == seen.read(newer).array_uuid


def test_a_damaged_newest_superblock_does_not_bring_back_an_older_one(seen: Seen) -> None:
    mixed = bytearray(seen.content("ten12.0")[: 8 * MIB] + seen.content("mirror10.0")[8 * MIB :])
    mixed[4096 + 24] ^= 1
    with pytest.raises(BadStructureError, match=r"\(version 1\.2\) is damaged: its checksum is wrong"):
        parse(bytes(mixed))


@pytest.mark.parametrize("member", ["mirror0.0", "mirror10.0", "mirror11.0", "lost.0"])
def test_a_device_that_was_cut_short_is_refused(seen: Seen, member: str) -> None:
    with pytest.raises(BadStructureError):
        parse(seen.content(member)[: 15 * MIB])


def test_the_other_byte_order_is_refused(seen: Seen) -> None:
    device = bytearray(seen.content("mirror0.0"))
    place = len(device) - 65536
    words = struct.unpack("<1024I", device[place : place + 4096])
    device[place : place + 4096] = struct.pack(">1024I", *words)
    with pytest.raises(BadStructureError, match="other byte order"):
        parse(bytes(device))


def test_no_superblock() -> None:
    for size in (0, 511, 4096, 12 * 1024, 65536, MIB):
        with pytest.raises(BadStructureError, match="there is no MD superblock"):
            parse(bytes(size))


@pytest.mark.matrix
def test_mdadm_takes_every_name_of_a_layout_for_that_layout(tmp_path: Path) -> None:
    copies = [near | far << 8 | offset for near in range(5) for far in range(5) for offset in (0, 1 << 16)]
    kinds = [(level, layout) for level, layouts in ((5, range(32)), (6, range(32)), (10, copies)) for layout in layouts]
    kinds = [(level, layout) for level, layout in kinds if layout_name(level, layout)]
    lines = ["udevadm control --exit", "export MDADM_NO_UDEV=1", "modprobe -a raid456 raid10", f"cd {tmp_path}"]
    for level, layout in kinds:
        options = f"--level={level} --layout={layout_name(level, layout)} --raid-devices=4 --chunk=64 --bitmap=none"
        lines.append(f"mdadm --create --quiet --run --assume-clean /dev/md/x {options} /dev/ubd[abcd] >&2")
        lines.append(f"mdadm --stop /dev/md/x; dd if=/dev/ubda of={level}.{layout} bs=1M 2>/dev/null")
    disks = [tmp_path / name for name in "abcd"]
    for disk in disks:
        disk.write_bytes(bytes(4 * MIB))
    run_in_uml("\n".join(lines), disks=disks)
    for level, layout in kinds:
        member = parse((tmp_path / f"{level}.{layout}").read_bytes())
        assert (member.level, member.layout, member.problems) == (level, layout, ())
