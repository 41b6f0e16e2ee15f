"""Opening the place that a person names as a repository; disks and shares are mounted for it, and unmounted at the end.

usb:LABEL/PATH               the attached volume with a label (uuid:UUID/PATH: with a UUID)
nfs://HOST[:PORT]/PATH       a folder on an NFS server
smb://[USER@]HOST[:PORT]/SHARE/PATH   a folder in a share of a Windows or Samba server
everything else              as `remetal.storage` opens it
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.media.answer import parse_place
from remetal.media.volumes import AttachedVolume, opened_volume, probe_volumes, select_volume
from remetal.storage import Store, find_folder, open_folder, open_store
from remetal.storage.address import split_address
from remetal.system.shares import NFS_PORT, SMB_PORT, NfsShare, SmbShare, mounted_nfs, mounted_smb

VOLUME_SECONDS = 10.0
"""How long a stick that is just being plugged in may take to appear."""
_LONGEST_CREDENTIALS = 1 << 16


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store, and the folder that it lies in as long as it is open; None where it lies elsewhere."""

    store: Store
    folder: Path | None


@contextmanager
def opened_store(
    location: str, *, urgent: bool = False, read_only: bool = False, rate: float | None = None
) -> Iterator[OpenedStore]:
    """Open the store that a person named, for the length of a block.

    `urgent` is whoever is about to make room there. With `read_only` what has to be mounted is mounted so. `rate`
    is what `open_store` takes. Raises UnavailableError if it is not there or cannot be reached, RefusedError if it
    must not be used.
    """
    scheme = location.partition(":")[0]
    if scheme not in MOUNTED:
        store = open_store(location, urgent=urgent, rate=rate)
        try:
            yield OpenedStore(store, find_folder(location))
        finally:
            store.close()
        return
    with MOUNTED[scheme](location, read_only) as folder:
        store = open_folder(folder, location, urgent=urgent, remote=scheme in {"nfs", "smb"}, rate=rate)
        try:
            yield OpenedStore(store, folder)
        finally:
            store.close()


@contextmanager
def _mounted_volume(location: str, read_only: bool) -> Iterator[Path]:
    place = parse_place(location)
    with opened_volume(_await_volume(location), writable=not read_only, replay=True) as top:
        yield top / place.path


def _await_volume(location: str) -> AttachedVolume:
    """Return the one volume that a place is on, as soon as it is attached. Raises RefusedError, UnavailableError."""
    place = parse_place(location)
    deadline = time.monotonic() + VOLUME_SECONDS
    while True:
        volumes = probe_volumes()
        wanted = [each for each in volumes if place.key.lower() in {each.label.lower(), each.uuid.lower()}]
        try:
            return select_volume(place, volumes)
        except RefusedError as error:
            if wanted:
                raise
            if time.monotonic() > deadline:
                raise UnavailableError(
                    error.message, hint=f"Attach it, and run the command again. {error.hint}"
                ) from error
        time.sleep(0.5)


def _mounted_nfs(location: str, read_only: bool) -> AbstractContextManager[Path]:
    secrets = "An NFS server knows machines by their addresses, and no passwords."
    parts = split_address(location, "nfs://HOST/EXPORTED/FOLDER", secrets=secrets)
    path = _path_of(location, parts)
    assert parts.hostname is not None
    share = NfsShare(parts.hostname, f"/{path}", parts.port or NFS_PORT)
    return mounted_nfs(share, read_only=read_only)


def _mounted_smb(location: str, read_only: bool) -> AbstractContextManager[Path]:
    secrets = "The password belongs into REMETAL_SMB_PASSWORD, or a file that REMETAL_SMB_CREDENTIALS names."
    parts = split_address(location, "smb://USER@HOST/SHARE/FOLDER", secrets=secrets, user=True)
    share, _, path = _path_of(location, parts).partition("/")
    if not share:
        raise UsageError(f"'{location}' does not say which share", hint="Write smb://USER@HOST/SHARE/FOLDER.")
    user, password, domain = _smb_credentials(unquote(parts.username or ""))
    assert parts.hostname is not None
    port = parts.port or SMB_PORT
    return mounted_smb(SmbShare(parts.hostname, share, path, port, user, domain, password), read_only=read_only)


def _path_of(location: str, parts: SplitResult) -> str:
    words = [word for word in unquote(parts.path).split("/") if word]
    if any(word in {".", ".."} or "\0" in word for word in words):
        raise UsageError(f"'{location}' is no place: its path must not contain '..'")
    return "/".join(words)


def _smb_credentials(named: str) -> tuple[str, str, str]:
    """Return user, password and domain: from the file that the environment names, the environment, and the address."""
    file = os.environ.get("REMETAL_SMB_CREDENTIALS", "")
    known = _read_credentials(Path(file)) if file else {}
    user = named or os.environ.get("REMETAL_SMB_USER", "") or known.get("username", "")
    domain = os.environ.get("REMETAL_SMB_DOMAIN", "") or known.get("domain", "")
    password = os.environ.get("REMETAL_SMB_PASSWORD", "")
    if not password and known.get("username", user) == user:
        password = known.get("password", "")
    if user and not password:
        raise RefusedError(
            f"there is no password for the SMB user {user}",
            hint="Set REMETAL_SMB_PASSWORD, or name a file with username= and password= lines in "
            "REMETAL_SMB_CREDENTIALS.",
        )
    return user, password, domain


def _read_credentials(path: Path) -> dict[str, str]:
    """Return what a credentials file says, which is written as mount.cifs(8) wants it: `username=`, `password=`, …"""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST_CREDENTIALS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the credentials for SMB in {path} cannot be read", hint="Check REMETAL_SMB_CREDENTIALS, owner and mode."
        ) from error
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip().lower(): value for name, equals, value in pairs if equals}


MOUNTED: dict[str, Callable[[str, bool], AbstractContextManager[Path]]] = {
    "usb": _mounted_volume,
    "uuid": _mounted_volume,
    "nfs": _mounted_nfs,
    "smb": _mounted_smb,
}
"""What mounts a location, by its scheme; a new kind is one line here."""
