"""What is mounted where, and mounting for the length of a block. Source: proc(5), /proc/PID/mountinfo; fstab(5)."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from remetal.errors import RemetalError
from remetal.system.run import ProgramFailedError, run, start, wait_for_end

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8  # <linux/mount.h>
_MS_REC, _MS_SLAVE = 1 << 14, 1 << 19
_MNT_DETACH = 2

_PREFIX = "remetal-mount-"
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_UMOUNT_TRIES = 15
_UMOUNT_PAUSE = 0.2
_SERVER_PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: what is mounted, where, from which device number, and how.

    `root` is the folder of the file system that shows there; `/` is all of it.
    """

    source: str
    target: Path
    kind: str
    device: tuple[int, int]
    read_only: bool
    root: str = "/"


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of /proc/self/mountinfo; read-only tells of the file system, not of the one mount.

    The kernel escapes blank, tab, newline and backslash in names, and nothing else: any other byte is part of one.
    """
    mounts = []
    for line in text.split("\n"):
        if not line:
            continue
        before, _, after = line.partition(" - ")
        fields, (kind, source, options) = before.split(" "), after.split(" ", 2)
        major, _, minor = fields[2].partition(":")
        mounts.append(
            Mount(
                source=_unescape(source),
                target=Path(_unescape(fields[4])),
                kind=kind,
                device=(int(major), int(minor)),
                read_only="ro" in options.split(","),
                root=_unescape(fields[3]),
            )
        )
    return mounts


def parse_fstab_places(text: str) -> list[Path]:
    """Return the places where the text of an fstab has something mounted, as mountinfo writes them.

    As libmount reads it: fields end at blanks and tabs only, and any byte of one may be written as an octal number.
    """
    fields = [re.split(r"[ \t]+", line.strip(" \t")) for line in text.split("\n")]
    names = [_unescape(each[1]) for each in fields if len(each) > 1 and not each[0].startswith("#")]
    return [Path(os.path.normpath(f"/{name.lstrip('/')}")) for name in names if name.startswith("/")]


def probe_mounts() -> list[Mount]:
    """Return this process's mounts, in the order in which they were made."""
    return parse_mountinfo(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))


def find_mount_of(path: Path) -> Mount:
    """Return the mount that `path` lies on (its nearest existing parent, if it does not exist yet).

    Raises RemetalError if the kernel shows no such mount, as in a bare chroot, or the path cannot be looked at.
    """
    try:
        place = path.resolve()
        while not place.exists():
            place = place.parent
        number = place.stat().st_dev
    except OSError as error:
        raise RemetalError(
            f"cannot look at {path}: {os.strerror(error.errno or 0)}",
            hint="Look at `dmesg` and at the disk or network that it lies on, then run the command again.",
        ) from error
    device = (os.major(number), os.minor(number))
    mounts = [mount for mount in probe_mounts() if place.is_relative_to(mount.target)]
    candidates = [mount for mount in mounts if mount.device == device] or mounts
    if not candidates:
        raise RemetalError(f"cannot tell which file system {path} lies on", hint="Is /proc mounted?")
    deepest = max(len(mount.target.parts) for mount in candidates)
    return [mount for mount in candidates if len(mount.target.parts) == deepest][-1]


def enter_private_mounts() -> None:
    """Keep the mounts of this process to itself from now on, so that the kernel undoes them when it dies.

    Mounts that others make still appear here. To be called before any thread is started; without the rights of
    root nothing happens. Sources: unshare(2), mount_namespaces(7).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) == 0 and libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) != 0:
        raise RemetalError(f"cannot keep mounts private: {os.strerror(ctypes.get_errno())}")


@contextmanager
def mounted(
    device: Path, *, kind: str | None = None, options: Sequence[str] = (), target: Path | None = None
) -> Iterator[Path]:
    """Mount a device on `target` (a fresh folder if none is given) and yield that folder; unmounted on leaving.

    Raises RemetalError if it cannot be mounted, or stays busy on leaving; it is then left mounted. The fresh folder
    is only ever removed empty: whatever goes wrong, no file of what is mounted is touched.
    """
    folder = target or Path(mkdtemp(prefix=_PREFIX))
    argv = ["mount", *(["-t", kind] if kind else []), *(["-o", ",".join(options)] if options else [])]
    try:
        run([*argv, device, folder])
        try:
            yield folder
        finally:
            _unmount(folder)
    finally:
        if target is None:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def opened_mountpoint() -> Iterator[Path]:
    """Yield a fresh folder for `mount_quietly`; whatever is mounted on it is taken away at the end.

    It is detached even if its server does not answer any more.
    """
    folder = Path(mkdtemp(prefix=_PREFIX))
    try:
        yield folder
    finally:
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), _MNT_DETACH)
        with suppress(OSError):
            folder.rmdir()


def mount_quietly(source: str, folder: Path, kind: str, options: str, *, read_only: bool) -> None:
    """Mount a file system by mount(2) itself, so that no command line shows its options, which may hold a password.

    Raises OSError as the kernel says it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | (_MS_RDONLY if read_only else 0)
    if libc.mount(source.encode(), os.fsencode(folder), kind.encode(), flags, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def mounted_by_server(argv: Sequence[str], device: Path, *, options: Sequence[str]) -> Iterator[Path]:
    """Mount a device by a program that serves it through FUSE and stays in the foreground; it ends with us.

    A server that is killed while it is the last one in our mount namespace waits for itself for ever: the kernel wants
    its word before it lets the mount go. So it is asked to end, and takes its mount away itself. Raises RemetalError if
    the program gives up or shows nothing in time.
    """
    folder = Path(mkdtemp(prefix=_PREFIX))
    log = Path(f"{folder}.log")
    try:
        command = [*argv, "-o", ",".join(options), str(device), str(folder)]
        with start(command, log=log, orphaned=signal.SIGTERM) as server:
            deadline = time.monotonic() + _SERVER_PATIENCE
            while not any(mount.target == folder for mount in probe_mounts()):
                if server.poll() is not None or time.monotonic() > deadline:
                    said = " ".join(log.read_text(errors="replace").split())[-300:]
                    raise RemetalError(f"{argv[0]} does not mount {device}: {said or 'it says nothing'}")
                time.sleep(0.02)
            try:
                yield folder
            finally:
                _unmount(folder)
                wait_for_end(server, _SERVER_PATIENCE)
    finally:
        log.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _unmount(folder: Path) -> None:
    """Unmount, with some patience: on a desktop, an indexer may hold a fresh mount for a moment."""
    for attempt in range(_UMOUNT_TRIES):
        try:
            run(["umount", folder])
        except ProgramFailedError as error:
            if "busy" not in error.stderr or attempt == _UMOUNT_TRIES - 1:
                raise
            time.sleep(_UMOUNT_PAUSE)
        else:
            return


def _unescape(text: str) -> str:
    """Return a name without its octal escapes, of which several may make up one character."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), os.fsencode(text)))
