"""netplan's files, and cloud-init's network configuration: YAML, of which only the scalars change that have to. Pure.

A parser of YAML 1.1, which netplan and cloud-init read, tells where each scalar stands; the text around them, comments
and all, stays byte for byte. What comes out is parsed again and must say the same but for these scalars.

Under `match`, `macaddress`, `driver` and `name` say which card is meant; beside it, `macaddress` sets an address, which
stays, and is told. Sources: netplan-yaml(5), cloud-init's documentation ("Networking config version 1", "version 2").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from remetal.adapt.network.addresses import parse_address, spell_address
from remetal.adapt.network.cards import Cards, Uses, base_name, is_virtual_name
from remetal.adapt.network.edits import note_lost, note_set
from remetal.adapt.text import Edit, TextPlan, plan_edits

_CARDS = {"ethernets", "wifis", "modems"}
_LINKS = {"interfaces", "link", "primary", "ports"}
_DEPTH_MAX = 64
_SIZE_MAX = 1 << 18


@dataclass(frozen=True, slots=True)
class _Scalar:
    """A scalar in a text: the keys that lead to it, its value, and where it stands, quotes included."""

    keys: tuple[str, ...]
    value: str
    start: int
    end: int
    style: str


@dataclass(frozen=True, slots=True)
class _Device:
    """One network device: its id or name, the section that it stands in, and its scalars below that."""

    name: str
    section: str
    scalars: tuple[_Scalar, ...]

    def find(self, *keys: str) -> str:
        """Return the value behind these keys; empty if there is none."""
        return next((each.value for each in self.scalars if each.keys == keys), "")


def find_yaml(text: str, path: str) -> Uses:
    """Return what a file says of cards; nothing where it is no YAML, as netplan would then say as well."""
    uses = Uses()
    for device in _devices(text):
        if device.section in _CARDS:
            uses += _find_card(device)
        else:
            linked = [each.value for each in device.scalars if each.keys[0] in _LINKS]
            uses += Uses(
                names=tuple(base_name(each) for each in linked if not is_virtual_name(each)), virtual=(device.name,)
            )
    return uses


def plan_yaml(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a file: what matches a card by its address or its driver finds the one that it has become."""
    edits: list[Edit] = []
    notes: list[str] = []
    for device in _devices(text):
        meant = cards.find_by_address(parse_address(device.find("match", "macaddress")))
        chosen = Cards((meant,)) if meant is not None else cards
        for each in device.scalars:
            if each.keys == ("match", "macaddress"):
                edits += _edit(each, cards, device.name)
                notes += note_lost(text, cards, each.start, each.end, path)
            elif each.keys[:2] == ("match", "driver"):
                edits += _carry_driver(each, chosen, device.name)
            elif each.keys == ("macaddress",):
                notes += note_set(each.value, cards, 0, len(each.value), path, f"macaddress of {device.name}")
    edits = list({each.start: each for each in edits}.values())  # what an alias repeats stands in the text once
    plan = plan_edits(path, text, edits, notes)
    return (
        plan if _is_as_before(text, plan.text, edits) else plan_edits(path, text, (), [*notes, _give_up(path, edits)])
    )


def _find_card(device: _Device) -> Uses:
    address = parse_address(device.find("match", "macaddress"))
    matched = device.find("match", "name")
    is_glob = bool(set("*?[") & set(matched))
    given = device.find("set-name")
    name = given or (matched if matched and not is_glob else "")
    if not name and not any(each.keys[0] == "match" for each in device.scalars):
        name = device.name
    leased = any(device.find(key).lower() in {"true", "yes", "on"} for key in ("dhcp4", "dhcp6"))
    named = (name,) if name else ()
    return Uses(
        names=named,
        addresses=(address,) if address and not name else (),
        pairs=((name, address),) if address and name else (),
        given=(given,) if given and address else (),
        globs=(matched,) if is_glob else (),
        dhcp=named if leased else (),
    )


def _edit(each: _Scalar, cards: Cards, name: str) -> Iterator[Edit]:
    new = cards.new_address(parse_address(each.value))
    if new:
        text = spell_address(new, each.value)
        yield Edit(
            each.start, each.end, _quoted(text, each.style), f"{name} is matched by {text} instead of {each.value}"
        )


def _carry_driver(each: _Scalar, cards: Cards, name: str) -> Iterator[Edit]:
    new = cards.carry(each.value, lambda nic: nic.driver)
    if len(new) == 1 and new[0] != each.value:
        yield Edit(
            each.start, each.end, _quoted(new[0], each.style), f"{name} is driven by {new[0]} instead of {each.value}"
        )


def _quoted(text: str, style: str) -> str:
    """Return a scalar in the style of the old one; a plain one that YAML would take for a number gets quotes."""
    resolved = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    if style in {"'", '"'}:
        return f"{style}{text}{style}"
    return text if resolved == "tag:yaml.org,2002:str" else f'"{text}"'


def _give_up(path: str, edits: Sequence[Edit]) -> str:
    return f"{path} could not be changed safely; change it by hand: {'; '.join(edit.what for edit in edits)}"


def _is_as_before(old: str, new: str, edits: Sequence[Edit]) -> bool:
    """Whether a changed file still says the same, but for as many scalars as were changed."""
    if not edits:
        return True
    before, after = (list(_walk(_compose(text), ())) for text in (old, new))
    if [each.keys for each in before] != [each.keys for each in after]:
        return False
    return sum(one.value != other.value for one, other in zip(before, after, strict=True)) == len(edits)


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a text; None where it is no YAML, or more of it than anybody would write."""
    if len(text) > _SIZE_MAX:
        return None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _walk(node: yaml.Node | None, keys: tuple[str, ...], depth: int = 0) -> Iterator[_Scalar]:
    """Yield all scalars below a node, those of a sequence under the keys of the sequence. Aliases are passed over."""
    stack: list[tuple[yaml.Node, tuple[str, ...]]] = [(node, keys)] if node is not None else []
    seen: set[int] = set()
    while stack:
        here, way = stack.pop()
        if id(here) in seen or len(way) > _DEPTH_MAX:
            continue
        seen.add(id(here))
        match here:
            case yaml.ScalarNode():
                yield _Scalar(way, here.value, here.start_mark.index, here.end_mark.index, here.style or "")
            case yaml.SequenceNode():
                stack += [(each, way) for each in reversed(here.value)]
            case yaml.MappingNode():
                stack += [
                    (value, (*way, key.value if isinstance(key, yaml.ScalarNode) else ""))
                    for key, value in reversed(here.value)
                ]


def _devices(text: str) -> Iterator[_Device]:
    """Yield the devices of a file, be it of version 1 or 2, below `network:` or without it."""
    top = _compose(text)
    network = _child(top, "network") or top
    if isinstance(network, yaml.MappingNode):
        config = _child(network, "config")
        if isinstance(config, yaml.SequenceNode):
            yield from filter(None, map(_read_device_1, config.value))
        elif config is not None:
            network = config
        for key, section in network.value if isinstance(network, yaml.MappingNode) else ():
            if isinstance(section, yaml.MappingNode) and isinstance(key, yaml.ScalarNode):
                for name, device in section.value:
                    if isinstance(name, yaml.ScalarNode):
                        yield _Device(name.value, key.value, tuple(each for each in _walk(device, ()) if each.keys))


def _read_device_1(node: yaml.Node) -> _Device | None:
    """Return a device of version 1 as one of version 2: `mac_address` says which card a `physical` one is."""
    scalars = tuple(_walk(node, ()))
    facts = {each.keys: each.value for each in scalars}
    kind, name = facts.get(("type",), ""), facts.get(("name",), "")
    if not kind or not name:
        return None
    renamed: dict[tuple[str, ...], tuple[str, ...]] = {
        ("mac_address",): ("match", "macaddress") if kind == "physical" else ("macaddress",)
    }
    renamed |= {(key,): ("interfaces",) for key in ("bond_interfaces", "bridge_interfaces", "vlan_link")}
    moved = tuple(
        _Scalar(renamed.get(each.keys, each.keys), each.value, each.start, each.end, each.style)
        for each in scalars
        if each.keys
    )
    given = (_Scalar(("set-name",), name, 0, 0, ""),) if kind == "physical" and ("mac_address",) in facts else ()
    leased = any(each.keys == ("subnets", "type") and each.value.startswith("dhcp") for each in scalars)
    dhcp = (_Scalar(("dhcp4",), "true", 0, 0, ""),) if leased else ()
    return _Device(name, "ethernets" if kind == "physical" else kind, (*moved, *given, *dhcp))


def _child(node: yaml.Node | None, name: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    found = (value for key, value in node.value if isinstance(key, yaml.ScalarNode) and key.value == name)
    return next(found, None)
