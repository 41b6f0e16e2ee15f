"""Disks are matched by what they are, never by what the kernel calls them."""

from __future__ import annotations

import pytest

from remetal.errors import RefusedError, UsageError
from remetal.layout.matching import match_targets
from remetal.layout.model import Disk, GptTable, Layout
from remetal.layout.plan import PlanOptions, Target, plan_restore

GIB = 1 << 30
A = Disk(name="sda", size=10 * GIB, wwn="naa.1", serial="A1")
B = Disk(name="sdb", size=20 * GIB, serial="B1")


def target(name: str, size: int = 20 * GIB, **more: str | int | bool | tuple[str, ...]) -> Target:
    return Target(path=f"/dev/{name}", name=name, size=size, **more)  # type: ignore[arg-type]


def test_world_wide_name_beats_the_kernels_name() -> None:
    found = match_targets([A], [target("sda"), target("sdb", wwn="naa.1", content="the old system")])
    assert found["sda"].path == "/dev/sdb"


def test_serial_number_where_there_is_no_world_wide_name() -> None:
    found = match_targets([A, B], [target("sda", serial="B1"), target("sdb", serial="A1", wwn="naa.2")])
    assert {name: each.path for name, each in found.items()} == {"sda": "/dev/sdb", "sdb": "/dev/sda"}


def test_identities_that_are_not_unique_do_not_count() -> None:
    candidates = [target("sdc", serial="A1"), target("sdd", serial="A1")]
    with pytest.raises(RefusedError, match=r"/dev/sdc \(20.0 GiB\) could take it; /dev/sdd"):
        match_targets([A], candidates)
    twins = [Disk(name="sda", size=GIB, serial="0"), Disk(name="sdb", size=GIB, serial="0")]
    with pytest.raises(RefusedError, match="sda and sdb"):
        match_targets(twins, [target("sdc", serial="0")])


def test_the_only_blank_one_that_is_large_enough() -> None:
    candidates = [
        target("sda", content="GPT table with 2 partitions"),
        target("sdb", 5 * GIB),
        target("sdc"),
        target("sdd", uses=("/dev/sdd1 is mounted read-write at /mnt",)),
        target("sde", roles=("is the recovery medium",)),
        target("sdf", logical_sector=4096),
    ]
    assert match_targets([A], candidates)["sda"].path == "/dev/sdc"
    with pytest.raises(RefusedError) as caught:
        match_targets([A], [each for each in candidates if each.name != "sdc"])
    for reason in (
        "/dev/sda (20.0 GiB) holds GPT table with 2 partitions",
        "/dev/sdb (5.00 GiB) is smaller than sda, which has 10.0 GiB",
        "/dev/sdd (20.0 GiB) cannot be taken (/dev/sdd1 is mounted read-write at /mnt)",
        "/dev/sde (20.0 GiB) is the recovery medium",
        "/dev/sdf (20.0 GiB) has sectors of 4096 bytes",
    ):
        assert reason in caught.value.message
    assert "--map sda=TARGET" in caught.value.hint


def test_two_that_fit_are_one_too_many() -> None:
    with pytest.raises(RefusedError, match="not clear"):
        match_targets([A], [target("sda"), target("sdb")])
    with pytest.raises(RefusedError, match="no other disk"):
        match_targets([A], [])


def test_blank_is_only_taken_for_a_single_disk() -> None:
    with pytest.raises(RefusedError, match="sda and sdb"):
        match_targets([A, B], [target("sdx"), target("sdy", 10 * GIB)])
    rest = match_targets([A, B], [target("sdx", wwn="naa.1"), target("sdy")])
    assert rest["sdb"].path == "/dev/sdy"


GUID = "12345678-1234-4234-8234-1234567890AB"
TABLE = GptTable(on="sda", disk_guid=GUID, entry_count=128, partitions=(), protective_mbr=bytes(512))
LAYOUT = Layout(
    disks=(A, B), layers=(TABLE, GptTable(**{**{f: getattr(TABLE, f) for f in TABLE.__struct_fields__}, "on": "sdb"}))
)


def refused(**targets: Target) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        plan_restore(LAYOUT, {}, targets, snapshot="s", options=PlanOptions())
    return caught.value


def test_the_plan_refuses_what_cannot_be_meant() -> None:
    assert "there is no target for disk sdb" in refused(sda=target("x")).message
    assert "both go to /dev/x" in refused(sda=target("x"), sdb=target("x")).message
    other = refused(sda=target("x", logical_sector=4096), sdb=target("y"))
    assert "sectors of 4096 bytes, sda had 512" in other.message
    tight = refused(sda=target("x", is_file=True, size=0), sdb=target("y"))
    assert "impossible size" in tight.message
    with pytest.raises(UsageError, match="no disk 'sdz'"):
        plan_restore(LAYOUT, {}, {"sdz": target("x")}, snapshot="s", options=PlanOptions())


def test_all_reasons_are_told_at_once() -> None:
    error = refused(
        sda=target("x", uses=("/dev/x1 is mounted read-only at /mnt",)),
        sdb=target("y", roles=("holds the repository",)),
    )
    assert "/dev/x must not be overwritten: /dev/x1 is mounted read-only at /mnt" in error.message
    assert "/dev/y must not be overwritten: it holds the repository" in error.message


def test_another_sector_size_is_no_matter_for_a_disk_file() -> None:
    coarse = Layout(disks=(Disk(name="sda", size=GIB, logical_sector=4096),), layers=(TABLE,))
    plan = plan_restore(coarse, {}, {"sda": target("x.img", GIB, is_file=True)}, snapshot="s", options=PlanOptions())
    assert plan.result.disks[0].logical_sector == 4096
