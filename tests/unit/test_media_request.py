"""Requests for a medium that cannot be met are refused before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remetal.errors import RefusedError, UsageError
from remetal.events import Event
from remetal.media.apt import AptSources
from remetal.media.build import MediumRequest, build_medium, cache_folder
from remetal.media.root import open_base
from remetal.system.run import ProgramFailedError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMETAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_bad_answer_is_not_baked_in(cache: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer.toml"
    answer.write_text('repository = "usb:A/b"\npassphrase = "p"\nendd = "reboot"\n')
    with pytest.raises(RefusedError, match=r"answer\.toml .*endd"):
        build_medium(MediumRequest(tmp_path / "r.iso", answer=answer))
    with pytest.raises(UsageError, match=r"cannot read .*nothing\.toml"):
        build_medium(MediumRequest(tmp_path / "r.iso", answer=tmp_path / "nothing.toml"))
    assert not cache.exists()


def test_an_iso_needs_a_folder_and_sane_arguments(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        build_medium(MediumRequest(tmp_path / "nowhere" / "r.iso"))
    with pytest.raises(UsageError, match="kernel arguments"):
        build_medium(MediumRequest(tmp_path / "r.iso", append="a\nb"))
    assert not cache.exists()


def test_the_cache_is_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("REMETAL_CACHE")
    assert cache_folder() == Path("/var/cache/remetal")


def test_packages_that_cannot_be_had_leave_nothing_behind(tmp_path: Path) -> None:
    said: list[Event] = []
    old, recent = tmp_path / "media/old", tmp_path / "media/medium-of-another"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    (old / "root.squashfs").write_bytes(b"x")
    os.utime(old, (0, 0))
    sources = AptSources("debian", "bookworm", (f"deb [trusted=yes] file://{tmp_path}/none bookworm main",))
    with pytest.raises(ProgramFailedError, match="mmdebstrap"):
        open_base(tmp_path, sources, ["linux-image-amd64"], fresh=False, report=said.append)
    assert said
    assert [path.name for path in (tmp_path / "media").iterdir() if path.suffix != ".lock"] == [recent.name]
