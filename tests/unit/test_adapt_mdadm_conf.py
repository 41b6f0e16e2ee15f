"""The plan for the restored mdadm.conf, and what mdadm itself assembles by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.uml import run_in_uml
from remetal.adapt.identity import Identities, Named, Place
from remetal.adapt.mdadm_conf import parse_mdadm_conf, plan_mdadm_conf
from remetal.units import MIB
from tests.adapt_identities import ARRAY, NEW_ARRAY, SERVER, with_new, without_array

DEBIAN = f"""\
# mdadm.conf
#
# !NB! Run update-initramfs -u after updating this file.
#DEVICE partitions containers

# automatically tag new arrays as belonging to the local system
HOMEHOST <system>

# instruct the monitoring daemon where to send mail alerts
MAILADDR root

# definitions of existing MD arrays
ARRAY /dev/md/0  metadata=1.2 UUID={ARRAY} name=host:0
   spares=1
ARRAY /dev/md/1  metadata=1.2 UUID=b23f3c6d:aec43a9f:fd65db85:369432df name=host:1

# This configuration was auto-generated on Thu, 26 Nov 2026 07:44:38 +0000 by mkconf
"""
ANACONDA = f"""\
# mdadm.conf written out by anaconda
MAILADDR root
AUTO +imsm +1.x -all
ARRAY /dev/md/boot level=raid1 num-devices=2 UUID={ARRAY}
ARRAY /dev/md/imsm0 metadata=imsm UUID=19464854:03f71b1b:e0df2edd:246cc977
ARRAY /dev/md/Volume0_0 container=19464854:03f71b1b:e0df2edd:246cc977 member=0 UUID=9187a482:5dde19d9:eea3cc4a:d646ab8b
"""
ARCH = f"DEVICE partitions\nARRAY <ignore> UUID={ARRAY}\nARRAY /dev/md9 name='Data Storage'\n"


def plan(text: str, identities: Identities = SERVER) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    done = plan_mdadm_conf(text, identities)
    assert bool(done.changes) == (done.text != text) == bool(done.diff)
    again = plan_mdadm_conf(done.text, identities)
    assert (again.text, again.changes) == (done.text, ())
    return done.text, done.changes, done.notes


@pytest.mark.parametrize("text", [DEBIAN, ANACONDA, ARCH])
def test_arrays_that_are_there_are_left_alone(text: str) -> None:
    assert plan(text) == (text, (), ())


def test_a_dissolved_array_is_commented_out_with_its_continuation() -> None:
    new, changes, _ = plan(DEBIAN, without_array())
    why = "the array was dissolved; its content stands on sda:6"
    assert new == DEBIAN.replace("ARRAY /dev/md/0", f"# remetal: {why}.\n# ARRAY /dev/md/0").replace("   sp", "#    sp")
    assert changes == (f"the array /dev/md/0 was commented out: {why}",)
    assert plan(ARCH, without_array())[0] == ARCH


@pytest.mark.parametrize(
    "line",
    [
        "ARRAY /dev/md0 metadata=1.2 spares=1",
        "array md0 name=host:0",
        "ARR 0 level=raid1",
        "ARRAY super-minor=0",
        "ARRAY name='host:0'",
    ],
)
def test_an_array_is_known_by_its_node_number_or_name(line: str) -> None:
    new, _, _ = plan(f"{line}\nMAILADDR root\n", without_array())
    assert new.splitlines()[1:] == [f"# {line}", "MAILADDR root"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ARRAY, NEW_ARRAY),
        (ARRAY.upper(), NEW_ARRAY),
        (ARRAY.replace(":", ""), NEW_ARRAY.replace(":", "")),
        ("3aaa0122-2982-7cfa-5331-ad66ca767371", "01234567-89ab-cdef-0123-456789abcdef"),
    ],
)
def test_a_uuid_that_changed_keeps_its_punctuation(old: str, new: str) -> None:
    text = f"ARRAY /dev/md/0 metadata=1.2   uuid={old} name=host:0 # mine\n"
    assert plan(text, with_new(SERVER, "md", ARRAY, NEW_ARRAY))[0] == text.replace(old, new)


def test_members_named_by_nodes_give_way_to_the_uuid() -> None:
    text = "ARRAY /dev/md0 devices=/dev/sda6,/dev/sdb1 spares=1\n"
    assert plan(text)[0] == f"ARRAY /dev/md0 UUID={ARRAY} spares=1\n"
    text = f"ARRAY /dev/md0 UUID={ARRAY} spares=1\n\tdevices=/dev/sda6,/dev/sdb1\n"
    assert plan(text)[0] == f"ARRAY /dev/md0 UUID={ARRAY} spares=1\n\n"
    text = "ARRAY /dev/md0 devices=/dev/nvme*\nARRAY /dev/md0 devices=/dev/disk/by-partuuid/c0ffee00*\n"
    assert plan(text) == (text, (), ())


def test_device_patterns_that_do_not_lead_to_the_members_any_more() -> None:
    new, changes, _ = plan("DEV /dev/sd[ab]*\n    /dev/sdc1\nDEVICE containers # c\n")
    assert new == "DEV partitions /dev/sd[ab]*\n    /dev/sdc1\nDEVICE containers # c\n"
    assert len(changes) == 1
    for text in ("DEVICE /dev/nvme*n1p*\n", "DEVICE partitions /dev/sda6\n", "DEVICE /dev/hda1\n", "DEVICE\n"):
        assert plan(text) == (text, (), ())


def test_nothing_moved_nothing_changes() -> None:
    unmoved = Identities(tuple(replace(each, place=None, moved=False) for each in SERVER.volumes))
    text = "DEVICE /dev/sd*\nARRAY /dev/md0 devices=/dev/sda6\n"
    assert plan(text, unmoved) == (text, (), ())


def test_words_quotes_and_comments() -> None:
    first, second = parse_mdadm_conf('# x\nARRAY \'a b\'"c" x=#1 #y z\n\n  d="e\n  # f\nMAILADDR q\n')
    assert (first.keyword, [word.text for word in first.words]) == ("arr", ["a bc", "x=#1", "d=e"])
    assert (second.keyword, first.starts) == ("mai", (4, 30))


@pytest.mark.storage
def test_mdadm_assembles_the_array_on_other_devices_by_the_planned_text(tmp_path: Path) -> None:
    """What names the old members finds nothing; the planned text finds the array where it stands now."""
    disks = [tmp_path / name for name in ("a.img", "b.img", "c.img")]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(16 * MIB)
    old = "DEVICE /dev/ubda\nARRAY /dev/md0 devices=/dev/ubda,/dev/ubdb\n"
    nodes = (("/dev/ubda", "/dev/ubdb"), ("/dev/ubdb", "/dev/ubdc"))
    members = tuple(
        Named(
            space=f"ubd{index}", kind="member", uuid=ARRAY, names=(before,), place=Place(devices=(now,)), moved=True
        )
        for index, (before, now) in enumerate(nodes)
    )  # fmt: skip
    array = Named(space="md/0", kind="md", uuid=ARRAY, names=("/dev/md0",), lasting=("/dev/md0",))
    new, changes, _ = plan(old, Identities((*members, array)))
    assert len(changes) == 2
    (tmp_path / "old").write_text(old)
    (tmp_path / "new").write_text(new)
    outcome = run_in_uml(
        f"""
        mdadm --create /dev/md0 --run --level=1 --raid-devices=2 --metadata=1.2 --uuid={ARRAY} /dev/ubdb /dev/ubdc
        udevadm settle
        mdadm --stop /dev/md0
        udevadm settle  # it looks at what has changed, and may assemble it by itself
        mdadm --stop --scan
        if mdadm --assemble --scan --config={tmp_path}/old; then exit 7; fi
        mdadm --assemble --scan --config={tmp_path}/new
        mdadm --detail --export /dev/md0
        """,
        disks=disks,
    )
    assert f"MD_UUID={ARRAY}" in outcome.stdout
