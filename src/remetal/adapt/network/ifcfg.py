"""ifcfg files: /etc/sysconfig/network-scripts of Red Hat and its kin, /etc/sysconfig/network of SUSE. Pure.

`HWADDR=` says which card is meant. `MACADDR=` and SUSE's `LLADDR=` set an address: they stay, and are told. Sources:
initscripts' sysconfig.txt, nm-settings-ifcfg-rh(5), ifcfg(5) of wicked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from remetal.adapt.network.addresses import find_addresses
from remetal.adapt.network.cards import Cards, Uses, base_name, is_virtual_name
from remetal.adapt.network.edits import edit_addresses, note_lost, note_set
from remetal.adapt.text import Edit, TextPlan, plan_edits

_ASSIGNMENT = re.compile(
    r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"'#;]*))", re.MULTILINE
)
_NO_CARD = {"bond", "bridge", "team", "vlan", "gre", "ipip", "sit", "ovsbridge", "ovsbond", "wireguard", "ipsec", "vti"}
_MADE = re.compile(r"BONDING_(?:OPTS|MASTER|MODULE_OPTS)|BRIDGE_PORTS|BRIDGE_STP|STP|TEAM_.*|DELAY|VLAN_ID|TUNNEL.*")
_PARENTS = re.compile(r"PHYSDEV|ETHERDEVICE|BRIDGE_PORTS|BONDING_SLAVE_?\d+|TEAM_PORT_DEVICE_?\d+")
_SET = {"MACADDR", "MACADDRESS", "LLADDR"}


def find_ifcfg(text: str, path: str) -> Uses:
    """Return what an ifcfg file says of a card; its name ends with that of its interface, if it does not tell it."""
    values = {key: value for key, value, _, _ in _assignments(text)}
    name = values.get("DEVICE") or path.rpartition("/ifcfg-")[2]
    parents = [word for key, value in values.items() if _PARENTS.fullmatch(key) for word in value.split()]
    addresses = [address for _, _, address in find_addresses(values.get("HWADDR", ""))]
    made = values.get("TYPE", "").lower() in _NO_CARD or values.get("VLAN", "").lower() == "yes"
    made = made or any(_MADE.fullmatch(key) and value.lower() != "no" for key, value in values.items())
    made = made or is_virtual_name(name) or (base_name(name) != name and ":" not in name) or "ETHERDEVICE" in values
    own = "" if made else base_name(name)
    leased = values.get("BOOTPROTO", "").lower().startswith("dhcp") and bool(own)
    return Uses(
        names=tuple(each for each in (own, *parents) if each and not is_virtual_name(each)),
        virtual=(name,) if made else (),
        pairs=tuple((own, address) for address in addresses[:1] if own),
        dhcp=(own,) if leased else (),
    )


def plan_ifcfg(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan an ifcfg file: its HWADDR= is the new card's."""
    edits: list[Edit] = []
    notes: list[str] = []
    for key, _, start, end in _assignments(text):
        if key == "HWADDR" or key == "HWADDR_BLACKLIST":
            edits += edit_addresses(text, cards, start, end, f"{key}=")
            notes += note_lost(text, cards, start, end, path) if key == "HWADDR" else ()
        elif key in _SET:
            notes += note_set(text, cards, start, end, path, f"{key}=")
    return plan_edits(path, text, edits, notes)


def _assignments(text: str) -> Iterator[tuple[str, str, int, int]]:
    for match in _ASSIGNMENT.finditer(text):
        group = next(number for number in (2, 3, 4) if match[number] is not None)
        yield match[1], match[group], *match.span(group)
