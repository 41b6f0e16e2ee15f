"""What an initramfs holds: modules, firmware and programs, and which modules it loads whatever the hardware.

Sources: initramfs-tools(7), mkinitramfs(8); dracut(8), dracut.modules(7), dracut.cmdline(7) (`rd.driver.pre`);
mkinitcpio(8); modules-load.d(5).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal, TypeAlias

from remetal.adapt.kernels.modules import module_name, name_of_file
from remetal.ondisk.cpio import Member, read_initramfs
from remetal.units import MIB

Generator: TypeAlias = Literal["initramfs-tools", "dracut", "mkinitcpio", ""]

_MODULE = re.compile(r"((?:usr/)?lib/modules)/([^/]+)/.+\.ko(?:\.gz|\.xz|\.zst)?")
_FIRMWARE = re.compile(r"(?:usr/)?lib/firmware/(.+?)(?:\.xz|\.zst)?")
_PROGRAM = re.compile(r"(?:usr/)?(?:s?bin|lib/systemd|lib/udev|lib/initcpio)/([^/]+)")
_LISTS = re.compile(r"conf/modules|(?:usr/lib|etc)/modules-load\.d/[^/]+\.conf")
_COMMAND_LINE = re.compile(r"etc/cmdline\.d/[^/]+\.conf")
_MKINITCPIO = "config"
_STORAGE = re.compile(
    r"cryptroot/crypttab|conf/conf\.d/[^/]+|etc/(?:crypttab|mdadm\.conf|mdadm/mdadm\.conf|lvm/[^/]+\.conf|"
    r"lvm/devices/system\.devices)"
)
"""What names the storage that the root is on."""
_NAMING = re.compile(r"etc/(?:systemd/network/[^/]+\.link|udev/rules\.d/[^/]+\.rules)")
"""What names network cards."""
_LIST_MAX = 1 * MIB
_MARKS: tuple[tuple[Generator, re.Pattern[str]], ...] = (
    ("initramfs-tools", re.compile(r"conf/initramfs\.conf|conf/arch\.conf|scripts/functions")),
    ("dracut", re.compile(r"(?:usr/)?lib/dracut(?:-lib\.sh|/.*)|(?:usr/)?lib/initrd-release|(?:usr/)?bin/dracut-.*")),
    ("mkinitcpio", re.compile(r"init_functions|buildconfig|hooks/udev|(?:usr/)?lib/initcpio/.*")),
)
_UDEV = {"udevd", "systemd-udevd", "udevadm"}


@dataclass(frozen=True, slots=True)
class Initramfs:
    """What is in an initramfs.

    `modules` are names by kernel version; `library` is where they lie, with no link on the way (`usr/lib/modules`;
    empty if there are none). `loads` are those that it loads by name. `texts` are the files that say so, and those that
    name the storage and network cards. `firmware` is below lib/firmware, `programs` by their last names. `packing` is
    how its last stream is packed.
    """

    generator: Generator
    library: str
    modules: Mapping[str, frozenset[str]]
    loads: frozenset[str]
    texts: Mapping[str, str]
    firmware: frozenset[str]
    programs: frozenset[str]
    packing: str

    @property
    def loads_for_devices(self) -> bool:
        """Whether it loads the modules of the devices that it finds."""
        return bool(self.programs & _UDEV)


def probe_initramfs(*files: BinaryIO) -> Initramfs:
    """Read an initramfs, which may come in several files. Raises BadStructureError."""
    return sort_members(member for file in files for member in read_initramfs(file, _is_wanted))


def sort_members(members: Iterable[Member]) -> Initramfs:
    """Return what the members of an initramfs, in their order, amount to."""
    modules: dict[str, set[str]] = defaultdict(set)
    places: dict[str, None] = {}
    firmware, programs = set(), set()
    texts: dict[str, str] = {}
    marks: dict[Generator, None] = {}
    packing = ""
    for each in members:
        packing = each.packing
        if each.data and _is_wanted(each.name, each.size):
            texts[each.name] = each.data.decode("utf-8", "surrogateescape")
        if (match := _MODULE.fullmatch(each.name)) and (name := name_of_file(each.name)):
            places[match[1]] = None
            modules[match[2]].add(name)
        elif match := _FIRMWARE.fullmatch(each.name):
            firmware.add(match[1])
        elif match := _PROGRAM.fullmatch(each.name):
            programs.add(match[1])
        for generator, pattern in _MARKS:
            if pattern.fullmatch(each.name):
                marks[generator] = None
    return Initramfs(
        generator=next((generator for generator, _ in _MARKS if generator in marks), ""),
        library=next(iter(places), ""),
        modules={version: frozenset(names) for version, names in modules.items()},
        loads=frozenset(
            name for path, text in texts.items() if _says_what_to_load(path) for name in parse_loads(path, text)
        ),
        texts=texts,
        firmware=frozenset(firmware),
        programs=frozenset(programs),
        packing=packing,
    )


def read_modules_of(file: BinaryIO, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files of modules below a folder of an initramfs, by their paths in it. Raises BadStructureError."""

    def is_wanted(name: str, size: int) -> bool:
        return name.startswith(f"{folder}/") and _MODULE.fullmatch(name) is not None

    for each in read_initramfs(file, is_wanted):
        if each.data and is_wanted(each.name, each.size):
            yield each.name, each.data


def parse_loads(path: str, text: str) -> set[str]:
    """Return the modules that a file of an initramfs has loaded, by the path that it has there."""
    if path == _MKINITCPIO:
        found = re.search(r"^(?:EARLY)?MODULES=[\"'(]*([^\"')\n]*)", text, re.MULTILINE)
        return {module_name(name) for name in found[1].split()} if found else set()
    if _COMMAND_LINE.fullmatch(path):
        values = (word.partition("=")[2] for word in text.split() if word.startswith("rd.driver.p"))
        return {module_name(name) for value in values for name in value.split(",") if name}
    lines = (line.split("#")[0].split() for line in text.splitlines())
    return {module_name(words[0]) for words in lines if words}


def _is_wanted(name: str, size: int) -> bool:
    return size <= _LIST_MAX and (_says_what_to_load(name) or any(each.fullmatch(name) for each in (_STORAGE, _NAMING)))


def _says_what_to_load(name: str) -> bool:
    return name == _MKINITCPIO or any(each.fullmatch(name) for each in (_LISTS, _COMMAND_LINE))
