"""The reference says what the program does."""

from __future__ import annotations

from lab.reference import REFERENCE, render_reference
from remetal.cli.app import COMMANDS


def test_the_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == render_reference(), "run `make docs`"


def test_every_command_is_in_the_reference() -> None:
    text = render_reference()
    for name in COMMANDS:
        assert f"remetal {name}" in text
