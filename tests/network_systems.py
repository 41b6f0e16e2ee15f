"""Installed systems as their distributions configure the network of one machine, and the machines that they move to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remetal.adapt.network.adapt import apply_network
from remetal.adapt.network.cards import Cards, find_cards
from remetal.adapt.network.facts import probe_udev
from remetal.adapt.network.files import NetworkPlan, plan_network, probe_uses
from remetal.adapt.network.matching import Choice
from remetal.layout.model import Nic

SYSTEMD = "/usr/lib/systemd/systemd-udevd"


def card(name: str, mac: str, driver: str = "e1000e", bus: str = "00:03.0", **more: object) -> Nic:
    """Return a card as udev and sysfs tell of it."""
    told = {"permanent": mac, "assigned": 0, "path": f"pci-0000:{bus}", "up": True} | more
    return Nic(name=name, mac=mac, driver=driver, place=f"0000:{bus}", **told)  # type: ignore[arg-type]


OLD = card("ens3", "52:54:00:12:34:56", "virtio_net", properties=("ID_NET_NAME_PATH=enp0s3", "ID_NET_NAME_SLOT=ens3"))
OLD_2 = card("ens4", "52:54:00:12:34:57", "virtio_net", "00:04.0", properties=("ID_NET_NAME_SLOT=ens4",))
NEW = card("enp1s0", "b4:45:06:aa:bb:01", "e1000e", "01:00.0", properties=("ID_NET_NAME_PATH=enp1s0",))
NEW_2 = card("enp2s0", "b4:45:06:aa:bb:02", "igb", "02:00.0", properties=("ID_NET_NAME_PATH=enp2s0",))


@dataclass
class Rooted:
    """A system as a folder: what `remetal` would have mounted."""

    root: Path
    is_debian: bool = False
    files: dict[str, str] = field(default_factory=dict)

    def write(self, files: Mapping[str, str]) -> None:
        for path, text in files.items():
            place = self.root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def cards(self, captured: tuple[Nic, ...], now: tuple[Nic, ...], chosen: tuple[Choice, ...] = ()) -> Cards:
        return find_cards(probe_uses(self.root), captured, now, chosen)

    def plan(
        self, captured: tuple[Nic, ...], now: tuple[Nic, ...], chosen: tuple[Choice, ...] = ()
    ) -> tuple[Cards, NetworkPlan]:
        uses = probe_uses(self.root)
        cards = find_cards(uses, captured, now, chosen)
        return cards, plan_network(self.root, cards, probe_udev(self.root, is_debian=self.is_debian), uses)

    def adapt(
        self, captured: tuple[Nic, ...], now: tuple[Nic, ...], chosen: tuple[Choice, ...] = ()
    ) -> tuple[Cards, NetworkPlan]:
        done = self.plan(captured, now, chosen)
        apply_network(self.root, done[1])
        return done

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()


def make_system(root: Path, files: Mapping[str, str], *, systemd: int = 252, is_debian: bool = False) -> Rooted:
    """Make the files of a system; `systemd` is its version, 0 for one without udev."""
    root.mkdir(parents=True, exist_ok=True)
    made = Rooted(root, is_debian)
    if systemd:
        made.write({SYSTEMD: "", f"/usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-{systemd}.so": ""})
    made.write({"/etc/hostname": "web1\n"} | dict(files))
    return made


DEBIAN = {
    "/etc/network/interfaces": """# This file describes the network interfaces available on your system
# and how to activate them. For more information, see interfaces(5).

source /etc/network/interfaces.d/*

# The loopback network interface
auto lo
iface lo inet loopback

# The primary network interface
allow-hotplug ens3
iface ens3 inet static
	address 192.0.2.10/24
	gateway 192.0.2.1
	# dns-* options are implemented by the resolvconf package, if installed
	dns-nameservers 192.0.2.1
"""
}
DEBIAN_BOND = {
    "/etc/network/interfaces": """auto lo
iface lo inet loopback

auto bond0
iface bond0 inet manual
    bond-slaves ens3 ens4
    bond-mode 802.3ad
    bond-miimon 100

auto vmbr0
iface vmbr0 inet static
    address 192.0.2.20/24
    gateway 192.0.2.1
    bridge-ports bond0.100
    bridge-stp off

iface ens3 inet manual

iface ens4 inet manual
"""
}
UBUNTU = {
    "/etc/netplan/00-installer-config.yaml": """# This is the network config written by 'subiquity'
network:
  ethernets:
    ens3:
      addresses:
      - 192.0.2.10/24
      nameservers:
        addresses: [192.0.2.1]
        search: []
      routes:
      - to: default
        via: 192.0.2.1
  version: 2
"""
}
UBUNTU_CLOUD = {
    "/etc/netplan/50-cloud-init.yaml": """# This file is generated from information provided by the datasource.  Changes
# to it will not persist across an instance reboot.
network:
    ethernets:
        ens3:
            dhcp4: true
            match:
                macaddress: 52:54:00:12:34:56   # the first one
            set-name: ens3
    version: 2
""",
    "/etc/cloud/cloud.cfg.d/50-curtin-networking.cfg": """network:
  config:
  - id: ens3
    mac_address: '52:54:00:12:34:56'
    name: ens3
    subnets: [{type: dhcp4}]
    type: physical
  - name: bond0
    type: bond
    mac_address: '52:54:00:12:34:56'
    bond_interfaces: [ens3]
  version: 1
""",
}
RHEL_9 = {
    "/etc/NetworkManager/system-connections/ens3.nmconnection": """[connection]
id=ens3
uuid=7e1d1c0f-3a2e-3d5a-9a2d-6a3f4f1b2c3d
type=ethernet
interface-name=ens3

[ethernet]
mac-address=52:54:00:12:34:56

[ipv4]
address1=192.0.2.10/24,192.0.2.1
method=manual

[ipv6]
addr-gen-mode=eui64
method=auto

[proxy]
"""
}
RHEL_7 = {
    "/etc/sysconfig/network-scripts/ifcfg-ens3": """TYPE="Ethernet"
BOOTPROTO="none"
NAME="ens3"
UUID="3a2e7e1d-1c0f-4d5a-9a2d-6a3f4f1b2c3d"
HWADDR=52:54:00:12:34:56
DEVICE="ens3"
ONBOOT="yes"
IPADDR="192.0.2.10"
PREFIX="24"
GATEWAY="192.0.2.1"
""",
    "/etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\nIPADDR=127.0.0.1\nONBOOT=yes\nNAME=loopback\n",
    "/etc/sysconfig/network-scripts/ifcfg-ens3.bak": "HWADDR=52:54:00:12:34:56\nDEVICE=ens3\n",
}


def _rule(mac: str, rest: str) -> str:
    return f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{mac}", {rest}\n'


CENTOS_6 = {
    "/etc/udev/rules.d/70-persistent-net.rules": """\
# This file was automatically generated by the /lib/udev/write_net_rules
# program, run by the persistent-net-generator.rules rules file.
#
# You can modify it, as long as you keep each rule on a single
# line, and change only the value of the NAME= key.

# PCI device 0x1af4:0x1000 (virtio-pci)
"""
    + _rule("52:54:00:12:34:56", 'ATTR{type}=="1", KERNEL=="eth*", NAME="eth0"'),
    "/etc/sysconfig/network-scripts/ifcfg-eth0": """DEVICE=eth0
HWADDR=52:54:00:12:34:56
TYPE=Ethernet
ONBOOT=yes
NM_CONTROLLED=yes
BOOTPROTO=dhcp
""",
    "/sbin/udevd": "",
}
SUSE = {
    "/etc/sysconfig/network/ifcfg-eth0": "BOOTPROTO='static'\nSTARTMODE='auto'\nIPADDR='192.0.2.10/24'\nZONE=public\n",
    "/etc/sysconfig/network/ifroute-eth0": "default 192.0.2.1 - eth0\n",
    "/etc/sysconfig/network/ifcfg-br0": "BOOTPROTO='none'\nBRIDGE='yes'\nBRIDGE_PORTS='eth1'\nSTARTMODE='auto'\n",
    "/etc/udev/rules.d/70-persistent-net.rules": "".join(
        _rule(mac, f'ATTR{{dev_id}}=="0x0", ATTR{{type}}=="1", KERNEL=="eth*", NAME="{name}"')
        for name, mac in (("eth0", "52:54:00:12:34:56"), ("eth1", "52:54:00:12:34:57"))
    ),
    "/etc/sysctl.d/70-yast.conf": "net.ipv4.conf.eth0.rp_filter = 0\nnet.ipv4.conf.veth0.rp_filter = 0\n",
}
ARCH = {
    "/etc/systemd/network/20-wired.network": """[Match]
MACAddress=52:54:00:12:34:56 \\
           02-00-00-00-00-99
Driver=virtio_net

[Link]
MACAddress=52:54:00:12:34:56

[Network]
DHCP=no
Address=192.0.2.10/24
Gateway=192.0.2.1
""",
    "/etc/systemd/network/10-lan.link": """[Match]
Path=pci-0000:00:04.0
Property=ID_NET_NAME_SLOT=ens4 ID_PATH=pci-0000:00:04.0

[Link]
Name=lan0
""",
    "/etc/systemd/network/30-lan.network": "[Match]\nName=lan0\n\n[Network]\nDHCP=yes\n",
}
ALPINE = {
    "/etc/network/interfaces": "auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n",
    "/etc/mactab": "# name mac\neth0 52:54:00:12:34:56\n",
}
