"""Runs remetal with other constants than its own: `python -m bench.varied MODULE.NAME=NUMBER … -- COMMAND …`."""

from __future__ import annotations

import importlib
import sys

from remetal.cli.app import main as remetal


def main() -> None:
    """Set the constants, then be `remetal`. A name that is a function returns the number instead."""
    at = sys.argv.index("--")
    for setting in sys.argv[1:at]:
        place, _, number = setting.partition("=")
        name, _, attribute = place.rpartition(".")
        module, value = importlib.import_module(name), int(number)
        setattr(module, attribute, (lambda value=value: value) if callable(getattr(module, attribute)) else value)
    sys.argv[1:] = sys.argv[at + 1 :]
    remetal()


if __name__ == "__main__":
    main()
