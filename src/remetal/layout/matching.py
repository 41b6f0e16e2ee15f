"""Which disk of this machine is which disk of a snapshot: by identity, never by the kernel's name alone."""

from __future__ import annotations

from collections.abc import Sequence

from remetal.errors import RefusedError
from remetal.layout.model import Disk
from remetal.layout.plan import Target
from remetal.units import format_bytes


def match_targets(disks: Sequence[Disk], candidates: Sequence[Target]) -> dict[str, Target]:
    """Propose a target for every disk, by source name.

    By world-wide name, then by serial number; one disk that is left goes to the only candidate that is blank,
    free and large enough. Raises RefusedError, which lists the candidates with reasons, where that is not clear.
    """
    found: dict[str, Target] = {}
    for disk in disks:
        for kind in ("wwn", "serial"):
            target = _find_same(disk, kind, disks, candidates)
            if target is not None and target not in found.values():
                found[disk.name] = target
                break
    left = [disk for disk in disks if disk.name not in found]
    rest = [target for target in candidates if target not in found.values()]
    if not left:
        return found
    fitting = [target for target in rest if not _reason_against(left[0], target)]
    if len(left) == 1 and len(fitting) == 1:
        return {**found, left[0].name: fitting[0]}
    names = " and ".join(disk.name for disk in left)
    raise RefusedError(
        f"it is not clear onto which disk {names} should go: {_listing(left, rest)}",
        hint=" ".join(f"Say it with --map {disk.name}=TARGET." for disk in left),
    )


def _find_same(disk: Disk, kind: str, disks: Sequence[Disk], candidates: Sequence[Target]) -> Target | None:
    """Return the one candidate with the same identity; None if there is none, or if it is not unique."""
    identity = getattr(disk, kind)
    if not identity or sum(getattr(each, kind) == identity for each in disks) > 1:
        return None
    same = [target for target in candidates if getattr(target, kind) == identity]
    return same[0] if len(same) == 1 else None


def _listing(left: Sequence[Disk], rest: Sequence[Target]) -> str:
    if not rest:
        return "there is no other disk"
    words = []
    for target in rest:
        reasons = {_reason_against(disk, target) for disk in left}
        why = "could take it" if "" in reasons else " and ".join(sorted(reasons))
        words.append(f"{target.path} ({format_bytes(target.size)}) {why}")
    return "; ".join(words)


def _reason_against(disk: Disk, target: Target) -> str:
    """Return why a candidate is not taken unasked, or an empty text."""
    if target.uses:
        return f"cannot be taken ({target.uses[0]})"
    if target.roles:
        return target.roles[0]
    if target.content:
        return f"holds {target.content}"
    if target.size < disk.size:
        return f"is smaller than {disk.name}, which has {format_bytes(disk.size)}"
    if not target.is_file and target.logical_sector != disk.logical_sector:
        return f"has sectors of {target.logical_sector} bytes"
    return ""
