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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.fat_files import FatTree, apply_fat_file, probe_fat, read_fat_file
from remetal.adapt.firmware import find_partitions
from remetal.adapt.grub_cfg import find_device_uuids
from remetal.adapt.identity import Gone, Identities, find_uuid
from remetal.adapt.nvram import EFIVARS, BootEntry, NvramError, Place, apply_entries
from remetal.adapt.remedy import plan_grub_install
from remetal.adapt.restored import Restored
from remetal.adapt.roots import System
from remetal.adapt.storage_files import adapt_esp_files
from remetal.errors import RemetalError
from remetal.events import Report, Step, Warn
from remetal.layout.model import EFI_SYSTEM, GptTable, Layout, MbrTable, SpaceId

FALLBACK = "/EFI/BOOT/BOOTX64.EFI"

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
    restored: Restored,
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
    esps = find_esps(restored, systems)
    for space in esps:
        report(Step(f"Checking the EFI system partition {space}"))
        try:
            tree = probe_fat(restored.span(space))
        except RemetalError as error:
            if firmware == "uefi":
                raise
            done += Adaptation(notes=(f"the EFI system partition {space} cannot be read: {error.message}",))
            continue
        system = _find_owner(space, systems)
        vendor = choose_vendor(find_vendors(tree), systems)
        if system is not None:
            done += adapt_esp_files(tree, system.identities)
            done += _check_images(tree, vendor, system, restored, report)
        done += _adapt_fallback(tree, vendor, report)
        if firmware == "uefi" and vendor is not None:
            places = [_place_of(each, restored.result) for each in find_partitions(restored.result, space)]
            done += _adapt_nvram(tree, vendor, places, efivars, report)
    if firmware == "uefi" and systems and not esps:
        text = "this machine boots by UEFI, but the restored disks have no EFI system partition"
        report(Warn(text, "Switch the firmware to BIOS (CSM, legacy) mode to boot it."))
        done += Adaptation(notes=(text,))
    return done


def find_esps(restored: Restored, systems: Sequence[System]) -> list[SpaceId]:
    """Return the FAT volumes that are EFI system partitions: by partition type, or by where a system mounts it.

    One that lies on an array counts where the firmware finds it on the array's members.
    """
    mounted = {system.mounts[point] for system in systems for point in _ESP_POINTS if point in system.mounts}
    found = []
    for volume in restored.file_systems():
        if volume.type == "vfat":
            partitions = find_partitions(restored.result, volume.on)
            if partitions and (
                volume.on in mounted or any(_has_esp_type(each, restored.result) for each in partitions)
            ):
                found.append(volume.on)
    return found


def _has_esp_type(space: SpaceId, layout: Layout) -> bool:
    below, _, number = space.rpartition(":")
    table = layout.layer_on(below)
    assert isinstance(table, (GptTable, MbrTable))
    kind = next(each.type for each in table.partitions if str(each.number) == number)
    return kind.upper() == EFI_SYSTEM if isinstance(table, GptTable) else kind.lower() == _ESP_ID


def _find_owner(space: SpaceId, systems: Sequence[System]) -> System | None:
    """Return the first system that mounts an ESP; the first of all if none does."""
    owners = [each for each in systems if any(each.mounts.get(point) == space for point in _ESP_POINTS)]
    return next(iter((*owners, *systems)), None)


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


def _check_images(
    tree: FatTree, vendor: Vendor | None, system: System, restored: Restored, report: Report
) -> Adaptation:
    """Say which of a vendor's GRUB images looks for its files on what is there no more; signed ones do not."""
    notes: list[str] = []
    lost = any(each.kind in {"md", "vg", "lv", "luks"} for each in system.identities.gone)
    for path in dict.fromkeys((vendor.loader, *vendor.beside)) if lost and vendor is not None else ():
        gone = _find_gone(read_fat_file(tree.span, path), system.identities)
        if gone is not None:
            note = f"GRUB in {path} looks for its files on what is there no more: {gone.why}. It does not start"
            words = plan_grub_install(system, restored, "--target=x86_64-efi")
            report(Warn(note, f"Make it anew from the recovery shell: {words}"))
            notes.append(f"{note} until it is made anew, from the recovery shell: {words}")
    return Adaptation(notes=tuple(notes))


def _find_gone(image: bytes, identities: Identities) -> Gone | None:
    for uuid, kinds in find_device_uuids(image.decode("latin-1")):
        found = find_uuid(uuid, identities, kinds)
        if isinstance(found, Gone):
            return found
    return None


def _adapt_nvram(tree: FatTree, vendor: Vendor, places: Sequence[Place], efivars: Path, report: Report) -> Adaptation:
    name = PurePosixPath(vendor.loader).name
    label = parse_csv_label(read_fat_file(tree.span, vendor.csv), name) if vendor.csv else None
    loader = vendor.loader.replace("/", "\\")
    try:
        if not efivars.is_dir() or not any(efivars.iterdir()):
            raise NvramError("the firmware's variables are not visible (efivarfs is not mounted)")
        what = apply_entries([BootEntry(label or vendor.name, place, loader) for place in places], efivars)
    except NvramError as error:
        report(Warn(error.message, error.hint))
        return Adaptation(notes=(f"{error.message}; the disk boots through {FALLBACK}",))
    return Adaptation(changes=(Change("NVRAM", f"{what}: {loader}"),) if what else ())


def _place_of(space: SpaceId, layout: Layout) -> Place:
    device, start, size = layout.place(space)
    table, number = layout.layer_on(device.name), int(space.rpartition(":")[2])
    sector = device.logical_sector
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
