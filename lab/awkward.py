"""Files that backups are known to lose or to spoil, made the same way every time."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from hashlib import shake_128
from pathlib import Path

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS in <linux/fs.h>
_IMMUTABLE, _NO_DUMP = 0x10, 0x40
_CAP_NET_RAW = 13  # <linux/capability.h>


def make_awkward(folder: Path, seed: bytes = b"awkward") -> None:
    """Fill a new folder, on a file system with xattrs, ACLs and inode flags. Needs root.

    The same folder comes out whenever it is called with the same seed, times included.
    """
    folder.mkdir(parents=True)
    for make in (_make_contents, _make_names, _make_links, _make_special, _make_attributes, _make_times):
        make(folder, seed)
    _settle_times(folder)
    _make_flags(folder)


def _make_contents(folder: Path, seed: bytes) -> None:
    (folder / "empty").touch()
    (folder / "one-byte").write_bytes(b"x")
    (folder / "block").write_bytes(_noise(seed, 4096))
    (folder / "block-and-one").write_bytes(_noise(seed, 4097))
    (folder / "large").write_bytes(_noise(seed, 6 << 20))
    (folder / "zeroes").write_bytes(b"\0" * (1 << 20))
    with (folder / "sparse").open("wb") as file:
        for place in (0, 5 << 20, (24 << 20) - 4096):
            file.seek(place)
            file.write(_noise(seed, 4096))
    with (folder / "all-hole").open("wb") as file:
        file.truncate(8 << 20)


def _make_names(folder: Path, seed: bytes) -> None:
    names = os.fsencode(folder / "names")
    os.mkdir(names)
    for name in (
        b"n" * 255,
        "ü".encode() * 127,
        b"latin1-caf\xe9",
        b"not-utf8-\xff\xfe\x80",
        b"new\nline",
        b"tab\tand\x07bell",
        b" leading and trailing ",
        b"-rf",
        b"$(reboot)`reboot`",
        b"quote'\"\\",
        b"*?[a-z]",
        b".hidden",
        "Ünïcödé ✓ 文件".encode(),
        # The same name to a person, in Unicode's composed and decomposed form.
        "\u00e9".encode(),
        "e\u0301".encode(),
        b"Case",
        b"case",
    ):
        with open(os.path.join(names, name), "wb") as file:
            file.write(name + seed)
    (folder / "deep" / "/".join(["d" * 90] * 30)).mkdir(parents=True)
    (folder / "deep" / "/".join(["d" * 90] * 30) / "bottom").write_bytes(seed)
    crowd = folder / "crowd"
    crowd.mkdir()
    for number in range(400):
        (crowd / f"{number:04}").write_bytes(seed[: number % 8])


def _make_links(folder: Path, seed: bytes) -> None:
    first = folder / "hard-link-1"
    first.write_bytes(seed * 100)
    (folder / "hard-link-2").hardlink_to(first)
    (folder / "names" / "hard-link-3").hardlink_to(first)
    (folder / "link").symlink_to("block")
    (folder / "link-dangling").symlink_to("/nowhere/at/all")
    (folder / "link-loop").symlink_to("link-loop")
    (folder / "link-long").symlink_to("t" * 1000)
    os.symlink(b"../\xff\xfe", os.fsencode(folder / "link-not-utf8"))
    os.link(folder / "link", folder / "link-hard", follow_symlinks=False)


def _make_special(folder: Path, seed: bytes) -> None:
    os.mkfifo(folder / "pipe", 0o640)
    os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(folder / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 262143))
    # A socket's address is short, so it is bound from within its folder.
    parent = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(f"/proc/self/fd/{parent}/socket")
    os.close(parent)
    program = folder / "setuid"
    program.write_bytes(b"#!/bin/true\n")
    os.chown(program, 1234, 5678)
    program.chmod(0o6755)
    sticky = folder / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    locked = folder / "no-permissions"
    locked.write_bytes(seed)
    locked.chmod(0)
    stranger = folder / "stranger"
    stranger.write_bytes(seed)
    os.chown(stranger, 4294967294, 4000000000)


def _make_attributes(folder: Path, seed: bytes) -> None:
    path = folder / "attributes"
    path.write_bytes(seed)
    os.setxattr(path, "user.comment", "grüße".encode())
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "user.binary", bytes(range(256)))
    os.setxattr(path, "user.large", _noise(seed, 2000))
    os.setxattr(path, "trusted.remetal", b"only root sees this")
    capable = folder / "capable"
    capable.write_bytes(b"#!/bin/true\n")
    capable.chmod(0o755)
    # struct vfs_cap_data, revision 2, effective: <linux/capability.h>
    os.setxattr(capable, "security.capability", struct.pack("<5I", 0x02000001, 1 << _CAP_NET_RAW, 0, 0, 0))
    listed = folder / "access-list"
    listed.write_bytes(seed)
    os.setxattr(
        listed,
        "system.posix_acl_access",
        _acl((1, 6, None), (2, 4, 1234), (4, 4, None), (16, 4, None), (32, 0, None)),
    )
    inherited = folder / "access-list-inherited"
    inherited.mkdir()
    default = _acl((1, 7, None), (4, 5, None), (8, 7, 5678), (16, 7, None), (32, 0, None))
    os.setxattr(inherited, "system.posix_acl_default", default)
    (inherited / "child").write_bytes(seed)


def _acl(*entries: tuple[int, int, int | None]) -> bytes:
    """Return an access control list as the kernel keeps it: tag, permissions, id (<linux/posix_acl_xattr.h>)."""
    packed = (struct.pack("<HHI", tag, mode, 0xFFFFFFFF if owner is None else owner) for tag, mode, owner in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def _make_times(folder: Path, seed: bytes) -> None:
    times = folder / "times"
    times.mkdir()
    for name, when in {
        "nanoseconds": 1_600_000_000_123_456_789,
        "epoch": 0,
        "before-epoch": -1_000_000_000,
        "after-2038": 2_200_000_000_000_000_001,
        "after-2106": 5_000_000_000_000_000_007,
    }.items():
        (times / name).write_bytes(seed)
        os.utime(times / name, ns=(when, when))


def _settle_times(folder: Path) -> None:
    """Give everything that has no time of its own one that a second run gives it as well."""
    for path in _below(os.fsencode(folder)):
        if os.path.dirname(path) != os.fsencode(folder / "times"):
            os.utime(path, ns=(1_700_000_000_000_000_000, 1_700_000_000_987_654_321), follow_symlinks=False)


def _below(folder: bytes) -> Iterator[bytes]:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in sorted(files + [each for each in folders if os.path.islink(os.path.join(parent, each))]):
            yield os.path.join(parent, name)
        yield parent


def _make_flags(folder: Path) -> None:
    for name, flag in (("large", _NO_DUMP), ("one-byte", _IMMUTABLE)):
        fd = os.open(folder / name, os.O_RDONLY)
        (flags,) = struct.unpack("Q", fcntl.ioctl(fd, _GETFLAGS, b"\0" * 8))
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("Q", flags | flag))
        os.close(fd)


def _noise(seed: bytes, size: int) -> bytes:
    """Return bytes that no compressor and no deduplication makes smaller, the same for the same seed."""
    return shake_128(seed).digest(size)
