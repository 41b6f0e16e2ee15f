"""`python -m lab.live`: back up databases at work, lose their machines, and write the page with what came back."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from lab import CHECKOUT
from lab.cache import cache_folder, cached
from lab.live.cases import CASES, LiveCase
from lab.live.kills import kill_while_held
from lab.live.page import PAGE, render_page
from lab.live.pause import hold_while_written
from lab.live.run import Seen, run_case
from remetal.events import Event
from remetal.media.build import MediumRequest, build_medium

_TESTS = (
    "tests/unit/test_image_live.py",
    "tests/boot/test_live_backup.py",
    "tests/boot/test_live_stacks.py",
    "tests/boot/test_libvirt_guests.py",
)


def main() -> int:
    """Parse the words, run the cases one after the other, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m lab.live", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(each.name for each in CASES)}; without a page")
    words = parser.parse_args()
    chosen = [each for each in CASES if each.name in words.cases or not words.cases]
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="live-", dir=cache_folder()) as place:
        medium = build_medium(MediumRequest(Path(place) / "recovery.iso"), _say).path
        seen = [_see(case, Path(place) / case.name, medium) for case in chosen]
    if words.cases:
        return 0
    with tempfile.TemporaryDirectory(prefix="live-") as place:
        kills = kill_while_held(Path(place), seed=1)
        _say(kills)
    with tempfile.TemporaryDirectory(prefix="live-") as place:
        held = hold_while_written(Path(place))
        _say(held)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "matrix", *_TESTS], check=True, cwd=CHECKOUT)
    PAGE.write_text(render_page(seen, kills, held))
    return 0


def _see(case: LiveCase, work: Path, medium: Path) -> Seen:
    """Run a case, or return what it came to with just these sources; so a run that was ended goes on where it was."""
    sources = [path for folder in ("src", "lab") for path in sorted((CHECKOUT / folder).rglob("*.py"))]
    inputs = [path.read_text() for path in (*sources, CHECKOUT / "requirements.lock", CHECKOUT / "packages.txt")]

    def build(path: Path) -> None:
        path.write_bytes(msgspec.json.encode(run_case(case, work, medium, _say)))

    seen = msgspec.json.decode(cached(f"live-{case.name}", inputs, build).read_bytes(), type=Seen)
    _say(seen)
    return seen


def _say(event: Event | object) -> None:
    print(getattr(event, "title", event), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
