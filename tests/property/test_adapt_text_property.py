"""Whatever stands in a file that names storage: planning never raises, is narrow, and applied twice changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from remetal.adapt.crypttab import parse_crypttab, plan_crypttab
from remetal.adapt.grub_cfg import plan_grub_cfg
from remetal.adapt.identity import Gone, Identities, Named
from remetal.adapt.lvm_conf import plan_lvm_conf
from remetal.adapt.lvm_devices import plan_lvm_devices
from remetal.adapt.lvm_filter import PatternError, accepts, parse_rules
from remetal.adapt.mdadm_conf import plan_mdadm_conf
from remetal.adapt.resume import (
    plan_boot_entry,
    plan_default_grub,
    plan_dracut_conf,
    plan_grubenv,
    plan_kernel_cmdline,
    plan_resume,
)
from remetal.adapt.text import Edit, TextPlan, plan_edits
from tests.adapt_identities import ARRAY, BOOT, DISSOLVED, ESP, LUKS, LV, OPENED, PART, PV, ROOT, SERVER, SWAP, VG

Planner = Callable[[str, Identities, str], TextPlan]

CMDLINE = (
    "root={name} ro quiet",
    "resume={name}  resume={name}",
    "rd.luks.uuid=luks-{uuid} rd.luks.name={uuid}=cryptlvm",
    "rd.md.uuid={uuid} rd.md.uuid={uuid}",
    "rd.lvm.lv=vg0/root cryptdevice={name}:cryptlvm root=/dev/mapper/cryptlvm",
)
PLANNERS: dict[Planner, tuple[str, ...]] = {
    plan_crypttab: (
        "cryptlvm {name} none luks,discard",
        "cswap\t{name}\t/dev/urandom\tswap",
        "  x {name}",
        "# {name} {name}",
    ),
    plan_mdadm_conf: (
        "ARRAY /dev/md/0 metadata=1.2 UUID={uuid} name=host:0\n   spares=1",
        "ARRAY {name} devices={name},{name}",
        "array uuid={uuid} devices={name} # {name}",
        "DEVICE {name}\n  {name}",
        "DEV /dev/sd*",
        "MAILADDR root",
    ),
    plan_lvm_conf: (
        'devices {{ filter = [ "a|{name}|", "r|.*|" ] }}',
        'devices {{ filter = [ "a|/dev/sda|", "r|.*|" ] }}',
        'devices/global_filter=["r|{name}|"]',
        'devices {{ dir="/dev" # filter = [ ]\n filter = "r|mapper|" }}',
        'activation {{ volume_list = [ "vg0" ] }}',
    ),
    plan_lvm_devices: (
        "VERSION=1.1.1",
        "# HASH=12",
        f"IDTYPE=sys_wwid IDNAME=naa.5 DEVNAME={{name}} PVID={PV.replace('-', '')} PART=3",
        f"IDTYPE=md_uuid IDNAME={{uuid}} DEVNAME=/dev/md0 PVID={PV.replace('-', '')}",
        f"IDTYPE=crypt_uuid IDNAME=CRYPT-LUKS2-{LUKS.replace('-', '')}-x PVID={PV.replace('-', '')}",
    ),
    plan_default_grub: tuple(
        f"{head}{each}{tail}"
        for each in CMDLINE
        for head, tail in (('GRUB_CMDLINE_LINUX="', '"'), ("export GRUB_CMDLINE_LINUX_DEFAULT+='", "'"), ("# ", ""))
    ),
    plan_kernel_cmdline: CMDLINE,
    plan_boot_entry: ("title x", "linux /x", "initrd /y", *(f"options {each}" for each in CMDLINE)),
    plan_dracut_conf: ('add_device+=" {name} {name} "', *(f'kernel_cmdline="{each}"' for each in CMDLINE)),
    plan_resume: ("RESUME={name}", "RESUME='{name}'", '# RESUME="{name}"', 'RESUME="{name}"'),
    plan_grub_cfg: (
        "set root='mduuid/{uuid}'",
        f"set root='lvmid/{VG}/{LV}'",
        "search --no-floppy --fs-uuid --set=root --hint='mduuid/{uuid}' {uuid}",
        "cryptomount -u {uuid}",
        *(f"\tlinux /vmlinuz {each}\n\tinitrd /x" for each in CMDLINE),
    ),
    plan_grubenv: tuple(f"kernelopts={each}" for each in CMDLINE),
}
_BLANK = re.compile(r"\{(name|uuid)\}")
UUIDS = (ESP, BOOT, LUKS, ROOT, SWAP, ARRAY, PV, VG, LV)
NAMES = (
    *(f"UUID={uuid}" for uuid in UUIDS),
    *(f"/dev/sda{number}" for number in range(8)),
    *("/dev/disk/by-uuid/" + uuid for uuid in UUIDS),
    "/dev/md0", "/dev/md/0", "/dev/mapper/vg0-root", "/dev/vg0/root", "/dev/mapper/cryptlvm", "LABEL=boot",
    f"PARTUUID={PART}3", "UUID=", "/dev/disk/by-id/", "host:0",
)  # fmt: skip
noise = st.one_of(
    st.text(max_size=60),
    st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.lists(st.sampled_from([*NAMES, *UUIDS, *" \t\n\"'\\#:=[]{}\0", "\r\n", "\udc80", "\u2028"]), max_size=12).map(
        "".join
    ),
)


@st.composite
def texts(draw: st.DrawFn, planner: Planner) -> str:
    """Return a file as its planner expects it, with some noise; or nothing but noise."""
    lines = []
    for template in draw(st.lists(st.sampled_from(PLANNERS[planner]), max_size=6)):
        blanks = [draw(st.sampled_from(NAMES if each == "name" else UUIDS)) for each in _BLANK.findall(template)]
        lines.append(_BLANK.sub("{}", template).format(*blanks))
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(noise))
    text = "\n".join(lines)
    return f"{text}\n{'#' * 900}" if planner is plan_grubenv else text


def unchanged(each: Named) -> Named:
    """Return the same on the same hardware: all its names still find it."""
    return replace(each, lasting=(*each.lasting, *each.names), place=None, moved=False)


SAME = Identities(tuple(unchanged(each) for each in SERVER.volumes))


@st.composite
def identities(draw: st.DrawFn) -> Identities:
    """Return some of the server: with new UUIDs, other places, nothing lasting, dissolved or dropped."""
    volumes: list[Named] = []
    gone: list[Gone] = []
    for number, each in enumerate(SERVER.volumes):
        fate = draw(st.sampled_from(["kept", "kept", "renewed", "same", "gone", "unknown", "nameless"]))
        if fate == "gone":
            gone.append(Gone(space=each.space, kind=each.kind, why="gone", uuid=each.uuid, names=each.names))
        elif fate == "renewed" and each.uuid:
            fresh = f"{number:08x}-ffff-4fff-8fff-ffffffffffff"
            volumes.append(replace(each, new_uuid=fresh, new_partuuid=f"{number:08x}-eeee", lasting=(f"UUID={fresh}",)))
        elif fate == "same":
            volumes.append(unchanged(each))
        elif fate == "unknown":
            volumes.append(replace(each, place=None, moved=True))
        elif fate == "nameless":
            volumes.append(replace(each, lasting=(), new_partuuid=""))
        else:
            volumes.append(each)
    return Identities(tuple(volumes), tuple(gone) + draw(st.sampled_from([(), (DISSOLVED,), (DISSOLVED, OPENED)])))


@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data(), known=identities())
@settings(max_examples=60)
def test_planning_is_total_and_settles(planner: Planner, data: st.DataObject, known: Identities) -> None:
    text = data.draw(texts(planner))
    plan = planner(text, known, "/etc/file")
    assert bool(plan.changes) == (plan.text != text) == bool(plan.diff)
    assert all(plan.changes)
    again = planner(plan.text, known, "/etc/file")
    assert (again.text, again.changes) == (plan.text, ())


@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data())
@settings(max_examples=40)
def test_where_no_identity_changed_no_byte_changes(planner: Planner, data: st.DataObject) -> None:
    text = data.draw(texts(planner))
    assert planner(text, SAME, "/etc/file").text == text
    assert planner(text, Identities(), "/etc/file").text == text


@given(text=texts(plan_crypttab), known=identities())
@settings(max_examples=150)
def test_crypttab_changes_sources_only(text: str, known: Identities) -> None:
    old, new = parse_crypttab(text), parse_crypttab(plan_crypttab(text, known).text)
    assert [(each.name, each.options) for each in old] == [(each.name, each.options) for each in new]


@given(text=texts(plan_grubenv), known=identities())
@settings(max_examples=100)
def test_the_environment_block_keeps_its_size(text: str, known: Identities) -> None:
    plan = plan_grubenv(text, known, "/boot/grub/grubenv")
    assert len(plan.text.encode("utf-8", "surrogateescape")) == len(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_examples_above_do_change(planner: Planner) -> None:
    find(
        st.tuples(texts(planner), identities()),
        lambda drawn: bool(planner(drawn[0], drawn[1], "/etc/file").changes),
        settings=settings(max_examples=1000, phases=[Phase.generate]),
    )


@given(st.text("ar|/^$.*+?()[]-\\dev^x", max_size=30), st.text("/devsdanvme0p1x", max_size=20))
@settings(max_examples=300)
def test_filters_are_decided_or_refused(entry: str, name: str) -> None:
    try:
        rules = parse_rules([entry])
    except PatternError:
        return
    assert accepts(rules, [name]) in {True, False}


edits = st.builds(lambda start, size, text: Edit(start, start + size, text, "x"), *[st.integers(0, 20)] * 2, st.text())


@given(st.text(min_size=40, max_size=60), st.lists(edits, max_size=6))
def test_edits_leave_what_they_do_not_cover(text: str, chosen: list[Edit]) -> None:
    plan = plan_edits("/x", text, chosen)
    end = max((edit.end for edit in chosen), default=0)
    start = min((edit.start for edit in chosen), default=0)
    assert plan.text.startswith(text[:start])
    assert plan.text.endswith(text[end:])
