"""What one kernel of an installed system can drive: its modules, what is built in, and for which devices.

Sources: modules.dep(5), modprobe(8), modprobe.d(5), depmod(8); Linux Documentation/kbuild/kbuild.rst
(modules.builtin, modules.builtin.modinfo).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from remetal.adapt.rooted import list_inside, read_inside
from remetal.units import MIB

_FILE = re.compile(r"([^/]+)\.ko(?:\.gz|\.xz|\.zst)?")
_LIMIT = 32 * MIB
"""Bytes of one list of modules; Debian's largest has 1.3 MB."""
_CONFIGURATION = ("/etc/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d")


class Aliases:
    """Which modules name a device as one of theirs: patterns of modaliases, as modules.alias lists them."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        """Take pairs of pattern and module."""
        self._pairs = tuple(pairs)
        self._by_start: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for pattern, module in self._pairs:
            start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
            self._by_start[start].append((pattern, module))

    def with_first(self, pairs: Iterable[tuple[str, str]]) -> Aliases:
        """Return these with others before them."""
        return Aliases((*pairs, *self._pairs))

    def find(self, modalias: str) -> tuple[str, ...]:
        """Return the modules for a device with this modalias, each once, in the order of the list."""
        found: dict[str, None] = {}
        for size in range(len(modalias) + 1):
            for pattern, module in self._by_start.get(modalias[:size], ()):
                if _is_match(pattern, modalias):
                    found[module] = None
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Modules:
    """What a kernel of this version has. Modules go by their names, with underscores.

    `files` are their paths below the version's folder, `needs` what must be loaded before each, in order.
    `soft` is what modprobe tries to load before; `hidden` are those that no device loads (modprobe.d's `blacklist`).
    """

    version: str
    files: Mapping[str, str]
    needs: Mapping[str, tuple[str, ...]]
    builtin: frozenset[str]
    aliases: Aliases
    soft: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)

    def find_drivers(self, modalias: str) -> tuple[str, ...]:
        """Return the modules, built in or not, that say of a device that it is theirs."""
        return tuple(name for name in self.aliases.find(modalias) if name in self.files or name in self.builtin)

    def resolve(self, name: str) -> tuple[str, ...]:
        """Return the modules that a name or an alias, such as `crypto-crc32c`, stands for."""
        plain = module_name(name)
        if plain in self.files or plain in self.builtin:
            return (plain,)
        return self.find_drivers(name)

    def closure(self, names: Iterable[str], *, soft: bool) -> tuple[str, ...]:
        """Return modules with all that they need, as they have to be loaded; nothing that is built in, or unknown.

        With `soft` also what is only tried: it makes them faster, or is needed for some of what they can do.
        """
        found: dict[str, None] = {}
        under_way: set[str] = set()

        def add(name: str) -> None:
            if name in found or name in under_way or name not in self.files:
                return
            under_way.add(name)
            for wish in self.soft.get(name, ()) if soft else ():
                for each in self.resolve(wish)[:1]:
                    add(each)
            for each in self.needs.get(name, ()):
                add(each)
            found[name] = None

        for name in names:
            add(name)
        return tuple(found)


def module_name(text: str) -> str:
    """Return a module's name as the kernel has it, whatever hyphens it is written with."""
    return text.replace("-", "_")


def name_of_file(path: str) -> str | None:
    """Return the name of the module that lies in a file; None if that is no module."""
    match = _FILE.fullmatch(PurePosixPath(path).name)
    return module_name(match[1]) if match else None


def list_versions(root: Path) -> list[str]:
    """Return the versions of which the system mounted at `root` has modules, in the order of their names."""
    return [name for name in list_inside(root, "/lib/modules") if "/" not in name and name not in {".", ".."}]


def read_modules(root: Path, version: str) -> Modules | None:
    """Return what the kernel of this version of the system mounted at `root` has; None if it has no list of modules."""

    def text(name: str) -> str:
        data = read_inside(root, f"/lib/modules/{version}/{name}", limit=_LIMIT) or b""
        return data.decode("utf-8", "replace")

    dep = read_inside(root, f"/lib/modules/{version}/modules.dep", limit=_LIMIT)
    if dep is None:
        return None
    files, needs = parse_dep(dep.decode("utf-8", "replace"))
    builtin = parse_builtin(text("modules.builtin"))
    own = list(parse_modinfo(text("modules.builtin.modinfo")))
    return Modules(
        version=version,
        files=files,
        needs=needs,
        builtin=builtin,
        aliases=Aliases((*parse_aliases(text("modules.alias")), *own)),
        soft=parse_softdep(text("modules.softdep")),
        hidden=dict(_find_hidden(root)),
    )


def parse_dep(text: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the paths of modules, and what has to be loaded before each, from the text of modules.dep."""
    files: dict[str, str] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        path, colon, rest = line.partition(":")
        name = name_of_file(path)
        if colon and name is not None and _is_below(path):
            files[name] = path
            # what is named last does not need anything, so it comes first
            needs[name] = tuple(each for word in reversed(rest.split()) if (each := name_of_file(word)) is not None)
    return files, needs


def parse_builtin(text: str) -> frozenset[str]:
    """Return what is built in from the text of modules.builtin."""
    return frozenset(name for line in text.splitlines() if (name := name_of_file(line.strip())) is not None)


def parse_aliases(text: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of pattern and module from the text of modules.alias."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias":
            yield words[1], module_name(words[2])


def parse_modinfo(text: str) -> Iterator[tuple[str, str]]:
    """Yield the same of what is built in, from the text of modules.builtin.modinfo."""
    for entry in text.split("\0"):
        name, dot, rest = entry.partition(".")
        key, equals, value = rest.partition("=")
        if dot and equals and key == "alias":
            yield value, module_name(name)


def parse_softdep(text: str) -> dict[str, tuple[str, ...]]:
    """Return what is to be loaded before a module if it is there, from the text of modules.softdep or modprobe.d."""
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) > 2 and words[0] == "softdep":
            name = module_name(words[1])
            before, here = [], False
            for word in words[2:]:
                if word.endswith(":"):
                    here = word == "pre:"
                elif here:
                    before.append(word)
            found[name] = (*found.get(name, ()), *before)
    return found


def parse_blacklist(text: str) -> set[str]:
    """Return the modules that no device loads by itself, from the text of a file of modprobe.d."""
    lines = (line.split() for line in text.splitlines())
    return {module_name(words[1]) for words in lines if len(words) == 2 and words[0] == "blacklist"}


def _find_hidden(root: Path) -> Iterator[tuple[str, str]]:
    """Yield modules that are blacklisted, and where."""
    for folder in _CONFIGURATION:
        for name in list_inside(root, folder):
            if name.endswith(".conf"):
                text = (read_inside(root, f"{folder}/{name}") or b"").decode("utf-8", "replace")
                for module in sorted(parse_blacklist(text)):
                    yield module, f"{folder}/{name}"


def _is_below(path: str) -> bool:
    """Whether a path that a list names stays in the version's folder."""
    return not path.startswith("/") and ".." not in path.split("/")


def _is_match(pattern: str, text: str) -> bool:
    """Whether a pattern as fnmatch(3) knows it fits; most have stars only, for which that is too slow."""
    if "[" in pattern or "?" in pattern:
        return fnmatchcase(text, pattern)
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, last = rest
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True
