"""Snapshots of mounted logical volumes: taken by LVM, watched while they are read, and gone at the end.

An ordinary snapshot takes room in its group for what is written to the volume while it is there; when that is full,
the kernel gives the snapshot up. A thin one takes what is written from the volume's pool; when that is full, the volume
itself stops.

Taking one, and removing an ordinary one, suspends the volume for a moment, for which the kernel freezes its file
system. An LVM that were ended within it would leave the volume suspended for ever, so it is not ended by us, nor with
us, nor with what else is in our control groups. While it works other file systems may be frozen, perhaps the root: it
must write nothing but its locks below /run, so it keeps no copies of its metadata, and tells dmeventd, syslog and D-Bus
nothing.

A thin snapshot is never activated by LVM, but mapped as LVM maps its hidden layers: udev makes no links to such, and
those by UUID and label, which it shares with its volume, stay the volume's. An ordinary snapshot has them behind the
volume by LVM's own doing.

Source: lvmthin(7), lvcreate(8); Documentation/admin-guide/device-mapper/snapshot.rst and thin-provisioning.rst; LVM's
lib/activate/dev_manager.c and udev/11-dm-lvm.rules.in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import msgspec

from remetal.errors import RemetalError, UnavailableError
from remetal.events import Note, Report, Warn
from remetal.system.apart import UnbrokenProgram
from remetal.system.locks import process_start
from remetal.system.mapped import find_mapping, find_mappings, mapping_name, mapping_uuid
from remetal.system.run import ProgramFailedError, find_program, run
from remetal.units import format_bytes

PREFIX = "remetal-"
"""How the names and the tags of our snapshots begin."""

FULL = 0.95
"""The part of a thin pool's data or metadata that may be in use: then we make room before its volumes have to wait."""

_CONFIG = (
    "backup { backup = 0 archive = 0 } activation { monitoring = 0 } log { syslog = 0 } global { notify_dbus = 0 }"
)
_FIELDS = "vg_name,vg_uuid,vg_free,vg_extent_size,lv_name,lv_uuid,lv_size,lv_layout,lv_role,lv_tags,pool_lv,thin_id"
_PATIENCE = 60.0
"""Seconds: how long LVM may take while nothing is held still."""
_TAG = re.compile(rf"{PREFIX}(\d+)-(\d+)")
_SHOWN = 24
"""Characters of a volume's name in that of its snapshot."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A thin pool: its device, the part of its data or metadata that is in use, the greater one, and what is wrong."""

    name: str
    device: Path
    usage: float
    trouble: str


@dataclass(frozen=True, slots=True)
class Origin:
    """A logical volume as LVM tells of it; `free` and `extent` are bytes of its group.

    `layout` and `role` are lists of words: see lvs(8), lv_layout and lv_role.
    """

    group: str
    name: str
    size: int
    layout: str
    role: str
    free: int
    extent: int
    pool: Pool | None = None

    def __str__(self) -> str:
        return f"{self.group}/{self.name}"


class SnapshotFailedError(RemetalError):
    """LVM did not take a snapshot; the volume is as it was."""


class LvmSnapshot:
    """A snapshot that `take` takes; whatever becomes of it, `drop` leaves nothing of it."""

    def __init__(self, origin: Origin, room: int) -> None:
        """`room` is how many bytes of its group an ordinary snapshot takes up; a thin one takes none."""
        self.origin = origin
        self.name = f"{PREFIX}{origin.name[:_SHOWN]}-{token_hex(4)}"
        self._room = room
        self._fd = -1
        self._taking: UnbrokenProgram | None = None

    def take(self, patience: float) -> None:
        """Take it: it has the volume's content as it is at some moment until this returns.

        Raises SnapshotFailedError if LVM does not, UnavailableError if it takes more than `patience` seconds.
        """
        kind = ["--activate", "n"] if self.origin.pool else ["--size", f"{self._room}b"]
        words = ["--name", self.name, "--addtag", f"{PREFIX}{os.getpid()}-{process_start(os.getpid())}", *kind]
        self._taking = UnbrokenProgram(
            _command("lvcreate", "--snapshot", "--permission", "r", *words, str(self.origin))
        )
        try:
            taken = self._taking.ends(patience)
        except ProgramFailedError as error:
            raise SnapshotFailedError(f"LVM takes no snapshot of {self.origin}: {error.message}") from error
        if not taken:
            raise UnavailableError(
                f"no LVM snapshot of {self.origin} was taken within {patience:g} seconds",
                hint="Nothing is kept of this backup. Allow more time (--freeze-limit SECONDS), or do without: "
                "--lvm-snapshots none.",
            )

    def open(self) -> Path:
        """Return the device that shows it, which is read-only, and nobody else's to remove until `drop`."""
        name = _mapping(self.origin.group, self.name)
        if self.origin.pool:
            rows = _rows(f"lv_name={self.name}", self.origin.group)
            if not rows:
                raise UnavailableError(
                    f"the LVM snapshot of {self.origin} is not there any more",
                    hint="Nothing is kept of this backup; run it again.",
                )
            uuid = f"{_dm_uuid(rows[0])}-remetal"
            table = f"0 {self.origin.size // 512} thin {self.origin.pool.device} {rows[0]['thin_id']}"
            name = _hidden(self.origin.group, self.name).name
            run(["dmsetup", "create", name, "--readonly", "--uuid", uuid, "--table", table])
        device = Path("/dev/mapper", name).resolve()
        self._fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        return device

    def check(self) -> None:
        """Raise UnavailableError if it does not hold any more what it was taken of, or its pool is nearly full."""
        pool = self.origin.pool
        if pool is None:
            told = run(["dmsetup", "status", _mapping(self.origin.group, self.name)], timeout=_PATIENCE).text
            if not is_whole(told):
                raise UnavailableError(
                    f"the LVM snapshot of {self.origin} is full: more was written to the volume while it was read than "
                    f"the {format_bytes(self._room)} that the snapshot had",
                    hint=f"Nothing is kept of this backup. Leave more free space in the volume group "
                    f"{self.origin.group}, back up when less is written, or do without: --lvm-snapshots none.",
                )
            return
        now = _probe_pool(pool.name, pool.device)
        why = now.trouble or (f"{now.usage:.0%} of it are in use" if now.usage >= FULL else "")
        if why:
            raise UnavailableError(
                f"the thin pool {pool.name} is not fit for reading {self.origin} from a snapshot any more: {why}",
                hint="Nothing is kept of this backup, and the snapshot is removed. Extend the pool (lvextend; "
                "--poolmetadatasize for its metadata), or do without: --lvm-snapshots none.",
            )

    def give_up(self) -> None:
        """Remove a thin one at once, so that its pool has the room; who reads it gets errors from then on.

        An ordinary one that is full was given up by the kernel, and its volume does not suffer from it. Raises
        ProgramFailedError if that does not succeed; then `drop` tries again.
        """
        if self.origin.pool is None:
            return
        hidden = _hidden(self.origin.group, self.name)
        if hidden.exists():
            run(["dmsetup", "wipe_table", "--nolockfs", "--noudevsync", hidden.name], timeout=_PATIENCE)
        _remove(self.origin.group, self.name)

    def drop(self, report: Report) -> None:
        """Remove it, if it is there; what LVM does not let go of is reported, and the next backup removes it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._taking is None:
            return
        name = f"{self.origin.group}/{self.name}"
        if not _is_over(self._taking):
            report(
                Warn(
                    f"LVM is still taking the snapshot {name} of {self.origin}, and is not waited for any longer",
                    hint=f"See what it waits for: ps -C lvm -o pid,stat,wchan:20,args. Once it has ended: lvremove "
                    f"{name}; and if who writes to {self.origin} still waits then: dmsetup resume "
                    f"{_mapping(self.origin.group, self.origin.name)}.",
                )
            )
            return
        self._taking = None
        try:
            _unmap(self.origin.group, self.name)
            if _rows(f"lv_name={self.name}", self.origin.group):
                _remove(self.origin.group, self.name)
        except ProgramFailedError as error:
            report(
                Warn(f"the LVM snapshot {name} was not removed: {error.message}", hint=f"Remove it: lvremove {name}")
            )


def probe_origins(devices: Iterable[Path]) -> dict[Path, Origin]:
    """Return what LVM tells of those devices that are logical volumes. Raises ProgramFailedError if it does not."""
    wanted = {mapping_uuid(device): device for device in devices}
    if not any(uuid.startswith("LVM-") for uuid in wanted) or find_program("lvm") is None:
        return {}
    rows = _rows()
    pools = {(row["vg_name"], row["lv_name"].strip("[]")): row for row in rows}
    return {
        wanted[_dm_uuid(row)]: _origin(row, pools.get((row["vg_name"], row["pool_lv"].strip("[]"))))
        for row in rows
        if _dm_uuid(row) in wanted
    }


def remove_left_behind(report: Report) -> None:
    """Remove the snapshots that backups left which were killed."""
    if find_program("lvm") is None or next(find_mappings("LVM-"), None) is None:
        return
    try:
        rows = _rows(f"lv_name=~^{PREFIX}")
    except ProgramFailedError as error:
        report(
            Warn(
                f"LVM does not tell whether a backup that was killed has left snapshots: {error.message}",
                hint="See whether another LVM is still at work: ps -C lvm -o pid,stat,wchan:20,args.",
            )
        )
        return
    for row in rows:
        owner = _TAG.search(row["lv_tags"])
        if owner is None or process_start(int(owner[1])) in {int(owner[2]), None}:
            continue
        name = f"{row['vg_name']}/{row['lv_name']}"
        report(Note(f"removing the LVM snapshot {name}, which a backup left that was killed"))
        try:
            _unmap(row["vg_name"], row["lv_name"])
            _remove(row["vg_name"], row["lv_name"])
        except ProgramFailedError as error:
            report(Warn(f"it was not removed: {error.message}", hint=f"Remove it: lvremove {name}"))


def is_whole(status: str) -> bool:
    """Whether an ordinary snapshot has all that it should, by what dmsetup(8) tells of its status."""
    return re.fullmatch(r"\d+ \d+ snapshot \d+/\d+ \d+", status.strip()) is not None


def parse_pool(status: str) -> tuple[float, str]:
    """Return the part of a thin pool that is in use, and what is wrong, by what dmsetup(8) tells of its status."""
    words = status.split()
    parts = [tuple(map(int, each.split("/"))) for each in words[4:6] if re.fullmatch(r"\d+/[1-9]\d*", each)]
    if words[2:3] != ["thin-pool"] or len(parts) != 2:
        return 1.0, "it has failed"
    trouble = {"ro": "it is read-only", "out_of_data_space": "it has run out of space"}
    found = next((text for word, text in trouble.items() if word in words), "")
    return max(used / size for used, size in parts), "it needs a check" if "needs_check" in words else found


def _probe_pool(name: str, device: Path) -> Pool:
    told = run(["dmsetup", "status", "--noflush", mapping_name(device)], timeout=_PATIENCE).text
    return Pool(name, device, *parse_pool(told))


def _origin(row: Mapping[str, str], pool: Mapping[str, str] | None) -> Origin:
    device = find_mapping(f"{_dm_uuid(pool)}-tpool") if pool else None
    return Origin(
        group=row["vg_name"],
        name=row["lv_name"],
        size=int(row["lv_size"]),
        layout=row["lv_layout"],
        role=row["lv_role"],
        free=int(row["vg_free"]),
        extent=int(row["vg_extent_size"]),
        pool=_probe_pool(f"{row['vg_name']}/{row['pool_lv']}", device) if device else None,
    )


def _unmap(group: str, name: str) -> None:
    """Remove what shows a thin snapshot, if anything does. Raises ProgramFailedError, also if somebody reads it."""
    hidden = _hidden(group, name)
    if hidden.exists():
        run(["dmsetup", "remove", "--retry", hidden.name])


def _remove(group: str, name: str) -> None:
    """Remove a snapshot that nothing shows any more. Raises ProgramFailedError."""
    command = _command("lvremove", f"{group}/{name}")
    if not UnbrokenProgram(command).ends(_PATIENCE):
        raise ProgramFailedError(command, 0, "", ending=f"does not end within {_PATIENCE:g} s")


def _is_over(taking: UnbrokenProgram) -> bool:
    """Whether LVM has ended, with a snapshot or without."""
    try:
        return taking.ends(_PATIENCE)
    except ProgramFailedError:
        return True


def _rows(select: str = "", group: str = "") -> list[dict[str, str]]:
    """Return what LVM tells of logical volumes, by `_FIELDS`; sizes in bytes.

    Raises ProgramFailedError, also if it does not get to it because another LVM has the group's lock.
    """
    words = ["--all", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", _FIELDS]
    which = [*(["--select", select] if select else []), *filter(None, [group])]
    told = run(["lvm", "lvs", "--config", _CONFIG, *words, *which], timeout=_PATIENCE)
    return msgspec.json.decode(told.stdout, type=_Told).report[0].lv


class _Volumes(msgspec.Struct):
    lv: list[dict[str, str]]


class _Told(msgspec.Struct):
    report: list[_Volumes]


def _command(name: str, *words: str) -> list[str]:
    return ["lvm", name, "--yes", "--quiet", "--config", _CONFIG, *words]


def _mapping(group: str, name: str) -> str:
    """Return how the kernel names the mapping of a volume."""
    return "-".join(part.replace("-", "--") for part in (group, name))


def _hidden(group: str, name: str) -> Path:
    """Return the mapping that shows a thin snapshot."""
    return Path("/dev/mapper", f"{_mapping(group, name)}-remetal")


def _dm_uuid(row: Mapping[str, str]) -> str:
    return "LVM-" + (row["vg_uuid"] + row["lv_uuid"]).replace("-", "")
