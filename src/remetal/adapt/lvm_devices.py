"""The restored system's LVM devices file: LVM uses only the devices that it lists, by what their hardware says. Pure.

An entry whose disk is another one now gets what lvmdevices would write for the new one; its PVID stays, since the
physical volume is the same. Which kinds of identity LVM takes from where differs between its versions, so only what
all of them read alike is written: `sys_wwid`, `sys_serial`, else `devname`, whose entries LVM itself corrects by PVID.

The file may carry a checksum of its lines. Where it was right before, it is right again; where somebody had edited
the file by hand, LVM shall go on to notice. Source: lvmdevices(8).
"""

from __future__ import annotations

import re
import zlib

from remetal.adapt.identity import Gone, Identities, Named, Place, find_uuid, plan_uuid
from remetal.adapt.text import Edit, TextPlan, line_starts, plan_edits

SYSTEM_DEVICES = "/etc/lvm/devices/system.devices"

_FIELD = re.compile(r"\b(IDTYPE|IDNAME|DEVNAME|PVID|PART)=([^ \n]*)")
_HASH = re.compile(r"^# HASH=([0-9]{1,10})\b", re.MULTILINE)
_UUID_OF = {"md_uuid": "md", "crypt_uuid": "luks"}
_HARDWARE = {"sys_wwid", "sys_serial", "devname", "loop_file", "mpath_uuid"}
_HARDWARE_PREFIXES = ("wwid_", "nvme_")
_CRYPT_ID = re.compile(r"(CRYPT-LUKS\d-)([0-9a-f]{32})(-.*)")
_FIRST_CRC = 0xF597A6CF


def plan_lvm_devices(text: str, identities: Identities, path: str = SYSTEM_DEVICES) -> TextPlan:
    """Check every entry against where its physical volume stands now and return the file that lists it there."""
    edits: list[Edit] = []
    notes: list[str] = []
    lines = text.split("\n")
    for start, line in zip(line_starts(lines), lines, strict=True):
        fields = {} if line.startswith("#") else {match[1]: match[2] for match in _FIELD.finditer(line)}
        volume = find_uuid(fields["PVID"], identities, ("pv",)) if "PVID" in fields else None
        if isinstance(volume, Gone):
            notes.append(f"system.devices: {fields['PVID']}: {volume.why}; run lvmdevices --delpvid {fields['PVID']}")
        elif volume is not None and "IDTYPE" in fields:
            wanted = _plan_entry(fields, volume, identities)
            if wanted is None:
                notes.append(_unknown_note(fields["PVID"]))
            elif any(fields.get(name, "") != value for name, value in wanted.items()):
                new = " ".join(f"{name}={value}" for name, value in wanted.items() if value)
                what = f"the physical volume {fields['PVID']} is listed as {new.partition(' PVID=')[0]}"
                edits.append(Edit(start, start + len(line), _replace_fields(line, wanted), what))
    done = plan_edits(path, text, edits, notes)
    return plan_edits(path, text, [*edits, *_plan_hash(text, done.text)], notes)


def hash_entries(text: str) -> int:
    """Return the checksum of a devices file: LVM's own 32 bits over all lines that are no comment."""
    lines = [line for line in re.split(r"(?<=\n)", text) if not line.startswith(("#", "SYSTEMID"))]
    data = "".join(lines).encode("utf-8", "surrogateescape")
    return ~zlib.crc32(data, ~_FIRST_CRC & 0xFFFFFFFF) & 0xFFFFFFFF


def choose_device_id(place: Place) -> tuple[str, str]:
    """Return IDTYPE and IDNAME for a device, in the form that every version of LVM reads.

    Older ones do not look at the names that QEMU gives its disks, so such a disk is listed by its device node.
    """
    if place.wwid and "QEMU" not in place.wwid:
        return "sys_wwid", _plain(place.wwid)
    if place.serial and not place.wwid:
        return "sys_serial", _plain(place.serial)
    return "devname", place.devices[0] if place.devices else "."


def _plan_entry(fields: dict[str, str], volume: Named, identities: Identities) -> dict[str, str] | None:
    """Return the fields that an entry must have; None if nobody knows on which hardware the volume will stand."""
    pvid = plan_uuid(fields["PVID"], volume.uuid_now)
    kept = {"IDTYPE": fields["IDTYPE"], "IDNAME": fields.get("IDNAME", ""), "PVID": pvid}
    kind = fields["IDTYPE"]
    moved = volume.moved and (kind in _HARDWARE or kind.startswith(_HARDWARE_PREFIXES))
    if kind in _UUID_OF:
        name = _uuid_name(kind, kept["IDNAME"], identities)
        if name is not None:
            return kept | {"IDNAME": name}
        moved = True
    if not moved:
        return kept
    if volume.place is None:
        return None
    idtype, idname = choose_device_id(volume.place)
    if (kind, kept["IDNAME"], fields.get("PART", "")) == (idtype, idname, _part(volume.place)):
        return kept
    node = volume.place.devices[0] if volume.place.devices else "."
    return {"IDTYPE": idtype, "IDNAME": idname, "DEVNAME": node, "PVID": pvid, "PART": _part(volume.place)}


def _uuid_name(kind: str, name: str, identities: Identities) -> str | None:
    """Return what an entry by an array's or a container's UUID is called now; None if that was dissolved."""
    head, uuid, tail = "", name, ""
    if kind == "crypt_uuid":
        match = _CRYPT_ID.fullmatch(name)
        if match is None:
            return name
        head, uuid, tail = match.groups()
    found = find_uuid(uuid, identities, ("md",) if kind == "md_uuid" else ("luks",))
    if isinstance(found, Gone):
        return None
    return name if found is None else f"{head}{plan_uuid(uuid, found.uuid_now)}{tail}"


def _part(place: Place) -> str:
    return str(place.part) if place.part else ""


def _replace_fields(line: str, wanted: dict[str, str]) -> str:
    """Return a line with these fields; an empty one is taken out, one that is not there is put at the end."""
    for name, value in wanted.items():
        field = re.compile(rf" ?\b{name}=[^ \n]*")
        match = field.search(line)
        if match is None:
            line = f"{line} {name}={value}" if value else line
        elif value:
            at = match.start() + match[0].index("=") + 1
            line = line[:at] + value + line[match.end() :]
        else:
            line = line[: match.start()] + line[match.end() :]
    return line


def _plan_hash(old: str, new: str) -> list[Edit]:
    match = _HASH.search(old)
    if match is None or new == old or int(match[1]) != hash_entries(old):
        return []
    return [Edit(match.start(1), match.end(1), str(hash_entries(new)))]


def _plain(text: str) -> str:
    """Return a hardware's name as it stands in the file: blanks, quotes and control characters are underscores."""
    return "".join("_" if each.isspace() or not each.isprintable() or each == '"' else each for each in text)


def _unknown_note(pvid: str) -> str:
    return (
        f"system.devices: {pvid} is listed by the hardware that it stood on, and nobody knows yet what it will stand "
        f"on. If the system does not find it, run vgchange -ay --devicesfile '' in its emergency shell, and "
        f"vgimportdevices --all once it is up"
    )
