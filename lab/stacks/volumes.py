"""LVM: volume groups and logical volumes of every kind, by the tools of lvm2 and thin-provisioning-tools."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lab.stacks.machine import LabFailedError, Machine
from lab.stacks.model import Facts, Layer, Space

_PATIENCE = 60.0


@dataclass(frozen=True)
class Group(Layer):
    """A volume group on its physical volumes; `options` go to vgcreate, `pv_options` to pvcreate."""

    name: str
    members: tuple[Space, ...]
    tags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    pv_options: tuple[str, ...] = ()

    def build(self, machine: Machine) -> None:
        devices = [machine.path(member) for member in self.members]
        machine.run("pvcreate", "--quiet", "--yes", *self.pv_options, *devices)
        machine.run(
            "vgcreate", "--quiet", *(f"--addtag={tag}" for tag in self.tags), *self.options, self.name, *devices
        )

    def open(self, machine: Machine) -> None:
        machine.run("vgs", self.name)

    def check(self, machine: Machine) -> Iterator[str]:
        said = machine.run("vgck", self.name)
        if said.strip():
            raise LabFailedError(f"vgck {self.name}:\n{said}")
        yield "vgck"
        for member in self.members:
            machine.run("pvck", machine.path(member))
        yield "pvck"

    def describe(self, machine: Machine) -> Facts:
        (group,) = _report(machine, "vgs", "vg_uuid,vg_tags,vg_extent_size,vg_missing_pv_count,pv_count", self.name)
        kept = {f"{self.name} {word}": value for word, value in group.items()}
        exact: dict[str, str] = {}
        for member in self.members:
            (volume,) = _report(machine, "pvs", "pv_uuid,pv_tags,vg_name,pv_mda_count", str(machine.path(member)))
            kept |= {f"{member} {word}": value for word, value in volume.items()}
            (place,) = _report(machine, "pvs", "pe_start,pv_size", str(machine.path(member)))
            exact |= {f"{member} {word}": value for word, value in place.items()}
        return Facts(kept, exact)

    def close(self, machine: Machine) -> None:
        machine.run("vgchange", "--quiet", "--activate=n", self.name)
        machine.settle()


@dataclass(frozen=True)
class Logical(Layer):
    """A logical volume; `options` are lvcreate's words that say what kind it is and how large."""

    group: str
    name: str
    options: tuple[str, ...]
    tags: tuple[str, ...] = ()

    @property
    def _volume(self) -> str:
        return f"{self.group}/{self.name}"

    def build(self, machine: Machine) -> None:
        argv = ["lvcreate", "--quiet", "--yes", f"--name={self.name}", *(f"--addtag={tag}" for tag in self.tags)]
        # `--snapshot`, `--thin` and so on name what they stand on; everything else needs the group.
        names_parent = any(option.startswith(f"{self.group}/") for option in self.options)
        machine.run(*argv, *([] if names_parent else [self.group]), *self.options)
        self.open(machine)

    def open(self, machine: Machine) -> None:
        machine.run("lvchange", "--quiet", "--activate=y", "--ignoreactivationskip", self._volume)
        machine.settle()

    def check(self, machine: Machine) -> Iterator[str]:
        kind = self._field(machine, "segtype")
        if kind.startswith("raid") and kind != "raid0":
            self._wait(machine, "sync_percent")
            machine.run("lvchange", "--syncaction=check", self._volume)
            end = time.monotonic() + _PATIENCE
            while self._field(machine, "raid_sync_action") != "idle" and time.monotonic() < end:
                time.sleep(0.1)
            count = self._field(machine, "raid_mismatch_count")
            if count != "0":
                raise LabFailedError(f"{self._volume} has {count} mismatches between its legs")
            yield "lvchange --syncaction=check"
        if kind == "mirror":
            self._wait(machine, "copy_percent")
            yield "lvs copy_percent"
        health = self._field(machine, "lv_health_status")
        if health:
            raise LabFailedError(f"lvs says that {self._volume} is {health}")
        yield "lvs lv_health_status"

    def _wait(self, machine: Machine, word: str) -> None:
        end = time.monotonic() + _PATIENCE
        while self._field(machine, word) != "100.00":
            if time.monotonic() > end:
                raise LabFailedError(f"{self._volume} stays at {word} {self._field(machine, word)}")
            time.sleep(0.1)

    def _field(self, machine: Machine, word: str) -> str:
        row, *_ = _report(machine, "lvs", word, self._volume)
        return row[word]

    def describe(self, machine: Machine) -> Facts:
        words = "lv_uuid,lv_tags,lv_layout,origin,pool_lv,lv_permissions,lv_skip_activation,lv_fixed_minor"
        row, *_ = _report(machine, "lvs", words, self._volume)
        kept = {f"{self._volume} {word}": value for word, value in row.items()}
        segments = _report(
            machine, "lvs", "segtype,stripes,stripe_size,region_size,chunk_size", self._volume, "--segments"
        )
        kept |= {
            f"{self._volume} segment": ", ".join(f"{word} {value}" for word, value in segments[0].items() if value)
        }
        (size,) = _report(machine, "lvs", "lv_size", self._volume)
        return Facts(kept, {f"{self._volume} lv_size": size["lv_size"]})


@dataclass(frozen=True)
class ThinPool(Logical):
    """A thin pool; its metadata are checked before it is activated. `options` are lvcreate's."""

    def check_closed(self, machine: Machine) -> Iterator[str]:
        metadata = f"{self.group}/{self.name}_tmeta"
        machine.run("lvchange", "--quiet", "--yes", "--activate=y", metadata)
        machine.settle()
        try:
            machine.run("thin_check", f"/dev/{metadata}")
        finally:
            machine.run("lvchange", "--quiet", "--activate=n", metadata)
        yield "thin_check"

    def describe(self, machine: Machine) -> Facts:
        facts = super().describe(machine)
        words = "discards,zero,thin_count"
        row, *_ = _report(machine, "lvs", words, self._volume)
        place = self._volume
        kept = {f"{place} {word}": row[word] for word in ("discards", "zero", "thin_count")}
        return Facts({**facts.kept, **kept}, facts.exact)


@dataclass(frozen=True)
class ClassicSnapshot(Layer):
    """A snapshot of the old kind, with a copy-on-write area of `size` MiB: what is captured is its origin."""

    group: str
    name: str
    origin: str
    size: int

    def build(self, machine: Machine) -> None:
        argv = ["lvcreate", "--quiet", "--yes", "--snapshot", f"--name={self.name}", f"--size={self.size}M"]
        machine.run(*argv, f"{self.group}/{self.origin}")
        machine.settle()


def _report(machine: Machine, program: str, fields: str, place: str, *more: str) -> list[dict[str, str]]:
    """Return the rows of one of LVM's reports, sizes in bytes."""
    words = ["--options", fields, "--units=b", "--nosuffix", "--reportformat=json", *more, place]
    (report,) = json.loads(machine.run(program, *words))["report"]
    (rows,) = report.values()
    return [{word: str(value) for word, value in row.items()} for row in rows]
