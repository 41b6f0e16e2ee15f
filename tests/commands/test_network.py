"""Which network card becomes which, as plain commands: the plan shows it, takes it, and refuses what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.layout.inventory import probe_nics
from remetal.layout.model import Nic
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import LINUX, ROOT_UUID, make_ext4, partition, read_table
from tests.commands.site import DISK_SIZE, Site
from tests.network_systems import DEBIAN, make_system

MACHINES = Path(__file__).parents[1] / "machines"


@pytest.fixture
def captured(site: Site, machine_disk: Path) -> Iterator[Nic]:
    """A snapshot of a block device of this machine, so it tells the cards; returns the first of them."""
    nics = probe_nics()
    assert nics, "these tests need a machine with a network card"
    with attach_loop(Span(machine_disk, 0, DISK_SIZE)) as loop:
        site.remetal("backup", "--disk", loop, "--machine", "m")
        yield nics[0]


def onto(site: Site, name: str, *words: str, code: int = 0) -> str:
    disk = site.remetal("show", "latest", "--json").json["layout"]["disks"][0]["name"]
    target = {"server-perc": "/dev/sdb", "server-blank": "/dev/nvme1n1"}[name]
    done = site.remetal(
        "plan",
        "latest",
        *("--onto", str(MACHINES / f"{name}.json"), "--map", f"{disk}={target}", "--overwrite", target, *words),
        code=code,
    )
    return done.out if code == 0 else done.err


def test_the_plan_shows_what_becomes_of_each_card(site: Site, captured: Nic) -> None:
    shown = " ".join(onto(site, "server-blank").split())
    assert "it is the only card" in shown
    assert f"{captured.name} ({captured.mac}, {captured.driver}) eno1 (b4:45:06:11:22:33, tg3)" in shown
    plan = json.loads(onto(site, "server-blank", "--json"))
    (fate,) = plan["nics"]
    assert (fate["before"]["mac"], fate["now"]["mac"], fate["guess"]) == (captured.mac, "b4:45:06:11:22:33", False)


def test_a_guess_is_a_warning_with_the_way_to_choose_another(site: Site, captured: Nic) -> None:
    plan = json.loads(onto(site, "server-perc", "--json"))
    (warning,) = [each for each in plan["warnings"] if "network card" in each]
    assert f"--nic {captured.mac}=e4:43:4b:11:22:34 (eno2)" in warning
    chosen = json.loads(onto(site, "server-perc", "--json", "--nic", f"{captured.name}=eno2"))
    assert chosen["nics"][0]["now"]["name"] == "eno2"
    assert chosen["nics"][0]["reason"] == "it was chosen"
    assert not any("network card" in each for each in chosen["warnings"])
    assert chosen["id"] != plan["id"]
    none = json.loads(onto(site, "server-perc", "--json", "--nic", f"{captured.mac}=none"))
    assert none["nics"][0]["now"] is None
    assert json.loads(onto(site, "server-perc", "--json"))["id"] == plan["id"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("eth99=eno1", "captured machine has no network card eth99"),
        ("{name}=eth99", "no network card eth99"),
        ("{name}", "is not OLD=NEW"),
        ("{name}=eno1 {mac}=eno2", "twice"),
    ],
)
def test_contradictory_choices_are_refused_before_anything_is_touched(
    site: Site, captured: Nic, choice: str, message: str
) -> None:
    words = [word for each in choice.format(name=captured.name, mac=captured.mac).split() for word in ("--nic", each)]
    assert message in " ".join(onto(site, "server-perc", *words, code=2).split())


def test_disk_files_are_in_no_machine(site: Site, captured: Nic) -> None:
    target = site.folder / "new.img"
    plan = site.remetal("plan", "latest", "--map", target, "--json").json
    assert plan["nics"] == []
    refused = site.remetal("plan", "latest", "--map", target, "--nic", f"{captured.name}=x", code=2)
    assert "disk files" in " ".join(refused.err.split())
    assert not target.exists()


def test_a_restored_system_finds_its_network(site: Site, tmp_path: Path) -> None:
    """Nothing is known of the card that it had, but there is only one to take its place."""
    record = json.loads((MACHINES / "vm-kvm-virtio.json").read_text())
    (card,) = record["inventory"]["nics"]
    card["permanent"] = card["mac"]
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(record))
    disk, new = tmp_path / "disk.img", tmp_path / "new.img"
    partition(disk, 32 * MIB, f"label: gpt\nsize=24M,type={LINUX}\n")
    files = {**DEBIAN, "/etc/fstab": f"UUID={ROOT_UUID} / ext4 defaults 0 1\n", "/etc/os-release": "ID=debian\n"}
    make_ext4(disk, read_table(disk, "sda").partitions[0], make_system(tmp_path / "root", files).root)
    site.remetal("backup", "--disk", disk, "--machine", "m")
    words = ("restore", "latest", "--map", new, "--inventory", machine, "--yes", "--even-unbootable", "--json")
    done, again = site.remetal(*words).json, site.remetal(*words).json
    (change,) = [each for each in done["adaptation"]["changes"] if "10-remetal-ens3.link" in each["path"]]
    assert f"+PermanentMACAddress={card['mac']}" in change["diff"]
    told = [each for each in done["adaptation"]["notes"] if f"ens3 is {card['name']}" in each]
    assert "it is the only card" in told[0]
    assert [each["path"] for each in again["adaptation"]["changes"]] == [
        each["path"] for each in done["adaptation"]["changes"]
    ]
    with attach_loop(Span(new, MIB, 24 * MIB)) as part, mounted(part, options=["ro", "noload"]) as root:
        assert (root / "etc/systemd/network/10-remetal-ens3.link").read_text().endswith("Name=ens3\n")
