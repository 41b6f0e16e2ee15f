"""Who is who on random stacks: nothing is forgotten, what stands has lasting names, and what is left out is told."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.adapt.evidence import Nodes, find_nodes
from remetal.adapt.firmware import find_boot_device, find_partitions
from remetal.adapt.identities import Known, plan_identities
from remetal.adapt.identity import Identities, Named, find_named, plan_name
from remetal.adapt.restored import Restored
from remetal.errors import RemetalError
from remetal.layout.model import FileSystem, Layout, Luks, MdArray, Swap, VolumeGroup
from remetal.layout.reshape import reshape
from tests.stacked_layouts import stacked_layouts

QUICK = settings(max_examples=150)


def nodes_of(layout: Layout) -> Nodes:
    """Return the nodes that a system on the first volume would know."""
    roots = [volume.on for volume in layout.volumes() if isinstance(volume, FileSystem)]
    return find_nodes(layout, roots[0], "/dev/sda1", []) if roots else Nodes()


def planned(source: Layout, result: Layout, moved: dict[str, str]) -> Identities:
    restored = Restored(source=source, result=result, devices={}, moved=moved)
    return plan_identities(restored, nodes_of(source), Known())


@given(stacked_layouts())
@QUICK
def test_everything_is_known_and_its_lasting_names_hold(layout: Layout) -> None:
    it = planned(layout, layout, {})
    assert all(each.kind == "lv" for each in it.gone)
    kinds = {(each.kind, each.space) for each in it.volumes}
    for layer in layout.layers:
        match layer:
            case FileSystem():
                assert ("filesystem", layer.on) in kinds
            case Swap():
                assert ("swap", layer.on) in kinds
            case Luks():
                assert ("luks", layer.on) in kinds
            case MdArray():
                assert {("md", layer.device), *(("member", space) for space in layer.spaces)} <= kinds
            case VolumeGroup():
                assert {("vg", layer.name), *(("pv", space) for space in layer.spaces)} <= kinds
            case _:
                pass
    for each in it.volumes:
        assert each.now is None
        for name in each.lasting:
            found = find_named(name, it, (each.kind,))
            assert isinstance(found, Named)
            assert plan_name(name, found) == name


@given(stacked_layouts(), st.data())
@QUICK
def test_what_is_left_stands_and_what_is_gone_is_told(layout: Layout, data: st.DataObject) -> None:
    disks = [disk.name for disk in layout.disks]
    arrays = [layer.device for layer in layout.layers if isinstance(layer, MdArray)]
    without = data.draw(st.sets(st.sampled_from(disks), max_size=len(disks) - 1)) if len(disks) > 1 else set[str]()
    dissolve = data.draw(st.sets(st.sampled_from(arrays))) if arrays else set[str]()
    try:
        shaped = reshape(layout, without=sorted(without), dissolve=sorted(dissolve))
    except RemetalError:
        return
    it = planned(layout, shaped.layout, dict(shaped.moved))
    before = planned(layout, layout, {})
    assert {(each.kind, each.space) for each in before.everything} == {
        (each.kind, each.space) for each in it.everything
    }
    for each in it.volumes:
        if each.kind not in {"vg", "lv"}:
            shaped.layout.place(each.space_now)
    assert all(each.why for each in it.gone)
    assert {each.space for each in it.gone if each.kind == "disk"} == without
    gone = {each.space for each in it.gone if each.kind in {"filesystem", "swap"}}
    assert gone == {space for space in shaped.dropped if isinstance(layout.layer_on(space), (FileSystem, Swap))}


@given(stacked_layouts())
@QUICK
def test_the_firmware_finds_partitions_of_disks_alone(layout: Layout) -> None:
    for volume in layout.volumes():
        for space in find_partitions(layout, volume.on):
            seen = {find_boot_device(layout, disk.name) for disk in layout.disks}
            assert layout.place(space)[0].name in seen
