"""The firmware's boot entries, as bytes and as files like efivarfs has them."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.adapt.nvram import (
    BootEntry,
    NvramError,
    Place,
    apply_entries,
    encode_entry,
    parse_entry,
    probe_entries,
    probe_order,
)
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from tests.adapt_disks import partition

GUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
DISK = Place(2, 4096, 131072, "0c81c6dc-9c28-4b29-8b15-a9f61e1fbb6a")
DEBIAN = BootEntry("debian", DISK, "\\EFI\\debian\\shimx64.efi")

HAND_LAID = bytes.fromhex(
    "01000000"  # active
    "6200"  # bytes of device path
    "640065006200690061006e000000"  # debian
    "04012a00 02000000 0010000000000000 0000020000000000 dcc6810c289c294b8b15a9f61e1fbb6a 0202"  # hard drive
    "04043400" + "\\EFI\\debian\\shimx64.efi\0".encode("utf-16-le").hex() + "7fff0400"  # file  # end
)


def variable(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{name}-{GUID}").write_bytes(struct.pack("<I", 7) + data)


@pytest.fixture
def efivars(tmp_path: Path) -> Path:
    """A firmware that knows a CD drive, a shell on the network and nothing of our disk."""
    other = BootEntry("UEFI QEMU", Place(1, 2048, 4096, "ffffffff-0000-4000-8000-000000000001"), "\\a.efi")
    variable(tmp_path, "Boot0000", encode_entry(other))
    variable(tmp_path, "Boot0001", struct.pack("<IH", 1, 4) + "net\0".encode("utf-16-le") + b"\x7f\xff\x04\x00")
    variable(tmp_path, "Boot0003", b"\1\0\0")
    variable(tmp_path, "BootOrder", struct.pack("<2H", 1, 0))
    variable(tmp_path, "Timeout", b"\0\0")
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in folder.iterdir()}


def test_an_entry_is_laid_out_as_the_specification_has_it() -> None:
    assert encode_entry(DEBIAN) == HAND_LAID
    assert parse_entry(HAND_LAID) == DEBIAN


def efibootmgr(folder: Path, *words: str) -> str:
    """Run the real efibootmgr on a folder that stands for efivarfs."""
    done = subprocess.run(
        ["efibootmgr", *words],
        env={**os.environ, "EFIVARFS_PATH": f"{folder}/"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_efibootmgr_reads_what_we_write(tmp_path: Path) -> None:
    apply_entries([DEBIAN], tmp_path)
    said = efibootmgr(tmp_path, "-v")
    assert "BootOrder: 0000\n" in said
    line = next(line for line in said.splitlines() if line.startswith("Boot0000*"))
    assert f"debian\tHD(2,GPT,{DISK.signature},0x1000,0x20000)" in line
    assert "\\EFI\\debian\\shimx64.efi" in line


def test_an_entry_that_efibootmgr_made_is_ours_byte_for_byte(tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk.img", tmp_path / "vars"
    folder.mkdir()
    partition(
        disk,
        128 << 20,
        f"label: gpt\nstart=2048,size=2048\nstart=4096,size=131072,uuid={DISK.signature},type=uefi\n",
    )
    with attach_loop(Span(disk, 0, 128 << 20)) as loop:
        efibootmgr(folder, "-c", "-d", str(loop), "-p", "2", "-L", "debian", "-l", "\\EFI\\debian\\shimx64.efi")
    before = contents(folder)
    assert apply_entries([DEBIAN], folder) == ""
    assert contents(folder) == before
    assert (folder / f"Boot0000-{GUID}").read_bytes()[4:] == encode_entry(DEBIAN)


def test_a_new_entry_is_made_and_comes_first(efivars: Path) -> None:
    said = apply_entries([DEBIAN], efivars)
    assert "Boot0002 'debian' was made" in said
    assert probe_entries(efivars)[2] == DEBIAN
    assert probe_order(efivars) == (2, 1, 0)
    assert (efivars / f"Boot0002-{GUID}").read_bytes()[:4] == b"\x07\0\0\0"


def test_a_second_time_nothing_is_written(efivars: Path) -> None:
    apply_entries([DEBIAN], efivars)
    before = contents(efivars)
    assert apply_entries([DEBIAN], efivars) == ""
    assert contents(efivars) == before


def test_an_equal_entry_is_used_whatever_its_label_and_case(efivars: Path) -> None:
    standing = BootEntry("my debian", DISK, "\\efi\\DEBIAN\\shimx64.EFI", extra=b"options")
    variable(efivars, "Boot0010", encode_entry(standing))
    assert apply_entries([DEBIAN], efivars) == "Boot0010 is first in the boot order"
    assert probe_entries(efivars)[0x10] == standing
    assert sorted(probe_entries(efivars)) == [0, 1, 0x10]


def test_a_stale_entry_is_corrected_and_not_doubled(efivars: Path) -> None:
    moved = BootEntry("debian", Place(7, 99, 100, DISK.signature), DEBIAN.loader, active=False, extra=b"keep")
    variable(efivars, "Boot0005", encode_entry(moved))
    assert "Boot0005 'debian' was corrected" in apply_entries([DEBIAN], efivars)
    assert probe_entries(efivars)[5] == BootEntry("debian", DISK, DEBIAN.loader, extra=b"keep")
    assert sorted(probe_entries(efivars)) == [0, 1, 5]


def test_another_disk_with_the_same_loader_gets_its_own_entry(efivars: Path) -> None:
    apply_entries([DEBIAN], efivars)
    twin = BootEntry("debian", Place(2, 4096, 131072, "11111111-9c28-4b29-8b15-a9f61e1fbb6a"), DEBIAN.loader)
    assert "was made" in apply_entries([twin], efivars)
    assert len({entry.place for entry in probe_entries(efivars).values() if entry.label == "debian"}) == 2


def test_an_mbr_disk_is_named_by_signature_and_number(efivars: Path) -> None:
    entry = BootEntry("debian", Place(1, 2048, 4096, "deadbeef", mbr=True), "\\EFI\\debian\\grubx64.efi")
    assert parse_entry(encode_entry(entry)) == entry
    assert b"\xef\xbe\xad\xde" in encode_entry(entry)
    apply_entries([entry], efivars)
    second = BootEntry("debian", Place(2, 8192, 4096, "deadbeef", mbr=True), entry.loader)
    assert "was made" in apply_entries([second], efivars)


def test_a_firmware_without_an_order_gets_one(tmp_path: Path) -> None:
    assert "Boot0000" in apply_entries([DEBIAN], tmp_path)
    assert probe_order(tmp_path) == (0,)


def test_a_firmware_that_refuses_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(NvramError, match="Boot0000") as caught:
        apply_entries([DEBIAN], tmp_path / "absent")
    assert caught.value.hint


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_hostile_entries_raise_only_value_errors(data: bytes) -> None:
    for hostile in (data, HAND_LAID[: len(data)], HAND_LAID[:22] + data, HAND_LAID[:4] + data):
        with contextlib.suppress(ValueError):
            parse_entry(hostile)


@given(
    st.builds(
        BootEntry,
        label=st.text(st.characters(codec="utf-16-le", exclude_characters="\0"), max_size=20),
        place=st.builds(
            Place,
            st.integers(1, 128),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 64) - 1),
            st.uuids().map(str),
        ),
        loader=st.text(st.characters(codec="utf-16-le", exclude_characters="\0"), min_size=1, max_size=30),
        active=st.booleans(),
        extra=st.binary(max_size=10),
    )
)
@settings(max_examples=200)
def test_entries_round_trip(entry: BootEntry) -> None:
    assert parse_entry(encode_entry(entry)) == entry
