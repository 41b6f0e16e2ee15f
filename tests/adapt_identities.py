"""A captured server and where it stands now, as the planners of configuration files are told it.

sda: ESP, /boot, LUKS with the group vg0 in it, plain swap, an area that is encrypted anew at every boot, a member of
the array md/0, a physical volume of its own. All of it was restored onto an NVMe disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from remetal.adapt.evidence import find_nodes
from remetal.adapt.fstab import find_root, parse_fstab
from remetal.adapt.identities import Known, plan_identities
from remetal.adapt.identity import Gone, Identities, Named, Place
from remetal.adapt.restored import Restored
from remetal.layout.model import Layout, SpaceId

ESP = "1234-ABCD"
BOOT = "0b7c9a10-58a8-4d07-8f2e-7a6b5c4d3e2f"
LUKS = "b1f0e2d3-c4b5-4a69-8778-695a4b3c2d1e"
ROOT = "6f9c3a52-6d3f-4f0a-9a35-1d2c3b4a5e6f"
SWAP = "9d8c7b6a-5948-4736-a5b4-c3d2e1f00112"
DATA = "5c1c2d3e-4f50-4162-8374-95a6b7c8d9e0"
NEW = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
ARRAY = "3aaa0122:29827cfa:5331ad66:ca767371"
NEW_ARRAY = "01234567:89abcdef:01234567:89abcdef"
PV = "h2z7vi-JquF-LugN-Ik1N-tLF4-bBGw-IdVeYJ"
PV2 = "Qv5oBc-1a2b-3C4d-5E6f-7g8H-9i0J-KlMnOp"
VG = "aBcDeF-0123-4567-89ab-cDeF-0123-456789"
LV = "zYxWvU-0123-4567-89ab-cDeF-0123-456789"
PART = "c0ffee00-0001-4000-8000-00000000000"
WWID = "eui.0025385b71b00a2f"

SERIAL_NODE = "/dev/disk/by-id/ata-Samsung_SSD_860_S3Z9NX0M123456"


def on_sda(number: int) -> dict[str, object]:
    """Return what everything on a partition of sda has in common: names, PARTUUID, and where it stands now."""
    return {
        "space": f"sda:{number}",
        "partuuid": f"{PART}{number}",
        "names": (f"/dev/sda{number}", f"{SERIAL_NODE}-part{number}"),
        "place": Place(devices=(f"/dev/nvme0n1p{number}",), wwid=WWID, serial="S64DNX0T", part=number),
        "moved": True,
    }


def make(kind: str, number: int, uuid: str = "", **more: object) -> Named:
    """Return what stands on a partition of sda; its best name is its UUID, or else the partition's."""
    best = f"UUID={uuid}" if uuid else f"PARTUUID={PART}{number}"
    fields: dict[str, object] = {**on_sda(number), "kind": kind, "uuid": uuid, "lasting": (best,), **more}
    return Named(**fields)  # type: ignore[arg-type]


def lv(name: str, kind: str, uuid: str, **more: object) -> Named:
    """Return a logical volume of vg0, or what stands on it."""
    nodes = (f"/dev/mapper/vg0-{name}", f"/dev/vg0/{name}")
    best = () if kind == "lv" else (f"UUID={uuid}",)
    fields: dict[str, object] = {"space": f"vg0/{name}", "kind": kind, "uuid": uuid, "names": nodes}
    return Named(**{**fields, "lasting": (*best, *nodes), **more})  # type: ignore[arg-type]


MD_NODES = ("/dev/md0", "/dev/md/0")

SERVER = Identities(
    (
        make("filesystem", 1, ESP),
        make("filesystem", 2, BOOT, label="boot"),
        make("luks", 3, LUKS),
        *(make("partition", number) for number in range(1, 7)),
        make("swap", 4, SWAP),
        make("member", 6, ARRAY, lasting=(f"PARTUUID={PART}6",)),
        Named(
            space="md/0", kind="md", uuid=ARRAY, label="host:0", names=MD_NODES, lasting=("/dev/md/0",)
        ),
        Named(space="md/0", kind="filesystem", uuid=DATA, names=MD_NODES, lasting=(f"UUID={DATA}", "/dev/md/0")),
        Named(
            space="sda:3:luks", kind="pv", uuid=PV, names=("/dev/mapper/cryptlvm",), lasting=("/dev/mapper/cryptlvm",)
        ),
        make("pv", 7, PV2, lasting=()),
        Named(space="vg0", kind="vg", uuid=VG, names=("/dev/vg0",), lasting=("/dev/vg0",)),
        lv("root", "lv", LV),
        lv("root", "filesystem", ROOT, label="root"),
        lv("swap", "lv", "x" + LV[1:]),
    )
)  # fmt: skip


def with_new(identities: Identities, kind: str, old: str, new: str) -> Identities:
    """Return the identities with another UUID for one of them."""
    found = [each for each in identities.volumes if (each.kind, each.uuid) == (kind, old)]
    assert found

    def renewed(each: Named) -> Named:
        lasting = tuple(name.replace(f"UUID={old}", f"UUID={new}") for name in each.lasting)
        return replace(each, new_uuid=new, lasting=lasting) if each in found else each

    return replace(identities, volumes=tuple(renewed(each) for each in identities.volumes))


DISSOLVED = Gone(
    space="md/0",
    kind="md",
    why="the array was dissolved; its content stands on sda:6",
    uuid=ARRAY,
    label="host:0",
    names=MD_NODES,
)
OPENED = Gone(space="sda:3", kind="luks", why="the encryption was taken off", uuid=LUKS, names=("/dev/sda3",))


def without_array() -> Identities:
    """Return the server after its array was dissolved: the file system is on the partition that was a member."""
    kept = [each for each in SERVER.volumes if each.kind not in {"md", "member"} and each.uuid != DATA]
    data = make("filesystem", 6, DATA, space="md/0", names=MD_NODES)
    return Identities((*kept, data), (DISSOLVED,))


def without_luks() -> Identities:
    """Return the server after its encryption was taken off: the volume group is on the partition."""
    pv = make("pv", 3, PV, space="sda:3:luks", names=(), lasting=())
    kept = [each for each in SERVER.volumes if each.kind not in {"luks", "pv"}]
    return Identities((*kept, pv), (OPENED,))


def identify(
    source: Layout,
    result: Layout | None = None,
    *,
    root: SpaceId,
    fstab: str = "",
    mdadm_conf: str = "",
    moved: Mapping[SpaceId, SpaceId] | None = None,
    known: Known | None = None,
) -> Identities:
    """Return who is who on a layout for the system whose root stood on a captured space, with these files."""
    entry = find_root(parse_fstab(fstab))
    nodes = find_nodes(source, root, entry.spec if entry is not None else "", [fstab], mdadm_conf)
    restored = Restored(source=source, result=result or source, devices={}, moved=moved or {})
    return plan_identities(restored, nodes, known or Known())
