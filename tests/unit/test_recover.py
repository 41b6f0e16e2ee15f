"""Recovering from the medium, on real volumes: which answer counts, where things are found, and what is left behind."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from remetal.errors import RefusedError, RemetalError
from remetal.events import Event, Warn, silent
from remetal.media.answer import FILE_NAME, Answer, CommandLine, parse_command_line
from remetal.media.volumes import AttachedVolume, opened_places, opened_volume, probe_volumes, read_from
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted, probe_mounts
from remetal.workflows.recover import (
    Found,
    Recovery,
    check_first_time,
    choose_answer,
    find_answer,
    leave_log,
    plan_mark,
    recover,
)

ANSWER = b'repository = "backup"\npassphrase = "p"\n'


def new_label() -> str:
    """A label that no other volume of this host has."""
    return f"T{secrets.token_hex(4)}".upper()


@contextmanager
def attached(folder: Path, label: str, files: dict[str, bytes], kind: str = "ext4") -> Iterator[AttachedVolume]:
    """Attach a new file system with these files at its top to this host as a loop device."""
    image = folder / f"{label}-{kind}.img"
    with image.open("wb") as file:
        file.truncate(320 << 20 if kind == "xfs" else 16 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", "-L", label, image], check=True, capture_output=True)
    with attach_loop(Span(image, 0, image.stat().st_size), writable=True) as device:
        with mounted(device, kind=kind) as top:
            for name, data in files.items():
                (top / name).parent.mkdir(parents=True, exist_ok=True)
                (top / name).write_bytes(data)
        yield next(volume for volume in probe_volumes() if volume.device == device)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_looking_into_a_volume_changes_no_byte_of_it(tmp_path: Path, kind: str) -> None:
    if kind == "btrfs":
        image = tmp_path / "b.img"
        with image.open("wb") as file:
            file.truncate(128 << 20)
        subprocess.run(["mkfs.btrfs", "-q", "-L", new_label(), image], check=True, capture_output=True)
        with attach_loop(Span(image, 0, 128 << 20)) as device:
            volume = next(each for each in probe_volumes() if each.device == device)
            before = image.read_bytes()
            assert read_from(volume, FILE_NAME, 1000) is None
            assert str(device) not in [mount.source for mount in probe_mounts()]
        assert image.read_bytes() == before
        return
    with attached(tmp_path, new_label(), {FILE_NAME: ANSWER}, kind) as volume:
        subprocess.run(["sync", "-f", tmp_path], check=True)
        before = volume.device.read_bytes()
        assert read_from(volume, FILE_NAME, 1000) == ANSWER
        assert read_from(volume, "other.toml", 1000) is None
        assert volume.device.read_bytes() == before


def test_a_symbolic_link_is_no_answer(tmp_path: Path) -> None:
    with attached(tmp_path, new_label(), {}) as volume:
        with opened_volume(volume, writable=True) as top:
            (top / FILE_NAME).symlink_to("/etc/hostname")
        assert read_from(volume, FILE_NAME, 1000) is None


def candidate(data: bytes, label: str | None) -> tuple[bytes, str, AttachedVolume | None]:
    volume = None if label is None else AttachedVolume(Path(f"/dev/{label}"), "ext4", label)
    return data, f"the answer on {label}", volume


def test_the_volume_labelled_remetal_goes_first_then_the_medium() -> None:
    stick, baked, other = candidate(b"1", "remetal"), candidate(b"2", None), candidate(b"3", "DATA")
    assert choose_answer([other, baked, stick]) == stick
    assert choose_answer([other, baked]) == baked
    assert choose_answer([other]) == other


def test_two_answers_that_differ_are_refused_by_name() -> None:
    with pytest.raises(RefusedError, match=r"answer on A and .* on B"):
        choose_answer([candidate(b"1", "A"), candidate(b"2", "B")])
    assert choose_answer([candidate(b"1", "A"), candidate(b"1", "B")])[1] == "the answer on A"


def test_the_command_line_goes_before_every_file(tmp_path: Path) -> None:
    baked = tmp_path / FILE_NAME
    baked.write_bytes(ANSWER)
    line = parse_command_line("remetal.repo=usb:X/y remetal.kit-file=/kit")
    found = find_answer(line, silent, baked=baked)
    assert found is not None
    assert (found.origin, found.answer.repository) == ("the kernel's command line", "usb:X/y")
    assert find_answer(CommandLine(mode="shell"), silent, baked=baked) is None
    assert find_answer(CommandLine(mode="dialogue"), silent, baked=baked) is None


def test_an_answer_file_is_found_on_an_attached_volume(tmp_path: Path) -> None:
    label = new_label()
    with attached(tmp_path, label, {"deep/a.toml": ANSWER + b'end = "reboot"\n'}) as volume:
        line = parse_command_line(f"remetal.answer=usb:{label}/deep/a.toml remetal.end=poweroff")
        found = find_answer(line, silent)
        assert found is not None
        assert (found.volume, found.answer.end, found.answer.passphrase) == (volume, "poweroff", "p")
        with pytest.raises(RefusedError, match=f"{label}/deep"):
            find_answer(parse_command_line(f"remetal.answer=usb:{label}/deep"), silent)
        assert str(volume.device) not in [mount.source for mount in probe_mounts()]


def test_the_answer_in_the_medium_is_found(tmp_path: Path) -> None:
    baked = tmp_path / FILE_NAME
    baked.write_bytes(ANSWER)
    found = find_answer(CommandLine(), silent, baked=baked)
    assert found is not None
    assert "in the recovery medium" in found.origin
    baked.write_bytes(b"repo = 1")
    with pytest.raises(RefusedError, match="in the recovery medium"):
        find_answer(CommandLine(), silent, baked=baked)


def test_places_are_found_by_label_by_uuid_and_beside_the_answer(tmp_path: Path) -> None:
    label = new_label()
    with attached(tmp_path, label, {"a/b": b"content"}) as volume, opened_places([volume], volume) as places:
        for text in (f"usb:{label}/a/b", f"uuid:{volume.uuid}/a/b", "a/b"):
            assert places.path(text).read_bytes() == b"content"
        with pytest.raises(RefusedError, match="no 'a/c'"):
            places.path("a/c")
        with pytest.raises(RefusedError, match="label 'ELSEWHERE'") as caught:
            places.path("usb:ELSEWHERE/x")
        assert label in caught.value.hint
    with opened_places([], None) as places, pytest.raises(RefusedError, match="does not say on which volume"):
        places.path("a/b")


def test_a_label_that_two_volumes_have_names_neither(tmp_path: Path) -> None:
    label = new_label()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        volumes = [stack.enter_context(attached(folder, label, {})) for folder in folders]
        with opened_places(volumes, None) as places, pytest.raises(RefusedError, match="several volumes"):
            places.path(f"usb:{label}/x")


def found_on(volume: AttachedVolume | None, **fields: object) -> Found:
    return Found(Answer(repository="backup", passphrase="p", **fields), "the test", volume)  # type: ignore[arg-type]


def test_the_log_of_a_failure_is_left_on_the_answers_volume(tmp_path: Path) -> None:
    with attached(tmp_path, new_label(), {}) as volume:
        recovery = Recovery(found_on(volume), plan=b"{}", mark="finished-1")
        place = leave_log(recovery, b"what was shown", silent)
        assert place is not None
        with opened_volume(volume) as top:
            (folder,) = (top / "remetal-log").iterdir()
            assert {each.name for each in folder.iterdir()} == {"recovery.log", "dmesg.txt", "plan.json"}
            assert (folder / "recovery.log").read_bytes() == b"what was shown"
        check_first_time(recovery)


def test_the_log_of_a_bad_answer_is_left_beside_it(tmp_path: Path) -> None:
    with attached(tmp_path, "REMETAL", {FILE_NAME: b"repo = 1"}) as volume:
        with pytest.raises(RefusedError, match=f"{volume.device} .*repo"):
            find_answer(CommandLine(), silent, baked=tmp_path / "none")
        recovery = Recovery(None)
        assert leave_log(recovery, b"", silent) is not None
        assert recovery.log_volume == volume


def test_a_log_that_cannot_be_left_is_told_and_no_failure(tmp_path: Path) -> None:
    told: list[Event] = []
    with attached(tmp_path, new_label(), {}) as volume:
        pass
    assert leave_log(Recovery(found_on(volume)), b"", told.append) is None
    assert [event for event in told if isinstance(event, Warn)]


def test_a_recovery_that_was_carried_out_is_not_repeated_by_itself(tmp_path: Path) -> None:
    with attached(tmp_path, new_label(), {}) as volume:
        recovery = Recovery(found_on(volume), log_volume=volume, log_folder="deep", mark="finished-1")
        check_first_time(recovery)
        with opened_volume(volume, writable=True) as top:
            (top / "deep/remetal-log").mkdir(parents=True)
            (top / "deep/remetal-log/finished-1").write_text("now")
        with pytest.raises(RefusedError, match="carried out already"):
            check_first_time(recovery)
        recovery.found = found_on(volume, repeat=True)
        check_first_time(recovery)


def test_the_mark_knows_snapshot_and_disks() -> None:
    targets = {"sda": Path("/dev/does-not-exist")}
    mark = plan_mark("1" * 32, targets)
    assert mark == plan_mark("1" * 32, dict(targets))
    assert mark != plan_mark("2" * 32, targets)
    assert mark != plan_mark("1" * 32, {"sda": Path("/dev/other")})


def test_a_recovery_without_its_repository_touches_nothing_and_unmounts_everything(tmp_path: Path) -> None:
    with attached(tmp_path, new_label(), {FILE_NAME: ANSWER}) as volume:
        recovery = Recovery(found_on(volume))
        with pytest.raises(RemetalError, match="no 'backup'"):
            recover(recovery, lambda prepared: None, silent)
        assert recovery.log_volume == volume
        assert recovery.plan == b""
        assert str(volume.device) not in [mount.source for mount in probe_mounts()]


def test_an_answer_names_a_target_twice_and_brings_keys(tmp_path: Path) -> None:
    """Data on a target are lost only where the answer says so; a bad key file is told before anything is touched."""
    source, target = tmp_path / "m.img", tmp_path / "t.img"
    for path, kind, name in ((source, "ext4", "system"), (target, "ext2", "precious")):
        with path.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run([f"mkfs.{kind}", "-q", "-L", name, path], check=True, capture_output=True)
    before = target.read_bytes()
    with attached(tmp_path, new_label(), {"phrase": b"p\n", "empty": b"", "key": b"1234"}) as volume:
        with opened_volume(volume, writable=True) as top:
            options = ["--repo", str(top / "backup"), "--quiet"]
            environment = os.environ | {"REMETAL_STATE": str(tmp_path / "state")}
            remetal = str(Path(sys.executable).with_name("remetal"))
            subprocess.run([remetal, "init", *options, "--passphrase-file", str(top / "phrase")], check=True)
            argv = [remetal, "backup", *options, "--disk", str(source), "--machine", "m"]
            subprocess.run(argv, check=True, env=environment, stdin=subprocess.DEVNULL)

        def carry_out(**fields: object) -> Recovery:
            recovery = Recovery(found_on(volume, map=str(target), pause=0, **fields))
            recover(recovery, lambda prepared: None, silent)
            return recovery

        for fields, told in (
            ({}, "precious"),
            ({"overwrite": (str(source),)}, "which is no target"),
            ({"overwrite": (str(target),), "protect": (str(target),)}, "must not be overwritten"),
            ({"overwrite": (str(target),), "without": ("m.img",)}, "is left out"),
            ({"overwrite": (str(target),), "luks_key_file": {"m.img": "empty"}}, "'empty' is empty"),
            ({"overwrite": (str(target),), "luks_passphrase_file": "empty"}, "first line of 'empty'"),
            ({"overwrite": (str(target),), "luks_key_file": "none"}, "no 'none'"),
            ({"overwrite": (str(target),), "grow": ("m.img:7",)}, "m.img:7"),
        ):
            with pytest.raises(RemetalError, match=told):
                carry_out(**fields)
            assert target.read_bytes() == before
        done = carry_out(overwrite=(str(target),), luks_key_file="key", luks_passphrase_file={"m.img": "phrase"})
        assert done.report is not None
        assert done.report.written > 0
    assert b"system" in target.read_bytes()[: 8 << 10]
