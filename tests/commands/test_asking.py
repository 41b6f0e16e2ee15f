"""A LUKS container that no given key opens: who sits at a terminal is asked, and nobody else."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.commands.site import REMETAL, Site
from tests.terminal import on_terminal

PHRASE = "the disk's own passphrase"
ASKED = r"Passphrase of the LUKS container on l\.img, UUID [0-9a-f-]{36}, label vault \(Enter: capture it as it is"
WHOLE = r"l\.img[\s\S]*captured whole"


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """A disk file that is one LUKS container."""
    path = tmp_path / "l.img"
    with path.open("wb") as file:
        file.truncate(20 << 20)
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-keyslots-size", "1m")
    argv = ("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--label", "vault", *fast, path, "-")
    subprocess.run(argv, input=PHRASE.encode(), check=True)
    return path


def kinds(site: Site) -> list[str]:
    """Return what the last snapshot has on its disk."""
    return [
        layer.get("type", layer["layer"]) for layer in site.remetal("show", "latest", "--json").json["layout"]["layers"]
    ]


def test_enter_captures_a_container_as_it_is(site: Site, container: Path) -> None:
    argv = [str(REMETAL), "backup", "--disk", str(container), "--machine", "m"]
    with on_terminal(argv, site.environment | {"TERM": "xterm", "COLUMNS": "200"}) as terminal:
        terminal.wait_for(ASKED)
        time.sleep(0.6)
        terminal.type("wrong")
        terminal.wait_for("That opens none of its key slots")
        terminal.wait_for(ASKED)
        assert "\x1b[2K" not in terminal.said, "progress bars wipe the question away"
        terminal.type("")
        terminal.wait_for(WHOLE)
        assert terminal.end() == 0, terminal.said
        assert "wrong" not in terminal.said
        assert terminal.said.count("captured whole") == 1, "what was said before the question is not said twice"
    assert kinds(site) == ["crypto_LUKS"]


def test_nobody_is_asked_without_a_terminal(site: Site, container: Path) -> None:
    said = site.remetal("backup", "--disk", container, "--machine", "m").err
    assert "Passphrase" not in said
    assert "no key was given that opens the LUKS container on l.img" in said
    assert kinds(site) == ["crypto_LUKS"]


def test_key_files_that_are_none_are_refused(site: Site, container: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "long").open("wb") as file:
        file.truncate((8 << 20) + 1)
    for option, name, told in (
        ("--luks-key-file", "empty", "it is empty"),
        ("--luks-key-file", "long", "it is too long"),
        ("--luks-key-file", "nowhere", "cannot read"),
        ("--luks-passphrase-file", "empty", "the first line of"),
    ):
        assert told in site.remetal("backup", "--disk", container, option, tmp_path / name, code=2).err
