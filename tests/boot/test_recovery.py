"""The whole main job in real machines: backed up, destroyed, recovered by the medium, booted, compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest

from lab.machine import Recipe
from lab.recovery import opened_stage, recover_machine
from remetal.events import silent

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_a_dead_machine_comes_back(tmp_path: Path, firmware: Literal["bios", "uefi"]) -> None:
    out = tmp_path / "out"
    # Without the fallback path on its ESP, the machine boots by UEFI only if adaptation has filled that path or has
    # made an entry in the new machine's NVRAM.
    recipe = Recipe(fallback=firmware == "bios")
    with opened_stage(out, firmware) as stage:
        story = recover_machine(stage, recipe, silent)
    assert story.boot is not None
    assert story.boot.name == recipe.name
    assert story.boot.firmware == firmware
    assert story.boot.state == "running"
    assert story.files > 10_000
    added = [line for line in story.differences if firmware == "uefi" and line.lower().startswith("/boot/efi/efi/boot")]
    assert story.differences == added
    assert (out / "plan.json").stat().st_size > 1000
    assert (out / "login.png").read_bytes().startswith(b"\x89PNG")
    if firmware == "uefi":
        assert added, "the fallback path was filled"
        said = (out / "vm" / "serial.log").read_text(errors="replace")
        assert re.search(r'BdsDxe: starting Boot\w+ "debian" from HD', said), "the firmware followed our entry"
