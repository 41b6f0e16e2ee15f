"""The files of a restored system that are about its network: which they are, what they say, and what they should say.

Everything is read and planned before anything is written. Files that give names to cards are written last, so that an
adaptation that broke off finds the rest as it was when it is repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

from remetal.adapt.network.addresses import address_of
from remetal.adapt.network.boot import find_boot_words, plan_boot_words
from remetal.adapt.network.cards import Cards, Uses, names_of
from remetal.adapt.network.ifcfg import find_ifcfg, plan_ifcfg
from remetal.adapt.network.ifupdown import find_ifupdown, find_sources, plan_ifupdown
from remetal.adapt.network.keyfiles import find_keyfile, find_manager_conf, plan_keyfile, plan_manager_conf
from remetal.adapt.network.naming import LINKS, RULES, Naming, Udev, plan_naming
from remetal.adapt.network.networkd import find_networkd, plan_networkd
from remetal.adapt.network.renaming import FILES, find_moves, plan_renames
from remetal.adapt.network.tables import find_table, plan_table
from remetal.adapt.network.udev_rules import find_rules, plan_rules
from remetal.adapt.network.yaml_files import find_yaml, plan_yaml
from remetal.adapt.rooted import find_inside, list_inside, read_inside
from remetal.adapt.text import TextPlan, diff_texts

Finder: TypeAlias = Callable[[str, str], Uses]
Planner: TypeAlias = Callable[[str, Cards, str], TextPlan]

_FILES: tuple[tuple[str, Finder, Planner], ...] = (
    ("/etc/network/interfaces", find_ifupdown, plan_ifupdown),
    ("/etc/network/interfaces.d/*", find_ifupdown, plan_ifupdown),
    ("/etc/netplan/*.yaml", find_yaml, plan_yaml),
    ("/etc/netplan/*.yml", find_yaml, plan_yaml),
    ("/etc/systemd/network/*.network", find_networkd, plan_networkd),
    ("/etc/systemd/network/*.netdev", find_networkd, plan_networkd),
    ("/etc/systemd/network/*.link", find_networkd, plan_networkd),
    ("/etc/NetworkManager/system-connections/*", find_keyfile, plan_keyfile),
    ("/usr/lib/NetworkManager/system-connections/*", find_keyfile, plan_keyfile),
    ("/etc/NetworkManager/NetworkManager.conf", find_manager_conf, plan_manager_conf),
    ("/etc/NetworkManager/conf.d/*.conf", find_manager_conf, plan_manager_conf),
    ("/etc/sysconfig/network-scripts/ifcfg-*", find_ifcfg, plan_ifcfg),
    ("/etc/sysconfig/network/ifcfg-*", find_ifcfg, plan_ifcfg),
    ("/etc/udev/rules.d/*.rules", find_rules, plan_rules),
    ("/etc/iftab", find_table, plan_table),
    ("/etc/mactab", find_table, plan_table),
    ("/etc/cloud/cloud.cfg.d/*.cfg", find_yaml, plan_yaml),
    ("/var/lib/cloud/seed/nocloud/network-config", find_yaml, plan_yaml),
    ("/var/lib/cloud/seed/nocloud-net/network-config", find_yaml, plan_yaml),
)
_BOOT_FILES = (
    "/etc/default/grub",
    "/etc/default/grub.d/*.cfg",
    "/etc/kernel/cmdline",
    "/etc/cmdline.d/*.conf",
    "/etc/dracut.conf",
    "/etc/dracut.conf.d/*.conf",
    "/boot/loader/entries/*.conf",
    "/boot/grub/grub.cfg",
    "/boot/grub/grubenv",
    "/boot/grub2/grub.cfg",
    "/boot/grub2/grubenv",
)
_LEFTOVERS = re.compile(r".*(?:~|\.(?:bak|old|orig|save|rpmnew|rpmsave|rpmorig|dpkg-\w+|ucf-\w+|swp))")
_SCRIPTS = ("/etc/sysconfig/network-scripts", "/etc/sysconfig/network")
_DRACUT = "/etc/dracut.conf.d/90-remetal-network.conf"
_INITRAMFS = ("/etc/initramfs-tools/initramfs.conf", "/etc/initramfs-tools/conf.d/*")
_EARLY = re.compile(r"^[ \t]*(?:export[ \t]+)?(?:IP|DEVICE)=[\"']?[^\s\"'#]", re.MULTILINE)
_DROPBEAR = ("/etc/dropbear/initramfs", "/etc/dropbear-initramfs")
_MENTIONS_MAX = 20
_WALK_MAX = 20_000
_MENTION_SIZE = 1 << 18
_NO_TEXT = ("/etc/udev/hwdb", "/etc/ld.so.cache", "/etc/ssl/", "/etc/selinux/", "/etc/alternatives/")


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """What is to be changed for the network, in this order: texts, files that get other names, new files by path."""

    texts: tuple[TextPlan, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    early: tuple[str, ...] = ()
    """Files among them that the initramfs cannot do without: it uses the network, or names have to be exchanged."""
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything is to be written."""
        return bool(self.moves or self.files or any(plan.changes for plan in self.texts))


def probe_uses(root: Path) -> Uses:
    """Return what the configuration of the system mounted at `root` says of network cards. Nothing is written."""
    uses = Uses()
    for path, finder, _ in _walk(root):
        text = _read(root, path)
        if text is not None:
            uses += finder(text, path)
    return uses


def plan_network(root: Path, cards: Cards, udev: Udev, uses: Uses) -> NetworkPlan:
    """Return what has to change in the system mounted at `root` for its cards to be those of this machine.

    `uses` is what `probe_uses` returned of it. Nothing is written.
    """
    plans: dict[str, TextPlan] = {}
    for path, _, planner in _walk(root):
        text = _read(root, path)
        if text is not None and path not in plans:
            plans[path] = planner(text, cards, path)
    naming = plan_naming(
        cards,
        udev,
        given=_find_given(root, plans, cards),
        links={path: plan.text for path, plan in plans.items() if path.endswith(".link")},
        used=(*uses.names, *uses.virtual, *uses.given),
    )
    others = {path: plan for path, plan in plans.items() if path not in naming.files}
    renamed = _rename(root, others, naming)
    texts = sorted(renamed.values(), key=lambda plan: _gives_names(plan.path))
    files = {path: text for path, text in naming.files.items() if _read(root, path) != text}
    named = (*files, *(plan.path for plan in texts if plan.changes and _gives_names(plan.path)))
    early = named if _is_early(root, cards, naming) else ()
    if early and list_inside(root, "/usr/lib/dracut"):
        files = {_DRACUT: _dracut_text(early)} | files
    moves = [move for folder in _SCRIPTS for move in find_moves(folder, list_inside(root, folder), naming.renames)]
    return NetworkPlan(
        texts=tuple(plan for plan in texts if plan.changes or plan.notes),
        moves=tuple(moves),
        files=files,
        renames=naming.renames,
        early=early,
        notes=(*naming.notes, *_find_mentions(root, cards, naming, {*plans, *naming.files})),
    )


def probe_naming_files(root: Path) -> dict[str, bytes]:
    """Return the files that give names to network cards in the system mounted at `root`, by their paths in it.

    They are what its initramfs should hold, too, at the same paths below its root, wherever remetal has written or
    changed one of them: an initramfs names the cards first, and some mistakes cannot be undone later. Files that it
    has by itself are replaced by those of the same name.
    """
    found: dict[str, bytes] = {}
    for folder, pattern in ((LINKS, "*.link"), ("/etc/udev/rules.d", "*.rules")):
        for name in list_inside(root, folder):
            data = read_inside(root, f"{folder}/{name}") if fnmatchcase(name, pattern) else None
            if data is not None and (pattern == "*.link" or find_rules(decode(data), name).names):
                found[f"{folder}/{name}"] = data
    return found


def new_file_diff(root: Path, path: str, text: str) -> str:
    """Return the diff of a file that is written anew."""
    return diff_texts(path, _read(root, path) or "", text)


def decode(data: bytes) -> str:
    """Return a file's bytes as text; what is no UTF-8 comes back as it was."""
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes of a file's text."""
    return text.encode("utf-8", "surrogateescape")


def _walk(root: Path) -> Iterator[tuple[str, Finder, Planner]]:
    """Yield the files that are there, each once, with what reads and plans them."""
    seen: set[str] = set()
    boot = tuple((pattern, find_boot_words, plan_boot_words) for pattern in _BOOT_FILES)
    sourced = tuple((pattern, find_ifupdown, plan_ifupdown) for pattern in _find_sourced(root))
    for pattern, finder, planner in (*_FILES, *sourced, *boot):
        for path in _paths(root, pattern):
            if path not in seen and not _LEFTOVERS.fullmatch(path):
                seen.add(path)
                yield path, finder, planner


def _paths(root: Path, pattern: str) -> Iterator[str]:
    folder, _, name = pattern.rpartition("/")
    if not set("*?[") & set(name):
        yield pattern
        return
    for each in list_inside(root, folder):
        if fnmatchcase(each, name):
            yield f"{folder}/{each}"


def _find_sourced(root: Path) -> Iterator[str]:
    """Yield the patterns of other files that /etc/network/interfaces reads in."""
    for how, word in find_sources(_read(root, "/etc/network/interfaces") or ""):
        path = word if word.startswith("/") else f"/etc/network/{word}"
        folder = path.rpartition("/")[0]
        if not set("*?[${") & set(folder):
            yield path if how == "source" else f"{path.rstrip('/')}/*"


def _read(root: Path, path: str) -> str | None:
    try:
        data = read_inside(root, path)
    except OSError:
        return None
    return None if data is None else decode(data)


def _find_given(root: Path, plans: Mapping[str, TextPlan], cards: Cards) -> set[str]:
    """Return the names that the planned files, other than our own, give to the very cards that should have them."""
    uses = Uses()
    for path, finder, _ in _walk(root):
        if path in plans and path != RULES and not path.startswith(f"{LINKS}/10-remetal-"):
            uses += finder(plans[path].text, path)
    facts = ((card.name, card.now) for card in cards.used if card.now is not None)
    wanted = {(name, fact) for name, nic in facts for fact in (address_of(nic), nic.path) if fact}
    return {name for name, fact in (*uses.pairs, *uses.places) if name in uses.given and (name, fact) in wanted}


def _is_early(root: Path, cards: Cards, naming: Naming) -> bool:
    """Whether an initramfs that does not know the names does harm that cannot be undone later."""
    placed = [card for card in cards.used if card.now is not None]
    every = [*cards.others, *(card.now for card in placed if card.now is not None)]
    for card in placed:
        name = naming.renames.get(card.name, card.name)
        if any(name in names_of(nic) for nic in every if nic != card.now):
            return True
    texts = (_read(root, path) or "" for pattern in _BOOT_FILES for path in _paths(root, pattern))
    if any(find_boot_words(text, "").names for text in texts):
        return True
    configured = (_read(root, path) or "" for pattern in _INITRAMFS for path in _paths(root, pattern))
    return any(_EARLY.search(text) for text in configured) or any(list_inside(root, path) for path in _DROPBEAR)


def _dracut_text(paths: tuple[str, ...]) -> str:
    """Return a drop-in for dracut, which takes no such files by itself. Source: dracut.conf(5)."""
    return (
        "# Written by remetal when it restored this system onto other hardware: the initramfs has to call the network\n"
        "# cards by the names that this system knows.\n"
        f'install_items+=" {" ".join(paths)} "\n'
    )


def _gives_names(path: str) -> bool:
    return path.endswith((".link", ".rules"))


def _rename(root: Path, plans: Mapping[str, TextPlan], naming: Naming) -> dict[str, TextPlan]:
    """Return the plans with the names in them that became others; more files name interfaces than know cards."""
    done = dict(plans)
    if not naming.renames:
        return done
    for path in dict.fromkeys((*plans, *(path for pattern in FILES for path in _paths(root, pattern)))):
        old = _read(root, path)
        if old is None or path in naming.files or _LEFTOVERS.fullmatch(path):
            continue
        before = plans.get(path) or TextPlan(path, old)
        after = plan_renames(before.text, naming.renames, path)
        diff = diff_texts(path, old, after.text)
        done[path] = TextPlan(path, after.text, (*before.changes, *after.changes), before.notes, diff)
    return done


def _find_mentions(root: Path, cards: Cards, naming: Naming, handled: set[str]) -> Iterator[str]:
    """Yield a note for other files below /etc that hold an old address, or a name that became another one."""
    wanted = {
        address_of(card.before): f"the address of the old {card.called}"
        for card in cards.moved()
        if cards.new_address(address_of(card.before))
    }
    names = {name: f"{name}, which is called {new} now" for name, new in naming.renames.items()}
    if not wanted and not names:
        return
    words = [re.escape(each).replace(":", "[:-]") for each in wanted] + [
        rf"(?<![\w-]){re.escape(each)}(?![\w-])" for each in names
    ]
    pattern = re.compile("|".join(words).encode(), re.IGNORECASE)
    renamed = {path for each in FILES for path in _paths(root, each)} if names else set()
    found: dict[str, list[str]] = {}
    for path, data in _texts_below_etc(root):
        if path in handled or path in renamed or _LEFTOVERS.fullmatch(path) or path.startswith(_NO_TEXT):
            continue
        for match in pattern.finditer(data):
            word = match[0].decode("utf-8", "replace")
            what = wanted.get(word.lower().replace("-", ":")) or names.get(word, "")
            if what and path not in found.setdefault(what, []):
                found[what].append(path)
    for what, paths in found.items():
        more = f" and {len(paths) - _MENTIONS_MAX} more" if len(paths) > _MENTIONS_MAX else ""
        yield f"{', '.join(paths[:_MENTIONS_MAX])}{more} mention {what}; look whether that has to change"


def _texts_below_etc(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the small regular files below /etc, without following a link."""
    top = find_inside(root, "/etc")
    number = 0
    for folder, folders, names in os.walk(top) if top is not None else ():
        folders.sort()
        for name in sorted(names):
            place = Path(folder) / name
            number += 1
            if number > _WALK_MAX:
                return
            try:
                if place.is_symlink() or not place.is_file() or place.stat().st_size > _MENTION_SIZE:
                    continue
                yield f"/etc/{place.relative_to(top)}", place.read_bytes()  # type: ignore[arg-type]
            except OSError:
                continue
