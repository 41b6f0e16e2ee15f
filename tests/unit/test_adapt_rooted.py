"""Paths inside a restored system never lead out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from remetal.adapt.rooted import find_inside, read_inside
from remetal.adapt.roots import parse_os_release


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("secret")
    root = tmp_path / "root"
    (root / "usr/lib").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "usr/lib/os-release").write_text("ID=debian\n")
    return root


def test_links_are_followed_as_the_restored_system_would(root: Path) -> None:
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "etc/absolute").symlink_to("/usr/lib/os-release")
    (root / "lib").symlink_to("usr/lib")
    (root / "etc/folder").symlink_to("/lib")
    for path in ("/etc/os-release", "etc/absolute", "/lib/os-release", "//etc/./folder/../lib/os-release"):
        assert read_inside(root, path) == b"ID=debian\n", path


@pytest.mark.parametrize(
    "target", ["../../outside", "../../../../../../etc/passwd", "/../outside", "{root}/../outside", "/outside"]
)
def test_no_link_leads_out(root: Path, target: str) -> None:
    (root / "etc/fstab").symlink_to(target.format(root=root))
    assert read_inside(root, "/etc/fstab") is None
    place = find_inside(root, "/etc/fstab")
    assert place is None or place.is_relative_to(root)
    assert find_inside(root, "/../../..") == root


def test_loops_gaps_and_other_kinds_are_nothing(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("/a")
    assert find_inside(root, "/a") is None
    assert find_inside(root, "/nowhere/deeper") is None
    assert find_inside(root, "/usr/lib/os-release/below") is None
    assert find_inside(root, "/nul\0byte") is None
    assert read_inside(root, "/etc") is None
    assert read_inside(root, "/usr/lib/os-release", limit=3) is None


def test_os_release() -> None:
    text = "# comment\nID=debian\nPRETTY_NAME=\"A 'b' \\\"c\\\"\"\nBROKEN='x\nID_LIKE='a b'\nnothing\n\n"
    assert parse_os_release(text) == {"ID": "debian", "PRETTY_NAME": "A 'b' \"c\"", "ID_LIKE": "a b"}
