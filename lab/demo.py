"""`make demo`: a real Debian machine dies and comes back, in front of your eyes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lab import CHECKOUT
from lab.machine import Recipe
from lab.recovery import opened_stage, recover_machine, story_rows
from remetal.errors import RemetalError
from remetal.events import Event, Note, Step, Warn


def main() -> None:
    """Play the story, print its table, and end with 0 if the machine came back without any difference."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--firmware", choices=("bios", "uefi"), default="bios")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "out" / "demo")
    options = parser.parse_args()
    began = time.monotonic()

    def report(event: Event) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        if isinstance(event, Step):
            print(f"[{minutes:2}:{seconds:02}] {event.title}", file=sys.stderr, flush=True)
        elif isinstance(event, (Note, Warn)):
            print(f"        {event.text}", file=sys.stderr, flush=True)

    try:
        with opened_stage(options.out, options.firmware) as stage:
            story = recover_machine(stage, Recipe(), report)
    except RemetalError as error:
        print(f"\nThe demo failed: {error.message}.\n{error.hint}", file=sys.stderr)
        sys.exit(1)
    rows = [*story_rows(story), ("whole demo", f"{time.monotonic() - began:.0f} s")]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    (options.out / "story.json").write_text(json.dumps(asdict(story), indent=2) + "\n")
    print(f"\nSerial log, plan, report and screenshots: {options.out}")
    back = story.boot is not None and story.boot.state == "running" and not story.differences
    if not back:
        print(f"The machine did not come back as it was: see {options.out}/differences.txt", file=sys.stderr)
    sys.exit(0 if back else 1)


if __name__ == "__main__":
    main()
