"""The page with the results: what came back of databases that were at work while their machines were backed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from lab import CHECKOUT
from lab.live import PAIRS, ROUNDS
from lab.live.cases import CASES, FOLDERS
from lab.live.kills import LIMIT, Kills
from lab.live.pause import Held
from lab.live.run import CLIENTS, FREEZE_LIMIT, GENTLE, Seen
from remetal.units import format_bytes

PAGE = CHECKOUT / "docs" / "reference" / "live.md"

_HEAD = f"""# Machines that are backed up while they work

This page is made by `make test-live` from what it has seen. Each machine is a virtual one with Debian's own kernel, on
an emulated processor, so every time is much longer than on a real one. Its database keeps its files, its log and one
table on three volumes, which stand on different things. {CLIENTS} clients outside of the machine commit one transaction
after the other, each in two tables, and write down which were acknowledged; pgbench (or, for MariaDB, who replaces
rows as fast as it can) works beside them. Meanwhile `remetal backup --freeze-limit {FREEZE_LIMIT}` is run on all that
the machine uses: into an empty repository, gently (`{GENTLE}`) into another one, and into the first one again. Then the
machine is switched off, its disks are wiped, the recovery medium restores them by itself, and the machine starts.

In each of the backups every file system has to be read from a snapshot if it lies on LVM-thin, else while the kernel
told what was written to it (tracked). A hook in the last backup, which runs while everything is frozen, waits until it
is written down outside what was acknowledged and sent by then (with LVM-thin one runs right before, and one right
after). What came back has to be every transaction that was acknowledged, none that was not sent yet, and of each client
the first ones without a gap, in both tables; the database's own tool has to find no damage, and systemd no unit that
failed.
"""

_TAIL = """
## Killed, and compared

- {kills.count} backups were killed (SIGKILL) at random moments in one of the two holds, with a limit of
  {limit:.0f} s, each while the file system was frozen. Who wrote there waited for {kills.longest:.1f} s at most after
  that, and for {kills.altogether:.1f} s since it was frozen; none of the backups is listed.
- {backups} backups were made of an ext4 on which {rate} a second were written, at random places and made durable each
  second: it was held for {held:.2f} s in the median, and for {most:.2f} s at most.
- {rounds} backups of each of the pairs {pairs} under random writes were compared with
  copies of the whole disks, made while they were held: no block in use was missed.
- Seven file systems at once, on LVM (in two segments, and striped), LVM-thin, LUKS, RAID 1, RAID 5 and btrfs, came back
  with just the first so many of the writes that went to them in turn, each durable before the next.
"""


def render_page(seen: Sequence[Seen], kills: Kills, held: Held) -> str:
    """Return the page as Markdown, once ROUNDS of each of the PAIRS were compared and nothing was missed."""
    places = (*(f"/{folder} on" for folder in FOLDERS), "read", "in use", "held for", "took", "gently")
    rates = (
        "a second alone",
        "meanwhile",
        "gently",
        "longest wait",
        "acknowledged",
        "came back",
        "sent",
        "checked by",
    )
    parts = [_HEAD, "## Backups\n", *_table(["machine", "database", *places], map(_backup, seen)), ""]
    parts += [
        "## Transactions: how many a second, and how many came back\n",
        *_table(["machine", *rates], map(_transactions, seen)),
    ]
    tail = _TAIL.format(
        kills=kills,
        limit=LIMIT,
        rounds=ROUNDS,
        pairs=", ".join(" and ".join(pair) for pair in PAIRS),
        backups=len(held.pauses),
        rate=format_bytes(int(held.rate)),
        held=median(held.pauses),
        most=max(held.pauses),
    )
    return "\n".join(parts) + "\n" + tail


def _backup(seen: Seen) -> list[str]:
    case = next(each for each in CASES if each.name == seen.case)
    places = [f"{place.kind}, {place.on}" for place in case.places]
    ways = Counter(way for backup in seen.ways for way in backup.values())
    read = ", ".join(f"{count} {way}" for way, count in ways.most_common())
    figures = [format_bytes(seen.used), f"{seen.pause:.1f} s", f"{seen.seconds:.0f} s", f"{seen.gentle_seconds:.0f} s"]
    return [seen.case, f"{case.database}, Debian {case.suite}", *places, read, *figures]


def _transactions(seen: Seen) -> list[str]:
    rates = [f"{seen.alone:.1f}", f"{seen.during:.1f}", f"{seen.gently:.1f}", f"{seen.waited:.1f} s"]
    return [seen.case, *rates, str(seen.least), str(seen.found), str(seen.most), seen.checked_by]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
