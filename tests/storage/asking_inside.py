"""What the storage ring runs inside its own kernel: people are asked for passphrases, and to name a disk twice."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from remetal.events import silent
from remetal.media.answer import Answer
from remetal.media.volumes import probe_disks
from remetal.system.mounts import mounted
from remetal.workflows.recover import Found, Recovery, recover
from tests.storage.layout_inside import partition, program, refusal
from tests.terminal import Terminal, on_terminal

USB, SOURCE, TARGET = (Path(f"/dev/ubd{letter}") for letter in "abc")
REPOSITORY = Path("/run/usb/repository")
SECRET = ("--passphrase-file", "/run/secret")
PHRASE = "the disk's own passphrase"
REMETAL = str(Path(sys.executable).with_name("remetal"))
ENVIRONMENT = os.environ | {
    "REMETAL_REPO": str(REPOSITORY),
    "REMETAL_STATE": "/run/state",
    "TERM": "dumb",
    "COLUMNS": "200",
}
ASKED = r"Passphrase of the LUKS container on ubdb:1, UUID [0-9a-f-]{36}"


def prepare() -> None:
    """Make a disk with a LUKS container, a USB disk with a repository, and a target with somebody's data."""
    partition(SOURCE, "label: gpt\nsize=48MiB, type=linux\n")
    secret = Path("/run/luks")
    secret.write_text(PHRASE)
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-keyslots-size", "1m")
    program("cryptsetup", "luksFormat", "-q", "--type", "luks2", *fast, f"{SOURCE}1", secret)
    program("cryptsetup", "open", "--key-file", secret, f"{SOURCE}1", "plain")
    program("mkfs.ext4", "-q", "-L", "inside", "/dev/mapper/plain")
    with mounted(Path("/dev/mapper/plain")) as place:
        (place / "file").write_bytes(b"content" * 10_000)
    program("cryptsetup", "close", "plain")
    program("mkfs.ext4", "-q", "-L", "BACKUP", USB)
    program("mkfs.ext4", "-q", "-L", "precious", TARGET)
    Path("/run/secret").write_text("the repository's\n")
    REPOSITORY.parent.mkdir()
    program("mount", USB, REPOSITORY.parent)
    remetal("init", *SECRET)


def remetal(*words: str) -> Any:
    """Run the program without a terminal, and return what it says as JSON."""
    os.environ |= ENVIRONMENT
    return json.loads(program(REMETAL, *words, "--json", "--quiet"))


def kinds() -> set[str]:
    """Return what the only snapshot has on which spaces."""
    layers = remetal("show", "latest")["layout"]["layers"]
    return {f"{each['on']} {each.get('type') or each['layer']}" for each in layers}


def a_backup_asks() -> None:
    """A wrong answer is asked for again. For escrow, a container that is open already needs its passphrase, too."""
    argv = [REMETAL, "backup", "--disk", str(SOURCE), "--machine", "opened"]
    with on_terminal(argv, ENVIRONMENT) as terminal:
        terminal.wait_for(rf"{ASKED} \(Enter: capture it as it is, encrypted and whole\): ")
        terminal.type("wrong")
        terminal.wait_for("That opens none of its key slots")
        terminal.wait_for(ASKED)
        terminal.type(PHRASE)
        terminal.wait_for(r"Snapshot [0-9a-f]+ of opened")
        assert terminal.end() == 0
        assert "captured whole" not in terminal.said, terminal.said
        assert PHRASE not in terminal.said
    assert {"ubdb:1 luks", "ubdb:1:luks ext4"} <= kinds()
    program("cryptsetup", "open", "--readonly", "--key-file", "/run/luks", f"{SOURCE}1", "plain")
    with on_terminal([*argv[:-1], "escrowed", "--escrow-luks-keys"], ENVIRONMENT) as terminal:
        terminal.wait_for(ASKED)
        terminal.type(PHRASE)
        terminal.wait_for("into escrow")
        assert terminal.end() == 0, terminal.said
    program("cryptsetup", "close", "plain")


def a_restore_asks() -> None:
    """Enter refuses, before anything is touched."""
    words = ["restore", "latest", "--machine", "opened", "--map", f"ubdb={SOURCE}", "--yes", *SECRET]
    with on_terminal([REMETAL, *words], ENVIRONMENT) as terminal:
        terminal.wait_for(rf"{ASKED} \(Enter: restore nothing\): ")
        terminal.type("")
        terminal.wait_for(r"so\s+its\s+content\s+cannot\s+be\s+written")
        assert terminal.end() == 3


def the_dialogue_asks() -> None:
    """The repository's disk is not offered; a target with data is named twice; the passphrase is tried."""
    assert [disk.path for disk in probe_disks()] == [USB, SOURCE, TARGET]
    program("umount", REPOSITORY.parent)
    code = (
        "from pathlib import Path\n"
        "from remetal.cli.dialogue import hold_dialogue\n"
        "from remetal.cli.options import Output\n"
        "hold_dialogue(Path('/run/recovery.log'), Output())\n"
    )
    with on_terminal([sys.executable, "-c", code], ENVIRONMENT) as terminal:
        choose_target(terminal)
        terminal.type("ubdb")
        terminal.wait_for("Back to the menu; nothing was touched")
        choose_target(terminal)
        terminal.type("/dev/ubdc")
        terminal.wait_for(ASKED)
        terminal.type("wrong")
        terminal.wait_for("That opens none of its key slots")
        terminal.wait_for(ASKED)
        terminal.type(PHRASE)
        terminal.wait_for(r"\|1 LUKS ext4")
        terminal.wait_for("Type 'yes' or the plan's id")
        terminal.type("yes")
        terminal.wait_for("Restored: .* written", 120)
        terminal.wait_for(r"6  Power off\n> ")
        terminal.type("4")
        assert terminal.end() == 0
    program("udevadm", "settle")
    program("cryptsetup", "open", "--readonly", "--key-file", "/run/luks", f"{TARGET}1", "plain")
    with mounted(Path("/dev/mapper/plain"), options=["ro", "noload"]) as place:
        assert (place / "file").read_bytes() == b"content" * 10_000
    program("cryptsetup", "close", "plain")


def an_answer_brings_the_key() -> None:
    """An unattended recovery opens the container with what its answer names, and refuses where that opens nothing."""
    with mounted(USB) as top:
        (top / "key").write_text(PHRASE)

    def carry_out(**keys: Any) -> int:
        answer = Answer(
            repository="usb:BACKUP/repository",
            passphrase_file="/run/secret",
            machine="opened",
            map=str(TARGET),
            **keys,
        )
        recovery = Recovery(Found(answer, "the test"))
        recover(recovery, lambda prepared: None, silent)
        assert recovery.report is not None
        return recovery.report.written

    told = refusal(lambda: carry_out(luks_passphrase="wrong"))
    assert "no key was given that opens the LUKS container on ubdb:1" in told
    assert carry_out(luks_passphrase="wrong", luks_key_file={"ubdb:1": "usb:BACKUP/key"}) == 0


def choose_target(terminal: Terminal) -> None:
    """Go from the menu to the question for the target's name."""
    terminal.wait_for(r"6  Power off\n> ")
    terminal.type("1")
    terminal.wait_for(r"1  /repository on /dev/ubda \(BACKUP, ext4\)\n   0  Back\n> ")
    terminal.type("1")
    terminal.wait_for("Passphrase: ")
    terminal.type("the repository's")
    number = terminal.wait_for(r"(\d+)  opened ").split()[0]
    terminal.wait_for("0  Back\n> ")
    terminal.type(number)
    offered = terminal.wait_for(r"Onto which disk shall 'ubdb'[^?]*\?[\s\S]*0  Back\n> ")
    assert "/dev/ubda" not in offered, offered
    assert "leave it out" not in offered, offered
    terminal.type("2")
    terminal.wait_for("/dev/ubdc holds data that are not of this snapshot: ext4 'precious'.")
    terminal.wait_for(r"type the disk's name, ubdc; anything else goes back: ")
