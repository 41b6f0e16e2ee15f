"""Planners of network configuration: total, settled after one pass, and silent about what they need not touch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from remetal.adapt.network.addresses import parse_address, spell_address
from remetal.adapt.network.boot import find_boot_words, plan_boot_words
from remetal.adapt.network.cards import Cards, Uses, find_cards
from remetal.adapt.network.ifcfg import find_ifcfg, plan_ifcfg
from remetal.adapt.network.ifupdown import find_ifupdown, find_sources, plan_ifupdown
from remetal.adapt.network.keyfiles import find_keyfile, plan_keyfile, plan_manager_conf
from remetal.adapt.network.networkd import find_networkd, plan_networkd
from remetal.adapt.network.renaming import plan_renames
from remetal.adapt.network.tables import find_table, plan_table
from remetal.adapt.network.udev_rules import find_rules, plan_rules
from remetal.adapt.network.yaml_files import find_yaml, plan_yaml
from remetal.adapt.text import TextPlan
from remetal.layout.model import Nic
from tests.network_systems import (
    ALPINE,
    ARCH,
    CENTOS_6,
    DEBIAN,
    DEBIAN_BOND,
    NEW,
    NEW_2,
    OLD,
    OLD_2,
    RHEL_7,
    RHEL_9,
    SUSE,
    UBUNTU,
    UBUNTU_CLOUD,
    card,
    make_system,
)

Planner = Callable[[str, Cards, str], TextPlan]
Finder = Callable[[str, str], Uses]

MOVED = find_cards(Uses(names=("ens3", "ens4")), (OLD, OLD_2), (NEW, NEW_2))
LOST = find_cards(Uses(names=("ens3", "ens4")), (OLD, OLD_2), (NEW,))
SAME = find_cards(Uses(names=("ens3", "ens4")), (OLD, OLD_2), (OLD, OLD_2))
NONE = Cards()
YAML = """network:
  ethernets:
    a: {match: {macaddress: {mac}, driver: virtio_net}}
    b:
      match:
        macaddress: '{mac}'
      macaddress: {mac}
"""

PLANNERS: dict[Planner, tuple[Finder | None, tuple[str, ...]]] = {
    plan_ifupdown: (
        find_ifupdown,
        (*DEBIAN.values(), *DEBIAN_BOND.values(), "auto mac/{mac}=x\nrename address/{mac}=y\n"),
    ),
    plan_networkd: (
        find_networkd,
        (*ARCH.values(), "[Match]\nPermanentMACAddress={mac} {mac}\nDriver=virtio_net\nPath=pci-*\n"),
    ),
    plan_keyfile: (find_keyfile, (*RHEL_9.values(), "[wifi]\nmac-address={mac}\nmac-address-blacklist={mac};{mac}\n")),
    plan_manager_conf: (None, ("[keyfile]\nunmanaged-devices=mac:{mac};except:mac:{mac},interface-name:ens3\n",)),
    plan_ifcfg: (find_ifcfg, (*RHEL_7.values(), *SUSE.values(), "export HWADDR='{mac}' # x\nMACADDR={mac}\n")),
    plan_rules: (find_rules, (*CENTOS_6.values(), 'SUBSYSTEM=="net", ATTR{address}=="{mac}", NAME="a"\n')),
    plan_table: (find_table, (*ALPINE.values(), "ens3 mac {mac} x\n")),
    plan_yaml: (find_yaml, (*UBUNTU.values(), *UBUNTU_CLOUD.values(), YAML)),
    plan_boot_words: (find_boot_words, ('GRUB_CMDLINE_LINUX="ifname=ens3:{mac} BOOTIF=01-{mac} ip=ens3:dhcp"\n',)),
}
ADDRESSES = (
    *(spell_address(each.mac, like) for each in (OLD, OLD_2, NEW) for like in ("aa:", "AA:", "aa-", "a.b")),
    *("02:00:00:00:00:01", "", "52:54:00", "00:00:00:00:00:00"),
)
noise = st.one_of(
    st.text(max_size=60),
    st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.lists(
        st.sampled_from([*ADDRESSES, "ens3", "[Match]", *" \t\n\"'\\#:=[]{}\0-&*|>%,;", "\r\n", "\udc80"]), max_size=16
    ).map("".join),
)


@st.composite
def texts(draw: st.DrawFn, planner: Planner) -> str:
    """Return a file as its planner expects it, with some noise; or nothing but noise."""
    examples = draw(st.lists(st.sampled_from(PLANNERS[planner][1]), max_size=3))
    lines = "".join(re.sub(r"\{mac\}", lambda _: draw(st.sampled_from(ADDRESSES)), each) for each in examples).split(
        "\n"
    )
    for _ in range(draw(st.integers(0, 2))):
        lines.insert(draw(st.integers(0, len(lines))), draw(noise))
    return "\n".join(lines)


@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data(), cards=st.sampled_from([MOVED, LOST]))
@settings(max_examples=80)
def test_planning_is_total_and_settles(planner: Planner, data: st.DataObject, cards: Cards) -> None:
    text = data.draw(texts(planner))
    plan = planner(text, cards, "/etc/file")
    assert bool(plan.changes) == (plan.text != text) == bool(plan.diff)
    again = planner(plan.text, cards, "/etc/file")
    assert (again.text, again.changes) == (plan.text, ())
    finder = PLANNERS[planner][0]
    if finder is not None:
        assert finder(text, "/etc/file").virtual == finder(plan.text, "/etc/file").virtual


@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data())
@settings(max_examples=40)
def test_where_no_card_changed_no_byte_changes(planner: Planner, data: st.DataObject) -> None:
    text = data.draw(texts(planner))
    assert planner(text, SAME, "/etc/file").text == text
    assert planner(text, NONE, "/etc/file").text == text


@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data())
@settings(max_examples=60)
def test_what_is_no_fact_of_a_card_stays_byte_for_byte(planner: Planner, data: st.DataObject) -> None:
    """With addresses, drivers and places taken out, old and new text are the same."""
    text = data.draw(texts(planner))
    facts = re.compile("|".join(map(re.escape, FACTS)))
    old, new = (blank(each) for each in (text, planner(text, MOVED, "/etc/file").text))
    assert re.sub(r"[\s;]+", "", facts.sub("", old)) == re.sub(r"[\s;]+", "", facts.sub("", new))


FACTS = ("virtio_net", "e1000e", "igb", "pci-0000:00:03.0", "pci-0000:00:04.0", "pci-0000:01:00.0", "pci-0000:02:00.0",
         "0000:00:03.0", "0000:00:04.0", "0000:01:00.0", "0000:02:00.0")  # fmt: skip
SPELLED = [
    spell_address(nic.mac, like) for nic in (OLD, OLD_2, NEW, NEW_2) for like in ("a:", "A:", "a-", "A-", "a.", "A.")
]


def blank(text: str) -> str:
    """Return a text with all addresses taken out, and the quotes that YAML may need around one."""
    every = "|".join(map(re.escape, SPELLED))
    return re.sub(rf'"(?:{every})"|{every}', "", text)


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_examples_above_do_change(planner: Planner) -> None:
    find(
        texts(planner),
        lambda text: bool(planner(text, MOVED, "/etc/file").changes),
        settings=settings(max_examples=2000, phases=[Phase.generate]),
    )


@given(text=noise, names=st.dictionaries(st.sampled_from(["eth0", "eth1", "a.b"]), st.sampled_from(["net0", "net1"])))
def test_renaming_settles(text: str, names: dict[str, str]) -> None:
    plan = plan_renames(text, names, "/x")
    assert plan_renames(plan.text, names, "/x").text == plan.text


@given(noise)
def test_sources_and_addresses_are_found_or_not(text: str) -> None:
    assert all(how.startswith("source") for how, _ in find_sources(text))
    address = parse_address(text)
    assert not address or parse_address(spell_address(address, text)) == address


ETH = (card("eth0", OLD.mac, "virtio_net"), card("eth1", OLD_2.mac, "virtio_net", "00:04.0"))
BY_SLOT = (DEBIAN, DEBIAN_BOND, RHEL_7, RHEL_9, UBUNTU, UBUNTU_CLOUD)
BY_KERNEL = (ALPINE, CENTOS_6, SUSE)
PLACES = (
    "/etc/network/interfaces.d/x",
    "/etc/netplan/x.yaml",
    "/etc/systemd/network/x.link",
    "/etc/udev/rules.d/z.rules",
)


@pytest.mark.parametrize(("systems", "known"), [(BY_SLOT, (OLD, OLD_2)), (BY_KERNEL, ETH), ((ARCH,), (OLD, OLD_2))])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_whole_system_settles(
    systems: tuple[dict[str, str], ...], known: tuple[Nic, ...], data: st.DataObject
) -> None:
    files = data.draw(st.lists(st.sampled_from(systems), min_size=1, max_size=3))
    now = tuple(data.draw(st.lists(st.sampled_from([NEW, NEW_2, *known]), unique=True, max_size=3)))
    captured = tuple(data.draw(st.lists(st.sampled_from(known), unique=True)))
    with TemporaryDirectory() as folder:
        merged = {path: text for each in files for path, text in each.items()}
        system = make_system(Path(folder) / "root", merged, systemd=data.draw(st.sampled_from([0, 219, 247, 252])))
        place = system.root / data.draw(st.sampled_from(PLACES)).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data.draw(noise).encode("utf-8", "surrogateescape"))
        system.adapt(captured, now)
        assert not system.plan(captured, now)[1].changes
