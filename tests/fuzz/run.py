"""Fuzzes parsers with atheris, one after the other: `python -m tests.fuzz.run [--seconds N] [--keep] [TARGET…]`.

Inputs that reach something new are kept under `$REMETAL_CACHE/fuzz/` (else `.cache/fuzz/`). With `--keep`, those that
reach what no seed and no input of `corpus/TARGET.txt` does are added to that file, where every test run meets them.
What breaks a parser is written to the cache, too, and belongs there once it is understood: a line in base64.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.target import Target

CORPUS = Path(__file__).with_name("corpus")
_LONGEST_INPUT = 1 << 16
_LARGEST_CORPUS = 12 << 10
"""Bytes of a target's corpus that are kept in the tree; of more, the smallest inputs are."""
_PRODUCT = str(Path(__file__).parents[2] / "src")

Steps = set[tuple[str, int, int]]


def cache_folder() -> Path:
    """Return where inputs are kept."""
    return Path(os.environ.get("REMETAL_CACHE") or Path(__file__).parents[2] / ".cache") / "fuzz"


def fuzz(target: Target, seeds: Sequence[bytes], limits: Sequence[str]) -> None:
    """Fuzz one target up to libFuzzer's limits; the process ends, with another code than 0 if something is found."""
    import atheris

    folder = cache_folder() / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)

    def meet(data: bytes) -> None:
        try:
            target.meet(data)
        except Exception:
            (cache_folder() / f"{target.name}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    bounds = [f"-max_len={_LONGEST_INPUT}", "-timeout=10", "-rss_limit_mb=1024"]
    found = f"-artifact_prefix={cache_folder()}/{target.name}-"
    words = [*limits, *bounds, found, "-verbosity=0", "-print_final_stats=1", str(folder)]
    atheris.Setup([sys.argv[0], *words], meet)
    atheris.Fuzz()


def fuzz_apart(target: Target, limits: Sequence[str]) -> tuple[int, str]:
    """Fuzz one target in a process of its own, which has all that is instrumented; return its exit code and words."""
    seeds = [*target.seeds(), *read_corpus(target.name)]
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                fuzz(target, seeds, limits)
            finally:
                os._exit(99)  # it has ended before
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode("utf-8", "replace")


def read_corpus(name: str) -> list[bytes]:
    """Return the inputs that the tree keeps for a target."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line, validate=True) for line in path.read_text().splitlines()] if path.exists() else []


def keep(target: Target) -> int:
    """Add to a target's corpus what reaches something new; return how many inputs that is."""
    known = read_corpus(target.name)
    reached: Steps = set()
    for each in (*target.seeds(), *known):
        reached |= steps_of(target, each)
    found: Iterable[bytes] = sorted(
        (path.read_bytes() for path in (cache_folder() / target.name).glob("*")), key=lambda data: (len(data), data)
    )
    new = []
    room = _LARGEST_CORPUS - sum(map(len, known))
    for each in found:
        if len(each) > room:
            break
        steps = steps_of(target, each)
        if not steps <= reached:
            new.append(each)
            reached |= steps
            room -= len(each)
    if new:
        CORPUS.mkdir(exist_ok=True)
        lines = [base64.b64encode(each).decode() for each in (*known, *new)]
        (CORPUS / f"{target.name}.txt").write_text("\n".join(lines) + "\n")
    return len(new)


def steps_of(target: Target, data: bytes) -> Steps:
    """Return the steps from line to line of the product's code that an input leads to."""
    steps: Steps = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_PRODUCT):
            return None
        last = 0

        def walk(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                steps.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return walk

        return walk

    sys.settrace(enter)
    try:
        target.meet(data)
    finally:
        sys.settrace(None)
    return steps


def main() -> None:
    """Fuzz the targets that are named, or all, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, help="instead, so many inputs for each target, the same each time")
    parser.add_argument("--keep", action="store_true", help="add what reaches something new to the corpus in the tree")
    chosen = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["remetal"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS

    broken = []
    for name in chosen.targets or list(TARGETS):
        target = TARGETS[name]
        limits = [f"-runs={chosen.runs}", "-seed=1"] if chosen.runs else [f"-max_total_time={chosen.seconds}"]
        code, said = fuzz_apart(target, limits)
        runs = [line.split()[-1] for line in said.splitlines() if "number_of_executed_units" in line]
        print(f"{name}: {runs[0] if runs else 'no'} inputs, {'BROKEN' if code else 'fine'}", flush=True)
        if code:
            print(said[-3000:], flush=True)
            broken.append(name)
        elif chosen.keep:
            print(f"{name}: {keep(target)} inputs more are kept", flush=True)
    if broken:
        sys.exit(f"{len(broken)} targets found something: {', '.join(broken)}; see {cache_folder()}")


if __name__ == "__main__":
    main()
