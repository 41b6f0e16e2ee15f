"""The shared vocabulary: errors with exit codes, sizes and times as people read them, ids, events."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remetal import errors
from remetal.errors import EXIT_CODES, RemetalError, UsageError
from remetal.events import Note, Progress, Step, Warn, silent
from remetal.ids import match_prefix, new_id, short
from remetal.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    align_down,
    align_up,
    format_bytes,
    format_duration,
    format_rate,
    parse_bytes,
)


def test_exit_codes_are_the_documented_contract() -> None:
    assert EXIT_CODES == {
        0: "done",
        1: "failed",
        2: "usage",
        3: "refused before anything was touched",
        4: "stopped after writing began, can be resumed",
        5: "the repository is damaged",
        6: "locked or unreachable",
    }
    assert {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RemetalError)
    } == set(range(1, 7))


def test_an_error_carries_message_and_hint() -> None:
    error = UsageError("what", hint="do")
    assert (str(error), error.message, error.hint, error.exit_code) == ("what", "what", "do", 2)
    assert RemetalError("x").hint == ""


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 40))
def test_alignment(value: int, alignment: int) -> None:
    down, up = align_down(value, alignment), align_up(value, alignment)
    assert down <= value <= up < down + 2 * alignment
    assert down % alignment == up % alignment == 0
    assert (down == up) == (value % alignment == 0)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (-1, "-1 byte"),
        (1023, "1023 bytes"),
        (KIB, "1.00 KiB"),
        (1023 * KIB + 1023, "1.00 MiB"),
        (999 * KIB, "999 KiB"),
        (10 * MIB, "10.0 MiB"),
        (1568 * MIB, "1.53 GiB"),
        (100 * GIB, "100 GiB"),
        (TIB, "1.00 TiB"),
        (1 << 70, "1024 EiB"),
    ],
)
def test_bytes_are_shown_with_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(KIB, (1 << 60) - 1))
def test_shown_bytes_are_near_the_truth(count: int) -> None:
    shown = format_bytes(count)
    assert re.fullmatch(r"\d\.\d\d [KMGTPE]iB|\d\d\.\d [KMGTPE]iB|\d{3} [KMGTPE]iB", shown), shown
    if not shown.endswith("EiB"):
        assert abs(parse_bytes(shown) - count) <= count * 0.006


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("500", 500),
        ("64K", 64 * KIB),
        ("64 kib", 64 * KIB),
        ("1.5GiB", 3 * GIB // 2),
        (" 2TB ", 2 * TIB),
        ("7b", 7),
        ("9007199254740993", 9007199254740993),
        ("9007199254740993K", 9007199254740993 * KIB),
    ],
)
def test_sizes_are_read_exactly(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5.2", "1e9", "0x10", "1 X", "\u0661", "1,5G", "9" * 400, "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_reading_a_size_never_fails_otherwise(text: str) -> None:
    with suppress(UsageError):
        assert parse_bytes(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.949, "9.9 s"),
        (9.95, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (47 * 3600, "47 h 00 min"),
        (100 * 3600, "4 d 04 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rates() -> None:
    assert format_rate(310 * MIB, 1) == "310 MiB/s"
    assert format_rate(5, 0) == "-"


def test_ids_are_random_and_short_for_people() -> None:
    first, second = new_id(), new_id()
    assert first != second
    assert re.fullmatch(r"[0-9a-f]{32}", first)
    assert short(first) == first[:12]


def test_a_prefix_finds_the_one_it_means() -> None:
    names = ["aa11", "aa22", "bb33"]
    assert match_prefix("B", names, what="snapshot") == "bb33"
    assert match_prefix("aa1", [*names, "aa11"], what="snapshot") == "aa11"
    with pytest.raises(UsageError, match="fits 2 snapshots: aa11, aa22"):
        match_prefix("aa", names, what="snapshot")
    for nothing in ("", "cc", "aa111"):
        with pytest.raises(UsageError, match="no snapshot starts with"):
            match_prefix(nothing, names, what="snapshot")


def test_silence_takes_every_event() -> None:
    for event in (Step("a"), Progress("a", 1, 2), Note("a"), Warn("a", "b")):
        silent(event)
