"""Random disks and random candidates: every disk finds its one place for a reason, or all candidates are listed."""

from __future__ import annotations

import msgspec.structs
from hypothesis import event, given, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError
from remetal.layout.matching import IS_MEDIUM, Match, match_targets
from remetal.layout.model import Disk, Layout, Raw
from remetal.layout.plan import Target
from remetal.layout.sameness import is_same_disk_by_serial, is_same_disk_by_wwn, plain_serial, plain_wwn

GIB = 1 << 30
SIZES = st.sampled_from([GIB, 2 * GIB, 3 * GIB])
WORDS = {
    "wwn": st.sampled_from(["", "", "naa.5000c500000000a1", "0x5000C500000000A1", "eui.0025385b71b01234"]),
    "serial": st.sampled_from(["", "", "S1", " s1", "S2", "QM00001", "0"]),
    "bus": st.sampled_from(["", "ata", "scsi", "usb", "virtio"]),
    "model": st.sampled_from(["", "ACME", "ACME "]),
}
DISKS = st.lists(st.builds(Disk, name=st.just(""), size=SIZES, **WORDS), min_size=1, max_size=4)
TARGETS = st.lists(
    st.builds(
        Target,
        path=st.just(""),
        name=st.just(""),
        size=SIZES,
        content=st.sampled_from(["", "", "", "swap"]),
        uses=st.sampled_from([(), (), (), ("/dev/x is mounted",)]),
        roles=st.sampled_from([(), (), (), (IS_MEDIUM,)]),
        **WORDS,
    ),
    max_size=6,
)


def layout_of(disks: list[Disk]) -> Layout:
    named = tuple(msgspec.structs.replace(disk, name=f"d{index}") for index, disk in enumerate(disks))
    return Layout(disks=named, layers=tuple(Raw(on=disk.name, size=disk.size) for disk in named))


def named(targets: list[Target]) -> list[Target]:
    return [
        msgspec.structs.replace(target, path=f"/dev/t{index}", name=f"t{index}") for index, target in enumerate(targets)
    ]


def outcome(layout: Layout, targets: list[Target]) -> dict[str, Match] | str:
    try:
        return match_targets(layout, targets)
    except RefusedError as error:
        return f"{error.message}\n{error.hint}"


@settings(max_examples=500)
@given(DISKS, TARGETS)
def test_every_disk_has_its_own_place_for_a_reason_or_all_are_listed(disks: list[Disk], found: list[Target]) -> None:
    layout, targets = layout_of(disks), named(found)
    result = outcome(layout, targets)
    event("refused" if isinstance(result, str) else "matched")
    if isinstance(result, str):
        assert "--map d" in result
        for target in targets:
            taken = any(
                is_same_disk_by_wwn(disk, target)
                or is_same_disk_by_serial(disk, target)
                or (disk.size, disk.bus) == (target.size, target.bus)
                for disk in layout.disks
            )
            assert taken or f"{target.path} (" in result
        return
    assert result.keys() == {disk.name for disk in layout.disks}
    assert len({match.target.path for match in result.values()}) == len(result)
    for disk in layout.disks:
        target, reason = result[disk.name].target, result[disk.name].reason
        event(reason.split(",")[0])
        if reason.startswith("same world-wide name"):
            assert is_same_disk_by_wwn(disk, target)
        elif reason.startswith("same serial number"):
            assert is_same_disk_by_serial(disk, target)
        else:
            assert not target.content
            assert not target.uses
            assert not target.roles
            assert target.size >= disk.size
            assert target.bus != "usb" or disk.bus == "usb"


@settings(max_examples=300)
@given(DISKS, TARGETS, st.data())
def test_names_and_order_do_not_matter(disks: list[Disk], found: list[Target], data: st.DataObject) -> None:
    """The kernel may find the disks in any order, and so call them by any name."""
    layout, targets = layout_of(disks), named(found)
    before = outcome(layout, targets)
    mixed = data.draw(st.permutations(targets))
    moved = [msgspec.structs.replace(target, name=f"x{index}") for index, target in enumerate(mixed)]
    after = outcome(layout, moved)
    if isinstance(before, str) or isinstance(after, str):
        assert isinstance(before, str)
        assert isinstance(after, str)
        return
    assert {name: match.target.path for name, match in before.items()} == {
        name: match.target.path for name, match in after.items()
    }


@given(DISKS, TARGETS)
def test_a_disk_whose_identity_is_unique_goes_to_itself(disks: list[Disk], found: list[Target]) -> None:
    """Whatever else is attached: the disk itself is recognised, also behind another controller."""
    itself = Disk(name="", size=7 * GIB, wwn="naa.5000c5000000beef", serial="UNIQUE-7", bus="ata")
    layout = layout_of([itself, *disks])
    there = Target(
        path="", name="", size=7 * GIB, wwn="0x5000C5000000BEEF", serial="  unique-7", bus="scsi", content="x"
    )
    targets = named([*found, there])
    result = outcome(layout, targets)
    if not isinstance(result, str):
        assert result["d0"].target == targets[-1]
    else:
        assert "d0" not in result.split("(")[0]


@given(st.text(max_size=40))
def test_plain_forms_stay_as_they_are(text: str) -> None:
    for plain in (plain_wwn(text), plain_serial(text)):
        assert plain == plain.lower()
        assert not any(each.isspace() for each in plain)
