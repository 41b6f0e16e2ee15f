"""Targets: files of a restored system, firmware variables, answers of whoever recovers, and pages of web servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from remetal.adapt.cmdline import parse_cmdline, plan_cmdline
from remetal.adapt.efi import parse_csv_label
from remetal.adapt.evidence import parse_node
from remetal.adapt.fstab import find_root, parse_fstab
from remetal.adapt.grub_cfg import find_device_uuids
from remetal.adapt.grub_images import CoreImageError, parse_core, parse_runs, patch_runs, sectors_of
from remetal.adapt.identity import Identities
from remetal.adapt.lvm_filter import PatternError, accepts, parse_rules
from remetal.adapt.mdadm_conf import parse_mdadm_conf
from remetal.adapt.names import parse_tag, parse_udev_link, unescape
from remetal.adapt.nvram import encode_entry, parse_entry
from remetal.adapt.roots import parse_os_release
from remetal.adapt.text import TextPlan
from remetal.errors import DamagedError, RefusedError, UnavailableError, UsageError
from remetal.image.extents import DoubtfulMapError, parse_ext_map, parse_xfs_map
from remetal.image.ranges import Extents
from remetal.layout.identity import parse_serial_page
from remetal.layout.inventory import parse_udev_data
from remetal.layout.signatures import parse_signature
from remetal.media.answer import merge_answer, parse_answer, parse_command_line, parse_place
from remetal.media.volumes import parse_volumes
from remetal.storage.http import HttpStore, find_name
from remetal.units import parse_bytes, parse_duration
from tests.adapt_identities import SERVER
from tests.fuzz.target import Target
from tests.network_systems import OLD
from tests.property import test_network_property as network
from tests.property.test_adapt_text_property import PLANNERS

Planner = Callable[[str, Identities, str], TextPlan]


def text_of(data: bytes) -> str:
    """Return bytes as the files of a system are read."""
    return data.decode("utf-8", "surrogateescape")


def planned(planner: Planner) -> Callable[[bytes], None]:
    """Return a reader of a configuration file: it is planned, and a second plan has nothing left to do."""

    def run(data: bytes) -> None:
        text = text_of(data)
        plan = planner(text, SERVER, "/etc/file")
        assert bool(plan.changes) == (plan.text != text)
        again = planner(plan.text, SERVER, "/etc/file")
        assert (again.text, again.changes) == (plan.text, ())

    return run


def planner_targets() -> Iterator[Target]:
    for planner, examples in PLANNERS.items():
        seeds = [each.replace("{name}", "/dev/sda1").replace("{uuid}", "0").encode() for each in examples]
        yield Target(planner.__name__, planned(planner), (), lambda seeds=seeds: seeds)  # type: ignore[misc]


def networked(planner: network.Planner, finder: network.Finder | None) -> Callable[[bytes], None]:
    """Return a reader of a file about the network: what it says of cards is found, and one plan is enough."""

    def run(data: bytes) -> None:
        text = text_of(data)
        if finder is not None:
            finder(text, "/etc/file.link")
        plan = planner(text, network.MOVED, "/etc/file.link")
        assert bool(plan.changes) == (plan.text != text)
        again = planner(plan.text, network.MOVED, "/etc/file.link")
        assert (again.text, again.changes) == (plan.text, ())

    return run


def network_targets() -> Iterator[Target]:
    for planner, (finder, examples) in network.PLANNERS.items():
        seeds = [each.replace("{mac}", OLD.mac).encode() for each in examples]
        yield Target(planner.__name__, networked(planner, finder), (), lambda seeds=seeds: seeds)  # type: ignore[misc]


def fstab(data: bytes) -> None:
    text = text_of(data)
    find_root(parse_fstab(text))
    parse_mdadm_conf(text)
    parse_os_release(text)
    for _ in find_device_uuids(text):
        pass


def cmdline(data: bytes) -> None:
    text = text_of(data)
    for each in parse_cmdline(text):
        assert each is not None
    plan_cmdline(text, SERVER)
    with suppress(RefusedError, UsageError):
        line = parse_command_line(text)
        merge_answer(None, line, "the command line")


def spelled(data: bytes) -> None:
    text = text_of(data)
    for read in (parse_tag, parse_udev_link, unescape, parse_node):
        read(text)
    for measure in (parse_place, parse_bytes, parse_duration):
        with suppress(UsageError):
            measure(text)


def rules(data: bytes) -> None:
    found = parse_rules(text_of(data).split("\n"))
    assert accepts(found, ["/dev/sda1", "/dev/mapper/x"]) in {True, False}


def core(data: bytes) -> None:
    with suppress(CoreImageError):
        found = parse_runs(data[:512])
        assert parse_runs(patch_runs(data[:512], found)) == found
        assert len(list(sectors_of(found))) < 1 << 16
    parse_core(data)


def nvram(data: bytes) -> None:
    found = parse_entry(data)
    if found.place is not None and found.loader is not None:
        with suppress(ValueError):
            again = parse_entry(encode_entry(found))
            assert again.place == found.place


def answer(data: bytes) -> None:
    merge_answer(parse_answer(data, "x"), parse_command_line(""), "x")


def used_map(parse: Callable[[list[str]], Extents]) -> Callable[[bytes], None]:
    """Return a reader of what a file system's own program prints of it: used ranges in order, none beside another."""

    def run(data: bytes) -> None:
        end = -1
        for each in parse(data.decode("utf-8", "replace").splitlines()):
            assert each.start > end
            assert each.size > 0
            end = each.start + each.size

    return run


def signature(data: bytes) -> None:
    found = parse_signature(data)
    assert "\0" not in found.label
    parse_serial_page(data)


class _Answer:
    """What a web server answers, a piece at a time."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int, decode_content: bool = True) -> bytes:
        piece, self.data = self.data[:7], self.data[7:]
        return piece


def listing(data: bytes) -> None:
    store = HttpStore("http://host/backup")
    for name in store._parse_links("keys", _Answer(data)):  # type: ignore[arg-type]
        assert "/" not in name.rstrip("/")
    assert "/" not in find_name("http://host/backup/keys/", data).rstrip("/")
    with suppress(UnavailableError):
        for _, size in store._parse_json("keys", data):
            assert size is None or size >= 0


_ENTRY = b"\1\0\0\0\x04\0d\0\0\0\x7f\xff\4\0"

TARGETS = [
    *planner_targets(),
    *network_targets(),
    Target(
        "udev-data",
        lambda data: (parse_udev_data(text_of(data)), None)[1],
        (),
        lambda: [b"E:ID_PATH=pci-0000:00:03.0\nE:ID_NET_NAME_MAC=enx525400123456\nG:systemd\n"],
    ),
    Target(
        "fstab",
        fstab,
        (),
        lambda: [b"UUID=0 / ext4 defaults 0 1\n/dev/sda1 /a\\040b vfat x 0 2\n", b"set root='hd0,gpt1'"],
    ),
    Target("cmdline", cmdline, (), lambda: [b'root=UUID=0 ro quiet "a b" remetal.map=a=b remetal.end=reboot']),
    Target(
        "spellings", spelled, (), lambda: [b"UUID=x", b"/dev/disk/by-id/ata-x-part1", b"usb:KEY/a", b"1.5GiB", b"12h"]
    ),
    Target(
        "signature",
        signature,
        (),
        lambda: [b"ID_FS_TYPE=ext4\nID_FS_LABEL_ENC=a\\x20b\nID_PART_TABLE_TYPE=gpt\n", b"\0\x80\0\4ABCD"],
    ),
    Target(
        "ext-map",
        used_map(parse_ext_map),
        (DoubtfulMapError,),
        lambda: [b"Block count: 100\nFree blocks: 6\nBlock size: 1024\n  Free blocks: 10-14, 20\n"],
    ),
    Target(
        "xfs-map",
        used_map(parse_xfs_map),
        (DoubtfulMapError,),
        lambda: [b"blocksize = 4096\ndblocks = 100\nagblocks = 50\nfdblocks = 20\n   0   10   4\n   1   3   1\n"],
    ),
    Target("lvm-filter", rules, (PatternError,), lambda: [b"a|^/dev/sd[a-z]+$|", b"r|.*|", b"a/loop(0|1)*/"]),
    Target("grub-core", core, (CoreImageError,), lambda: [b"\x52\xe8\x28\x01" + bytes(2000)]),
    Target("nvram", nvram, (ValueError,), lambda: [_ENTRY]),
    Target(
        "efi-csv",
        lambda data: (parse_csv_label(data, "shimx64.efi"), None)[1],
        (),
        lambda: ["\ufeffshimx64.efi,debian,,x".encode("utf-16-le"), b"shimx64.efi,debian"],
    ),
    Target(
        "answer",
        answer,
        (RefusedError, UsageError),
        lambda: [b'repository = "usb:X/b"\nsnapshot = "latest"\npassphrase-file = "a"\nmap = ["sda=sdb"]\n'],
    ),
    Target(
        "volumes",
        lambda data: (parse_volumes(text_of(data)), None)[1],
        (RefusedError,),
        lambda: [b'{"blockdevices":[{"path":"/dev/sda1","fstype":"ext4","label":"X","uuid":"0","size":1}]}'],
    ),
    Target(
        "listing",
        listing,
        (DamagedError,),
        lambda: [b"<a href=\"abc/\">abc/</a> <A HREF='x'>", b'[{"name":"a","type":"file","size":3}]'],
    ),
]
