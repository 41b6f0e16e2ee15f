"""The network of real distributions' files on other cards: what is changed, what is not, and what is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import msgspec.structs
import pytest

from remetal.adapt.network.cards import Cards, Uses, find_cards
from remetal.adapt.network.files import probe_naming_files
from remetal.adapt.network.ifupdown import find_ifupdown, plan_ifupdown
from remetal.adapt.network.keyfiles import plan_keyfile, plan_manager_conf
from remetal.adapt.network.matching import parse_choices
from remetal.adapt.network.naming import RULES
from remetal.adapt.network.networkd import find_networkd, plan_networkd
from remetal.adapt.network.renaming import plan_renames
from remetal.adapt.network.udev_rules import find_rules, plan_rules
from remetal.adapt.network.yaml_files import find_yaml, plan_yaml
from remetal.adapt.text import TextPlan
from remetal.layout.inventory import probe_nics
from remetal.layout.model import Nic
from remetal.system.run import run
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
    Rooted,
    card,
    make_system,
)

Make = Callable[..., Rooted]
LINK = "/etc/systemd/network/10-remetal-{}.link"
ETH = (card("eth0", "52:54:00:12:34:56", "virtio_net"), card("eth1", "52:54:00:12:34:57", "virtio_net", "00:04.0"))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    numbers = count()

    def made(files: dict[str, str], **options: object) -> Rooted:
        return make_system(tmp_path / f"root{next(numbers)}", files, **options)  # type: ignore[arg-type]

    return made


def settles(system: Rooted, captured: tuple[Nic, ...], now: tuple[Nic, ...]) -> bool:
    """Whether nothing is left to do."""
    return not system.plan(captured, now)[1].changes


def kept(system: Rooted, files: dict[str, str]) -> bool:
    return all(system.read(path) == text for path, text in files.items())


@pytest.mark.parametrize("files", [DEBIAN, UBUNTU], ids=["debian", "ubuntu"])
def test_a_card_keeps_its_name_so_no_file_changes(make: Make, files: dict[str, str]) -> None:
    system = make(files, is_debian=True)
    _, plan = system.adapt((OLD,), (NEW,))
    assert (list(plan.files), [text for text in plan.texts if text.changes], plan.notes) == (
        [LINK.format("ens3")],
        [],
        (),
    )
    text = system.read(LINK.format("ens3"))
    assert text.endswith("[Match]\nPermanentMACAddress=b4:45:06:aa:bb:01\n\n[Link]\nName=ens3\n")
    assert "place of the card that was called ens3" in text
    assert kept(system, files)
    assert settles(system, (OLD,), (NEW,))
    assert list(probe_naming_files(system.root)) == [LINK.format("ens3")]


def test_the_very_same_machine_needs_nothing(make: Make) -> None:
    for files in (DEBIAN, UBUNTU_CLOUD, RHEL_9, RHEL_7):
        _, plan = make(files).plan((OLD,), (OLD, NEW))
        assert (plan.changes, plan.notes, plan.texts) == (False, (), ())


def test_a_system_that_nothing_is_recorded_of_is_matched_by_what_its_files_say(make: Make) -> None:
    system = make(DEBIAN)
    cards, plan = system.adapt((), (NEW,))
    assert [(each.name, each.now) for each in cards.used] == [("ens3", NEW)]
    assert list(plan.files) == [LINK.format("ens3")]


def test_a_machine_that_was_captured_from_a_medium_is_known_by_what_udev_calls_its_cards(make: Make) -> None:
    seen = msgspec.structs.replace(OLD, name="eth7", up=False)
    cards, _ = make(DEBIAN).plan((seen, card("eth1", "52:54:00:00:00:99", "tg3", "05:00.0")), (NEW,))
    assert [(each.name, each.before.name, each.now) for each in cards.used] == [("ens3", "eth7", NEW)]
    only = msgspec.structs.replace(seen, properties=())
    cards, plan = make(DEBIAN).plan((only,), (only, NEW))
    assert ([(each.name, each.before.name, each.is_unchanged) for each in cards.used], plan.files) == (
        [("ens3", "eth7", True)],
        {},
    )


def test_bonds_bridges_and_vlans_stand_on_cards_that_keep_their_names(make: Make) -> None:
    system = make(DEBIAN_BOND)
    bonded = tuple(msgspec.structs.replace(each, mac=OLD.mac) for each in (OLD, OLD_2))
    cards, plan = system.adapt(bonded, (NEW, NEW_2))
    assert [(each.name, each.now) for each in cards.used] == [("ens3", NEW), ("ens4", NEW_2)]
    assert list(plan.files) == [LINK.format("ens3"), LINK.format("ens4")]
    assert kept(system, DEBIAN_BOND)
    assert settles(system, bonded, (NEW, NEW_2))


def test_cards_in_a_bond_that_an_old_record_gave_one_address(make: Make) -> None:
    old = tuple(Nic(name=name, mac="52:54:00:12:34:56", driver="igb", place=name) for name in ("ens3", "ens4"))
    cards, plan = make(DEBIAN_BOND).plan(old, (NEW, NEW_2))
    assert [each.name for each in cards.used] == ["ens3", "ens4"]
    assert len({each.now.name for each in cards.used if each.now}) == len(plan.files) == 2


def test_netplan_and_cloud_init_follow_the_address(make: Make) -> None:
    system = make(UBUNTU_CLOUD)
    _, plan = system.adapt((OLD,), (NEW,))
    netplan, cloud = UBUNTU_CLOUD
    expected = UBUNTU_CLOUD[netplan].replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")
    assert system.read(netplan) == expected
    first, rest = UBUNTU_CLOUD[cloud].split("  - name: bond0")
    assert system.read(cloud) == first.replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01") + "  - name: bond0" + rest
    assert dict(plan.files) == {}  # set-name gives the name
    assert "macaddress of bond0 sets the address that the old ens3 had" in "".join(
        note for text in plan.texts for note in text.notes
    )
    assert settles(system, (OLD,), (NEW,))


def test_network_manager_and_the_older_ifcfg(make: Make) -> None:
    system = make(RHEL_9)
    _, plan = system.adapt((OLD,), (NEW,))
    (profile,) = RHEL_9
    assert system.read(profile) == RHEL_9[profile].replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")
    assert list(plan.files) == [LINK.format("ens3")]


def test_an_old_systemd_gets_a_rule_and_backup_files_stay(make: Make) -> None:
    system = make(RHEL_7, systemd=219)
    _, plan = system.adapt((OLD,), (NEW,))
    ifcfg, loop, backup = RHEL_7
    assert system.read(ifcfg) == RHEL_7[ifcfg].replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")
    assert kept(system, {path: RHEL_7[path] for path in (loop, backup)})
    assert list(plan.files) == [RULES]
    assert (
        'ACTION=="add", DRIVERS=="?*", ATTR{address}=="b4:45:06:aa:bb:01", ATTR{type}=="1", NAME="ens3"\n'
        in system.read(RULES)
    )
    assert not plan.notes
    assert settles(system, (OLD,), (NEW,))
    assert list(probe_naming_files(system.root)) == [RULES]


def test_the_rules_that_udev_once_wrote_itself_follow(make: Make) -> None:
    system = make({**CENTOS_6, "/lib64/libudev.so.0.5.1": ""}, systemd=0)
    _, plan = system.adapt(ETH[:1], (NEW,))
    rules, ifcfg, _ = CENTOS_6
    for path in (rules, ifcfg):
        assert system.read(path) == CENTOS_6[path].replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")
    assert plan.renames == {}
    assert settles(system, ETH[:1], (NEW,))
    several, plan = system.plan(ETH[:1], (NEW, NEW_2))
    assert plan.renames == {}  # such a udev waits until a name is free
    assert several.used[0].now == NEW


def test_names_that_the_kernel_gives_itself_become_others_where_several_cards_may_get_them(make: Make) -> None:
    system = make(SUSE)
    _, plan = system.adapt(ETH, (NEW, NEW_2))
    assert plan.renames == {"eth0": "net0", "eth1": "net1"}
    folder = "/etc/sysconfig/network"
    assert not (system.root / f"{folder}/ifcfg-eth0".lstrip("/")).exists()
    assert system.read(f"{folder}/ifcfg-net0") == SUSE[f"{folder}/ifcfg-eth0"]
    assert system.read(f"{folder}/ifroute-net0") == "default 192.0.2.1 - net0\n"
    assert "BRIDGE_PORTS='net1'" in system.read(f"{folder}/ifcfg-br0")
    assert system.read("/etc/sysctl.d/70-yast.conf") == SUSE["/etc/sysctl.d/70-yast.conf"].replace(".eth0", ".net0")
    assert system.read(LINK.format("net1")).endswith("PermanentMACAddress=b4:45:06:aa:bb:02\n\n[Link]\nName=net1\n")
    assert "that was called eth1" in system.read(LINK.format("net1"))
    assert settles(system, ETH, (NEW, NEW_2))


def test_one_card_alone_gets_the_kernels_name(make: Make) -> None:
    files = {"/etc/network/interfaces": "auto eth0\niface eth0 inet dhcp\n"}
    _, plan = make(files).plan(ETH[:1], (NEW,))
    assert (plan.renames, list(plan.files)) == ({}, [LINK.format("eth0")])


def test_debians_older_udev_waits_until_a_name_is_free(make: Make) -> None:
    files = {"/etc/network/interfaces": "auto eth0\niface eth0 inet dhcp\n"}
    _, plan = make(files, systemd=241, is_debian=True).plan(ETH[:1], (NEW, NEW_2))
    assert (plan.renames, list(plan.files)) == ({}, [RULES])
    _, plan = make(files, systemd=247, is_debian=True).plan(ETH[:1], (NEW, NEW_2))
    assert plan.renames == {"eth0": "net0"}


def test_networkd_follows_address_driver_and_place_and_tells_what_sets_an_address(make: Make) -> None:
    system = make(ARCH)
    now = (NEW, NEW_2)
    _, plan = system.adapt((OLD, OLD_2), now)
    wired, link, lan = ARCH
    assert system.read(wired) == ARCH[wired].replace("52:54:00:12:34:56 \\", "b4:45:06:aa:bb:01 \\").replace(
        "virtio_net", "e1000e"
    )
    assert system.read(link) == ARCH[link].replace("pci-0000:00:04.0", "pci-0000:02:00.0")
    assert kept(system, {lan: ARCH[lan]})
    assert dict(plan.files) == {}  # the system's own .link gives the name
    notes = "\n".join(note for text in plan.texts for note in text.notes)
    assert "[Link] MACAddress= sets the address that the old 52:54:00:12:34:56 had" in notes
    assert "Property=ID_NET_NAME_SLOT=ens4 was made of the old lan0's place" in notes
    assert settles(system, (OLD, OLD_2), now)


def test_a_system_without_udev(make: Make) -> None:
    system = make(ALPINE, systemd=0)
    _, plan = system.adapt(ETH[:1], (NEW,))
    assert system.read("/etc/mactab") == "# name mac\neth0 b4:45:06:aa:bb:01\n"
    assert (dict(plan.files), plan.notes) == ({}, ())
    (system.root / "etc/mactab").unlink()
    _, plan = system.plan(ETH[:1], (NEW, NEW_2))
    assert plan.files == {}
    assert "'eth0 b4:45:06:aa:bb:01' in /etc/mactab" in plan.notes[0]


def test_another_link_file_of_the_administrators_still_counts(make: Make) -> None:
    files = {**DEBIAN, "/etc/systemd/network/50-wol.link": "[Match]\nOriginalName=*\n\n[Link]\nWakeOnLan=magic\n"}
    _, plan = make(files).plan((OLD,), (NEW,))
    assert list(plan.files) == [RULES]
    other = {
        **DEBIAN,
        "/etc/systemd/network/50-x.link": "[Match]\nMACAddress=02:00:00:00:00:01\n\n[Link]\nMTUBytes=9000\n",
    }
    assert list(make(other).plan((OLD,), (NEW,))[1].files) == [LINK.format("ens3")]


def test_a_card_that_nobody_uses_takes_no_name_that_is_needed(make: Make) -> None:
    taker = msgspec.structs.replace(NEW_2, properties=("ID_NET_NAME_PATH=enp2s0", "ID_NET_NAME_SLOT=ens3"))
    chosen = parse_choices(["ens3=enp1s0"], [OLD], [NEW, taker])
    _, plan = make(DEBIAN).plan((OLD,), (NEW, taker), chosen)
    assert set(plan.files) == {LINK.format("ens3"), LINK.format("enxb44506aabb02")}
    assert "does not use it" in plan.files[LINK.format("enxb44506aabb02")]


def test_two_cards_that_exchange_their_names(make: Make) -> None:
    """A card was moved from one slot to the other: udev would now call each by the other's name."""
    swapped = (
        msgspec.structs.replace(OLD, path=OLD_2.path, place=OLD_2.place, name="ens4", properties=OLD_2.properties),
        msgspec.structs.replace(OLD_2, path=OLD.path, place=OLD.place, name="ens3", properties=OLD.properties),
    )
    system = make(DEBIAN_BOND)
    _, plan = system.adapt((OLD, OLD_2), swapped)
    assert f"PermanentMACAddress={OLD.mac}\n" in plan.files[LINK.format("ens3")]
    assert f"PermanentMACAddress={OLD_2.mac}\n" in plan.files[LINK.format("ens4")]
    assert set(plan.early) == set(probe_naming_files(system.root)) == set(plan.files)


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/default/grub": 'GRUB_CMDLINE_LINUX="ip=ens3:dhcp"\n'},
        {"/etc/initramfs-tools/initramfs.conf": "MODULES=most\nIP=192.0.2.10::192.0.2.1:255.255.255.0::ens3\n"},
        {"/etc/dropbear/initramfs/authorized_keys": "x"},
    ],
)
def test_an_initramfs_that_uses_the_network_has_to_know_the_names(make: Make, files: dict[str, str]) -> None:
    assert make(DEBIAN).plan((OLD,), (NEW,))[1].early == ()
    assert make({**DEBIAN, **files}).plan((OLD,), (NEW,))[1].early == (LINK.format("ens3"),)
    _, plan = make({**DEBIAN, **files, "/usr/lib/dracut/dracut-init.sh": ""}).plan((OLD,), (NEW,))
    assert f'install_items+=" {LINK.format("ens3")} "\n' in plan.files["/etc/dracut.conf.d/90-remetal-network.conf"]
    stock = {"/etc/initramfs-tools/initramfs.conf": "MODULES=most\nDEVICE=\n# IP=x\n"}
    assert make({**DEBIAN, **stock}).plan((OLD,), (NEW,))[1].early == ()


def test_cards_without_an_address_of_their_own_are_known_by_their_place(make: Make) -> None:
    random = msgspec.structs.replace(NEW, permanent="", assigned=1)
    _, plan = make(DEBIAN).plan((OLD,), (random,))
    assert "[Match]\nPath=pci-0000:01:00.0\n" in plan.files[LINK.format("ens3")]
    _, plan = make(DEBIAN, systemd=219).plan((OLD,), (random,))
    assert 'KERNELS=="0000:01:00.0", NAME="ens3"' in plan.files[RULES]
    lost = msgspec.structs.replace(random, path="", place="")
    _, plan = make(DEBIAN).plan((OLD,), (lost,))
    assert plan.files == {}
    assert "cannot be called ens3" in plan.notes[0]


def test_two_cards_with_one_address_need_their_drivers(make: Make) -> None:
    netvsc, function = (card(name, "00:0d:3a:00:00:01", driver, bus) for name, driver, bus in
                        (("eth0", "hv_netvsc", ""), ("enP1p0s2", "mlx5_core", "01:00.2")))  # fmt: skip
    function = msgspec.structs.replace(function, virtual=True)
    _, plan = make(DEBIAN).plan((OLD,), (netvsc, function))
    assert "PermanentMACAddress=00:0d:3a:00:00:01\nDriver=hv_netvsc\n" in plan.files[LINK.format("ens3")]


def test_a_pattern_of_names_counts_only_if_the_new_card_does_not_match_it(make: Make) -> None:
    files = {"/etc/systemd/network/20-dhcp.network": "[Match]\nName=ens* !ens9\n\n[Network]\nDHCP=yes\n"}
    cards, plan = make(files).plan((OLD,), (NEW,))
    assert ([each.name for each in cards.used], list(plan.files)) == (["ens3"], [LINK.format("ens3")])
    files = {"/etc/systemd/network/20-dhcp.network": "[Match]\nName=en*\n\n[Network]\nDHCP=yes\n"}
    assert make(files).plan((OLD,), (NEW,))[0] == Cards((), (NEW,))


def test_other_files_that_mention_the_old_address_are_told(make: Make) -> None:
    files = {
        **RHEL_9,
        "/etc/dhcpd.conf": "host x { hardware ethernet 52:54:00:12:34:56; }\n",
        "/etc/a.bak": "52:54:00:12:34:56",
    }
    _, plan = make(files).plan((OLD,), (NEW,))
    assert plan.notes == ("/etc/dhcpd.conf mention the address of the old ens3; look whether that has to change",)


def test_files_that_interfaces_reads_in(make: Make) -> None:
    files = {
        "/etc/network/interfaces": "source /etc/network/more/*.cfg\nsource-directory dir\nsource /etc/network/${x}/*\n",
        "/etc/network/more/a.cfg": "auto ens3\niface ens3 inet dhcp\n",
        "/etc/network/dir/b": "auto mac/52:54:00:12:34:57=lan\niface lan inet dhcp\n",
    }
    system = make(files)
    cards, _ = system.adapt((OLD, OLD_2), (NEW, NEW_2))
    assert [(each.name, each.now) for each in cards.used] == [("ens3", NEW), ("", NEW_2)]
    assert system.read("/etc/network/dir/b").startswith("auto mac/b4:45:06:aa:bb:02=lan\n")


FACTS = find_cards(Uses(names=("ens3",)), (OLD,), (NEW,))


@pytest.mark.parametrize(
    ("planner", "old", "new"),
    [
        (plan_ifupdown, "rename mac/52:54:00:12:34:56=lan0\n", "rename mac/b4:45:06:aa:bb:01=lan0\n"),
        (
            plan_ifupdown,
            "mapping eth0\n  script x\n  map 52:54:00:12:34:56 home\n",
            "mapping eth0\n  script x\n  map b4:45:06:aa:bb:01 home\n",
        ),
        (plan_ifupdown, "# auto mac/52:54:00:12:34:56\n", "# auto mac/52:54:00:12:34:56\n"),
        (plan_ifupdown, "iface x inet static\n  up ip neigh add 192.0.2.1 lladdr 52:54:00:12:34:56\n", None),
        (
            plan_networkd,
            "[Match]\nPermanentMACAddress=5254.0012.3456\n",
            "[Match]\nPermanentMACAddress=b445.06aa.bb01\n",
        ),
        (plan_networkd, "[Match]\nDriver=virtio_net e1000e\n", None),
        (plan_networkd, "[Match]\nDriver=virtio*\n", "[Match]\nDriver=virtio* e1000e\n"),
        (plan_networkd, "[Match]\nDriver=!virtio_net\n", None),
        (plan_networkd, "[Match]\nPath=pci-0000:00:*\n", "[Match]\nPath=pci-0000:00:* pci-0000:01:00.0\n"),
        (
            plan_networkd,
            "[Match]\nProperty=ID_NET_NAME_MAC=enx525400123456\n",
            "[Match]\nProperty=ID_NET_NAME_MAC=enxb44506aabb01\n",
        ),
        (plan_networkd, "[DHCPServerStaticLease]\nMACAddress=52:54:00:99:99:99\n", None),
        (
            plan_keyfile,
            "[ethernet]\nmac-address-denylist=02:00:00:00:00:01;52:54:00:12:34:56;\n[match]\ndriver=virtio_net;\npath=pci-0000:00:03.0\n",
            "[ethernet]\nmac-address-denylist=02:00:00:00:00:01;b4:45:06:aa:bb:01;\n[match]\ndriver=e1000e;\npath=pci-0000:01:00.0\n",
        ),
        (
            plan_keyfile,
            "[802-3-ethernet]\nmac-address=82;84;0;18;52;86;\n",
            "[802-3-ethernet]\nmac-address=180;69;6;170;187;1;\n",
        ),
        (plan_keyfile, "[bridge]\nmac-address=52:54:00:12:34:56\n", None),
        (
            plan_manager_conf,
            "[keyfile]\nunmanaged-devices=mac:52:54:00:12:34:56;interface-name:eth*\n[main]\nno-auto-default=52:54:00:12:34:56\n",
            "[keyfile]\nunmanaged-devices=mac:b4:45:06:aa:bb:01;interface-name:eth*\n[main]\nno-auto-default=b4:45:06:aa:bb:01\n",
        ),
        (
            plan_rules,
            (
                'SUBSYSTEM=="net", \\\n  KERNELS=="0000:00:03.0", DRIVERS=="virtio_net", NAME="lan"\n'
                'SUBSYSTEM=="block", KERNELS=="0000:00:03.0"\n'
            ),
            (
                'SUBSYSTEM=="net", \\\n  KERNELS=="0000:01:00.0", DRIVERS=="e1000e", NAME="lan"\n'
                'SUBSYSTEM=="block", KERNELS=="0000:00:03.0"\n'
            ),
        ),
        (plan_rules, '# ATTR{address}=="52:54:00:12:34:56"\n', None),
        (plan_rules, 'SUBSYSTEM=="net", ATTR{address}!="52:54:00:12:34:56", NAME="x"\n', None),
        (
            plan_yaml,
            "network: {ethernets: {a: {match: {driver: [virtio_net, igb]}}}}\n",
            "network: {ethernets: {a: {match: {driver: [e1000e, igb]}}}}\n",
        ),
        (plan_yaml, "network:\n  ethernets:\n   a: {macaddress: 52:54:00:12:34:56}\n", None),
        (plan_yaml, "network: [\n", None),
    ],
)
def test_what_a_planner_changes(planner: Callable[[str, Cards, str], TextPlan], old: str, new: str | None) -> None:
    assert planner(old, FACTS, "/etc/x").text == (old if new is None else new)


def test_an_address_that_yaml_takes_for_a_number_is_quoted() -> None:
    cards = find_cards(Uses(names=("ens3",)), (OLD,), (card("x", "52:54:00:12:34:11"),))
    text = "network:\n  ethernets:\n    a:\n      match:\n        macaddress: 52:54:00:12:34:56 # a\n"
    assert plan_yaml(text, cards, "x").text == text.replace("52:54:00:12:34:56", '"52:54:00:12:34:11"')


def test_an_anchor_is_changed_once() -> None:
    text = "network:\n  ethernets:\n    a: &x\n      match: {macaddress: '52:54:00:12:34:56'}\n    b: *x\n"
    assert plan_yaml(text, FACTS, "x").text == text.replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")


def test_words_that_are_names() -> None:
    text = "eth0 eth0.10 eth0:1 veth0 eth0-x eth01 ifup@eth0.service net.ipv4.conf.eth0.x a.eth0 \n# eth0\n'eth0'"
    new = plan_renames(text, {"eth0": "net0"}, "/x").text
    assert (
        new == "net0 net0.10 net0:1 veth0 eth0-x eth01 ifup@net0.service net.ipv4.conf.net0.x a.eth0 \n# eth0\n'net0'"
    )


def test_which_names_are_cards() -> None:
    assert set(find_ifupdown(DEBIAN_BOND["/etc/network/interfaces"], "").names) == {"ens3", "ens4"}
    assert find_networkd("[NetDev]\nName=br5\n", "x.netdev").virtual == ("br5",)
    assert find_yaml(UBUNTU["/etc/netplan/00-installer-config.yaml"], "") == Uses(names=("ens3",))
    rules = find_rules(SUSE["/etc/udev/rules.d/70-persistent-net.rules"], "")
    assert rules.pairs == (("eth0", "52:54:00:12:34:56"), ("eth1", "52:54:00:12:34:57"))


def test_stale_configuration_claims_no_card(make: Make) -> None:
    files = {**DEBIAN, "/etc/network/interfaces.d/old": "auto eth5\niface eth5 inet dhcp\n"}
    cards, _ = make(files).plan((OLD,), (NEW,))
    assert [(each.name, each.is_guess) for each in cards.used] == [("ens3", False)]


def test_an_adaptation_that_broke_off_goes_on(make: Make) -> None:
    """The first file was written, the others were not."""
    system = make({**RHEL_7, **RHEL_9}, systemd=252)
    ifcfg = next(iter(RHEL_7))
    system.write({ifcfg: RHEL_7[ifcfg].replace("52:54:00:12:34:56", "b4:45:06:aa:bb:01")})
    _, plan = system.adapt((OLD,), (NEW,))
    assert "mac-address=b4:45:06:aa:bb:01" in system.read(next(iter(RHEL_9)))
    assert list(plan.files) == [LINK.format("ens3")]


def test_systemd_itself_reads_the_link_file_so(make: Make, tmp_path: Path) -> None:
    """udev's own builtin says what it would call a card of the machine that the tests run on."""
    own = [nic for nic in probe_nics() if nic.permanent]
    if not own or shutil.which("udevadm") is None:
        pytest.skip("no card with an address of its own, or no udevadm")
    system = make(DEBIAN)
    system.adapt((OLD,), (own[0],))
    script = (
        f"mount --bind {system.root}/etc/systemd/network /etc/systemd/network && "
        f"udevadm test-builtin net_setup_link /sys/class/net/{own[0].name}"
    )
    Path("/etc/systemd/network").mkdir(parents=True, exist_ok=True)
    said = run(["unshare", "-m", "sh", "-c", script]).text
    assert "ID_NET_LINK_FILE=/etc/systemd/network/10-remetal-ens3.link\n" in said
    assert "ID_NET_NAME=ens3\n" in said
