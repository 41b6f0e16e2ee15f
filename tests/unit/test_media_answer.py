"""Answer files and kernel command lines: what is understood, and that nothing else is."""

from __future__ import annotations

import pytest

from remetal.errors import RefusedError, UsageError
from remetal.media.answer import (
    MAX_SIZE,
    Answer,
    CommandLine,
    Place,
    merge_answer,
    named_places,
    pairs_of,
    parse_answer,
    parse_command_line,
    parse_place,
)

FULL = b"""
repository = "usb:BACKUP/machines"
snapshot = "4be1f03a"
machine = "phoenix"
map = { sda = "serial:S4EVNX0M1", sdb = "/dev/vdb" }
nic = { ens3 = "b4:45:06:aa:bb:01", "52:54:00:12:34:57" = "none" }
passphrase-file = "uuid:1234-ABCD/secret/phrase"
luks-passphrase = "open sesame"
luks-passphrase-file = "luks.txt"
luks-key-file = { "sda:3" = "usb:KEYS/sda3", "vg0/home" = "/etc/home.key" }
only = ["sda"]
keep = ["sda:4"]
without = ["sdb"]
dissolve = ["md/root"]
overwrite = ["serial:S4EVNX0M1"]
protect = ["wwn:0x5000c500a1b2c3d4", "/dev/sdz"]
grow = ["vg0/home", "sda:2"]
keep-sizes = true
verify = true
end = "poweroff"
log = "usb:LOGS/here"
pause = 0
repeat = true
"""


def test_every_field_of_an_answer_file_is_understood() -> None:
    answer = parse_answer(FULL, "a.toml")
    assert answer == Answer(
        repository="usb:BACKUP/machines",
        snapshot="4be1f03a",
        machine="phoenix",
        map={"sda": "serial:S4EVNX0M1", "sdb": "/dev/vdb"},
        nic={"ens3": "b4:45:06:aa:bb:01", "52:54:00:12:34:57": "none"},
        passphrase_file="uuid:1234-ABCD/secret/phrase",
        luks_passphrase="open sesame",
        luks_passphrase_file="luks.txt",
        luks_key_file={"sda:3": "usb:KEYS/sda3", "vg0/home": "/etc/home.key"},
        only=("sda",),
        keep=("sda:4",),
        without=("sdb",),
        dissolve=("md/root",),
        overwrite=("serial:S4EVNX0M1",),
        protect=("wwn:0x5000c500a1b2c3d4", "/dev/sdz"),
        grow=("vg0/home", "sda:2"),
        keep_sizes=True,
        verify=True,
        end="poweroff",
        log="usb:LOGS/here",
        pause=0,
        repeat=True,
    )
    assert pairs_of(answer.map) == [("sda", "serial:S4EVNX0M1"), ("sdb", "/dev/vdb")]
    assert named_places(answer) == [
        "usb:BACKUP/machines",
        "uuid:1234-ABCD/secret/phrase",
        "usb:LOGS/here",
        "luks.txt",
        "usb:KEYS/sda3",
        "/etc/home.key",
    ]


def test_the_shortest_answer_ends_in_a_shell() -> None:
    answer = parse_answer(b'repository = "backup"\npassphrase = "a b"\nmap = "wwn:0x5000"', "a.toml")
    assert (answer.snapshot, answer.end, answer.pause, answer.repeat) == ("latest", "shell", 5, False)
    assert pairs_of(answer.map) == [("", "wwn:0x5000")]
    assert (answer.overwrite, answer.grow, pairs_of(answer.luks_key_file)) == ((), (), [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('repository = "x"\npassphrase = "p"\nsnapshott = "latest"', "snapshott"),
        ('repository = "x"\npassphrase = "p"\nend = "halt"', "end"),
        ('repository = "x"\npassphrase = "p"\npause = -1', "pause"),
        ('repository = "x"\npassphrase = "p"\npause = true', "pause"),
        ('repository = "x"\npassphrase = "p"\nkeep-sizes = "no"', "keep-sizes"),
        ('repository = "x"\npassphrase = "p"\nmap = { sda = 1 }', "map"),
        ('repository = ""\npassphrase = "p"', "repository"),
        ('repository = "usb:/x"\npassphrase = "p"', "usb:/x"),
        ('repository = "../x"\npassphrase = "p"', r"\.\."),
        ('repository = "x"\npassphrase = "p"\nlog = "ftp:host/x"', "ftp:host/x"),
        ('repository = "x"\npassphrase = "p"\noverwrite = "/dev/sda"', "overwrite"),
        ('repository = "x"\npassphrase = "p"\ngrow = ["sda:2", ""]', "grow"),
        ('repository = "x"\npassphrase = "p"\nluks-key-file = { "sda:3" = "usb:/x" }', "usb:/x"),
        ('repository = "x"\npassphrase = "p"\nluks-passphrase-file = ["a"]', "luks-passphrase-file"),
        ('passphrase = "p"', "repository"),
        ('repository = "x"', "exactly one of passphrase"),
        ('repository = "x"\npassphrase = "p"\nkit-file = "k"', "exactly one of passphrase"),
        ("repository = ", "not valid TOML"),
        ("[" * 5000, "not valid TOML"),
    ],
)
def test_a_bad_answer_is_refused_with_its_file_and_field(text: str, named: str) -> None:
    with pytest.raises(RefusedError, match=named) as caught:
        parse_answer(text.encode(), "stick.toml")
    assert "stick.toml" in caught.value.message
    assert caught.value.hint


def test_an_answer_that_is_no_text_or_too_large_is_refused() -> None:
    for data in (b"\xff\xfe", b"#" * (MAX_SIZE + 1)):
        with pytest.raises(RefusedError, match=r"stick\.toml"):
            parse_answer(data, "stick.toml")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("usb:MY DISK/a/b", Place(volume="label", key="MY DISK", path="a/b")),
        ("usb:BACKUP", Place(volume="label", key="BACKUP")),
        ("uuid:AB-12/", Place(volume="uuid", key="AB-12")),
        ("/mnt/nfs", Place(volume="system", path="/mnt/nfs")),
        ("backup/a:b", Place(volume="own", path="backup/a:b")),
        (".", Place(volume="own", path=".")),
    ],
)
def test_places(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["usb:", "uuid:/x", "s3:bucket/x", "usb:A/../b", "..", "/../etc", "a\0b"])
def test_what_is_no_place_is_said(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)


def test_the_kernels_command_line() -> None:
    line = parse_command_line(
        'BOOT_IMAGE=/remetal/vmlinuz quiet remetal.repo="usb:MY DISK/a" "remetal.machine=two words" '
        "remetal.map=sda=serial:1,sdb=/dev/vdb remetal.map=sdc=wwn:3 remetal.passphrase-file=usb:K/p "
        "remetal.keep-sizes remetal.repeat=no remetal.pause=7 remetal.end=reboot\n"
    )
    assert line == CommandLine(
        fields={
            "repository": "usb:MY DISK/a",
            "machine": "two words",
            "map": {"sda": "serial:1", "sdb": "/dev/vdb", "sdc": "wwn:3"},
            "passphrase-file": "usb:K/p",
            "keep-sizes": True,
            "repeat": False,
            "pause": 7,
            "end": "reboot",
        }
    )
    assert parse_command_line("remetal.nic=ens3=b4:45:06:aa:bb:01 remetal.nic=ens4=none").fields == {
        "nic": {"ens3": "b4:45:06:aa:bb:01", "ens4": "none"}
    }
    assert parse_command_line("remetal.map=/dev/vda").fields == {"map": "/dev/vda"}
    assert parse_command_line(
        "remetal.grow=sda:2,vg0/home remetal.grow=md/data remetal.without=sdb remetal.dissolve=md/root "
        "remetal.overwrite=serial:1,/dev/vdb remetal.protect=wwn:2 remetal.only=sda remetal.keep=sda:4 "
        '"remetal.luks-key-file=sda:3=usb:MY KEYS/a,b" remetal.luks-key-file=vg0/home=/k '
        "remetal.luks-passphrase-file=usb:KEYS/p"
    ).fields == {
        "grow": ["sda:2", "vg0/home", "md/data"],
        "without": ["sdb"],
        "dissolve": ["md/root"],
        "overwrite": ["serial:1", "/dev/vdb"],
        "protect": ["wwn:2"],
        "only": ["sda"],
        "keep": ["sda:4"],
        "luks-key-file": {"sda:3": "usb:MY KEYS/a,b", "vg0/home": "/k"},
        "luks-passphrase-file": "usb:KEYS/p",
    }
    assert parse_command_line("remetal.mode=shell remetal.answer=usb:A/b.toml") == CommandLine(
        mode="shell", answer="usb:A/b.toml"
    )


@pytest.mark.parametrize(
    "word",
    [
        "remetal.repoo=x",
        "remetal.repo=",
        "remetal.repo",
        "remetal.passphrase=secret",
        "remetal.mode=silent",
        "remetal.pause=-1",
        "remetal.pause=٣",
        "remetal.verify=maybe",
        "remetal.map=sda=/dev/vda,/dev/vdb",
        "remetal.map=sda=/dev/vda,sda=/dev/vdb",
        "remetal.map==/dev/vdb",
        "remetal.map=",
        "remetal.nic=",
        "remetal.nic=ens3=a remetal.nic=ens3=b",
        "remetal.grow=",
        "remetal.grow=sda:2,",
        "remetal.overwrite",
        "remetal.luks-passphrase=secret",
        "remetal.luks-key-file=",
        "remetal.luks-key-file=sda:3=/a remetal.luks-key-file=/b",
    ],
)
def test_what_is_not_understood_on_the_command_line_is_refused(word: str) -> None:
    with pytest.raises(RefusedError):
        parse_command_line(f"quiet {word}")


def test_the_command_line_goes_over_the_answer_file() -> None:
    file = parse_answer(b'repository = "a"\npassphrase = "p"\nend = "reboot"\nmap = { sda = "/dev/vda" }', "f")
    line = parse_command_line("remetal.end=shell remetal.kit-file=usb:K/kit.txt remetal.map=/dev/vdb")
    merged = merge_answer(file, line, "f")
    assert (merged.repository, merged.end, merged.map) == ("a", "shell", "/dev/vdb")
    assert (merged.passphrase, merged.kit_file) == (None, "usb:K/kit.txt")
    file = parse_answer(b'repository = "a"\npassphrase = "p"\noverwrite = ["/dev/vda"]\ngrow = ["sda:2"]', "f")
    merged = merge_answer(file, parse_command_line("remetal.overwrite=/dev/vdb remetal.luks-key-file=k"), "f")
    assert (merged.overwrite, merged.grow, merged.luks_key_file) == (("/dev/vdb",), ("sda:2",), "k")
    with pytest.raises(RefusedError, match="the kernel's command line"):
        merge_answer(None, parse_command_line("remetal.repo=a remetal.end=halt"), "")
