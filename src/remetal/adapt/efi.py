"""Booting by UEFI: the fallback path on the EFI system partition, and the firmware's own boot entry.

A firmware that has forgotten its entries (new board, reset NVRAM, the disk in another machine) starts
`EFI/BOOT/BOOTX64.EFI`. Many installed systems lack it, so it is filled with a copy of the distribution's own
loader: shim with its GRUB and MokManager beside it, since shim starts what lies in its own folder. shim's
`fbx64.efi` is left out on purpose: with it the first boot would write firmware entries of its own and reset the
machine, which fails where NVRAM is full or read-only. The copied GRUB still finds its configuration: signed ones
look into `/EFI/VENDOR` of the partition that they were started from, self-made ones into the file system whose UUID
or number they carry.

Source: UEFI specification 2.10, 3.5.1.1 (removable media boot behaviour); shim's README.fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.fat_files import FatTree, apply_fat_file, probe_fat, read_fat_file
from remetal.adapt.nvram import EFIVARS, BootEntry, NvramError, Place, apply_entry
from remetal.adapt.roots import System, span_of
from remetal.errors import RemetalError
from remetal.events import Report, Step, Warn
from remetal.layout.model import FileSystem, GptTable, Layout, MbrTable, SpaceId

FALLBACK = "/EFI/BOOT/BOOTX64.EFI"

_ESP_GUID = "C12A7328-F81F-11D2-BA4B-00C04FC93EC9"
_ESP_ID = "ef"
_ESP_POINTS = ("/boot/efi", "/efi", "/boot")
_SHIMS = ("shimx64.efi", "shim.efi")
_GRUBS = ("grubx64.efi", "grub.efi")
_OTHERS = ("systemd-bootx64.efi",)
_BESIDE = (*_GRUBS, "mmx64.efi", "MokManager.efi")
_FALLBACK_APP = "fbx64.efi"
_VENDOR_OF_ID = {"rhel": "redhat", "opensuse-leap": "opensuse", "opensuse-tumbleweed": "opensuse"}


@dataclass(frozen=True, slots=True)
class Vendor:
    """A distribution's folder on the ESP: its loader, what must lie beside a copy of it, and its CSV of labels."""

    folder: str
    loader: str
    beside: tuple[str, ...]
    csv: str | None

    @property
    def name(self) -> str:
        """The folder's own name: debian, ubuntu, fedora, …"""
        return PurePosixPath(self.folder).name

    @property
    def has_shim(self) -> bool:
        """Whether the loader is shim, which starts a GRUB beside it."""
        return PurePosixPath(self.loader).name.lower() in _SHIMS


def adapt_efi(
    result: Layout,
    targets: Mapping[str, Path],
    systems: Sequence[System],
    *,
    firmware: str | None,
    report: Report,
    efivars: Path = EFIVARS,
) -> Adaptation:
    """Make the restored disks boot by UEFI, where they hold an ESP with a loader that we know.

    `firmware` is the machine's that we run on if the targets are its own disks; only `uefi` gets a boot entry.
    What the firmware or the ESP refuses is a note where the other way still boots. Raises RemetalError if an ESP
    cannot be read at all on a machine that boots by UEFI.
    """
    done = Adaptation()
    esps = find_esps(result, systems)
    for space in esps:
        report(Step(f"Checking the EFI system partition {space}"))
        try:
            tree = probe_fat(span_of(space, result, targets))
        except RemetalError as error:
            if firmware == "uefi":
                raise
            done += Adaptation(notes=(f"the EFI system partition {space} cannot be read: {error.message}",))
            continue
        vendor = choose_vendor(find_vendors(tree), systems)
        done += _adapt_fallback(tree, vendor, report)
        if firmware == "uefi" and vendor is not None:
            done += _adapt_nvram(tree, vendor, _place_of(space, result), efivars, report)
    if firmware == "uefi" and systems and not esps:
        text = "this machine boots by UEFI, but the restored disks have no EFI system partition"
        report(Warn(text, "Switch the firmware to BIOS (CSM, legacy) mode to boot it."))
        done += Adaptation(notes=(text,))
    return done


def find_esps(layout: Layout, systems: Sequence[System]) -> list[SpaceId]:
    """Return the FAT volumes that are EFI system partitions: by partition type, or by where a system mounts it."""
    mounted = {system.mounts[point] for system in systems for point in _ESP_POINTS if point in system.mounts}
    found = []
    for layer in layout.layers:
        if isinstance(layer, (GptTable, MbrTable)):
            kind = _ESP_GUID if isinstance(layer, GptTable) else _ESP_ID
            for partition in layer.partitions:
                space = f"{layer.on}:{partition.number}"
                volume = layout.layer_on(space)
                is_fat = isinstance(volume, FileSystem) and volume.type == "vfat"
                if is_fat and (partition.type.lower() == kind.lower() or space in mounted):
                    found.append(space)
    return found


def find_vendors(tree: FatTree) -> list[Vendor]:
    """Return the distributions' folders with a loader in them, in the order of their names."""
    vendors = []
    for folder in sorted(_folders(tree, "/EFI/")):
        if PurePosixPath(folder).name.upper() == "BOOT":
            continue
        loader = _first(tree, folder, (*_SHIMS, *_GRUBS, *_OTHERS))
        if loader is None:
            continue
        is_shim = PurePosixPath(loader).name.lower() in _SHIMS
        beside = [found for name in _BESIDE if is_shim and (found := tree.find(f"{folder}{name}"))]
        if is_shim and _first(tree, folder, _GRUBS) is None:
            continue
        vendors.append(Vendor(folder, loader, tuple(beside), _first(tree, folder, ("BOOTX64.CSV", "BOOT.CSV"))))
    return vendors


def choose_vendor(vendors: Sequence[Vendor], systems: Sequence[System]) -> Vendor | None:
    """Return the folder of the first installed system that has one; the only one, or the first, if none fits."""
    for system in systems:
        for identity in system.ids:
            for vendor in vendors:
                if vendor.name.lower() in {identity, _VENDOR_OF_ID.get(identity, identity)}:
                    return vendor
    return vendors[0] if vendors else None


def parse_csv_label(data: bytes, loader: str) -> str | None:
    """Return the label that a BOOTX64.CSV gives a loader (UTF-16, `file,label,options,text` per line), or None."""
    text = data.decode("utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-16-le", "replace")
    for line in text.splitlines():
        fields = line.strip("\0 ").split(",")
        if len(fields) > 1 and fields[0].lower() == loader.lower() and fields[1].strip():
            return fields[1].strip()
    return None


def _adapt_fallback(tree: FatTree, vendor: Vendor | None, report: Report) -> Adaptation:
    """Fill the fallback path if it is empty, or complete it if its shim lacks its GRUB; never replace a loader."""
    standing = tree.find(FALLBACK)
    if vendor is None:
        if standing is not None:
            return Adaptation()
        note = f"the EFI system partition {tree.span} holds no loader that remetal knows; nothing was added to it"
        report(Warn(note, "If the system does not boot, reinstall its boot loader from the recovery shell."))
        return Adaptation(notes=(note,))
    if standing is None:
        wanted = {path: PurePosixPath(path).name for path in vendor.beside} | {vendor.loader: "BOOTX64.EFI"}
    elif vendor.has_shim and _lacks_grub(tree) and _same(tree, standing, vendor.loader):
        wanted = {path: PurePosixPath(path).name for path in vendor.beside}
    else:
        return Adaptation()
    changes: list[Change] = []
    written = 0
    for path, name in wanted.items():
        target = f"/EFI/BOOT/{name}"
        if tree.find(target) is not None:
            continue
        content = read_fat_file(tree.span, path)
        try:
            tree = apply_fat_file(tree, target, content)
        except RemetalError as error:
            report(Warn(error.message, error.hint))
            note = f"the fallback path {FALLBACK} could not be filled: {error.message}"
            return Adaptation(tuple(changes), (note,), written)
        written += len(content)
        changes.append(Change(target, f"copied from {path}, so that the disk boots without a firmware entry"))
    return Adaptation(tuple(changes), (), written)


def _adapt_nvram(tree: FatTree, vendor: Vendor, place: Place, efivars: Path, report: Report) -> Adaptation:
    name = PurePosixPath(vendor.loader).name
    label = parse_csv_label(read_fat_file(tree.span, vendor.csv), name) if vendor.csv else None
    entry = BootEntry(label or vendor.name, place, vendor.loader.replace("/", "\\"))
    try:
        if not efivars.is_dir() or not any(efivars.iterdir()):
            raise NvramError("the firmware's variables are not visible (efivarfs is not mounted)")
        what = apply_entry(entry, efivars)
    except NvramError as error:
        report(Warn(error.message, error.hint))
        return Adaptation(notes=(f"{error.message}; the disk boots through {FALLBACK}",))
    return Adaptation(changes=(Change("NVRAM", f"{what}: {entry.loader}"),) if what else ())


def _place_of(space: SpaceId, layout: Layout) -> Place:
    disk, start, size = layout.place(space)
    table, number = layout.layer_on(disk.name), int(space.rpartition(":")[2])
    sector = disk.logical_sector
    if isinstance(table, MbrTable):
        return Place(number, start // sector, size // sector, table.signature, mbr=True)
    assert isinstance(table, GptTable)
    guid = next(each.uuid for each in table.partitions if each.number == number)
    return Place(number, start // sector, size // sector, guid.lower())


def _folders(tree: FatTree, parent: str) -> Iterator[str]:
    """Yield the folders that lie right in `parent`."""
    for path in tree.paths:
        inner = path[len(parent) :]
        if path.lower().startswith(parent.lower()) and inner.count("/") == 1 and inner.endswith("/"):
            yield path


def _first(tree: FatTree, folder: str, names: Sequence[str]) -> str | None:
    return next((found for name in names if (found := tree.find(f"{folder}{name}"))), None)


def _lacks_grub(tree: FatTree) -> bool:
    return _first(tree, "/EFI/BOOT/", (*_GRUBS, _FALLBACK_APP)) is None


def _same(tree: FatTree, one: str, other: str) -> bool:
    return read_fat_file(tree.span, one) == read_fat_file(tree.span, other)
