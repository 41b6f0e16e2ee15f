"""Volume groups with stripes, mirrors and RAID on physical volumes of any other sizes: consistent, or refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from remetal.layout.layers.lvm_extents import extensible_devices, find_disagreement, least_space, plan_container
from remetal.layout.model import LogicalVolume, PhysicalVolume, VolumeGroup
from remetal.ondisk.lvm import parse_volume_group
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB

EXTENT = MIB
DATA = {"raid0": 0, "raid1": None, "raid5_ls": 1, "raid6_zr": 2}
"""How many images of a RAID hold parity; a mirror has the same in all."""


def uuid(number: int) -> str:
    return f"000000-0000-0000-0000-0000-0000-{number:06d}"


@dataclass
class Builder:
    """Writes a group's metadata as LVM does, and takes the extents one after the other."""

    pvs: list[int]
    used: list[int] = field(default_factory=list)
    lvs: list[str] = field(default_factory=list)
    shown: list[tuple[str, str, int]] = field(default_factory=list)
    count: int = 100

    def volume(self, name: str, segment: str, *, visible: bool = True) -> str:
        self.count += 1
        status = '"READ", "WRITE", "VISIBLE"' if visible else '"READ", "WRITE"'
        self.lvs.append(
            f'{name} {{\nid = "{uuid(self.count)}"\nstatus = [{status}]\nflags = []\nsegment_count = 1\n'
            f"segment1 {{\nstart_extent = 0\n{segment}\n}}\n}}"
        )
        return uuid(self.count)

    def take(self, pv: int, extents: int) -> str:
        first = self.used[pv]
        self.used[pv] += extents
        return f'"pv{pv}", {first}'

    def stripes(self, places: list[int], extents: int) -> str:
        words = ", ".join(self.take(pv, extents) for pv in places)
        size = "stripe_size = 128\n" if len(places) > 1 else ""
        return (
            f'extent_count = {extents * len(places)}\ntype = "striped"\nstripe_count = {len(places)}\n{size}'
            f"stripes = [{words}]"
        )

    def show(self, name: str, kind: str, extents: int, segment: str) -> None:
        self.shown.append((name, kind, extents))
        self.volume(name, segment)

    def raid(self, name: str, kind: str, places: list[int], extents: int) -> None:
        words = []
        for number, pv in enumerate(places):
            self.volume(f"{name}_rmeta_{number}", self.stripes([pv], 1), visible=False)
            self.volume(f"{name}_rimage_{number}", self.stripes([pv], extents), visible=False)
            words.append(f'"{name}_rmeta_{number}", "{name}_rimage_{number}"')
        parity = DATA[kind]
        whole = extents * (1 if parity is None else len(places) - parity)
        self.show(
            name,
            kind,
            whole,
            f'extent_count = {whole}\ntype = "{kind}"\ndevice_count = {len(places)}\nregion_size = 1024\n'
            f"stripe_size = 128\nraids = [{', '.join(words)}]",
        )

    def build(self) -> VolumeGroup:
        extents = [used + spare for used, spare in zip(self.used, self.pvs, strict=True)]
        pvs = "\n".join(
            f'pv{number} {{\nid = "{uuid(number + 1)}"\ndevice = "/dev/sd{number}"\n'
            'status = ["ALLOCATABLE"]\nflags = []\n'
            f"dev_size = {(count + 1) * 2048}\npe_start = 2048\npe_count = {count}\n}}"
            for number, count in enumerate(extents)
        )
        text = (
            f'vg {{\nid = "{uuid(99)}"\nseqno = 1\nformat = "lvm2"\n'
            'status = ["RESIZEABLE", "READ", "WRITE"]\nflags = []\n'
            f"extent_size = 2048\nmax_lv = 0\nmax_pv = 0\nphysical_volumes {{\n{pvs}\n}}\n"
            f"logical_volumes {{\n{chr(10).join(self.lvs)}\n}}\n}}\n"
            'contents = "Text Format Volume Group"\nversion = 1\n'
        )
        known = {each.name: each.uuid for each in parse_volume_group(text).lvs}
        return VolumeGroup(
            name="vg",
            uuid=uuid(99),
            extent_size=EXTENT,
            members=tuple(
                PhysicalVolume(space=f"d{i}", name=f"pv{i}", uuid=uuid(i + 1), data_start=MIB, extents=count)
                for i, count in enumerate(extents)
            ),
            volumes=tuple(
                LogicalVolume(name=name, uuid=known[name], size=count * EXTENT, kind=kind, captured=True)
                for name, kind, count in self.shown
            ),
            metadata=text,
        )


@st.composite
def groups(draw: st.DrawFn) -> VolumeGroup:
    count = draw(st.integers(2, 5))
    builder = Builder([draw(st.integers(0, 20)) for _ in range(count)], [0] * count)
    places = st.lists(st.integers(0, count - 1), min_size=2, max_size=count, unique=True)
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "striped", *DATA]))
        extents, where = draw(st.integers(1, 30)), draw(places)
        if kind == "linear":
            builder.show(f"lv{number}", kind, extents, builder.stripes(where[:1], extents))
        elif kind == "striped":
            builder.show(f"lv{number}", kind, extents * len(where), builder.stripes(where, extents))
        elif DATA[kind] is None or len(where) > (DATA[kind] or 0) + 1:
            builder.raid(f"lv{number}", kind, where, extents)
    return builder.build()


@settings(max_examples=300)
@given(st.data(), groups())
def test_what_is_planned_is_a_group(data: Any, group: VolumeGroup) -> None:
    assert find_disagreement(group) == ""
    gains = {
        each.space: data.draw(st.integers(-each.extents, 40)) * EXTENT + data.draw(st.sampled_from([0, 4096]))
        for each in group.members
    }
    needs = {f"vg/{each.name}": data.draw(st.integers(1, each.size)) for each in group.volumes}
    able = extensible_devices(group)
    wish = data.draw(st.sampled_from(["", *able]))
    try:
        planned = plan_container(group, gains, wish, needs)
    except BadStructureError:
        event("refused")
        return
    event("planned")
    assert find_disagreement(planned) == ""  # parsing it has found no extent that is used twice or is not there
    for before, after in zip(group.members, planned.members, strict=True):
        assert after.extents == before.extents + gains[before.space] // EXTENT
    for old, new in zip(group.volumes, planned.volumes, strict=True):
        assert (new.name, new.uuid, new.kind) == (old.name, old.uuid, old.kind)
        assert new.size >= min(needs[f"vg/{old.name}"], old.size)
        if new.size > old.size:
            event("grown")
            assert f"vg/{old.name}" == wish
        if new.size < old.size:
            event("shrunk")


@settings(max_examples=200)
@given(groups(), st.integers(1, 30 * EXTENT))
def test_all_at_their_least_fit(group: VolumeGroup, need: int) -> None:
    """If every physical volume has just what it is said to need, the group fits, one with other than linear volumes."""
    if all(each.kind == "linear" for each in group.volumes):
        return
    needs = {f"vg/{each.name}": min(need, each.size) for each in group.volumes}
    gains = {}
    for each in group.members:
        size = (each.extents + 1) * EXTENT
        gains[each.space] = least_space(group, each.space, size, needs) - size
    planned = plan_container(group, gains, "", needs)
    assert find_disagreement(planned) == ""
