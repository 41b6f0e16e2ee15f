"""`make docs`: the reference of all commands, made from the commands themselves."""

from __future__ import annotations

from lab import CHECKOUT
from remetal.cli.app import build_app
from remetal.errors import EXIT_CODES

REFERENCE = CHECKOUT / "docs" / "reference" / "commands.md"

_HEAD = """# Commands

This page is made by `make docs` from what `remetal COMMAND --help` shows.

## Exit codes

| code | meaning |
|---|---|
"""


def render_reference() -> str:
    """Return the whole page as Markdown."""
    codes = "".join(f"| {code} | {meaning} |\n" for code, meaning in sorted(EXIT_CODES.items()))
    commands = build_app(overview=False).generate_docs(output_format="markdown", heading_level=2)
    commands = commands.replace(" -m lab.reference", "")  # cyclopts names the way in which this module was called
    lines = [line.rstrip() for line in f"{_HEAD}{codes}\n{commands}".splitlines()]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    REFERENCE.write_text(render_reference())
