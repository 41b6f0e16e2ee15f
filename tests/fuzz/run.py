"""Fuzzes parsers with atheris, one after the other: `python -m tests.fuzz.run [--seconds N] [TARGET…]`.

Inputs that reach something new are kept under `$REMETAL_CACHE/fuzz/` (else `.cache/fuzz/`). What breaks a parser is
written there, too, and belongs, once it is understood, into `corpus/TARGET/`, where every test run meets it again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
_LONGEST_INPUT = 1 << 16


def cache_folder() -> Path:
    """Return where inputs are kept."""
    return Path(os.environ.get("REMETAL_CACHE") or Path(__file__).parents[2] / ".cache") / "fuzz"


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target; the process ends with another code than 0 when something is found."""
    import atheris

    with atheris.instrument_imports(include=["remetal"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    folder = cache_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)

    def meet(data: bytes) -> None:
        try:
            target.meet(data)
        except Exception:
            (cache_folder() / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    known = [str(path) for path in [CORPUS / name] if path.is_dir()]
    limits = [f"-max_total_time={seconds}", f"-max_len={_LONGEST_INPUT}", "-timeout=10", "-rss_limit_mb=1024"]
    found = f"-artifact_prefix={cache_folder()}/{name}-"
    words = [*limits, found, "-verbosity=0", "-print_final_stats=1", str(folder), *known]
    atheris.Setup([sys.argv[0], *words], meet)
    atheris.Fuzz()


def main() -> None:
    """Fuzz the targets that are named, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--here", action="store_true", help="fuzz one target in this very process")
    chosen = parser.parse_args()
    if chosen.here:
        fuzz(chosen.targets[0], chosen.seconds)
        return
    from tests.fuzz.targets import TARGETS

    broken = []
    for name in chosen.targets or list(TARGETS):
        argv = [sys.executable, "-m", "tests.fuzz.run", "--here", "--seconds", str(chosen.seconds), name]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        said = done.stderr + done.stdout
        runs = [line.split()[-1] for line in said.splitlines() if "number_of_executed_units" in line]
        print(f"{name}: {runs[0] if runs else 'no'} inputs, {'fine' if done.returncode == 0 else 'BROKEN'}", flush=True)
        if done.returncode:
            print(said[-3000:], flush=True)
            broken.append(name)
    if broken:
        sys.exit(f"{len(broken)} targets found something: {', '.join(broken)}; see {cache_folder()}")


if __name__ == "__main__":
    main()
