"""Attached volumes: every file system on every disk, looked at without writing to any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError, RemetalError
from remetal.layout.disks import find_disks
from remetal.layout.identity import SYS, describe_disk, find_kernel_name
from remetal.layout.sameness import plain_wwn
from remetal.media.answer import Place, parse_place
from remetal.system.mounts import mounted, mounted_by_server, probe_mounts
from remetal.system.run import ProgramFailedError, find_program, run

_UNTOUCHED: dict[str, tuple[str, ...]] = {
    "btrfs": ("ro", "nologreplay"),
    "exfat": ("ro",),
    "ext2": ("ro",),
    "ext3": ("ro", "noload"),
    "ext4": ("ro", "noload"),
    "f2fs": ("ro",),
    "iso9660": ("ro",),
    "ntfs": ("ro",),
    "udf": ("ro",),
    "vfat": ("ro",),
    "xfs": ("ro", "norecovery", "nouuid"),
}
"""File systems that are looked into, and the options that keep even their journals as they are."""


@dataclass(frozen=True, slots=True)
class AttachedVolume:
    """A file system on a block device, as blkid names it."""

    device: Path
    kind: str
    label: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.device} ({f'{self.label}, ' if self.label else ''}{self.kind})"


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """A disk of this machine, as far as a person tells disks apart. `size` is in bytes."""

    path: Path
    size: int
    model: str = ""
    serial: str = ""
    wwn: str = ""
    bus: str = ""


def probe_volumes() -> list[AttachedVolume]:
    """Return every volume with a file system that can be looked into, in the order of their devices' names."""
    done = run(["blkid", "-c", "/dev/null", "-o", "export"], allowed=(0, 2))
    return parse_volumes(done.text)


def parse_volumes(text: str) -> list[AttachedVolume]:
    """Parse the output of `blkid -o export` (blkid(8)): KEY=value lines, a blank line between devices."""
    volumes = []
    for block in text.split("\n\n"):
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if fields.get("TYPE") in _UNTOUCHED and "DEVNAME" in fields:
            volumes.append(
                AttachedVolume(
                    device=Path(fields["DEVNAME"]),
                    kind=fields["TYPE"],
                    label=_unescape(fields.get("LABEL", "")),
                    uuid=fields.get("UUID", ""),
                )
            )
    return sorted(volumes, key=lambda volume: str(volume.device))


def _unescape(text: str) -> str:
    r"""Undo blkid's escapes: a backslash in front of characters that a shell would take."""
    return text.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\")


def probe_disks(sys: Path = SYS) -> list[AttachedDisk]:
    """Return this machine's disks: those that `remetal probe` shows, under the same names and numbers.

    Paths of a multipath device and members of a firmware RAID are none. `sys` is where sysfs is mounted.
    """
    found = []
    for path in find_disks(sys):
        disk = describe_disk(find_kernel_name(path), sys)
        found.append(AttachedDisk(path, disk.size, disk.model, disk.serial, disk.wwn, disk.bus))
    return found


def select_disk(wanted: str, disks: Sequence[AttachedDisk]) -> Path:
    """Return the one disk that `wanted` means: a path, `serial:…` or `wwn:…`, however that is spelled.

    Raises RefusedError that lists the disks if none or several fit.
    """
    if wanted.startswith("/"):
        return Path(wanted)
    scheme, _, value = wanted.partition(":")
    match scheme:
        case "serial":
            fitting = [disk for disk in disks if value and disk.serial == value]
        case "wwn":
            fitting = [disk for disk in disks if plain_wwn(value) and plain_wwn(disk.wwn) == plain_wwn(value)]
        case _:
            fitting = []
    if len(fitting) == 1:
        return fitting[0].path
    there = "; ".join(f"{disk.path} serial:{disk.serial or '-'} wwn:{disk.wwn or '-'}" for disk in disks) or "none"
    what = "no disk" if not fitting else f"{len(fitting)} disks"
    raise RefusedError(f"{what} of this machine fit{'s' if not fitting else ''} '{wanted}'", hint=f"Disks: {there}.")


@contextmanager
def opened_volume(volume: AttachedVolume, *, writable: bool = False, replay: bool = False) -> Iterator[Path]:
    """Mount a volume for the length of a block and yield its top folder; nothing on it changes unless `writable`.

    `replay` lets the file system finish its journal first, which the owner of a repository wants and a stranger's
    volume does not. A volume that is mounted already is used where it is. Raises RemetalError; RefusedError for one
    that is to be written to and is mounted read-only.
    """
    there = next((each for each in probe_mounts() if each.source == str(volume.device) and each.root == "/"), None)
    if there is not None:
        if writable and there.read_only:
            raise RefusedError(
                f"{volume} is mounted read-only at {there.target}",
                hint=f"Unmount it (umount {there.target}), then run the command again.",
            )
        yield there.target
        return
    if writable:
        options: tuple[str, ...] = ("rw",)
    else:
        options = ("ro",) if replay else _UNTOUCHED[volume.kind]
    options = (*options, "nosuid", "nodev", "noexec")
    server = _find_server(volume.kind)
    if server:
        with mounted_by_server(server, volume.device, options=options) as folder:
            yield folder
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(mounted(volume.device, kind=volume.kind, options=options))
        except ProgramFailedError as error:
            if writable or "busy" not in error.stderr:
                raise
            # Somebody writes to it whose mounts are private: the kernel then shows it read-only at this place alone.
            folder = stack.enter_context(mounted(volume.device, kind=volume.kind, options=("rw", *options[-3:])))
            run(["mount", "-o", "remount,bind,ro", folder])
        yield folder


_SERVERS = {"ntfs": ("ntfs-3g", "-o", "no_detach"), "exfat": ("mount.exfat-fuse", "-d")}
"""What serves a file system that the kernel does not know, without going into the background."""


def _find_server(kind: str) -> tuple[str, ...]:
    """Return the program that shows a file system through FUSE, and nothing where the kernel does it itself.

    The kernel's own `ntfs` reads only; ntfs-3g writes.
    """
    if kind not in _SERVERS or find_program(_SERVERS[kind][0]) is None:
        return ()
    if kind == "exfat":
        run(["modprobe", "exfat"], allowed=range(256)) if find_program("modprobe") else None
        if "\texfat\n" in Path("/proc/filesystems").read_text():
            return ()
    return _SERVERS[kind]


def select_volume(place: Place, volumes: Sequence[AttachedVolume]) -> AttachedVolume:
    """Return the one volume with the place's label or UUID. Raises RefusedError that lists what is attached."""
    by_label = place.volume == "label"
    fitting = [each for each in volumes if (each.label if by_label else each.uuid).lower() == place.key.lower()]
    if len(fitting) == 1:
        return fitting[0]
    what = f"the {'label' if by_label else 'UUID'} '{place.key}'"
    if fitting:
        names = ", ".join(str(each.device) for each in fitting)
        raise RefusedError(f"{what} is on several volumes: {names}", hint="Detach one, or name it as uuid:UUID/path.")
    there = ", ".join(str(each) for each in volumes) or "none"
    raise RefusedError(f"no attached volume has {what}", hint=f"Attached volumes: {there}.")


class Places:
    """Finds files on attached volumes, mounting each volume once; made by `opened_places`."""

    def __init__(self, stack: ExitStack, volumes: Sequence[AttachedVolume], own: AttachedVolume | None) -> None:
        self._stack = stack
        self._volumes = volumes
        self._own = own
        self._open: dict[AttachedVolume, Path] = {}

    def find_volume(self, text: str) -> AttachedVolume | None:
        """Return the volume that a place lies on, or None for a path of this system. Raises RefusedError."""
        place = parse_place(text)
        if place.volume == "system":
            return None
        if place.volume != "own":
            return select_volume(place, self._volumes)
        if self._own is None:
            raise RefusedError(
                f"'{text}' does not say on which volume it is", hint="Write usb:LABEL/path or uuid:UUID/path."
            )
        return self._own

    def path(self, text: str) -> Path:
        """Return the path of a place while the places are open; its volume is mounted read-only for that.

        Raises RefusedError if the volume is not attached or the path is not there.
        """
        volume = self.find_volume(text)
        place = parse_place(text)
        if volume is None:
            path = Path(place.path)
        else:
            if volume not in self._open:
                self._open[volume] = self._stack.enter_context(opened_volume(volume, replay=True))
            path = self._open[volume] / place.path
        if not path.exists():
            where = f" on {volume}" if volume else ""
            raise RefusedError(f"there is no '{place.path}'{where}", hint="Look at what is attached, and at the path.")
        return path


@contextmanager
def opened_places(volumes: Sequence[AttachedVolume], own: AttachedVolume | None) -> Iterator[Places]:
    """Yield a finder of places for the length of a block; `own` is the volume of places without a volume."""
    with ExitStack() as stack:
        yield Places(stack, volumes, own)


def read_from(volume: AttachedVolume, name: str, limit: int) -> bytes | None:
    """Return up to `limit` + 1 bytes of a file at the top of a volume, or None if it is not there.

    A volume that cannot be mounted has no such file.
    """
    try:
        with opened_volume(volume) as folder:
            path = folder / name
            if not path.is_file() or path.is_symlink():
                return None
            with path.open("rb") as file:
                return file.read(limit + 1)
    except (RemetalError, OSError):
        return None
