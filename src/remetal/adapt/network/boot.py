"""Kernel command lines that name network cards: `ifname=`, `BOOTIF=`, `ip=`, wherever they are written down. Pure.

`ifname=lan0:52:54:…` and `BOOTIF=01-52-54-…` know a card by its address, so they follow it. Other parameters know it by
its name, which stays; the initramfs then has to know the name, too. Sources: dracut.cmdline(7), initramfs-tools(7),
Linux Documentation/admin-guide/nfs/nfsroot.rst.
"""

from __future__ import annotations

import re

from remetal.adapt.network.addresses import parse_address
from remetal.adapt.network.cards import Cards, Uses, is_hardware_name
from remetal.adapt.network.edits import edit_address
from remetal.adapt.text import Edit, TextPlan, plan_edits

_LINE = re.compile(r"^(?![ \t]*#)(.+)$", re.MULTILINE)
_BYTES = r"(?:[0-9A-Fa-f]{2}[:-]){5}(?:(?:[0-9A-Fa-f]{2}[:-]){14})?[0-9A-Fa-f]{2}"
_ADDRESS = re.compile(
    rf"(?<![^\s\"'=])(?:ifname=([^\s:\"']+):|BOOTIF=(?:[0-9A-Fa-f]{{2}}[:-])?)({_BYTES})(?![0-9A-Za-z:-])"
)
_NETWORK = re.compile(r"(?<![^\s\"'=])(?:ip|bootdev|bond|bridge|team|vlan|nameserver|rd\.route)=([^\s\"']+)")


def find_boot_words(text: str, path: str) -> Uses:
    """Return which cards a command line brings up before the root is there."""
    names, pairs, alone = [], [], []
    for line in _LINE.finditer(text):
        for match in _ADDRESS.finditer(text, line.start(1), line.end(1)):
            address = parse_address(match[2])
            if address and match[1]:
                names.append(match[1])
                pairs.append((match[1], address))
            elif address:
                alone.append(address)
        for match in _NETWORK.finditer(text, line.start(1), line.end(1)):
            names += [word for word in re.split(r"[:,]", match[1]) if is_hardware_name(word)]
    return Uses(names=tuple(names), pairs=tuple(pairs), addresses=tuple(alone))


def plan_boot_words(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a file that holds command lines: the addresses in it are the new cards'. No length changes."""
    edits: list[Edit] = []
    for line in _LINE.finditer(text):
        for match in _ADDRESS.finditer(text, line.start(1), line.end(1)):
            edits += edit_address(text, cards, *match.span(2), "ifname=" if match[1] else "BOOTIF=")
    return plan_edits(path, text, edits)
