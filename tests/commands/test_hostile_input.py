"""What a tired, unlucky or hostile administrator types and has: a sentence, the right exit code, no wrong byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import REMETAL, Site, hash_file, list_tree

NOT_UTF8 = b"\xff\xfe".decode("utf-8", "surrogateescape")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A small disk file with content that nobody knows."""
    path = tmp_path / "d.img"
    path.write_bytes(bytes(MIB) + os.urandom(MIB) + bytes(MIB))
    return path


def run_into(site: Site, stdout: int | str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program with its standard output going to a file descriptor or a place."""
    target = os.open(stdout, os.O_WRONLY) if isinstance(stdout, str) else stdout
    try:
        return subprocess.run(
            [REMETAL, *words],
            stdout=target,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=site.environment,
            check=False,
        )
    finally:
        os.close(target)


@pytest.mark.parametrize("word", ["", "-rf", "$(x)\n\x1b[31mred", NOT_UTF8, "a" * 100_000])
def test_a_strange_word_is_told_without_harm(site: Site, word: str) -> None:
    for words in ([word], ["snapshots", word, "--json"], ["backup", "--machine", word]):
        told = site.remetal(*words, code=None)
        assert told.code in {2, 3}
        assert "\x1b" not in told.err
        assert len(told.err) < 20_000
    assert site.remetal("show", "--json", "--", word, code=2).json["error"]["exit_code"] == 2


@pytest.mark.parametrize("name", ["a[/b] c", "two\nlines \x1b[31m", NOT_UTF8])
def test_a_repository_and_a_disk_of_any_name(tmp_path: Path, disk: Path, name: str) -> None:
    site = Site(tmp_path)
    folder = tmp_path / name.replace("/", "-")
    strange = tmp_path / f"{name.replace('/', '-')}.img"
    disk.rename(strange)
    told = site.remetal("init", "--repo", folder)
    assert "RECOVERY KIT" in told.out
    assert "\x1b" not in told.out
    made = site.remetal("backup", "--repo", folder, "--disk", strange, "--tag", "[/red]", "--json")
    assert made.json["sequence"] == 1
    assert "[/red]" in site.remetal("snapshots", "--repo", folder).out
    site.remetal("check", "--repo", folder, "--json")


def test_the_kit_is_never_lost_to_a_bad_page(tmp_path: Path) -> None:
    site = Site(tmp_path)
    before = site.secret.read_bytes()
    for page in (site.secret, tmp_path / "nowhere" / "kit.html"):
        site.remetal("init", "--kit-page", page, code=2)
    assert not site.repository.exists()
    assert site.secret.read_bytes() == before
    site.remetal("init", "--kit-page", tmp_path / "kit.html")
    assert (tmp_path / "kit.html").stat().st_mode & 0o777 == 0o600
    site.remetal("init", "--kit-page", tmp_path / "again.html", code=3)
    assert not (tmp_path / "again.html").exists()


def test_the_kit_names_options_that_exist(site: Site, tmp_path: Path) -> None:
    page = tmp_path / "kit.html"
    text = site.remetal("key", "kit", "--kit-page", page).out
    for each in (text, page.read_text()):
        assert each.count("--kit-file FILE") == 1
        assert "--kit FILE" not in each
    (tmp_path / "kit").write_text(text)
    assert site.remetal("snapshots", "--kit-file", tmp_path / "kit", "--json").json == []


def test_a_kit_goes_before_the_passphrase_of_the_environment(site: Site, tmp_path: Path) -> None:
    (tmp_path / "kit").write_text(site.remetal("key", "kit", "--json").json["kit"])
    site.secret.write_text("forgotten and wrong\n")
    assert site.remetal("snapshots", "--kit-file", tmp_path / "kit", "--json").json == []
    both = ("--kit-file", tmp_path / "kit", "--passphrase-file", tmp_path / "other")
    assert "exclude" in site.remetal("snapshots", *both, code=2).err


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\xfd", b"x" * 2_000_000, None])
def test_a_passphrase_or_kit_file_that_is_none(site: Site, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "secret"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    del site.environment["REMETAL_PASSPHRASE_FILE"]
    assert str(file) in site.remetal("snapshots", "--passphrase-file", file, code=2).err
    assert site.remetal("snapshots", "--kit-file", file, code=None).code in {2, 3}
    site.remetal("init", "--repo", tmp_path / "new", "--passphrase-file", file, code=2)
    assert not (tmp_path / "new").exists()


def test_places_that_can_be_no_repository(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    assert "not a folder" in site.remetal("init", "--repo", tmp_path / "file", code=6).err
    assert "mounted" in site.remetal("init", "--repo", tmp_path / "link", code=6).err
    assert "too long" in site.remetal("init", "--repo", tmp_path / ("a" * 300), code=6).err
    for wrong in ("~/backup", "file:relative", "ftp://x", "file://elsewhere/x"):
        site.remetal("init", "--repo", wrong, code=2)


@pytest.mark.parametrize("words", [["snapshots"], ["snapshots", "--json"], ["key", "kit"], ["check", "--json"]])
def test_output_that_nobody_takes(site: Site, words: list[str]) -> None:
    full = run_into(site, "/dev/full", *words)
    assert full.returncode == 1
    assert "standard output" in full.stderr
    assert "Traceback" not in full.stderr
    reader, writer = os.pipe()
    os.close(reader)
    gone = run_into(site, writer, *words)
    assert gone.returncode == 1
    assert "Traceback" not in gone.stderr
    assert "Exception" not in gone.stderr


def test_a_full_log_and_closed_streams_stop_no_backup_and_no_restore(site: Site, disk: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.img"
    commands: list[list[str | Path]] = [["backup", "--disk", disk], ["restore", "latest", "--map", new, "--yes"]]
    for words in commands:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [REMETAL, *words], env=site.environment, check=False, stdout=subprocess.DEVNULL, stderr=full
            )
        assert done.returncode == 0, words
    assert hash_file(new) == hash_file(disk)
    script = f'"{REMETAL}" restore latest --map "{new}" --yes <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", script], env=site.environment, check=False).returncode == 0
    assert hash_file(new) == hash_file(disk)


def test_every_error_is_one_json_document(site: Site, disk: Path) -> None:
    commands: list[list[str | Path]] = [
        ["init"],
        ["probe", "--disk", "missing.img"],
        ["backup", "--disk", "missing.img"],
        ["show", "latest"],
        ["plan", "latest"],
        ["restore", "latest", "--yes"],
        ["export", "latest", "sda", "-o", "x.raw"],
        ["check", "--passphrase-file", disk],
        ["key"],
        ["key", "nonsense"],
        ["media", "build"],
        ["recovery"],
        ["nonsense"],
    ]
    for words in commands:
        told = site.remetal(*words, "--json", code=None)
        assert told.json["error"]["exit_code"] == told.code, words
        assert told.code in {1, 2, 3}


def test_two_names_of_one_disk(site: Site, tmp_path: Path, disk: Path) -> None:
    other = tmp_path / "other" / disk.name
    other.parent.mkdir()
    other.write_bytes(os.urandom(2 * MIB))
    (tmp_path / "hard.img").hardlink_to(disk)
    (tmp_path / "soft.img").symlink_to(disk)
    for same in ("hard.img", "soft.img", "d.img"):
        assert "twice" in site.remetal("backup", "--disk", disk, "--disk", tmp_path / same, code=3).err
    with attach_loop(Span(disk, 0, 3 * MIB)) as device:
        assert "twice" in site.remetal("backup", "--disk", device, "--disk", disk, code=3).err
    site.remetal("backup", "--disk", disk, "--disk", other)
    (tmp_path / "one.img").write_bytes(bytes(4 * MIB))
    (tmp_path / "two.img").hardlink_to(tmp_path / "one.img")
    maps = ("--map", f"d.img={tmp_path / 'one.img'}", "--map", f"d.img-2={tmp_path / 'two.img'}")
    before = hash_file(tmp_path / "one.img")
    assert "same" in site.remetal("restore", "latest", *maps, "--yes", code=3).err
    assert hash_file(tmp_path / "one.img") == before
    apart = ("--map", f"d.img={tmp_path / 'x.img'}", "--map", f"d.img-2={tmp_path / 'y.img'}")
    site.remetal("restore", "latest", *apart, "--yes", "--verify")
    assert hash_file(tmp_path / "x.img") == hash_file(disk)
    assert hash_file(tmp_path / "y.img") == hash_file(other)


def test_a_disk_file_with_half_a_sector_of_data_loses_nothing_silently(site: Site, tmp_path: Path, disk: Path) -> None:
    with disk.open("ab") as file:
        file.write(b"the end")
    assert "last 7 bytes" in site.remetal("backup", "--disk", disk, code=3).err
    subprocess.run(["truncate", "--size=%512", disk], check=True)
    site.remetal("backup", "--disk", disk)
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes")
    assert hash_file(tmp_path / "new.img") == hash_file(disk)


def test_targets_that_cannot_be_written_are_refused_before_the_first_write(
    site: Site, tmp_path: Path, disk: Path
) -> None:
    site.remetal("backup", "--disk", disk)
    fixed = tmp_path / "fixed.img"
    fixed.write_bytes(bytes(3 * MIB))
    wrong: list[Path | str] = [tmp_path, "/dev/null", "/dev/nothing", tmp_path / NOT_UTF8, tmp_path / ("a" * 300)]
    subprocess.run(["chattr", "+i", fixed], check=True)
    try:
        for target in [*wrong, fixed]:
            site.remetal("restore", "latest", "--map", target, "--yes", code=3)
    finally:
        subprocess.run(["chattr", "-i", fixed], check=True)
    assert fixed.read_bytes() == bytes(3 * MIB)
    with attach_loop(Span(fixed, 0, 3 * MIB)) as device:
        assert "read-only" in site.remetal("restore", "latest", "--map", device, "--yes", code=3).err


def test_a_repository_by_a_url_is_found_on_its_disk(site: Site, tmp_path: Path, disk: Path) -> None:
    """The check that a target does not hold the repository follows every way to name it."""
    site.remetal("backup", "--disk", disk)
    spaced = tmp_path / "my backup"
    site.repository.rename(spaced)
    victim = spaced / "victim.img"
    victim.write_bytes(bytes(3 * MIB))
    (tmp_path / "link").symlink_to(spaced)
    for name in (f"file://{tmp_path}/my%20backup", f"file://localhost{tmp_path}/my%20backup", tmp_path / "link"):
        told = site.remetal("restore", "latest", "--repo", name, "--map", victim, "--yes", code=3)
        assert "repository" in told.err
    assert victim.read_bytes() == bytes(3 * MIB)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_whose_free_map_lies_is_captured_whole(site: Site, tmp_path: Path, kind: str) -> None:
    """One damaged block makes used blocks look free: nothing of them may be missing in the backup."""
    disk = tmp_path / "fs.img"
    with disk.open("wb") as file:
        file.truncate(320 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", disk], check=True)
    with attach_loop(Span(disk, 0, 320 * MIB), writable=True) as device, mounted(device) as folder:
        for number in range(20):
            (folder / f"file-{number}").write_bytes(os.urandom(MIB))
    with attach_loop(Span(disk, 0, 320 * MIB)) as device, mounted(device, options=("ro",)) as folder:
        files = list_tree(folder)
    with disk.open("r+b") as file:
        if kind == "xfs":  # the first record of the free space tree by block number: all of the group is free
            file.seek(4096 + 56)
            file.write(bytes([0, 0, 0, 13, 0, 0, 0x4F, 0]))
        else:
            text = subprocess.run(["dumpe2fs", disk], check=True, capture_output=True, text=True).stdout
            block = int(text.partition("Block bitmap at ")[2].split()[0])
            size = int(text.partition("Block size:")[2].split()[0])
            file.seek(block * size)
            file.write(bytes(size))
    assert site.remetal("backup", "--disk", disk, "--json").json["used"] == 320 * MIB
    new = tmp_path / "new.img"
    site.remetal("restore", "latest", "--map", new, "--yes", "--no-adapt")
    assert hash_file(new) == hash_file(disk)
    with attach_loop(Span(new, 0, 320 * MIB)) as device, mounted(device, options=("ro",)) as folder:
        assert list_tree(folder) == files


def test_a_damaged_boot_sector_hides_no_file_system(site: Site, tmp_path: Path) -> None:
    disk = tmp_path / "fat.img"
    with disk.open("wb") as file:
        file.truncate(20 * MIB)
    subprocess.run(["mkfs.vfat", disk], check=True, capture_output=True)
    subprocess.run(["mcopy", "-i", disk, "/etc/os-release", "::HELLO.TXT"], check=True)
    with disk.open("r+b") as file:
        file.seek(11)
        file.write(b"\xff\xff\xff")
    assert "captured whole" in site.remetal("backup", "--disk", disk).err
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes")
    assert hash_file(tmp_path / "new.img") == hash_file(disk)


def test_lost_machine_keys_start_a_new_chain_and_say_so(site: Site, tmp_path: Path, disk: Path) -> None:
    first = site.remetal("backup", "--disk", disk, "--machine", "web1", "--json").json
    (tmp_path / "state").rename(tmp_path / "lost")
    told = site.remetal("backup", "--disk", disk, "--machine", "web1", "--json")
    assert "whose keys are not in" in told.err
    new = tmp_path / "new.img"
    unclear = site.remetal("restore", "latest", "--machine", "web1", "--map", new, "--yes", code=2)
    assert first["machine_id"][:12] in unclear.err
    for done in (first, told.json):
        one = site.remetal("show", "latest", "--machine", done["machine_id"][:12], "--json").json
        assert one["id"] == done["snapshot"]
    site.remetal("check")


def test_a_machine_without_the_rights_of_root_is_told_before_anything_is_touched(
    site: Site, machine_disk: Path, tmp_path: Path
) -> None:
    """As in a container: the user is root, and may not attach or mount anything."""

    def powerless(*words: str | Path) -> subprocess.CompletedProcess[str]:
        argv = ["setpriv", "--bounding-set=-sys_admin", REMETAL, *words]
        return subprocess.run(argv, env=site.environment, check=False, capture_output=True, text=True)

    done = powerless("backup", "--disk", machine_disk)
    assert (done.returncode, "sudo" in done.stderr) == (3, True), done.stderr
    site.remetal("backup", "--disk", machine_disk)
    done = powerless("restore", "latest", "--map", tmp_path / "new.img", "--yes")
    assert (done.returncode, "sudo" in done.stderr) == (3, True), done.stderr
    assert not (tmp_path / "new.img").exists()


def test_keys_that_cannot_be_kept_enroll_no_machine(site: Site, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    site.remetal("backup", "--disk", disk, code=3, REMETAL_STATE=str(tmp_path / "file"))
    site.remetal("backup", "--disk", disk, code=3, REMETAL_STATE="/proc/nowhere")
    assert {each["kind"] for each in site.remetal("key", "list", "--json").json} == {"recipient", "passphrase"}


def test_a_lost_connection_ends_a_restore_like_ctrl_c(site: Site, machine_disk: Path, tmp_path: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    new = tmp_path / "new.img"
    running = site.start("restore", "latest", "--map", new, "--yes")
    while running.poll() is None and not new.exists():
        pass
    running.send_signal(signal.SIGHUP)
    assert running.wait() in {0, 4}
    site.remetal("restore", "latest", "--map", new, "--yes", "--verify")


def test_results_are_json_for_every_command_that_has_one(site: Site, disk: Path, tmp_path: Path) -> None:
    site.remetal("backup", "--disk", disk, "--quiet")
    for words in (
        ["snapshots"],
        ["show", "latest"],
        ["probe", "--disk", disk],
        ["plan", "latest", "--map", tmp_path / "x.img"],
        ["check", "--read-data"],
        ["key", "list"],
        ["key", "kit"],
        ["key", "accept"],
        ["export", "latest", "d.img", "-o", tmp_path / "x.qcow2"],
    ):
        done = site.remetal(*words, "--json", "--quiet")
        json.loads(done.out)
        assert done.err == ""


def test_foreign_files_in_the_repository_do_no_harm(site: Site, disk: Path, tmp_path: Path) -> None:
    site.remetal("backup", "--disk", disk)
    for folder in ("", "packs", "history", "index", "keys/machines", "locks"):
        (site.repository / folder).mkdir(exist_ok=True)
        (site.repository / folder / "Thumbs.db").write_text("not ours")
        (site.repository / folder / "link").symlink_to("/etc")
        os.mkfifo(site.repository / folder / "pipe")
    with (site.repository / "history" / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert len(site.remetal("snapshots", "--json").json) == 1
    site.remetal("backup", "--disk", disk)
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes")
    assert hash_file(tmp_path / "new.img") == hash_file(disk)


def test_a_repository_that_lost_its_config_is_damaged_not_absent(site: Site, disk: Path) -> None:
    site.remetal("backup", "--disk", disk)
    config = site.repository / "config"
    saved = config.read_bytes()
    config.unlink()
    for words in (["snapshots"], ["check"], ["backup", "--disk", str(disk)]):
        assert "config is missing" in site.remetal(*words, code=5).err
    site.remetal("init", code=3)
    config.write_bytes(saved)
    site.remetal("check")


def test_the_second_recipient_opens_what_was_backed_up_after_it_was_accepted(
    site: Site, disk: Path, tmp_path: Path
) -> None:
    site.remetal("backup", "--disk", disk)
    escrow = tmp_path / "escrow"
    escrow.write_text("another long passphrase\n")
    site.remetal("key", "add-recipient", "--new-passphrase-file", escrow)
    with disk.open("r+b") as file:
        file.write(os.urandom(MIB))
    assert "key accept" in site.remetal("backup", "--disk", disk).err
    new = tmp_path / "new.img"
    told = site.remetal("restore", "latest", "--map", new, "--yes", "--passphrase-file", escrow, code=3)
    assert "first recipient" in told.err
    assert not new.exists()
    site.remetal("key", "accept")
    with disk.open("r+b") as file:
        file.write(os.urandom(3 * MIB))
    site.remetal("backup", "--disk", disk)
    site.remetal("restore", "latest", "--map", new, "--yes", "--passphrase-file", escrow)
    assert hash_file(new) == hash_file(disk)
    words = ("key", "remove-passphrase", "--passphrase-file", escrow)
    assert "the only passphrase of recipient" in site.remetal(*words, code=3).err
    site.remetal(*words, "--even-last")
    assert "only passphrase" in site.remetal("key", "remove-passphrase", code=3).err
