"""Writing the archives of an initramfs: cpio ("newc"), one behind the other, as the kernel unpacks them; see `cpio`.

Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst, init/initramfs.c, lib/decompress_unlz4.c.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from remetal.ondisk.cpio import End
from remetal.ondisk.packed import pack_lz4

_ALIGNMENT = 4
_BLOCK = 512
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: a folder (`content` is None), a symbolic link (a str), or a file (bytes, or the path of one)."""

    name: str
    content: bytes | str | Path | None
    mode: int = 0o755


def write_archive(output: BinaryIO, members: list[Entry]) -> None:
    """Append an uncompressed cpio archive of these members, all owned by root; folders before their content."""
    for number, member in enumerate(members, start=1):
        _write_member(output, member, number)
    _write_header(output, _TRAILER, 0, 0, 0)


def encode_archive(files: Mapping[str, bytes]) -> bytes:
    """Return an archive of these files by their paths, with the folders that they lie in; all are root's."""
    output = BytesIO()
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    entries = [Entry(path, None) for path in sorted(folders)]
    write_archive(output, [*entries, *(Entry(path, data, 0o644) for path, data in sorted(files.items()))])
    output.write(bytes(-output.tell() % _BLOCK))
    return output.getvalue()


def encode_behind(end: End, files: Mapping[str, bytes]) -> bytes:
    """Return what stands behind an initramfs that ends so, for every kernel to unpack an archive of these files, too.

    An archive has to begin at a multiple of 4 bytes. Behind a stream of LZ4 stands more of that stream: until 5.11, the
    kernel took whatever followed one, zeros included, for blocks of it.
    """
    archive = encode_archive(files)
    if end.packing == "lz4" and not end.zeros:
        return pack_lz4(bytes(-end.unpacked % _ALIGNMENT) + archive)
    return bytes(_BLOCK + -end.size % _BLOCK) + archive


def _write_member(output: BinaryIO, member: Entry, number: int) -> None:
    match member.content:
        case None:
            _write_header(output, member.name, stat.S_IFDIR | member.mode, 0, number)
        case str(target):
            data = target.encode()
            _write_header(output, member.name, stat.S_IFLNK | 0o777, len(data), number)
            output.write(data)
        case bytes(data):
            _write_header(output, member.name, stat.S_IFREG | member.mode, len(data), number)
            output.write(data)
        case Path() as path:
            _write_header(output, member.name, stat.S_IFREG | member.mode, path.stat().st_size, number)
            with path.open("rb") as source:
                shutil.copyfileobj(source, output, 1 << 20)
    _pad(output)


def _write_header(output: BinaryIO, name: str, mode: int, size: int, number: int) -> None:
    encoded = name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(encoded), 0)
    output.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
    _pad(output)


def _pad(output: BinaryIO) -> None:
    output.write(bytes(-output.tell() % _ALIGNMENT))
