"""A manifest: everything that a file tree holds, written down so that two trees can be compared.

This one file runs on the host and, copied, in the lab machine itself, so it uses nothing but Python's own
library (3.9 or later). As text, a manifest is one JSON object a line, ordered by path; bytes of names that
are not UTF-8 appear as lone surrogates (PEP 383).
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from typing import Any

Entry = dict[str, Any]
"""What is known of one path; see `_describe`. Times are left out of file systems that do not keep them well."""

Manifest = dict[str, Entry]
"""Entries by path, which starts with the tree's place in the machine (`/srv/…`)."""

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}
_GETFLAGS = 0x80086601  # FS_IOC_GETFLAGS in <linux/fs.h>
_FLAGS = {0x10: "immutable", 0x20: "append-only", 0x40: "no-dump", 0x80: "no-atime"}
_PIECE = 1 << 20


def take_manifest(root: str, place: str = "/", *, plain: bool = False, workers: int = 1) -> Manifest:
    """Return the manifest of the tree at `root`, which stands at `place` in its machine. Stays on one file system.

    `plain` is for FAT: names in upper case, and only type, size and content of files. With more than one of
    `workers`, that many processes are forked to share the work.
    """
    listed = list(_walk(root))
    groups: dict[int, str] = {}
    for name, status in listed:
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            path = _join(place, name)
            groups[status.st_ino] = min(groups.get(status.st_ino, path), path)
    describe = partial(_describe_item, root, place, plain, groups)
    if workers == 1:
        return dict(sorted(map(describe, listed)))
    with get_context("fork").Pool(workers) as pool:
        return dict(sorted(pool.imap_unordered(describe, listed, chunksize=256)))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as text, the same bytes for the same tree."""
    lines = (json.dumps({"path": path, **entry}, sort_keys=True) for path, entry in sorted(manifest.items()))
    return "".join(f"{line}\n" for line in lines).encode("ascii")


def decode_manifest(text: bytes) -> Manifest:
    """Parse what `encode_manifest` made."""
    entries = (json.loads(line) for line in text.splitlines())
    return {entry.pop("path"): entry for entry in entries}


def compare_manifests(before: Manifest, after: Manifest, *, without: Iterable[str] = ()) -> list[str]:
    """Return one readable line for every difference; an empty list says that the trees are the same.

    `without` names paths that do not count, each with all that is under it.
    """
    left_out = tuple(without)
    differences = []
    for path in sorted(before.keys() | after.keys()):
        if any(path == each or path.startswith(each.rstrip("/") + "/") for each in left_out):
            continue
        if path not in after:
            differences.append(f"{show_path(path)}: missing ({before[path]['type']})")
        elif path not in before:
            differences.append(f"{show_path(path)}: was not there before ({after[path]['type']})")
        elif before[path] != after[path]:
            differences.append(f"{show_path(path)}: {'; '.join(_compare_entries(before[path], after[path]))}")
    return differences


def show_path(path: str) -> str:
    """Return a path that any terminal can show: bytes that are not UTF-8 and control characters escaped."""
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)


def _compare_entries(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(before.keys() | after.keys()):
        old, new = before.get(field), after.get(field)
        if old != new:
            yield f"{field} {_show(field, old)} became {_show(field, new)}"


def _show(field: str, value: Any) -> str:
    if value is None:
        return "(none)"
    if field == "mode":
        return f"{value:04o}"
    text = json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)
    return show_path(text if len(text) <= 200 else text[:197] + "...")


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path under `root` (the root itself as "") and status of everything on its file system."""
    top = os.lstat(root)
    yield "", top
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as children:
            for child in children:
                status = child.stat(follow_symlinks=False)
                if status.st_dev != top.st_dev:
                    continue
                name = os.path.join(folder, child.name)
                yield name, status
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(name)


def _join(place: str, name: str) -> str:
    return os.path.join(place, name) if name else place


def _describe_item(
    root: str, place: str, plain: bool, groups: Mapping[int, str], item: tuple[str, os.stat_result]
) -> tuple[str, Entry]:
    name, status = item
    path = os.path.join(root, name) if name else root
    if plain:
        return _join(place, name.upper()), _describe_plain(path, status)
    return _join(place, name), _describe(path, status, groups)


def _describe_plain(path: str, status: os.stat_result) -> Entry:
    entry: Entry = {"type": _TYPES[stat.S_IFMT(status.st_mode)]}
    if stat.S_ISREG(status.st_mode):
        entry["size"] = status.st_size
        entry["content"], _ = _read_file(path, status.st_size)
    return entry


def _describe(path: str, status: os.stat_result, groups: Mapping[int, str]) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    entry: Entry = {
        "type": _TYPES[kind],
        "mode": stat.S_IMODE(status.st_mode),
        "owner": f"{status.st_uid}:{status.st_gid}",
        "mtime_ns": status.st_mtime_ns,
    }
    if kind == stat.S_IFREG:
        entry["size"] = status.st_size
        entry["content"], flags = _read_file(path, status.st_size)
        if flags:
            entry["flags"] = flags
        if status.st_blocks * 512 < status.st_size:
            entry["sparse"] = True
    elif kind == stat.S_IFLNK:
        entry["target"] = os.readlink(path)
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        entry["device"] = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if kind != stat.S_IFDIR and status.st_nlink > 1:
        entry["links"] = status.st_nlink
        entry["same_as"] = groups[status.st_ino]
    names = os.listxattr(path, follow_symlinks=False)
    if names:
        entry["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}
    return entry


def _read_file(path: str, size: int) -> tuple[str, list[str]]:
    """Return the hash of a file's content and its inode flags (those that a person sets)."""
    digest = blake2b(digest_size=32)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # Small files get small buffers: fresh memory is what an emulated machine is slowest at.
        while piece := os.read(fd, min(size + 1, _PIECE)):
            digest.update(piece)
        try:
            (flags,) = struct.unpack("I", fcntl.ioctl(fd, _GETFLAGS, b"\0" * 8)[:4])
        except OSError:  # a file system without flags
            flags = 0
    finally:
        os.close(fd)
    return digest.hexdigest(), [word for bit, word in _FLAGS.items() if flags & bit] if flags else []


if __name__ == "__main__":
    sys.stdout.buffer.write(encode_manifest(take_manifest(*sys.argv[1:3])))
