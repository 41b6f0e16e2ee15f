"""LUKS containers, by cryptsetup: every key slot is tried, and the whole header is held against what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from lab.stacks.machine import LabFailedError, Machine, mapping_name
from lab.stacks.model import Facts, Layer, Space

_CHEAP = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
_ARGON = ("--pbkdf=argon2id", "--pbkdf-memory=32768", "--pbkdf-parallel=1", "--pbkdf-force-iterations=4")


@dataclass(frozen=True)
class Luks(Layer):
    """A container: `slots` gives the secret's name by slot, `tokens` the JSON text by number (LUKS2 only)."""

    on: Space
    version: int = 2
    slots: Mapping[int, str] = field(default_factory=lambda: {0: "first"})
    tokens: Mapping[int, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    argon: bool = False

    @property
    def _space(self) -> Space:
        return f"{self.on}:luks"

    def build(self, machine: Machine) -> None:
        device, derive = machine.path(self.on), _ARGON if self.argon else _CHEAP[self.version == 1 :]
        derive = derive if self.version == 2 else ("--pbkdf-force-iterations=1000",)
        (slot, first), *rest = self.slots.items()
        words = ["cryptsetup", "luksFormat", "--batch-mode", f"--type=luks{self.version}", f"--key-slot={slot}"]
        machine.run(*words, *derive, *self.options, f"--key-file={machine.secret(first)}", device)
        for slot, name in rest:
            argv = ["cryptsetup", "luksAddKey", "--batch-mode", f"--key-slot={slot}", *derive]
            machine.run(*argv, f"--key-file={machine.secret(first)}", device, machine.secret(name))
        for number, text in self.tokens.items():
            machine.run("cryptsetup", "token", "import", f"--token-id={number}", device, text=text)
        self._open(machine, first)

    def open(self, machine: Machine) -> None:
        for slot, name in self.slots.items():
            argv = ["cryptsetup", "open", "--test-passphrase", f"--key-slot={slot}"]
            machine.run(*argv, f"--key-file={machine.secret(name)}", machine.path(self.on))
        self._open(machine, list(self.slots.values())[-1])

    def _open(self, machine: Machine, name: str) -> None:
        argv = ["cryptsetup", "open", f"--key-file={machine.secret(name)}"]
        machine.run(*argv, machine.path(self.on), mapping_name(self._space))
        machine.settle()
        machine.wait_for(machine.path(self._space))

    def check(self, machine: Machine) -> Iterator[str]:
        machine.run("cryptsetup", "luksDump", machine.path(self.on))
        yield "cryptsetup luksDump"
        yield f"cryptsetup open, {len(self.slots)} slot{'' if len(self.slots) == 1 else 's'}"

    def describe(self, machine: Machine) -> Facts:
        device = machine.path(self.on)
        dump = machine.run("cryptsetup", "luksDump", device).split("\n", 1)[1]
        secret = machine.secret(next(iter(self.slots.values())))
        argv = ("cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", f"--key-file={secret}")
        _, mark, key = machine.run(*argv, device).partition("MK dump:")
        if not mark:
            raise LabFailedError(f"cryptsetup does not show the volume key of {device}")
        kept = {f"{self.on} header": dump, f"{self.on} volume key": sha256(key.encode()).hexdigest()}
        for number in self.tokens:
            kept[f"{self.on} token {number}"] = machine.run(
                "cryptsetup", "token", "export", f"--token-id={number}", device
            )
        size = int(machine.run("blockdev", "--getsize64", machine.path(self._space)))
        return Facts(kept, {f"{self._space} size": str(size)})

    def close(self, machine: Machine) -> None:
        machine.run("cryptsetup", "close", mapping_name(self._space))
        machine.settle()
