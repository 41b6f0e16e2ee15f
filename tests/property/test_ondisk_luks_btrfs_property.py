"""Headers of LUKS and trees of btrfs with hostile bytes: something possible is described, or the one error raised."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.ondisk.btrfs import (
    SUPERBLOCKS,
    BtrfsSuperblock,
    Device,
    parse_btrfs,
    read_allocation,
    used_ranges,
)
from remetal.ondisk.luks import LuksHeader, parse_luks
from remetal.ondisk.regions import BadStructureError, Read

MIB = 1 << 20
CONTAINER = 32 * MIB
COPY = 16384
NODE = 4096
DISK = 256 * MIB

Patches = Mapping[int, bytes]
TOKEN = b'{"type":"clevis","keyslots":["0"]}'


def program(*argv: str | Path, data: bytes = b"") -> None:
    done = subprocess.run(argv, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def real_header(kind: str) -> bytes:
    """The first bytes of a real container, with two key slots."""
    with TemporaryDirectory() as folder:
        disk, key = Path(folder, "disk"), Path(folder, "key")
        key.write_bytes(b"secret")
        disk.touch()
        os.truncate(disk, CONTAINER)
        fast = ("--pbkdf-force-iterations", "1000", *(("--pbkdf", "pbkdf2") if kind == "luks2" else ()))
        program("cryptsetup", "luksFormat", "-q", "--type", kind, *fast, disk, key)
        program("cryptsetup", "luksAddKey", "-q", "--key-file", key, *fast, disk, key)
        if kind == "luks2":
            program("cryptsetup", "token", "import", disk, data=TOKEN)
        return disk.read_bytes()[: 2 * COPY]


def read_from(data: bytes, size: int) -> Read:
    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= size
        return data[offset : offset + count].ljust(count, b"\0")

    return read


def check_header(data: bytes, size: int) -> LuksHeader | None:
    try:
        header = parse_luks(read_from(data, size), size)
    except BadStructureError:
        return None
    assert 592 <= header.header_size <= size
    assert header.sector_size in {512, 1024, 2048, 4096}
    assert 0 <= header.key_size <= 512
    if not header.problems:
        assert header.header_size + (header.payload_size or 1) <= size
    for numbers in ([slot.number for slot in header.keyslots], [token.number for token in header.tokens]):
        assert numbers == sorted(set(numbers))
        assert set(numbers) <= set(range(32))
    assert len(header.uuid) == 36
    assert not any("\0" in text for text in (header.label, header.subsystem))
    return header


def seal(data: bytearray) -> None:
    """Give both copies of a LUKS2 header their right checksums."""
    for place in (0, COPY):
        data[place + 448 : place + 512] = bytes(64)
        data[place + 448 : place + 480] = hashlib.sha256(data[place : place + COPY]).digest()


def patch(data: bytearray, patches: Patches, start: int = 0) -> None:
    for offset, new in patches.items():
        if start + offset + len(new) <= len(data):
            data[start + offset : start + offset + len(new)] = new


def make_patches(size: int) -> st.SearchStrategy[dict[int, bytes]]:
    """Draw bytes to put at some places of the first `size` bytes, and not beyond them."""
    found = st.dictionaries(st.integers(0, size - 1), st.binary(min_size=1, max_size=8), max_size=6)
    return found.map(lambda patches: {place: new[: size - place] for place, new in patches.items()})


@settings(max_examples=400)
@given(make_patches(592), st.sampled_from([CONTAINER, 2 * MIB, MIB, 4096, 592, 591, 0]))
def test_any_first_version(patches: Patches, size: int) -> None:
    data = bytearray(real_header("luks1"))
    patch(data, patches)
    check_header(bytes(data), size)


@settings(max_examples=400)
@given(
    make_patches(512),
    make_patches(COPY - 4096),
    st.sampled_from([0, COPY]),
    st.booleans(),
    st.sampled_from([CONTAINER, 17 * MIB, 16 * MIB, MIB, 40000, 20000, 4096, 600]),
)
def test_any_second_version(binary: Patches, text: Patches, place: int, sealed: bool, size: int) -> None:
    data = bytearray(real_header("luks2"))
    patch(data, binary, place)
    patch(data, text, place + 4096)
    if sealed:
        seal(data)
    header = check_header(bytes(data), size)
    if size >= CONTAINER and not sealed:
        assert header is not None  # the other copy is sound
        assert [slot.number for slot in header.keyslots] == [0, 1]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["dynamic", "0", "512", "33554432", "9" * 18, "9" * 19, "backup-final", "luks2", "reencrypt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("0"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600)
@given(st.data(), st.integers(1, 3))
def test_any_description_with_a_right_checksum(draw: st.DataObject, changes: int) -> None:
    data = bytearray(real_header("luks2"))
    document: Any = json.loads(data[4096:COPY].split(b"\0")[0])
    for _ in range(changes):
        spot = document
        while True:
            name = draw.draw(st.sampled_from(sorted(spot)))
            if not isinstance(spot[name], dict) or not spot[name] or draw.draw(st.integers(0, 4)) == 0:
                break
            spot = spot[name]
        spot[name] = draw.draw(JSON)
    text = json.dumps(document).encode().ljust(COPY - 4096, b"\0")
    if len(text) == COPY - 4096:
        data[4096:COPY] = data[COPY + 4096 : 2 * COPY] = text
        seal(data)
        check_header(bytes(data), CONTAINER)


class Btrfs:
    """A real mirrored file system on two devices, and the superblock of the first: what may be overlaid."""

    def __init__(self, paths: list[Path]) -> None:
        self.descriptors = {number: os.open(path, os.O_RDONLY) for number, path in enumerate(paths, 1)}
        self.superblock = bytes(self.read(1, {}, SUPERBLOCKS[0], 4096))
        parsed = self.parse({})
        (chunk,) = [each for each in parsed.system_chunks if each.start <= parsed.chunk_root < each.start + each.size]
        self.root_at = {each.devid: each.start + parsed.chunk_root - chunk.start for each in chunk.stripes}
        self.root = bytes(self.read(1, {}, self.root_at[1], NODE))

    def read(self, devid: int, overlay: Patches, offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= DISK
        data = bytearray(os.pread(self.descriptors[devid], count, offset))
        for place, new in overlay.items():
            if offset <= place and place + len(new) <= offset + count:
                data[place - offset : place - offset + len(new)] = new
        return bytes(data)

    def device(self, devid: int, overlay: Patches) -> Device:
        return functools.partial(self.read, devid, overlay), DISK

    def parse(self, overlay: Patches) -> BtrfsSuperblock:
        return parse_btrfs(*self.device(1, overlay))


@functools.cache
def real_btrfs() -> Btrfs:
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"disk{number}") for number in range(2)]
        for path in paths:
            path.touch()
            os.truncate(path, DISK)
        program("mkfs.btrfs", "-q", "--csum", "sha256", "-n", str(NODE), "-m", "raid1", "-d", "raid0", *paths)
        return Btrfs(paths)


def sealed_block(block: bytes, patches: Patches) -> bytes:
    data = bytearray(block)
    patch(data, patches)
    return hashlib.sha256(data[32:]).digest() + bytes(data[32:])


def check_extents(found: Mapping[int, list[tuple[int, int]]]) -> None:
    for extents in found.values():
        assert all(start >= 0 and size > 0 for start, size in extents)
        assert all(first + size <= second for (first, size), (second, _) in pairwise(extents))
        ranges = used_ranges(extents, DISK)
        assert all(first + size < second for (first, size), (second, _) in pairwise(ranges))
        assert all(0 <= start < start + size <= DISK for start, size in ranges)


# Half of the changes go where the fields are, and half of them are small: 0x12B is behind them, 0x32B the chunks' list.
SPOTS = st.integers(32, 0x12B) | st.integers(0x32B, 0x32B + 300) | st.integers(0, 4095)
BYTES = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\1", b"\2", b"\xff", b"\xff" * 8, bytes(8)])


@settings(max_examples=600)
@given(st.dictionaries(SPOTS, BYTES, max_size=3), st.booleans())
def test_any_superblock(patches: Patches, sealed: bool) -> None:
    real = real_btrfs()
    block = bytearray(real.superblock)
    patch(block, patches)
    overlay = {SUPERBLOCKS[0]: sealed_block(real.superblock, patches) if sealed else bytes(block)}
    try:
        superblock = real.parse(overlay)
    except BadStructureError:
        return
    assert 0 <= superblock.bytes_used <= superblock.total_bytes
    assert 0 < superblock.device_size <= superblock.total_bytes
    assert "\0" not in superblock.label
    assert superblock.device_size <= DISK or superblock.problems
    try:
        check_extents(read_allocation({devid: real.device(devid, overlay) for devid in (1, 2)}, superblock).extents)
    except BadStructureError:
        return


ITEMS = st.integers(80, 101 + 8 * 25) | st.integers(NODE - 700, NODE - 1) | st.integers(0, NODE - 1)


@settings(max_examples=800)
@given(st.dictionaries(ITEMS, BYTES, max_size=4), st.booleans())
def test_any_chunk_tree(patches: Patches, both: bool) -> None:
    real = real_btrfs()
    root = sealed_block(real.root, patches)
    whole = read_allocation({devid: real.device(devid, {}) for devid in (1, 2)}, real.parse({})).extents
    overlays = {1: {real.root_at[1]: root}, 2: {real.root_at[2]: root} if both else {}}
    devices = {devid: real.device(devid, overlays[devid]) for devid in (1, 2)}
    try:
        found = read_allocation(devices, real.parse({})).extents
    except BadStructureError:
        return
    check_extents(found)
    if not patches:
        assert found == whole


def test_a_tree_that_comes_back_to_a_block_is_refused() -> None:
    real = real_btrfs()
    superblock = real.parse({})
    leaf, top = superblock.chunk_root, superblock.chunk_root + NODE
    key = bytes(17)
    pointers = b"".join(
        key + leaf.to_bytes(8, "little") + superblock.generation.to_bytes(8, "little") for _ in range(2)
    )
    count = (2).to_bytes(4, "little")
    node = sealed_block(real.root, {0x30: top.to_bytes(8, "little"), 0x60: count, 0x64: b"\1", 0x65: pointers})
    fields = {0x58: top.to_bytes(8, "little"), 0xC7: b"\1"}
    overlay = {
        SUPERBLOCKS[0]: sealed_block(real.superblock, fields),
        real.root_at[1] + NODE: node,
    }
    with pytest.raises(BadStructureError, match="loop"):
        read_allocation({1: real.device(1, overlay)}, real.parse(overlay))
