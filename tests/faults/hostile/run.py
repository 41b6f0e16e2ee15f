"""Carries out hostile cases, each in a process of its own, and tells what came of it: one line of JSON for each.

`python -m tests.faults.hostile.run KIND…`: a process loads the program once, makes a small repository, and forks for
every case. So what a case takes is what it adds to a program that has just begun.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from remetal.cli.app import COMMANDS, run_command
from remetal.layout.record import encode_layout
from remetal.repository import slots
from remetal.repository.machines import Head
from remetal.repository.repository import (
    enroll_machine,
    init_repository,
    save_machine_keys,
    unlock_with_kit,
)
from remetal.repository.session import open_session
from remetal.storage.local import LocalStore
from remetal.storage.retry import RetryingStore
from remetal.units import GIB
from tests.faults.hostile.case import VOLUME, Attacker, Case
from tests.faults.hostile.sample import plain_layout
from tests.repositories import CHUNK, PASSPHRASE, batches_of
from tests.sample_layout import images_of

KINDS = ("config", "keys", "history", "ledgers", "records", "packs", "parity", "layouts", "folders", "locks", "web")
MEMORY = 256
"""MiB of resident memory that a case may take, the program itself included."""
ROOM = 4 * GIB
"""Address space that a case may take more than it has: far beyond what is allowed, and little enough for a host."""
PATIENCE = 60
"""Seconds after which a case is killed."""
_FAULT = re.compile("Traceback|an error in remetal itself")


def read_cases(kind: str) -> list[Case]:
    """Return the cases of one kind."""
    cases: list[Case] = importlib.import_module(f"tests.faults.hostile.{kind}").CASES
    assert len({each.name for each in cases}) == len(cases), f"two cases of '{kind}' have one name"
    return cases


def make_attacker(folder: Path) -> Attacker:
    """Make a repository in a folder, with one small snapshot; its passphrase costs next to nothing."""
    slots.MEMORY_KIB = 1 << 10
    store = LocalStore(folder / "repository", str(folder / "repository"))
    repository, kit = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
    keys = enroll_machine(repository, "web")
    save_machine_keys(folder / "state" / "machines" / "web", keys)
    with open_session(repository, keys, workers=1) as session:
        for volume, facts in images_of(plain_layout()).items():
            data = (b"what the machine holds " * 12000)[: 4 * CHUNK] if volume == VOLUME else b""
            session.write_image(volume, facts.size, batches_of(data), previous=None)
        snapshot = session.commit(layout=encode_layout(plain_layout()), hostname="web.example", tags=("daily",))
    keys.remember(Head(sequence=snapshot.sequence, id=snapshot.id))
    (folder / "repository" / ".tmp" / "reserve").unlink(missing_ok=True)
    return Attacker(folder, keys, unlock_with_kit(repository, kit.text()), snapshot)


def run_case(case: Case, attacker: Attacker) -> dict[str, Any]:
    """Carry out a case in a child, and return what it took and all that was wrong with how it ended."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=attacker.folder))
    try:
        for part in ("repository", "state"):
            shutil.copytree(attacker.folder / part, folder / part)
        (folder / "work").mkdir()
        (folder / "passphrase").write_text(PASSPHRASE + "\n")
        own = Attacker(folder, attacker.keys, attacker.key, attacker.snapshot)
        case.make(own)
        outside = list_outside(folder)
        with case.around(own) if case.around is not None else nullcontext(str(own.repository)) as location:
            told = [run_words(case, words, folder, location) for words in case.words]
        problems = [problem for each in told for problem in each["problems"]]
        if list_outside(folder) != outside:
            problems.append(f"something was written: {sorted(list_outside(folder) ^ outside)}")
        if case.refused and not any(each["code"] for each in told):
            problems.append("nobody refused it")
        slow = max(each["cpu"] for each in told)
        large = max(each["rss"] for each in told)
        if slow > case.seconds or large > MEMORY:
            problems.append(f"it took {slow:.1f} s and {large} MiB")
        problems += [f"{path} was written" for path in ("/tmp/remetal-pwned", "/pwned") if Path(path).exists()]
        return {
            "case": f"{case.kind}: {case.name}",
            "problems": problems,
            "codes": [each["code"] for each in told],
            "cpu": slow,
            "wall": max(each["wall"] for each in told),
            "rss": large,
        }
    finally:
        shutil.rmtree(folder)


def list_outside(folder: Path) -> set[str]:
    """Return what there is beside the repository."""
    found = {path.relative_to(folder).as_posix() for path in folder.iterdir()}
    return found | {f"work/{path.name}" for path in (folder / "work").iterdir()} - {"work/out", "work/err"}


def run_words(case: Case, words: tuple[str, ...], folder: Path, location: str) -> dict[str, Any]:
    """Run one command line in a child process; times in seconds, memory in MiB."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os._exit(become_program(case, words, folder, location))
        finally:
            os._exit(99)
    signal.alarm(PATIENCE)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    _, status, usage = os.wait4(child, 0)
    signal.alarm(0)
    wall = time.monotonic() - began
    code = os.waitstatus_to_exitcode(status)
    out, err = ((folder / "work" / name).read_bytes() for name in ("out", "err"))
    problems = [f"{' '.join(words)}: {each}" for each in find_problems(case, code, out, err)]
    cpu = usage.ru_utime + usage.ru_stime
    return {"code": code, "cpu": cpu, "wall": wall, "rss": usage.ru_maxrss >> 10, "problems": problems}


def become_program(case: Case, words: tuple[str, ...], folder: Path, location: str) -> int:
    """Turn this process into the program in a folder where it should leave nothing, and return its exit code."""
    os.chdir(folder / "work")
    os.environ |= {
        "REMETAL_REPO": location,
        "REMETAL_STATE": str(folder / "state"),
        "REMETAL_PASSPHRASE_FILE": str(folder / "passphrase"),
        **case.environment,
    }
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    code = run_command(words)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def find_problems(case: Case, code: int, out: bytes, err: bytes) -> Iterator[str]:
    """Yield what is wrong with how a command ended."""
    if code not in case.ends:
        yield f"ended with {code}, not with one of {sorted(case.ends)}: {err[:400]!r}"
    for each in (out, err):
        text = each.decode("utf-8", "backslashreplace")
        bad = {letter for letter in text if not letter.isprintable() and letter != "\n"}
        if bad:
            yield f"printed {sorted(bad)[:8]}"
        if _FAULT.search(text):
            yield f"told of an error of its own: {text[-400:]!r}"
    if (
        code
        and not re.search(rb"^remetal: [^\n]+", err, re.MULTILINE)
        and not re.search(rb"(damaged|lost):", out + err)
    ):
        yield f"said nothing that helps: {err[:200]!r}"


def load_program() -> None:
    """Load everything that the commands load when they begin. Nobody waits before something is tried again."""
    defaults = RetryingStore.__init__.__kwdefaults__
    assert defaults is not None
    assert "sleep" in defaults
    defaults["sleep"] = lambda seconds: None
    for target, _ in COMMANDS.values():
        importlib.import_module(target.partition(":")[0])
    for name in ("rich.console", "rich.table", "rich.progress", "cyclopts", "remetal.storage.http"):
        importlib.import_module(name)


def main() -> None:
    """Run all cases of some kinds, or every N-th of them (`1/N`)."""
    words = [word for word in sys.argv[1:] if word.startswith("1/")]
    stride = int(words[0][2:]) if words else 1
    wanted = [word for word in sys.argv[1:] if not word.startswith("1/")]
    load_program()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        attacker = make_attacker(Path(name))
        for kind in wanted or KINDS:
            for number, case in enumerate(read_cases(kind)):
                if number % stride == 0:
                    print(json.dumps(run_case(case, attacker)), flush=True)


if __name__ == "__main__":
    main()
