"""Telling a system's files another name of an interface, where it could not keep the one that it knows. Pure.

Only whole words are names: `eth0` in `eth0.10`, `eth0:1` and `ifup@eth0.service`, but not in `veth0` or `my-eth0`.
Comments stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from remetal.adapt.text import Edit, TextPlan, plan_edits

FILES = (
    "/etc/network/interfaces",
    "/etc/network/interfaces.d/*",
    "/etc/systemd/network/*",
    "/etc/netplan/*.y*ml",
    "/etc/NetworkManager/NetworkManager.conf",
    "/etc/NetworkManager/conf.d/*.conf",
    "/etc/NetworkManager/system-connections/*",
    "/etc/sysconfig/network-scripts/ifcfg-*",
    "/etc/sysconfig/network-scripts/r[ou][ul]*-*",
    "/etc/sysconfig/network/*",
    "/etc/cloud/cloud.cfg.d/*.cfg",
    "/etc/udev/rules.d/*.rules",
    "/etc/iftab",
    "/etc/mactab",
    "/etc/default/grub",
    "/etc/default/grub.d/*.cfg",
    "/etc/kernel/cmdline",
    "/etc/cmdline.d/*.conf",
    "/etc/initramfs-tools/initramfs.conf",
    "/etc/initramfs-tools/conf.d/*",
    "/boot/loader/entries/*.conf",
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/etc/sysctl.conf",
    "/etc/sysctl.d/*.conf",
    "/etc/iptables/*",
    "/etc/sysconfig/iptables",
    "/etc/sysconfig/ip6tables",
    "/etc/nftables.conf",
    "/etc/nftables/*",
    "/etc/sysconfig/nftables.conf",
    "/etc/ufw/*.rules",
    "/etc/firewalld/zones/*.xml",
    "/etc/firewalld/direct.xml",
    "/etc/shorewall/*",
    "/etc/default/isc-dhcp-server",
    "/etc/default/dnsmasq",
    "/etc/dhcp/*.conf",
    "/etc/dnsmasq.conf",
    "/etc/dnsmasq.d/*",
    "/etc/keepalived/keepalived.conf",
    "/etc/radvd.conf",
)
"""Where names of interfaces usually stand."""

_MOVED = re.compile(r"(?:ifcfg|ifroute|route6?|rule6?|keys|ifrule)-(.+)")


def plan_renames(text: str, renames: Mapping[str, str], path: str) -> TextPlan:
    """Plan a file that names interfaces by names that have become others."""
    if not renames:
        return plan_edits(path, text, ())
    edits = []
    for match in _word(renames).finditer(text):
        if not text[text.rfind("\n", 0, match.start()) + 1 : match.start()].lstrip().startswith("#"):
            new = renames[match[0]]
            edits.append(Edit(*match.span(), new, f"{match[0]} is called {new} now"))
    return plan_edits(path, text, edits)


def find_moves(folder: str, names: list[str], renames: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the files of a folder that bear an interface's name in theirs, and what they are called from now on."""
    for name in names:
        match = _MOVED.fullmatch(name)
        if match is not None and match[1].partition(":")[0].partition(".")[0] in renames:
            base = re.split(r"[.:]", match[1], maxsplit=1)[0]
            yield f"{folder}/{name}", f"{folder}/{name[: match.start(1)]}{renames[base]}{match[1][len(base) :]}"


def _word(renames: Mapping[str, str]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(renames, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9_-])(?<!(?<!conf)(?<!neigh)\.)(?:{names})(?![A-Za-z0-9_-])")
