"""What a hostile case is, and the attacker's tools: a repository on a disk, and the keys that he has stolen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from remetal.repository.cipher import SIV_SIZE, digest, seal_record
from remetal.repository.history import LEDGER, SNAPSHOT, encode_clear, entry_name, sign_entry
from remetal.repository.machines import MachineKeys
from remetal.repository.maps import map_folder
from remetal.repository.recipients import RecipientKey
from remetal.repository.records import record_prefix
from remetal.repository.snapshots import Snapshot
from tests.faults.hostile.sample import MAPS

SHELL = "$(touch pwned)"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
"""Sets a terminal's title, empties its screen, and colours what follows, by a C1 control."""

NAMES = (
    SHELL,
    "`touch pwned`",
    "a;touch pwned",
    "a|touch pwned&",
    "../../pwned",
    "/tmp/remetal-pwned",
    "..",
    "-rf",
    "--exec=touch pwned",
    "a\0b",
    "two\nlines",
    ESCAPES,
    "[/red][bold",
    "\u202egnp.exe",
    "%s%n{0}",
    "x" * 100_000,
    "",
)
NUMBERS = (-1, 0, 1, 511, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 512, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400)

VOLUME = "sda:1"
"""The one volume that is not all holes."""
READ = ("check", "--read-data")
PLAN = ("plan", "latest", *MAPS)
SHOW = ("show", "latest")
ALL = (("snapshots",), (*SHOW, "--json"), PLAN, ("check",))
"""The command lines that a case is read with, unless it says others."""


@dataclass
class Attacker:
    """A repository of his own to spoil, in `folder`/repository, with a machine's keys, and a recipient's.

    The recipient's key stands for the one case that it was stolen, too: without it nobody signs a ledger.
    """

    folder: Path
    keys: MachineKeys
    key: RecipientKey
    snapshot: Snapshot

    @property
    def repository(self) -> Path:
        """Where the repository lies."""
        return self.folder / "repository"

    def put(self, name: str, data: bytes) -> None:
        """Write any bytes under any name."""
        path = self.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def get(self, name: str) -> bytes:
        """Return an object's bytes."""
        return (self.repository / name).read_bytes()

    def names(self, prefix: str) -> list[str]:
        """Return the names of the objects under a prefix, in their order."""
        paths = (path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file())
        return sorted(name for name in paths if name.startswith(prefix))

    def put_named(self, prefix: str, data: bytes) -> str:
        """Write an object under the hash of its bytes, and return its name."""
        name = f"{prefix}{digest(data).hex()}"
        self.put(name, data)
        return name

    def put_record(self, kind: str, folder: str, body: bytes) -> str:
        """Seal a body as an index object or a page of a map, and return its name."""
        domain = self.keys.domain
        prefix = record_prefix(kind, self.keys.repository_id, domain.machine_id, 0)
        return self.put_named(folder, prefix + seal_record(domain.record_key(kind), prefix, body))

    def put_page(self, body: bytes) -> bytes:
        """Seal a page of a map, and return the hash that names it."""
        return bytes.fromhex(self.put_record("map", map_folder(self.keys.machine_id), body)[-64:])

    def put_snapshot(self, packed: bytes, sequence: int = 2, **clear: Any) -> None:
        """Sign what is to be a snapshot's body, compressed or not, as the machine itself does."""
        domain = self.keys.domain
        values: dict[str, Any] = {"previous": self.snapshot.id, "ledger": 0, "size": len(packed) + SIV_SIZE} | clear
        head = encode_clear(SNAPSHOT, self.keys.repository_id, domain.machine_id, sequence, **values)
        sealed = seal_record(domain.record_key(SNAPSHOT), head, packed)
        name = entry_name(domain.machine_id, sequence)
        self.put(name, sign_entry(SNAPSHOT, self.keys.stored.signing_seed, head, sealed))

    def put_ledger(self, packed: bytes, sequence: int = 2, **clear: Any) -> None:
        """Sign what is to be a ledger's body, as a recipient does."""
        values: dict[str, Any] = {"previous": self.snapshot.id, "ledger": 0, "size": len(packed), "signer": self.key.id}
        values |= clear
        head = encode_clear(LEDGER, self.keys.repository_id, self.keys.machine_id, sequence, **values)
        name = entry_name(self.keys.machine_id, sequence)
        self.put(name, sign_entry(LEDGER, self.key.signing_seed, head, packed))

    def body(self, **changes: Any) -> dict[str, Any]:
        """Return a snapshot's body as plain values, with some of them changed."""
        return plain_body(self.snapshot) | changes

    def commit(self, **changes: Any) -> None:
        """Sign a snapshot that differs from the good one in these fields."""
        self.put_snapshot(squeeze(msgspec.msgpack.encode(self.body(**changes))))


def plain_body(found: Snapshot) -> dict[str, Any]:
    """Return a snapshot's body as plain values."""
    return {
        "time": found.time,
        "hostname": found.hostname,
        "tags": list(found.tags),
        "version": found.version,
        "layout": found.layout,
        "images": [msgspec.to_builtins(each, builtin_types=(bytes,)) for each in found.images],
    }


Lazy = bytes | Callable[[], bytes]
"""Bytes, or what makes them: what is huge is made when it is needed, and not kept."""


def made(data: Lazy) -> bytes:
    """Return the bytes."""
    return data if isinstance(data, bytes) else data()


def squeeze(data: bytes) -> bytes:
    """Return a Zstandard frame as the product writes it."""
    return zstandard.ZstdCompressor(level=3).compress(data)


@dataclass(frozen=True)
class Case:
    """One hostile thing: how it is made, the command lines that meet it, and how each may end.

    `ends` are the exit codes that are right: 5 it is damage, 3 it is refused, 0 this command does not meet it.
    """

    kind: str
    name: str
    make: Callable[[Attacker], None]
    words: tuple[tuple[str, ...], ...] = ALL
    ends: frozenset[int] = frozenset({5})
    refused: bool = True
    """Whether one of the command lines at least has to refuse it; else it is harmless as it is."""
    seconds: float = 2.0
    """How long it may take: more only where what it meets is as costly in a good repository."""
    environment: Mapping[str, str] = field(default_factory=dict)
    around: Callable[[Attacker], AbstractContextManager[str]] | None = None
    """What runs meanwhile, and says where the repository is then; None for the folder that it is."""
