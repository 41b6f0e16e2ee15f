"""What we read of LUKS headers is what cryptsetup reads; what is damaged, moved or unusual is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remetal.ondisk.luks import Keyslot, LuksHeader, Token, parse_luks
from remetal.ondisk.regions import BadStructureError

MIB = 1 << 20
SIZE = 32 * MIB
FAST = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
TOKEN = '{"type":"clevis","keyslots":["0"],"jwe":{"deep":[1,{"x":null}]}}'


def program(*argv: str | Path, data: str | None = None) -> str:
    done = subprocess.run(argv, input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def parse(path: Path, size: int | None = None) -> LuksHeader:
    end = path.stat().st_size if size is None else size
    with path.open("rb") as disk:

        def read(offset: int, count: int) -> bytes:
            assert 0 <= offset <= offset + count <= end
            return os.pread(disk.fileno(), count, offset)

        return parse_luks(read, end)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"correct horse")
    return path


@pytest.fixture
def make(tmp_path: Path, key: Path) -> Callable[..., Path]:
    """`make("luks2", *options)`: format a container on a new disk file and return it."""

    def make_container(kind: str, *options: str, size: int = SIZE) -> Path:
        path = tmp_path / f"disk{len(list(tmp_path.iterdir()))}.img"
        with path.open("wb") as disk:
            disk.truncate(size)
        kdf = FAST if kind == "luks2" else FAST[2:]
        program("cryptsetup", "luksFormat", "-q", "--type", kind, *kdf, *options, path, key)
        return path

    return make_container


def add_key(disk: Path, key: Path, slot: int, *options: str) -> None:
    extra = key.with_name(f"key-{slot}")
    extra.write_text(f"passphrase {slot}")
    program("cryptsetup", "luksAddKey", "-q", "--key-file", key, "--key-slot", str(slot), *options, disk, extra)


def dump(disk: Path) -> str:
    """What cryptsetup says; of a copy, because it repairs what it reads."""
    copy = disk.with_suffix(".copy")
    copy.write_bytes(disk.read_bytes())
    return program("cryptsetup", "luksDump", copy)


def find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, pattern
    return found[1].strip()


def assert_said(header: LuksHeader, text: str) -> None:
    """The header of a LUKS2 container is what luksDump says of it."""
    assert str(header.version) == find(r"^Version:(.*)$", text)
    assert header.uuid == find(r"^UUID:(.*)$", text)
    assert (header.label or "(no label)") == find(r"^Label:(.*)$", text)
    assert (header.subsystem or "(no subsystem)") == find(r"^Subsystem:(.*)$", text)
    assert header.cipher == find(r"^\tcipher:(.*)$", text)
    assert str(header.header_size) == find(r"^\toffset: (\d+) \[bytes\]", text)
    assert str(header.sector_size) == find(r"^\tsector: (\d+) \[bytes\]", text)
    size = find(r"^\tlength: (.*)$", text)
    assert size == ("(whole device)" if header.payload_size is None else f"{header.payload_size} [bytes]")
    names = {"normal": 1, "ignored": 0, "preferred": 2}
    slots = re.findall(
        r"^  (\d+): (luks2)(?: \(unbound\))?$.*?Priority: *(\w+)$.*?PBKDF: *(\w+)$", text, re.MULTILINE | re.DOTALL
    )
    assert header.keyslots == tuple(Keyslot(int(n), kind, kdf, names[rank]) for n, kind, rank, kdf in slots)
    tokens = re.search(r"^Tokens:\n(.*?)^Digests:", text, re.MULTILINE | re.DOTALL)
    assert tokens is not None
    found = re.findall(r"^  (\d+): (\S+)$", tokens[1], re.MULTILINE)
    assert header.tokens == tuple(Token(int(number), kind) for number, kind in found)


def test_second_version_with_everything(make: Callable[..., Path], key: Path) -> None:
    disk = make(
        "luks2",
        "--label",
        "größe ☃",
        "--subsystem",
        "wörk",
        "--sector-size",
        "4096",
        "--cipher",
        "aes-cbc-essiv:sha256",
    )
    add_key(disk, key, 7, *FAST)
    add_key(disk, key, 1, "--pbkdf", "argon2id", "--pbkdf-memory", "32", "--pbkdf-force-iterations", "4")
    add_key(disk, key, 9, *FAST)
    add_key(disk, key, 4, "--pbkdf", "argon2i", "--pbkdf-memory", "32", "--pbkdf-force-iterations", "4")
    program("cryptsetup", "luksKillSlot", "-q", disk, "9")
    program("cryptsetup", "config", "--priority", "prefer", "--key-slot", "7", disk)
    program("cryptsetup", "config", "--priority", "ignore", "--key-slot", "4", disk)
    program("cryptsetup", "token", "import", "--token-id", "11", disk, data=TOKEN)
    program("cryptsetup", "token", "import", "--token-id", "2", disk, data=TOKEN.replace("clevis", "recovery-desk"))
    header = parse(disk)
    assert_said(header, dump(disk))
    assert [(slot.number, slot.kdf, slot.priority) for slot in header.keyslots] == [
        (0, "pbkdf2", 1),
        (1, "argon2id", 1),
        (4, "argon2i", 0),
        (7, "pbkdf2", 2),
    ]
    assert header.tokens == (Token(2, "recovery-desk"), Token(11, "clevis"))
    assert (header.label, header.subsystem, header.key_size) == ("größe ☃", "wörk", 32)
    assert (header.damaged_copy, header.problems) == (False, ())


@pytest.mark.parametrize("metadata", ["16k", "64k", "4m"])
@pytest.mark.parametrize("sector", ["512", "4096"])
def test_second_version_in_other_sizes(make: Callable[..., Path], metadata: str, sector: str) -> None:
    sizes = ("--luks2-metadata-size", metadata, "--luks2-keyslots-size", "2m", "--sector-size", sector)
    disk = make("luks2", *sizes, "--offset", "24576", "--key-size", "256")
    header = parse(disk)
    assert_said(header, dump(disk))
    assert (header.header_size, header.key_size, header.problems) == (12 * MIB, 32, ())


def test_first_version(make: Callable[..., Path], key: Path) -> None:
    disk = make("luks1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256")
    for slot in (7, 1, 3):
        add_key(disk, key, slot, *FAST[2:])
    program("cryptsetup", "luksKillSlot", "-q", disk, "1")
    header, text = parse(disk), dump(disk)
    assert header.version == 1
    assert header.uuid == find(r"^UUID:(.*)$", text)
    assert header.cipher == f"{find(r'^Cipher name:(.*)$', text)}-{find(r'^Cipher mode:(.*)$', text)}"
    assert header.header_size == 512 * int(find(r"^Payload offset:(.*)$", text))
    assert header.key_size * 8 == int(find(r"^MK bits:(.*)$", text))
    assert [str(slot.number) for slot in header.keyslots] == re.findall(r"^Key Slot (\d): ENABLED", text, re.MULTILINE)
    assert header.keyslots == tuple(Keyslot(number, "luks1", "pbkdf2") for number in (0, 3, 7))
    assert (header.sector_size, header.payload_size, header.label, header.tokens) == (512, None, "", ())
    assert (header.damaged_copy, header.problems) == (False, ())


def test_key_size_is_that_of_the_volume_key(make: Callable[..., Path], key: Path) -> None:
    disk = make("luks2", "--key-size", "512", "--key-slot", "3")
    foreign = key.with_name("foreign")
    foreign.write_bytes(b"another")
    program("cryptsetup", "luksAddKey", "-q", *FAST, "--unbound", "--key-size", "128", disk, foreign)
    assert (parse(disk).key_size, [slot.number for slot in parse(disk).keyslots]) == (64, [0, 3])
    assert_said(parse(disk), dump(disk))
    program("cryptsetup", "luksErase", "-q", disk)
    assert (parse(disk).key_size, [slot.number for slot in parse(disk).keyslots]) == (0, [0])


def wipe(disk: Path, offset: int, size: int = 4096) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))


@pytest.mark.parametrize("metadata", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_one_damaged_copy(make: Callable[..., Path], metadata: int) -> None:
    disk = make("luks2", "--luks2-metadata-size", f"{metadata}k", "--luks2-keyslots-size", "1m", "--label", "x")
    whole, pristine = parse(disk), disk.read_bytes()
    assert not whole.damaged_copy
    for place in (0, 4096 + 100, metadata * 1024, metadata * 1024 + 4096 + 100):
        wipe(disk, place, 1 if place % 4096 else 4096)
        found = parse(disk)
        assert found.damaged_copy
        assert found.uuid == whole.uuid
        assert found.keyslots == whole.keyslots
        assert_said(found, dump(disk))
        disk.write_bytes(pristine)
    wipe(disk, 4096 + 100, 1)
    wipe(disk, metadata * 1024, 8)
    with pytest.raises(BadStructureError, match="its checksum is wrong"):
        parse(disk)
    assert subprocess.run(["cryptsetup", "isLuks", disk], check=False).returncode != 0


@pytest.mark.parametrize("stale", [0, 1])
def test_the_newer_copy_counts(make: Callable[..., Path], key: Path, stale: int) -> None:
    disk = make("luks2")
    place = stale * 16384
    before = disk.read_bytes()[place : place + 16384]
    add_key(disk, key, 5, *FAST)
    with disk.open("r+b") as file:
        file.seek(place)
        file.write(before)
    header = parse(disk)
    assert [slot.number for slot in header.keyslots] == [0, 5]
    assert header.damaged_copy
    assert_said(header, dump(disk))


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_detached_header_and_backup(make: Callable[..., Path], key: Path, kind: str) -> None:
    disk, payload = make(kind), key.with_name("payload.img")
    payload.write_bytes(bytes(SIZE))
    header, backup = key.with_name("header.img"), key.with_name("backup.img")
    kdf = FAST if kind == "luks2" else FAST[2:]
    program("cryptsetup", "luksFormat", "-q", "--type", kind, *kdf, "--header", header, payload, key)
    program("cryptsetup", "luksHeaderBackup", disk, "--header-backup-file", backup)
    assert parse(header).problems == ("a payload on another device (detached header)",)
    assert "no payload behind" in parse(backup).problems[0]
    assert parse(backup).uuid == parse(disk).uuid
    assert parse(backup).header_size <= backup.stat().st_size
    with pytest.raises(BadStructureError):
        parse(payload)


def test_reencryption_under_way(make: Callable[..., Path], key: Path) -> None:
    disk = make("luks2")
    add_key(disk, key, 1, *FAST)
    again = ("reencrypt", "-q", "--init-only", *FAST, "--key-file", key, "--key-slot", "0", disk)
    program("cryptsetup", *again)
    header = parse(disk)
    assert header.problems == ("a reencryption that did not end",)
    assert (header.header_size, header.cipher) == (16 * MIB, "aes-xts-plain64")
    first = make("luks1")
    with first.open("r+b") as file:
        file.write(b"LUKS\xde\xad")
    with pytest.raises(BadStructureError, match="a reencryption"):
        parse(first)


def forge(disk: Path, change: Callable[[Any], None], size: int = 16384, nested: int = 0) -> None:
    """Change the JSON part of both copies, and give them their right checksums.

    Each copy has `size` bytes; if `nested`, so many lists in one another are added.
    """
    data = bytearray(disk.read_bytes()[: 2 * size])
    for place in (0, size):
        document = json.loads(data[place + 4096 : place + size].split(b"\0")[0])
        change(document)
        text = json.dumps(document)
        if nested:
            text = f'{text[:-1]}, "more": {"[" * nested}{"]" * nested}}}'
        data[place + 4096 : place + size] = text.encode().ljust(size - 4096, b"\0")
        data[place + 448 : place + 512] = bytes(64)
        data[place + 448 : place + 480] = hashlib.sha256(data[place : place + size]).digest()
    with disk.open("r+b") as file:
        file.write(data)


def segment(**values: Any) -> Callable[[Any], None]:
    return lambda document: document["segments"]["0"].update(values)


def require(*names: str) -> Callable[[Any], None]:
    return lambda document: document["config"].update(requirements={"mandatory": list(names)})


def second_segment(document: Any) -> None:
    document["segments"]["0"].update(size=str(MIB))
    document["segments"]["1"] = {**document["segments"]["0"], "offset": str(17 * MIB), "size": "dynamic"}
    document["digests"]["0"]["segments"].append("1")


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (segment(size=str(8 * MIB)), ()),
        (segment(size=str(20 * MIB)), ("a payload that goes beyond the end of the device",)),
        (second_segment, ("a payload of 2 segments",)),
        (
            segment(integrity={"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}),
            ("integrity tags (dm-integrity)",),
        ),
        (segment(type="linear"), ("a payload of the unknown kind 'linear'",)),
        (segment(type="hw-opal"), ("a drive that encrypts it by itself (OPAL)",)),
        (require("opal"), ("a drive that encrypts it by itself (OPAL)",)),
        (require("online-reencrypt-v3"), ("a reencryption that did not end",)),
        (
            require("inline-hw-tags", "x"),
            ("the unknown requirement 'inline-hw-tags'", "the unknown requirement 'x'"),
        ),
    ],
)
def test_what_cannot_be_carried_is_told(
    make: Callable[..., Path], change: Callable[[Any], None], problems: tuple[str, ...]
) -> None:
    disk = make("luks2")
    forge(disk, change)
    header = parse(disk)
    assert header.problems == problems
    if not problems:
        assert_said(header, dump(disk))
        assert header.payload_size == 8 * MIB


@pytest.mark.parametrize(
    "change",
    [
        segment(offset="1"),
        segment(offset="-512"),
        segment(offset="9" * 19),
        segment(size="all"),
        segment(size="0"),
        segment(sector_size=513),
        lambda document: document.update(segments={}),
        lambda document: document.pop("digests"),
        lambda document: document["keyslots"].update({"32": document["keyslots"]["0"]}),
        lambda document: document["keyslots"]["0"]["area"].update(offset=str(16 * MIB)),
        lambda document: document["config"].update(keyslots_size=str(SIZE)),
        lambda document: document["keyslots"]["0"].update(type="x" * 257),
    ],
)
def test_impossible_descriptions_are_refused(make: Callable[..., Path], change: Callable[[Any], None]) -> None:
    disk = make("luks2")
    forge(disk, change)
    with pytest.raises(BadStructureError):
        parse(disk)


def test_fields_of_the_future_are_no_trouble_unless_nested_too_deep(make: Callable[..., Path]) -> None:
    disk = make("luks2", "--luks2-metadata-size", "4m")
    whole = parse(disk)
    forge(disk, lambda document: None, 4 * MIB, nested=20)
    assert parse(disk) == whole
    forge(disk, lambda document: None, 4 * MIB, nested=2_000_000)
    with pytest.raises(BadStructureError, match="JSON"):
        parse(disk)


def test_truncated_and_unknown(make: Callable[..., Path]) -> None:
    first, second = make("luks1"), make("luks2")
    for disk, sizes in ((first, (0, 7, 591, 592, 4096, MIB)), (second, (0, 591, 592, 4096, 16383, 32767, 8 * MIB))):
        for size in sizes:
            with pytest.raises(BadStructureError):
                parse(disk, size)
    with first.open("r+b") as file:
        file.seek(6)
        file.write(struct.pack(">H", 3))
    with pytest.raises(BadStructureError, match="unknown version 3"):
        parse(first)
