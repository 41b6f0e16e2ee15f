"""Archives of an initramfs as cpio(1) and the packers make them, and as the kernel takes them."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from pathlib import Path

import pytest

from remetal.ondisk import cpio
from remetal.ondisk.cpio import End, Member, probe_end, read_initramfs
from remetal.ondisk.cpio_write import encode_archive, encode_behind
from remetal.ondisk.packed import NotReadHereError, unpack_whole
from remetal.ondisk.regions import BadStructureError

PACKERS = {
    "": ["cat"],
    "gzip": ["gzip", "-c"],
    "bzip2": ["bzip2", "-c"],
    "lzma": ["xz", "--format=lzma", "-c"],
    "xz": ["xz", "--check=crc32", "-c"],
    "lz4": ["lz4", "-l", "-c"],
    "zstd": ["zstd", "-q", "-c"],
}


def archive(folder: Path, packing: str = "") -> bytes:
    """Return what cpio and a packer make of a folder."""
    names = "".join(f"{path.relative_to(folder)}\n" for path in sorted(folder.rglob("*"))).encode()
    plain = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], cwd=folder, input=names, capture_output=True, check=True
    ).stdout
    return subprocess.run(PACKERS[packing], input=plain, capture_output=True, check=True).stdout


def read(data: bytes) -> list[Member]:
    return list(read_initramfs(io.BytesIO(data), lambda name, size: True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "usr/lib").mkdir(parents=True)
    (folder / "lib").symlink_to("usr/lib")
    (folder / "usr/lib/large").write_bytes(bytes(range(256)) * 20_000)
    (folder / "usr/lib/empty").touch()
    (folder / "init").write_text("#!/bin/sh\n")
    return folder


@pytest.mark.parametrize("packing", PACKERS)
def test_what_is_packed_in_every_way_the_kernel_knows(folder: Path, packing: str) -> None:
    found = {each.name: each for each in read(archive(folder, packing))}
    assert sorted(found) == ["init", "lib", "usr", "usr/lib", "usr/lib/empty", "usr/lib/large"]
    assert found["usr/lib/large"].data == bytes(range(256)) * 20_000
    assert found["lib"].data == b"usr/lib"
    assert stat.S_ISLNK(found["lib"].mode)
    assert {(each.archive, each.packing) for each in found.values()} == {(0, packing)}


@pytest.mark.parametrize("first", PACKERS)
@pytest.mark.parametrize("second", PACKERS)
def test_one_behind_the_other(folder: Path, first: str, second: str) -> None:
    front = archive(folder, first)
    found = read(front + bytes(512 + -len(front) % 4) + archive(folder, second) + bytes(4))
    assert [(each.archive, each.packing) for each in found] == [(0, first)] * 6 + [(1, second)] * 6


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_what_we_append(folder: Path, packing: str, length: int) -> None:
    (folder / "usr/lib/length").write_bytes(os.urandom(3001 * length))
    first = archive(folder, packing)
    old = read(first)
    added = {"usr/lib/modules/6.1/new.ko": b"new" * 1000, "conf/modules": b""}
    whole = first + encode_behind(probe_end(io.BytesIO(first)), added)
    new = read(whole)[len(old) :]
    assert [each.name for each in new] == [
        *("conf", "usr", "usr/lib", "usr/lib/modules", "usr/lib/modules/6.1"),
        *("conf/modules", "usr/lib/modules/6.1/new.ko"),
    ]
    assert new[-1].data == b"new" * 1000
    again = whole + encode_behind(probe_end(io.BytesIO(whole)), {"a": b"b"})
    assert [(each.name, each.data) for each in read(again)[len(old) + len(new) :]] == [("a", b"b")]


def test_cpio_reads_what_we_write() -> None:
    ours = encode_archive({"usr/lib/modules/6.1/new.ko": b"new" * 1000, "conf/modules": b""})
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=ours, capture_output=True, check=True)
    assert listed.stdout.decode().split() == [each.name for each in read(ours)]


def test_lz4_goes_on_as_one_stream(folder: Path) -> None:
    """Until 5.11, the kernel took what followed LZ4 for blocks of it, whatever it was."""
    first = archive(folder, "lz4")
    whole = first + encode_behind(probe_end(io.BytesIO(first)), {"large": os.urandom(9 << 20)})
    plain = subprocess.run(["lz4", "-d", "-c"], input=whole, capture_output=True, check=True).stdout
    assert read(plain)[-1].data == read(whole)[-1].data
    assert {each.archive for each in read(whole)} == {0}
    for zeros in (1, 3, 4, 512):
        padded = first + bytes(zeros)
        assert probe_end(io.BytesIO(padded)).zeros == zeros
        whole = padded + encode_behind(probe_end(io.BytesIO(padded)), {"a": b"b"})
        assert [(each.name, each.archive) for each in read(whole)][-1] == ("a", 1)


def fits(data: bytes) -> bool:
    """Whether an initramfs can be read."""
    try:
        return bool(read(data))
    except BadStructureError:
        return False


@pytest.mark.parametrize("zeros", range(8))
def test_an_archive_begins_where_the_kernel_looks_for_it(folder: Path, zeros: int) -> None:
    """Source: Linux init/initramfs.c, `unpack_to_rootfs` and `do_reset`."""
    plain, packed = encode_archive({"a": b"b"}), archive(folder, "gzip")
    two = plain + bytes(zeros) + plain
    aligned = zeros % 4 == 0
    assert fits(packed + bytes(-len(packed) % 4 + zeros) + plain) is aligned
    assert fits(plain + bytes(zeros) + packed) is aligned
    assert fits(two) is aligned
    assert fits(subprocess.run(["gzip", "-c"], input=two, capture_output=True, check=True).stdout) is aligned
    assert fits(packed + bytes(zeros) + packed)


@pytest.mark.parametrize("packing", PACKERS)
def test_how_it_ends(folder: Path, packing: str) -> None:
    plain, packed = archive(folder), archive(folder, packing)
    found = probe_end(io.BytesIO(bytes(8) + plain + packed + bytes(20)))
    size = 8 + len(plain) + len(packed) + 20
    if packing:
        assert found == End(size, packing, len(plain), 20)
    else:
        assert (found.size, found.packing) == (size, "")
        assert 20 < found.zeros < 20 + 512, "cpio fills its last block with zeros"


def test_only_what_is_wanted_is_kept(folder: Path) -> None:
    found = list(read_initramfs(io.BytesIO(archive(folder, "zstd")), lambda name, size: name == "init"))
    assert {each.name for each in found if each.data} == {"init", "lib"}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_what_is_cut_off(folder: Path, packing: str, part: float) -> None:
    data = archive(folder, packing).rstrip(b"\0")
    with pytest.raises(BadStructureError):
        read(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no archive"),
        (bytes(4096), "no archive"),
        (b"MZ" + bytes(510), "no archive that the kernel could unpack"),
        (b"\x89LZO\x00\r\n\x1a\n", "packed with LZO"),
        (b"070701" + b"zz" * 52, "numbers that are none"),
        (
            b"070701" + b"0000A1FF" * 6 + b"-0000001" + b"00000000" * 4 + b"00000002" + b"0" * 8 + b"a\0",
            "that are none",
        ),
        (b"070701" + b"00000000" * 11 + b"FFFFFFFF" + b"00000000", "a name of 4294967295 bytes"),
        (b"070701" + b"0000A1FF" * 6 + b"FFFFFFFF" + b"00000000" * 4 + b"00000002" + b"0" * 8 + b"a\0", "ends in"),
        (encode_archive({"a/../../etc/passwd": b""}), "leads out of it"),
    ],
)
def test_what_no_kernel_would_take(data: bytes, words: str) -> None:
    with pytest.raises(BadStructureError, match=words):
        read(data)


def test_what_is_only_not_read_here(folder: Path) -> None:
    """The kernel goes on with what it has unpacked, so nothing is said of the whole."""
    good = archive(folder, "gzip")
    for data in (
        good + b"garbage!",
        b"\x89LZO\x00\r\n\x1a\n",
        good + bytes(1 + -len(good) % 4) + encode_archive({"a": b""}),
    ):
        with pytest.raises(NotReadHereError):
            read(data)
    with pytest.raises(BadStructureError) as raised:
        read(good[:-9])
    assert type(raised.value) is BadStructureError


def test_a_name_ends_where_the_kernel_says_so() -> None:
    assert [each.name for each in read(encode_archive({"a\0/../b": b""}))][-1:] == ["a"]


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz", "lz4", "zstd"])
def test_a_bomb_is_not_unpacked(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpio, "MAX_UNPACKED", 64 << 20)
    bomb = subprocess.run(PACKERS[packing], input=bytes(512 << 20), capture_output=True, check=True).stdout
    with pytest.raises(BadStructureError, match="larger than any initramfs"):
        read(bomb)
    with pytest.raises(BadStructureError, match="larger than 1000 bytes"):
        unpack_whole(bomb, limit=1000)


def test_a_packed_module() -> None:
    for packing, words in PACKERS.items():
        packed = subprocess.run(words, input=b"\x7fELF module" * 9999, capture_output=True, check=True).stdout
        assert unpack_whole(packed, limit=1 << 20) == b"\x7fELF module" * 9999, packing
