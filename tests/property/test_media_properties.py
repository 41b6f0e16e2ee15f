"""The medium's parsers under arbitrary and hostile input: a result or the documented refusal, nothing else."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError, UsageError
from remetal.media.answer import (
    convert_answer,
    parse_answer,
    parse_command_line,
    parse_place,
)
from remetal.media.grub import plan_menu
from remetal.media.volumes import parse_volumes
from remetal.ondisk.cpio_write import Entry, write_archive

FIELDS = (
    "repository",
    "snapshot",
    "machine",
    "map",
    "passphrase",
    "passphrase-file",
    "kit-file",
    "end",
    "log",
    "pause",
)
TEXT = st.text(min_size=1, max_size=40).filter(lambda text: ".." not in text and "\0" not in text)
WORD = st.text(st.sampled_from("abcXYZ019._/-@+="), min_size=1, max_size=12)


def refusal(call: Callable[[], object]) -> str | None:
    """Return what a call is refused with; any other exception is the test's failure."""
    try:
        call()
    except RefusedError as error:
        return error.message
    return None


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_hostile_answer_files_are_refused(data: bytes) -> None:
    told = refusal(lambda: parse_answer(data, "stick"))
    assert told is None or "stick" in told


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(FIELDS) | st.text(max_size=8),
        st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.dictionaries(TEXT, TEXT, max_size=3),
        max_size=8,
    )
)
def test_hostile_fields_are_refused(fields: dict[str, object]) -> None:
    told = refusal(lambda: convert_answer(fields, "stick"))
    assert told is None or told.startswith("stick ")


@settings(max_examples=200)
@given(st.text(max_size=200), st.sampled_from(["", "remetal.", "remetal.map=", "remetal.repo="]))
def test_hostile_command_lines_are_parsed_or_refused(text: str, prefix: str) -> None:
    told = refusal(lambda: parse_command_line(f"{prefix}{text}"))
    assert told is None or "remetal." in told


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_a_place_never_leaves_its_volume(text: str) -> None:
    try:
        place = parse_place(text)
    except UsageError:
        return
    assert ".." not in Path(place.path).parts
    if place.volume in {"own", "system"}:
        assert str(place) == text


@settings(max_examples=100)
@given(st.dictionaries(WORD, st.text(st.sampled_from("abc /:._-"), min_size=1, max_size=12), max_size=4))
def test_what_the_command_line_says_is_what_is_understood(mapping: dict[str, str]) -> None:
    pairs = {source: target for source, target in mapping.items() if "=" not in source}
    words = [f'"remetal.map={source}={target}"' for source, target in pairs.items()]
    fields = parse_command_line(" ".join(words)).fields
    assert fields.get("map", {}) == pairs


@settings(max_examples=100)
@given(st.text(max_size=300))
def test_hostile_blkid_output_yields_only_known_file_systems(text: str) -> None:
    for volume in parse_volumes(text):
        assert volume.kind in {
            "vfat",
            "ext4",
            "xfs",
            "btrfs",
            "exfat",
            "ext2",
            "ext3",
            "ntfs",
            "iso9660",
            "udf",
            "f2fs",
        }


@settings(max_examples=100)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_kernel_arguments_cannot_break_out_of_the_menu(append: str) -> None:
    try:
        menu = plan_menu("id", 1, append)
    except UsageError:
        return
    plain = plan_menu("id", 1)
    assert menu.count("\n") == plain.count("\n")
    assert len(msgspec.json.encode(menu)) >= len(msgspec.json.encode(plain))


@settings(max_examples=15)
@given(
    st.dictionaries(
        st.text("abcxyz09._", min_size=1, max_size=20).filter(lambda n: n.strip(".")),
        st.binary(max_size=300),
        max_size=6,
    )
)
def test_cpio_reads_every_archive_that_is_written(files: dict[str, bytes]) -> None:
    archive = io.BytesIO()
    write_archive(archive, [Entry(name, data, 0o640) for name, data in files.items()])
    for name, data in files.items():
        done = subprocess.run(
            ["cpio", "--quiet", "-i", "--to-stdout", name], input=archive.getvalue(), capture_output=True, check=True
        )
        assert done.stdout == data
