"""The words of remetal's command line that a stack needs: secrets of its containers, disks, options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lab.stacks.containers import Luks
from lab.stacks.machine import Machine
from lab.stacks.model import Stack, Variant


def backup_words(stack: Stack, machine: Machine, names: Mapping[str, str]) -> list[str]:
    """Return the words that open the stack's containers for a backup. `names` are remetal's for the disks."""
    words = list(_opening(stack, machine, names)) if stack.opened != "nobody" else []
    return [*words, *(["--escrow-luks-keys"] if stack.opened == "escrow" else [])]


def restore_words(stack: Stack, variant: Variant, machine: Machine, names: Mapping[str, str]) -> list[str]:
    """Return the words for `remetal plan` and `remetal restore`; `names` are those that the disks had."""
    maps = [word for letter, device in machine.disks.items() for word in ("--map", f"{names[letter]}={device}")]
    opening = _opening(stack, machine, names) if stack.opened in {"passphrase", "key file"} else ()
    return [*maps, *opening, *(_named(word, names) for word in variant.options)]


def _opening(stack: Stack, machine: Machine, names: Mapping[str, str]) -> Iterator[str]:
    """Yield the options that open every container, each by the secret in its last slot."""
    for layer in stack.layers:
        if isinstance(layer, Luks):
            secret = machine.secret(list(layer.slots.values())[-1])
            if stack.opened == "key file":
                yield from ("--luks-key-file", f"{_named(layer.on, names)}={secret}")
            else:
                yield from ("--luks-passphrase-file", str(secret))


def _named(word: str, names: Mapping[str, str]) -> str:
    """Put the disks' names in the place of their letters, where a word is a space or begins with one."""
    return re.sub(r"^([a-z])(?=[:=]|$)", lambda found: names.get(found[1], found[1]), word)
