"""Choosing a part of a snapshot: what lies inside of containers stays in them, or is refused."""

from __future__ import annotations

import pytest

from remetal.errors import RefusedError
from remetal.layout.model import ArrayMember, Disk, Layout, Luks, MbrTable, MdArray, Partition, Raw
from remetal.layout.plan import PlanOptions, Target, plan_restore
from remetal.layout.steps import ClearSignatures, ImageFacts, OpenContainer, WriteImage, WriteTable
from remetal.units import MIB

SIZE = 64 * MIB
TABLE = MbrTable(
    on="md/a",
    signature="01020304",
    boot_code=bytes(440),
    partitions=(Partition(number=1, start=MIB, size=8 * MIB, type="83"),),
)
ARRAY = MdArray(
    device="md/a",
    size=SIZE - 64 * 1024,
    members=(ArrayMember(space="sda", slot=0, data_size=SIZE - 64 * 1024),),
    uuid="00112233:44556677:8899aabb:ccddeeff",
    level="raid1",
    metadata="1.0",
    slots=1,
    component_size=SIZE - 64 * 1024,
)
SEALED = Luks(
    on="sda",
    version=1,
    uuid="12345678-1234-4234-8234-1234567890ab",
    header_size=MIB,
    size=SIZE - MIB,
    key_size=64,
    cipher="aes-xts-plain64",
)


def plan(layers: tuple[object, ...], images: dict[str, int], options: PlanOptions) -> list[object]:
    layout = Layout(disks=(Disk(name="sda", size=SIZE),), layers=layers)  # type: ignore[arg-type]
    target = Target(path="/t/sda", name="sda", size=SIZE, content="as it was")
    facts = {name: ImageFacts(size=size, used=1, digest="d", image="") for name, size in images.items()}
    found = plan_restore(layout, facts, {"sda": target}, snapshot="s", options=options, overwrite=["/t/sda"])
    return list(found.steps)


@pytest.mark.parametrize("options", [PlanOptions(keep=("md/a:1",)), PlanOptions(only=("md/a:1",))])
def test_a_partition_inside_of_an_array_is_refused(options: PlanOptions) -> None:
    layers = (ARRAY, TABLE, Raw(on="md/a:1", size=8 * MIB))
    with pytest.raises(RefusedError, match="md/a:1 is a partition of md/a, which is inside of a container") as told:
        plan(layers, {"md/a:1": 8 * MIB}, options)
    assert "Name md/a as a whole" in (told.value.hint or "")


def test_a_whole_array_that_is_kept_is_opened_as_it_stands_and_no_more() -> None:
    layers = (ARRAY, TABLE, Raw(on="md/a:1", size=8 * MIB))
    steps = plan(layers, {"md/a:1": 8 * MIB}, PlanOptions(keep=("md/a",)))
    assert not any(isinstance(step, (WriteTable, WriteImage)) for step in steps)
    assert [step.make for step in steps if isinstance(step, OpenContainer)] == [False]


def test_the_header_of_what_is_kept_is_not_written() -> None:
    layers = (SEALED, Raw(on="sda:luks", size=SIZE - MIB))
    images = {"sda:header": MIB, "sda:luks": SIZE - MIB}
    steps = plan(layers, images, PlanOptions(keep=("sda:luks",)))
    assert not any(isinstance(step, (WriteImage, ClearSignatures)) for step in steps)
