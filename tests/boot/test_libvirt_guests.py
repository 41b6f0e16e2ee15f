"""Guests with real agents are frozen for a backup, and thawed whatever happens."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from remetal.applications.contract import Moment, Phase
from remetal.applications.libvirt import Libvirt, LibvirtSettings
from remetal.errors import RemetalError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import Site
from tests.databases import folder_of
from tests.guests import USER, Host, running_libvirt

pytestmark = [pytest.mark.boot, pytest.mark.matrix]

SIZE = 192 * MIB


@dataclass(frozen=True)
class Setting:
    """A host with the guests `told`, which has an agent, and `deaf`, which has none, and the disk they are on."""

    host: Host
    device: Path
    folder: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    path = tmp_path_factory.mktemp("host") / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    with (
        attach_loop(Span(path, 0, SIZE), writable=True) as device,
        mounted(device) as folder,
        folder_of(USER) as own,
        running_libvirt(own) as host,
    ):
        for name in ("told", "deaf"):
            disk = folder / name
            subprocess.run(["mkfs.ext4", "-q", disk, "32M"], check=True)
            shutil.chown(disk, USER, USER)
            host.start(name, disk, agent=name == "told")
        yield Setting(host, device, folder)


def at(phase: Phase, limit: float = 60) -> Moment:
    return Moment(phase, limit, {}, lambda line: None)


def counts_on(host: Host, name: str) -> bool:
    before = host.count(name)
    time.sleep(3)
    return host.count(name) > before


def test_a_guest_is_frozen_and_thawed(setting: Setting) -> None:
    host = setting.host
    application = Libvirt(LibvirtSettings(uri=host.uri, guests=("told",)))
    application.carry_out(at("before-freeze"))
    assert host.status("told") == "frozen"
    assert not counts_on(host, "told")
    assert counts_on(host, "deaf")
    application.carry_out(at("after-thaw"))
    assert host.status("told") == "thawed"
    assert counts_on(host, "told")


def test_a_guest_without_an_agent_is_named_and_the_others_are_frozen_and_thawed(setting: Setting) -> None:
    application = Libvirt(LibvirtSettings(uri=setting.host.uri))
    with pytest.raises(RemetalError, match=r"guest deaf was not frozen: .*agent is not configured") as caught:
        application.carry_out(at("before-freeze"))
    assert "told" not in caught.value.message
    assert setting.host.status("told") == "frozen"
    application.carry_out(at("after-thaw"))
    assert setting.host.status("told") == "thawed"


def test_a_guest_is_thawed_when_twice_the_limit_is_over(setting: Setting) -> None:
    application = Libvirt(LibvirtSettings(uri=setting.host.uri, guests=("told",)))
    application.carry_out(at("before-freeze", 4))
    assert setting.host.status("told") == "frozen"
    time.sleep(9)
    assert setting.host.status("told") == "thawed"
    with pytest.raises(RemetalError, match="were not frozen until the end"):
        application.carry_out(at("after-thaw", 4))


def hooks(site: Site, setting: Setting, *, slow: bool = False) -> Path:
    """Return a file of hooks; `slow` is one that takes a minute in the frozen phase, once it has left a sign."""
    file = site.folder / "hooks.toml"
    text = f'[[hook]]\napplication = "libvirt"\nuri = "{setting.host.uri}"\nguests = ["told"]\nlimit = 100\n'
    if slow:
        program = site.folder / "slow"
        program.write_text(f"#!/bin/sh\ntouch {site.folder / 'frozen'}\nsleep 60\n")
        program.chmod(0o755)
        text += f'[[hook]]\nrun = ["{program}"]\nat = ["frozen"]\nlimit = 100\n'
    file.write_text(text)
    return file


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path)
    found.remetal("init", "--quiet")
    return found


def needs_recovery(image: Path) -> bool:
    said = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True, text=True).stdout
    return "needs_recovery" in said


def test_a_guests_file_system_is_clean_in_the_backup(site: Site, setting: Setting) -> None:
    site.remetal("backup", "--disk", setting.device, "--hooks", hooks(site, setting))
    target = site.folder / "target.img"
    site.remetal("restore", "latest", "--map", target, "--yes")
    with attach_loop(Span(target, 0, SIZE)) as copy, mounted(copy, options=("ro",)) as found:
        assert not needs_recovery(found / "told")
        assert needs_recovery(found / "deaf"), "it was told nothing"
        subprocess.run(["e2fsck", "-fn", found / "told"], check=True, capture_output=True)
    assert setting.host.status("told") == "thawed"
    assert counts_on(setting.host, "told")


def test_a_guest_is_thawed_when_remetal_is_killed(site: Site, setting: Setting) -> None:
    with site.start(
        *("backup", "--disk", setting.device, "--freeze-limit", "100", "--hooks", hooks(site, setting, slow=True))
    ) as process:
        until = time.monotonic() + 100
        while not (site.folder / "frozen").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        assert setting.host.status("told") == "frozen"
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while setting.host.status("told") != "thawed":
        assert time.monotonic() < until
        time.sleep(0.2)
    assert counts_on(setting.host, "told")
