"""Whatever stands in an fstab, planning it never raises, is idempotent and touches first fields only."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.adapt.fstab import parse_fstab, plan_fstab
from remetal.adapt.text import TextPlan
from remetal.layout.model import Disk, FileSystem, GptTable, Layout, Partition, Swap
from tests.adapt_identities import identify

PARTS = tuple(
    Partition(number=number, start=number << 20, size=1 << 20, type="x", uuid=f"GUID-{number}") for number in (1, 2, 3)
)
LAYOUT = Layout(
    disks=(Disk(name="sda", size=1 << 30),),
    layers=(
        GptTable(on="sda", disk_guid="X", entry_count=128, partitions=PARTS, protective_mbr=b""),
        FileSystem(on="sda:1", type="ext4", size=1, used=0, block_size=4096, uuid="aaaa"),
        Swap(on="sda:2", size=1, uuid="bbbb"),
    ),
)

specs = st.sampled_from(
    ["/dev/sda1", "/dev/sda2", "/dev/sda3", "/dev/sdb1", "/dev/nvme0n1p1", "UUID=aaaa", "LABEL=x", "tmpfs",
     "/dev/sda", "/dev/disk/by-path/pci-1-part1", "PARTUUID=GUID-3", "a\\040b"]
)  # fmt: skip
fields = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)
lines = st.one_of(
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=40),
    st.builds(
        lambda spec, target, kind, rest, gap: f"{spec}{gap}{target}{gap}{kind}{gap}{rest}",
        specs,
        st.sampled_from(["/", "/home", "none"]),
        st.sampled_from(["ext4", "swap", "auto", "xfs", ""]),
        fields,
        st.sampled_from([" ", "\t", "  "]),
    ),
)


def planned(text: str) -> TextPlan:
    identities = identify(LAYOUT, root="sda:1", fstab=text)
    return plan_fstab(text, source=LAYOUT, result=LAYOUT, identities=identities)


@given(st.lists(lines, max_size=8).map("\n".join))
@settings(max_examples=300)
def test_planning_is_total_idempotent_and_narrow(text: str) -> None:
    plan, again = planned(text), planned(planned(text).text)
    contradicts = any(each.target == "/" and "sda" not in each.spec for each in parse_fstab(text))
    assert contradicts or (again.text, again.changes) == (plan.text, ())
    old, new = parse_fstab(text), parse_fstab(plan.text)
    assert [(each.line, each.target, each.kind, each.options) for each in old] == [
        (each.line, each.target, each.kind, each.options) for each in new
    ]
    assert sum(one.spec != other.spec for one, other in zip(old, new, strict=True)) == len(plan.changes)
    for before, after, number in zip(text.split("\n"), plan.text.split("\n"), range(10_000), strict=False):
        if number not in {each.line for each in old}:
            assert before == after
        assert before.lstrip(" \t").partition(" ")[2].split("\t")[-1] in after
