"""Partition tables, made by sfdisk and checked by sgdisk and sfdisk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.stacks.machine import LabFailedError, Machine
from lab.stacks.model import Facts, Layer, Space


@dataclass(frozen=True)
class Table(Layer):
    """A partition table on a disk, an array or a volume; `script` is sfdisk's input, after its first line."""

    on: Space
    script: str
    label: str = "gpt"

    def build(self, machine: Machine) -> None:
        machine.run(
            "sfdisk", "--quiet", "--wipe=always", machine.path(self.on), text=f"label: {self.label}\n{self.script}"
        )
        self.open(machine)

    def open(self, machine: Machine) -> None:
        machine.settle()  # a disk that udev is looking at is busy
        if machine.is_mapped(self.on):
            sector = machine.run("blockdev", "--getss", machine.path(self.on)).strip()
            argv = ["losetup", "--find", "--show", "--partscan", "--sector-size", sector]
            machine.loops[self.on] = Path(machine.run(*argv, machine.path(self.on)).strip())
        else:
            machine.run("blockdev", "--rereadpt", machine.path(self.on))
        machine.settle()

    def check(self, machine: Machine) -> Iterator[str]:
        device = machine.path(self.on)
        if self.label == "gpt":
            said = machine.run("sgdisk", "--verify", device)
            if "No problems found" not in said:
                raise LabFailedError(f"sgdisk --verify {device}:\n{said}")
            yield "sgdisk --verify"
        said = machine.run("sfdisk", "--verify", device)
        if "No errors detected" not in said:
            raise LabFailedError(f"sfdisk --verify {device}:\n{said}")
        yield "sfdisk --verify"

    def describe(self, machine: Machine) -> Facts:
        device = machine.path(self.on)
        table = json.loads(machine.run("sfdisk", "--json", device))["partitiontable"]
        kept, exact = {f"{self.on} table": f"{table['label']} {table['id']}"}, {}
        for entry in table["partitions"]:
            number = entry["node"].removeprefix(str(device)).lstrip("p")
            place = f"{self.on}:{number}"
            words = ("type", "uuid", "name", "attrs", "bootable")
            kept[f"{place} entry"] = " ".join(f"{word}={entry[word]}" for word in words if word in entry)
            exact[f"{place} place"] = f"{entry['start']}+{entry['size']}"
        return Facts(kept, exact)

    def close(self, machine: Machine) -> None:
        if self.on in machine.loops:
            machine.run("losetup", "--detach", machine.loops.pop(self.on))
