"""Network file systems, mounted for the length of a block by mount(2) itself: NFS and SMB.

The programs mount.nfs and mount.cifs do little more than to look names up and to write options for the kernel. Doing
that here costs the recovery medium no package, names what went wrong, and shows a password to no other process.
Sources: nfs(5), mount.cifs(8), the kernel's Documentation/admin-guide/cifs/usage.rst.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from remetal.errors import RefusedError, RemetalError, UnavailableError, UsageError
from remetal.system.mounts import mount_quietly, opened_mountpoint

NFS_PORT, SMB_PORT = 2049, 445
_TIMEOUT = 10.0
"""Seconds that a server may take to accept a connection."""
_PATIENCE = 20.0
"""Seconds in which a network that is just coming up has to be there."""

_NO_SUCH_VERSION = frozenset({errno.EPROTONOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP})
_NFS_OPTIONS = "proto={proto},softerr,timeo=100,retrans=4,lookupcache=none,addr={address}"
"""A server that is gone ends a call with an error after a minute or so, instead of holding it for ever."""
_SMB_OPTIONS = "iocharset=utf8,file_mode=0600,dir_mode=0700,echo_interval=15"


@dataclass(frozen=True, slots=True)
class NfsShare:
    """A folder on an NFS server: what is exported, and perhaps folders below it; `path` is absolute."""

    host: str
    path: str
    port: int = NFS_PORT

    def __str__(self) -> str:
        return f"{self.path} on the NFS server {self.host}"


@dataclass(frozen=True, slots=True)
class SmbShare:
    """A share on an SMB server, a folder in it, and who asks for it; without a user that is a guest."""

    host: str
    share: str
    path: str = ""
    port: int = SMB_PORT
    user: str = ""
    domain: str = ""
    password: str = field(default="", repr=False)


@contextmanager
def mounted_nfs(share: NfsShare, *, read_only: bool) -> Iterator[Path]:
    """Mount what an NFS server exports and yield the folder that is meant, which need not be there yet.

    Version 4 is asked for first, then 3. Raises UnavailableError if the server cannot be reached, RefusedError if it
    exports no such folder to us, or if this kernel knows no NFS.
    """
    address = _reach(share.host, share.port, "nfs", "an NFS server")
    with opened_mountpoint() as folder:
        path = PurePosixPath(share.path)
        top = _mount_nfs_above(share, path, address, folder, read_only)
        yield folder / path.relative_to(top)


def _mount_nfs_above(
    share: NfsShare, path: PurePosixPath, address: str, folder: Path, read_only: bool
) -> PurePosixPath:
    """Mount a folder, or what is above it as far as it is not there yet, and return what was mounted.

    The top of a server is not tried for what is below: version 4 always shows one, which takes no files.
    """
    problem: OSError | None = None
    for top in (path, *(each for each in path.parents if each != each.parent)):
        try:
            _mount_nfs(share, top, address, folder, read_only)
        except OSError as error:
            problem = problem or error
            if error.errno != errno.ENOENT:
                raise _nfs_failure(share, error) from error
        else:
            return top
    assert problem is not None
    raise _nfs_failure(share, problem) from problem


def _mount_nfs(share: NfsShare, top: PurePosixPath, address: str, folder: Path, read_only: bool) -> None:
    """Mount a folder by the newest version that the server speaks. Raises OSError."""
    host = f"[{share.host}]" if ":" in share.host else share.host
    common = _NFS_OPTIONS.format(proto="tcp6" if ":" in address else "tcp", address=address)
    if share.port != NFS_PORT:
        common += f",port={share.port}"
    versions = [("nfs4", f"vers={each},clientaddr={_own_address(address)},{common}") for each in ("4.2", "4.1", "4.0")]
    versions.append(("nfs", f"vers=3,nolock,mountproto=tcp,{common}"))
    for number, (kind, options) in enumerate(versions, start=1):
        try:
            mount_quietly(f"{host}:{top}", folder, kind, options, read_only=read_only)
        except OSError as error:
            if error.errno not in _NO_SUCH_VERSION or number == len(versions):
                raise
        else:
            return


def _nfs_failure(share: NfsShare, error: OSError) -> RemetalError:
    match error.errno:
        case errno.ENOENT:
            return RefusedError(
                f"there is no {share}", hint="Look at what it exports: showmount -e, or /etc/exports on the server."
            )
        case errno.EACCES:
            return RefusedError(
                f"the NFS server {share.host} does not let this machine mount {share.path}",
                hint="Export it to this machine, as in /etc/exports: FOLDER ADDRESS(rw,sync,no_root_squash).",
            )
        case errno.ENODEV | errno.EPERM:
            return _cannot_mount("NFS", "nfs", error)
        case _:
            return _unreachable(f"the NFS server {share.host}", os.strerror(error.errno or 0))


@contextmanager
def mounted_smb(share: SmbShare, *, read_only: bool) -> Iterator[Path]:
    """Mount a share of an SMB server and yield the folder in it that is meant, which need not be there yet.

    Raises UnavailableError if the server cannot be reached, RefusedError if it does not know the share or the user, or
    if this kernel knows no SMB, UsageError for credentials that no server could have.
    """
    for word in (share.user, share.domain, share.password):
        if any(ord(each) < ord(" ") for each in word):
            raise UsageError("a user name or password for SMB holds a control character", hint="Look at its file.")
    address = _reach(share.host, share.port, "microsoft-ds", "an SMB server")
    words = {"ip": address, "port": str(share.port), "user": share.user or "guest", "domain": share.domain}
    options = [f"{name}={_escaped(value)}" for name, value in words.items() if value]
    options.append(f"pass={_escaped(share.password)}")
    with opened_mountpoint() as folder:
        try:
            source = f"//{share.host}/{share.share}"
            mount_quietly(source, folder, "cifs", ",".join([*options, _SMB_OPTIONS]), read_only=read_only)
        except OSError as error:
            raise _smb_failure(share, error) from error
        yield folder / share.path


def _escaped(text: str) -> str:
    return text.replace(",", ",,")


def _smb_failure(share: SmbShare, error: OSError) -> RemetalError:
    match error.errno:
        case errno.ENOENT | errno.ENXIO:
            return RefusedError(
                f"the SMB server {share.host} has no share '{share.share}'",
                hint="Look at what it shares, and at the spelling.",
            )
        case errno.EACCES | errno.EKEYREJECTED | errno.EKEYEXPIRED:
            who = f"user {share.user} with the password that was given" if share.user else "guests"
            return RefusedError(
                f"the SMB server {share.host} does not let {who} use the share {share.share}",
                hint="Set REMETAL_SMB_USER and REMETAL_SMB_PASSWORD, or name a file with username= and password= "
                "lines in REMETAL_SMB_CREDENTIALS.",
            )
        case errno.ENODEV | errno.EPERM:
            return _cannot_mount("SMB", "cifs", error)
        case _:
            return _unreachable(f"the SMB server {share.host}", os.strerror(error.errno or 0))


def _cannot_mount(name: str, module: str, error: OSError) -> RefusedError:
    if error.errno == errno.EPERM:
        return RefusedError(
            f"only root may mount by {name}",
            hint="Run the same command as root, or mount it yourself and give the folder to --repo.",
        )
    return RefusedError(
        f"this machine's kernel knows no {name}",
        hint=f"Is its module there? `modprobe {module}` tells. The recovery medium has it.",
    )


def _unreachable(what: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"{what} cannot be reached: {why}",
        hint="Is the server up, the name right, and this machine on the network (ip address, ping)?",
    )


def _reach(host: str, port: int, service: str, what: str) -> str:
    """Return the address by which a server accepts connections. Raises UnavailableError if there is none."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return _connect(host, port)
        except OSError as error:
            if error.errno not in {errno.ENETUNREACH, socket.EAI_AGAIN} or time.monotonic() > deadline:
                why = error.strerror or str(error)
                raise _unreachable(f"{what} at {host}, port {port} ({service}),", why) from error
        time.sleep(0.5)


def _connect(host: str, port: int) -> str:
    problem: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(_TIMEOUT)
                connection.connect(address)
                return str(address[0])
        except OSError as error:
            problem = problem or error
    raise problem or OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))


def _own_address(address: str) -> str:
    """Return the address that this machine has towards another; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, NFS_PORT))
        return str(probe.getsockname()[0])
