"""The lab's manifest sees every way in which a file can come back wrong, on files that are easily spoiled."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.awkward import make_awkward
from lab.disk import read_partitions
from lab.machine import Recipe, plan_parts
from lab.manifest import compare_manifests, decode_manifest, encode_manifest, show_path, take_manifest
from remetal.units import MIB


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tree"
    make_awkward(folder)
    yield folder
    subprocess.run(["chattr", "-f", "-i", folder / "one-byte"], check=True)


def manifest_of(folder: Path) -> dict[str, dict[str, object]]:
    return take_manifest(str(folder), "/t")


def test_awkward_files_come_out_the_same_twice(tree: Path) -> None:
    again = tree.parent / "again"
    make_awkward(again)
    assert compare_manifests(manifest_of(tree), manifest_of(again)) == []
    subprocess.run(["chattr", "-i", again / "one-byte"], check=True)


def test_a_manifest_survives_as_text(tree: Path) -> None:
    manifest = manifest_of(tree)
    kinds = {str(entry["type"]) for entry in manifest.values()}
    assert kinds == {"file", "folder", "link", "pipe", "socket", "character device", "block device"}
    assert decode_manifest(encode_manifest(manifest)) == manifest


def _change_mode(folder: Path) -> None:
    (folder / "setuid").chmod(0o755)


def _change_owner(folder: Path) -> None:
    os.chown(folder / "link", 1, 1, follow_symlinks=False)


def _change_content(folder: Path) -> None:
    path = folder / "block"
    before = path.stat()
    path.write_bytes(b"X" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _change_time(folder: Path) -> None:
    os.utime(folder / "times/nanoseconds", ns=(0, 1_600_000_000_123_456_000))


def _fill_hole(folder: Path) -> None:
    path = folder / "all-hole"
    before = path.stat()
    path.write_bytes(b"\0" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _break_hard_link(folder: Path) -> None:
    path = folder / "hard-link-2"
    before = path.stat()
    content = path.read_bytes()
    parent = folder.stat()
    path.unlink()
    path.write_bytes(content)
    path.chmod(before.st_mode & 0o7777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(folder, ns=(parent.st_atime_ns, parent.st_mtime_ns))


def _drop_xattr(folder: Path) -> None:
    os.removexattr(folder / "attributes", "trusted.remetal")


def _drop_capability(folder: Path) -> None:
    os.removexattr(folder / "capable", "security.capability")


def _change_acl(folder: Path) -> None:
    subprocess.run(["setfacl", "-m", "u:1234:rwx", folder / "access-list"], check=True)


def _drop_flag(folder: Path) -> None:
    subprocess.run(["chattr", "-i", folder / "one-byte"], check=True)


def _change_target(folder: Path) -> None:
    (folder / "link-not-utf8").unlink()
    (folder / "link-not-utf8").symlink_to(os.fsdecode(b"../\xff\xfd"))


def _change_device(folder: Path) -> None:
    (folder / "null").unlink()
    os.mknod(folder / "null", 0o020666, os.makedev(1, 5))


def _add_file(folder: Path) -> None:
    (folder / "new").touch()


def _lose_file(folder: Path) -> None:
    (folder / "names" / os.fsdecode(b"not-utf8-\xff\xfe\x80")).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_change_mode, r"/t/setuid: mode 6755 became 0755"),
        (_change_owner, r"/t/link: owner 0:0 became 1:1"),
        (_change_content, r"/t/block: content [0-9a-f]{64} became [0-9a-f]{64}$"),
        (_change_time, r"/t/times/nanoseconds: mtime_ns \d+456789 became \d+456000"),
        (_fill_hole, r"/t/all-hole: sparse True became \(none\)"),
        (_break_hard_link, r"/t/hard-link-2: links 3 became \(none\); same_as /t/hard-link-1 became \(none\)"),
        (_drop_xattr, r"/t/attributes: xattrs .*trusted\.remetal"),
        (_drop_capability, r"/t/capable: xattrs .*security\.capability.* became \(none\)"),
        (_change_acl, r"/t/access-list: .*xattrs .*system\.posix_acl_access"),
        (_drop_flag, r"/t/one-byte: flags \[\"immutable\"\] became \(none\)"),
        (_change_target, r"/t/link-not-utf8: .*target \.\./\\xff\\xfe became \.\./\\xff\\xfd"),
        (_change_device, r"/t/null: device 1:3 became 1:5"),
        (_add_file, r"/t/new: was not there before \(file\)"),
        (_lose_file, r"/t/names/not-utf8-\\xff\\xfe\\x80: missing \(file\)"),
    ],
)
def test_every_loss_is_seen(tree: Path, spoil: Callable[[Path], None], said: str) -> None:
    before = manifest_of(tree)
    spoil(tree)
    differences = compare_manifests(before, manifest_of(tree))
    assert any(re.search(said, each) for each in differences), differences


def test_paths_that_do_not_count() -> None:
    entry = {"type": "file"}
    before = {"/a": entry, "/a/b": entry, "/ab": entry}
    assert compare_manifests(before, {}, without=("/a",)) == ["/ab: missing (file)"]


def test_fat_is_compared_without_what_it_does_not_keep(tmp_path: Path) -> None:
    for name, mode in (("one", 0o644), ("two", 0o755)):
        folder = tmp_path / name / ("EFI" if name == "one" else "efi")
        folder.mkdir(parents=True)
        (folder / "File.efi").write_bytes(b"x")
        (folder / "File.efi").chmod(mode)
    one, two = (take_manifest(str(tmp_path / name), "/boot/efi", plain=True) for name in ("one", "two"))
    assert one == two
    assert list(one) == ["/boot/efi", "/boot/efi/EFI", "/boot/efi/EFI/FILE.EFI"]


@given(st.binary(min_size=1, max_size=40))
def test_any_name_can_be_shown_and_told_apart_as_text(name: bytes) -> None:
    path = os.fsdecode(name)
    assert show_path(path).isprintable()
    assert decode_manifest(encode_manifest({path: {"type": "file"}})) == {path: {"type": "file"}}


@pytest.mark.parametrize("table", ["gpt", "mbr"])
def test_the_plan_of_partitions_is_what_sfdisk_makes(tmp_path: Path, table: str) -> None:
    recipe = Recipe(table=table, size=1024 * MIB)  # type: ignore[arg-type]
    disk = tmp_path / "sdp1"
    disk.touch()
    os.truncate(disk, recipe.size)
    parts = plan_parts(recipe)
    script = f"label: {'dos' if table == 'mbr' else 'gpt'}\n"
    script += "".join(f"{part.number}: {part.table_line}\n" for part in parts)
    subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)
    spans = read_partitions(disk)
    assert list(spans) == [part.number for part in parts]
    assert max(span.start + span.size for span in spans.values()) > recipe.size - 2 * MIB
