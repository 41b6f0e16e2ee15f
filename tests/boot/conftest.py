"""What several boot tests need: a recovery medium built from this checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.cache import cache_folder
from remetal.media.build import Medium, MediumRequest, build_medium


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Medium:
    """A recovery medium with today's remetal on it; the Debian system in it comes from the lab's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMETAL_CACHE", str(cache_folder()))
        return build_medium(MediumRequest(tmp_path_factory.mktemp("medium") / "recovery.iso"))


@pytest.fixture
def answer_volume(tmp_path: Path) -> Path:
    """An ext4 disk file with the label REMETAL whose answer names a repository that is nowhere."""
    import subprocess

    top = tmp_path / "top"
    top.mkdir()
    (top / "remetal-answer.toml").write_text('repository = "nowhere"\npassphrase = "x"\nend = "reboot"\n')
    image = tmp_path / "answer.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-L", "REMETAL", "-d", top, image], check=True)
    return image
