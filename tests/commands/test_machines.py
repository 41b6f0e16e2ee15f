"""Planning onto machines that are only known by their records, as plain commands."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands.site import Site

MACHINES = Path(__file__).parents[1] / "machines"


def test_a_restore_is_planned_onto_a_recorded_machine(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    onto = MACHINES / "server-blank.json"
    plan = site.remetal("plan", "latest", "--onto", onto, "--map", "m.img=/dev/nvme1n1", "--json").json
    target = plan["targets"]["m.img"]
    assert (target["path"], target["serial"], target["is_file"]) == ("/dev/nvme1n1", "S64FNE0R123452", False)
    assert plan["id"] == site.remetal("plan", "latest", "--onto", onto, "--map", "nvme1n1", "--json").json["id"]
    shown = site.remetal("plan", "latest", "--onto", onto, "--map", "nvme1n1").out
    assert "/dev/nvme1n1 (SAMSUNG MZQL2960HCJR-00A07 S64FNE0R123452)" in " ".join(shown.split())


def test_the_program_says_why_it_chose_a_disk_or_why_it_did_not(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    chosen = site.remetal("plan", "latest", "--onto", MACHINES / "rescue-bench.json")
    assert "m.img goes to /dev/sda: the only disk that is free, blank and large enough" in chosen.err
    unclear = site.remetal("plan", "latest", "--onto", MACHINES / "server-blank.json", code=3)
    assert "/dev/nvme0n1 (894 GiB) could take it; /dev/nvme1n1 (894 GiB) could take it" in " ".join(unclear.err.split())
    assert "--map m.img=TARGET" in unclear.err
    full = site.remetal("plan", "latest", "--onto", MACHINES / "laptop-bitlocker.json", code=3)
    assert "holds GPT table with 4 partitions" in " ".join(full.err.split())


def test_records_that_are_none(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    other = site.folder / "other.json"
    other.write_text(json.dumps({"disks": []}))
    assert "is not the record of a machine" in site.remetal("plan", "latest", "--onto", other, code=2).err
    assert "No such file" in site.remetal("plan", "latest", "--onto", site.folder / "none", code=2).err
    onto = MACHINES / "twins.json"
    assert "has no disk /dev/sdz" in site.remetal("plan", "latest", "--onto", onto, "--map", "/dev/sdz", code=2).err


def test_what_a_probe_prints_is_a_record(site: Site, machine_disk: Path) -> None:
    record = site.folder / "web.json"
    record.write_text(site.remetal("probe", "--disk", machine_disk, "--json").out)
    site.remetal("backup", "--disk", machine_disk)
    plan = site.remetal("plan", "latest", "--onto", record, "--map", "m.img=m.img", "--json").json
    assert plan["targets"]["m.img"]["content"].startswith("GPT table with 5 partitions")
