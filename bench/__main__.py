"""Capture and restore beside their peers, in one run, on the same volumes: `make bench`.

Every figure is the median of several rounds in which all take turns. remetal's times are those of the whole command
and include hashing, encryption, authentication, reading back what was encoded, and fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.choices import measure_choices, measure_settings
from bench.data import find_mixed, find_root
from bench.limit import measure_parts
from bench.page import write_page
from bench.works import WORKS, Finding
from lab.cache import cache_folder


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    processor: str
    cores: int
    kernel: str


def main() -> None:
    """Run the comparisons, print the table, and keep it as JSON, as a page and as plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everybody takes a turn")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), metavar="WORK", help=f"some of: {', '.join(WORKS)}")
    options = parser.parse_args()
    machine = Machine(_processor(), os.cpu_count() or 1, platform.release())
    print(
        f"==> {machine.processor}, {machine.cores} cores, {options.rounds} rounds; volumes are built when first needed"
    )
    findings: list[Finding] = []
    for name in options.only or WORKS:
        with TemporaryDirectory(prefix="bench-", dir=cache_folder()) as folder:
            print(f"==> {name}", flush=True)
            findings += WORKS[name](Path(folder), options.rounds)
    _print(findings)
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "machine": asdict(machine),
        "rounds": options.rounds,
        "findings": [asdict(each) | {"ratio": each.ratio, "reached": each.reached} for each in findings],
    }
    if not options.only:
        volumes = (find_root("ext4"), find_root("xfs"), find_mixed())
        record["parts"] = [asdict(measure_parts(each)) | {"data": each.name} for each in volumes]
        record["choices"] = [asdict(each) for each in measure_choices(volumes[0])]
        with TemporaryDirectory(prefix="bench-", dir=cache_folder()) as folder:
            settings = measure_settings(volumes[0], Path(folder), options.rounds)
        record["settings"] = [asdict(each) for each in settings]
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    if not options.only:
        print(f"written: {write_page(record)}")


def _print(findings: Sequence[Finding]) -> None:
    layout = "{:26} {:20} {:>12} {:>12} {:>6} {:>7} {:8} {}"
    print("\n" + layout.format("work", "data", "remetal", "peer", "ratio", "goal", "", "peer"))
    for each in findings:
        ours, theirs = (f"{value:.2f} {each.unit}" for value in (each.ours, each.theirs))
        goal = f"{'≥' if each.at_least else '≤'} {each.goal:.2f}"
        reached = "reached" if each.reached else "missed"
        print(layout.format(each.work, each.data, ours, theirs, f"{each.ratio:.2f}", goal, reached, each.peer))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
