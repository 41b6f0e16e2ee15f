"""The hooks' file, and who is told what, when and in which order, whatever fails in between."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remetal.applications import APPLICATIONS
from remetal.applications.contract import Moment, Phase
from remetal.applications.hooks import Hook, HookFailedError, Hooks
from remetal.applications.settings import read_hooks
from remetal.errors import RefusedError, RemetalError, UsageError
from remetal.events import Event, Note, Step, Warn

ALL = '["before-freeze", "frozen", "after-thaw", "after-backup"]'


class Told:
    """Programs `a`, `b` and `c` that write down when they were called, and what was reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.events: list[Event] = []

    def hooks(self, *tables: str, **scripts: str) -> Hooks:
        """Return hooks of tables; a script may do more than write down the call."""
        for name in ("a", "b", "c"):
            program = self.folder / name
            program.write_text(f'#!/bin/sh\necho "{name} $REMETAL_PHASE" >> {self.log}\n{scripts.get(name, "")}\n')
            program.chmod(0o755)
        return Hooks(self.read(*tables), machine="web1", report=self.events.append)

    def read(self, *tables: str) -> list[Hook]:
        file = self.folder / "hooks.toml"
        file.write_text("".join(f"[[hook]]\n{each}\n" for each in tables))
        return read_hooks(file)

    def at(self, name: str, phases: str = ALL, more: str = "") -> str:
        return f'run = ["{self.folder / name}"]\nat = {phases}\n{more}\n'

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def go_through(hooks: Hooks, snapshot: str | None = "cafe") -> None:
    with hooks.backup():
        with hooks.quiet([Path("/"), Path("/srv/my data")]):
            hooks.frozen()
        hooks.snapshot = snapshot


def test_the_order_is_that_of_the_file_and_then_the_opposite(told: Told) -> None:
    go_through(told.hooks(told.at("a"), told.at("b")))
    before = ["a before-freeze", "b before-freeze", "a frozen", "b frozen"]
    assert told.lines == [*before, "b after-thaw", "a after-thaw", "b after-backup", "a after-backup"]
    assert told.events == [Step("Making ready: a, b")]


def test_nobody_is_called_at_other_phases(told: Told) -> None:
    go_through(told.hooks(told.at("a", '["after-thaw"]'), told.at("b", '["frozen"]')))
    assert told.lines == ["b frozen", "a after-thaw"]
    assert told.events == []


@pytest.mark.parametrize(("snapshot", "result"), [("cafe", "complete"), (None, "failed")])
def test_a_program_is_told_what_goes_on(told: Told, snapshot: str | None, result: str) -> None:
    show = f'env | grep ^REMETAL_ | sort > {told.folder}/env-$REMETAL_PHASE; echo "$REMETAL_FOLDERS" > {told.folder}/in'
    go_through(told.hooks(told.at("a"), a=show), snapshot)
    assert (told.folder / "in").read_text() == "/\n/srv/my data\n"
    for phase in ("before-freeze", "frozen", "after-thaw"):
        lines = (told.folder / f"env-{phase}").read_text().splitlines()
        assert lines == ["REMETAL_FOLDERS=/", "REMETAL_MACHINE=web1", f"REMETAL_PHASE={phase}"]
    last = (told.folder / "env-after-backup").read_text().splitlines()
    assert f"REMETAL_RESULT={result}" in last
    assert ("REMETAL_SNAPSHOT=cafe" in last) == (snapshot is not None)


def test_what_it_prints_is_told_and_bounded(told: Told) -> None:
    go_through(told.hooks(told.at("a", '["before-freeze"]'), a="seq 30; printf '\\033[31m%0500d\\n' 7 >&2"))
    notes = [each.text for each in told.events if isinstance(each, Note)]
    assert notes[:2] == ["hook 1 (a): 1", "hook 1 (a): 2"]
    assert notes[-1] == "hook 1 (a): … and 11 lines more"
    assert len(notes) == 21
    assert all(each.isprintable() and len(each) < 350 for each in notes)


def test_what_is_said_while_frozen_is_reported_when_they_are_let_go(told: Told) -> None:
    hooks = told.hooks(told.at("a", '["frozen"]', 'on-failure = "continue"'), a="echo cold; exit 1")
    with hooks.quiet([]):
        hooks.frozen()
        assert told.events == []
    assert [type(each) for each in told.events] == [Warn]


@pytest.mark.parametrize("phase", ["before-freeze", "frozen", "after-thaw"])
def test_a_failure_ends_the_backup_and_whoever_began_is_told_after(told: Told, phase: str) -> None:
    bad = f'[ "$REMETAL_PHASE" != {phase} ] || {{ echo no room >&2; exit 7; }}'
    with pytest.raises(HookFailedError) as caught:
        go_through(told.hooks(told.at("a"), told.at("b"), told.at("c"), b=bad), None)
    assert caught.value.message == (
        f"hook 2 (b) failed at {phase}: {told.folder / 'b'} failed with exit code 7: no room"
    )
    assert "Nothing is listed of this backup" in caught.value.hint
    begun = ["a", "b"] if phase == "before-freeze" else ["a", "b", "c"]
    assert [each for each in told.lines if "after-thaw" in each] == [f"{each} after-thaw" for each in reversed(begun)]
    assert [each for each in told.lines if "after-backup" in each] == [f"{each} after-backup" for each in "cba"]


@pytest.mark.parametrize("phase", ["before-freeze", "frozen", "after-thaw", "after-backup"])
def test_a_failure_may_be_a_warning(told: Told, phase: str) -> None:
    bad = f'[ "$REMETAL_PHASE" != {phase} ] || exit 7'
    go_through(told.hooks(told.at("a"), told.at("b", more='on-failure = "continue"'), told.at("c"), b=bad))
    assert len(told.lines) == 12
    warnings = [each.text for each in told.events if isinstance(each, Warn)]
    assert warnings == [f"hook 2 (b) failed at {phase}: {told.folder / 'b'} failed with exit code 7"]


def test_a_failure_after_the_backup_says_that_it_is_complete(told: Told) -> None:
    bad = '[ "$REMETAL_PHASE" != after-backup ] || exit 7'
    with pytest.raises(HookFailedError) as caught:
        go_through(told.hooks(told.at("a"), told.at("b"), b=bad))
    assert "The backup is complete: snapshot cafe." in caught.value.hint
    assert told.lines[-1] == "a after-backup"


def test_a_later_failure_does_not_cover_up_the_first(told: Told) -> None:
    bad = '[ "$REMETAL_PHASE" = before-freeze ] || exit 7'
    with pytest.raises(RemetalError, match="the disk is gone"), told.hooks(told.at("a"), a=bad).quiet([]):
        raise RemetalError("the disk is gone")
    assert [each.text for each in told.events if isinstance(each, Warn)] == [
        f"hook 1 (a) failed at after-thaw: {told.folder / 'a'} failed with exit code 7"
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RefusedError("cannot be held still"), RuntimeError()])
def test_whoever_began_is_told_after_whatever_happens(told: Told, error: BaseException) -> None:
    hooks = told.hooks(told.at("a"), told.at("b"))
    with pytest.raises(type(error)), hooks.backup(), hooks.quiet([]):
        raise error
    assert told.lines[2:] == ["b after-thaw", "a after-thaw", "b after-backup", "a after-backup"]


def test_a_limit_is_kept_and_said(told: Told) -> None:
    hooks = told.hooks(told.at("a", '["before-freeze"]', "limit = 0.5"), a="sleep 60")
    with pytest.raises(HookFailedError, match=r"did not end within 0\.5 s and was stopped"):
        go_through(hooks)


def test_a_program_that_is_not_there_may_be_a_warning(told: Told) -> None:
    go_through(told.hooks(told.at("none", '["frozen"]', 'on-failure = "continue"')))
    with pytest.raises(HookFailedError, match="there is no program /"):
        go_through(told.hooks(told.at("none", '["frozen"]')))


RUN = 'run = ["/bin/true"]\n'
AT = 'at = ["frozen"]\n'


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "it needs either application or run"),
        (f'{RUN}{AT}application = "redis"', "it needs either application or run"),
        ('application = "oracle"', "there is no application 'oracle'"),
        ("application = 7", "there is no application 7"),
        (f'{RUN}at = ["before-sunrise"]', "Invalid enum value 'before-sunrise'"),
        (RUN, "missing required field `at`"),
        (f"{RUN}at = []", "at is empty"),
        (f"run = []\n{AT}", "run is empty"),
        (f'run = "/bin/true"\n{AT}', "Expected `array`, got `str`"),
        (f'run = ["true"]\n{AT}', "'true' is no whole path"),
        (f'run = ["../true"]\n{AT}', "'../true' is no whole path"),
        (f'run = [""]\n{AT}', "'.' is no whole path"),
        ('application = "mariadb"\noptions = "my.cnf"', "'my.cnf' is no whole path"),
        (f"{RUN}{AT}limit = 0", "limit = 0 is no time"),
        (f"{RUN}{AT}limit = -1", "limit = -1 is no time"),
        (f"{RUN}{AT}limit = nan", "limit = nan is no time"),
        (f"{RUN}{AT}limit = inf", "limit = inf is no time"),
        (f'{RUN}{AT}limit = "30"', "Expected `float`, got `str`"),
        (f'{RUN}{AT}on-failure = "stop"', "Invalid enum value 'stop'"),
        (f"{RUN}{AT}retries = 3", "unknown field `retries`"),
    ],
)
def test_what_the_file_cannot_say_is_refused(told: Told, table: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        told.read(f"{RUN}{AT}", table)
    assert caught.value.message.startswith(f"{told.folder / 'hooks.toml'}, hook 2: ")
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["[[hook]", "[[hooks]]\n", "hook = 7", "hook = [7]", "\xff"])
def test_what_is_no_file_of_hooks_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hooks.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="holds no hooks"):
        read_hooks(file)
    with pytest.raises(UsageError, match="cannot read the hooks"):
        read_hooks(tmp_path / "none")


def test_every_application_has_defaults(told: Told) -> None:
    for name in APPLICATIONS:
        (hook,) = told.read(f'application = "{name}"')
        assert hook.label == f"hook 1 ({name})"


def owned_by_another(path: Path) -> None:
    os.chown(path, 65534, 65534)


def owned_by_root(path: Path) -> None:
    os.chown(path, 0, 0)
    path.chmod(0o755)


def writable_by_a_group(path: Path) -> None:
    path.chmod(0o775)


def writable_by_all(path: Path) -> None:
    path.chmod(0o757)


@pytest.mark.parametrize("spoil", [owned_by_another, writable_by_a_group, writable_by_all])
@pytest.mark.parametrize("what", ["hooks.toml", "program", "tools", "behind"])
def test_what_others_may_change_is_not_obeyed(tmp_path: Path, what: str, spoil: Callable[[Path], None]) -> None:
    tools, behind = tmp_path / "tools", tmp_path / "behind"
    for folder in (tools, behind):
        folder.mkdir()
    program = tools / "program"
    program.symlink_to(behind / "program")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "hooks.toml"
    file.write_text(f'[[hook]]\nrun = ["{program}"]\n{AT}')
    assert read_hooks(file)
    spoil(program if what == "program" else tmp_path / what)
    with pytest.raises(RefusedError, match=r"would be obeyed as root, but .* (belongs to user|may be changed by)"):
        read_hooks(file)


@pytest.mark.parametrize("table", ['application = "mariadb"\noptions', 'application = "redis"\npassword-file'])
def test_neither_are_files_that_an_application_obeys(tmp_path: Path, told: Told, table: str) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    assert told.read(f'{table} = "{secret}"')
    owned_by_another(secret)
    with pytest.raises(RefusedError, match=r"hooks.toml, hook 1: .*/secret belongs to user 65534"):
        told.read(f'{table} = "{secret}"')


def test_neither_is_one_that_somebody_may_put_there_later(told: Told) -> None:
    folder = told.folder / "app"
    folder.mkdir()
    owned_by_another(folder)
    with pytest.raises(RefusedError, match=r"would be obeyed as root, but .*/app belongs to user"):
        told.read(f'run = ["{folder}/hook"]\nat = {ALL}\n')


def test_neither_is_one_behind_a_link_that_others_may_change(told: Told) -> None:
    """Though both the link that is named, and the file that is found, are root's."""
    hooks = told.hooks(told.at("a"))
    folder = told.folder / "app"
    folder.mkdir()
    (folder / "middle").symlink_to(told.folder / "a")
    (told.folder / "first").symlink_to(folder / "middle")
    assert told.read(told.at("first"))
    owned_by_another(folder)
    with pytest.raises(RefusedError, match=r"would be obeyed as root, but .*/app belongs to user"):
        told.read(told.at("first"))
    (folder / "middle").unlink()
    folder.chmod(0o755)
    os.chown(folder, 0, 0)
    (folder / "middle").symlink_to("middle")
    with pytest.raises(RefusedError, match="Too many levels"):
        told.read(told.at("first"))
    go_through(hooks)


def test_it_is_looked_at_again_when_it_is_to_run(told: Told) -> None:
    hooks = told.hooks(told.at("a"))
    owned_by_another(told.folder / "a")
    with pytest.raises(HookFailedError, match=r"would be obeyed as root, but .*/a belongs to user"):
        go_through(hooks)
    assert told.lines == []


@pytest.mark.parametrize("spoil", [owned_by_another, writable_by_all])
def test_one_that_others_may_change_by_then_is_run_by_nobody(told: Told, spoil: Callable[[Path], None]) -> None:
    hooks = told.hooks(told.at("a"), told.at("b"))
    with (
        pytest.raises(HookFailedError, match=r"hook 1 \(a\) failed at after-thaw: .*would be obeyed as root"),
        hooks.quiet([]),
    ):
        spoil(told.folder / "a")
    owned_by_root(told.folder / "a")
    del hooks
    gc.collect()  # as when remetal ends
    time.sleep(0.5)
    assert told.lines == ["a before-freeze", "b before-freeze", "b after-thaw"]


@pytest.mark.parametrize(
    ("spoil", "runs"), [(owned_by_root, True), (owned_by_another, False), (writable_by_all, False)]
)
def test_neither_when_remetal_is_killed(told: Told, spoil: Callable[[Path], None], *, runs: bool) -> None:
    told.hooks()
    code = (
        "import sys, time; from pathlib import Path; from remetal.applications.hooks import Hooks\n"
        "from remetal.applications.settings import read_hooks\n"
        "with Hooks(read_hooks(Path(sys.argv[1]))).quiet([]):\n    print('ready', flush=True); time.sleep(60)\n"
    )
    told.read(told.at("a"))
    argv = [sys.executable, "-c", code, str(told.folder / "hooks.toml")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        spoil(told.folder / "a")
        process.kill()
    until = time.monotonic() + (10 if runs else 1)
    while len(told.lines) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert told.lines == ["a before-freeze", *(["a after-thaw"] if runs else [])]


def test_what_is_held_is_let_go_though_others_may_change_what_is_obeyed(told: Told) -> None:
    """Which is not looked at again for it; and what comes of it is told beside the reason."""
    moments = []

    class Holding:
        name = "holding"
        phases: tuple[Phase, ...] = ("before-freeze", "after-thaw")

        def carry_out(self, moment: Moment) -> None:
            moments.append((moment.phase, moment.obeys))
            if not moment.obeys:
                raise RemetalError("it was not held until the end")

    secret = told.folder / "secret"
    secret.touch()
    hooks = Hooks([Hook(1, Holding(), 30, "end", (secret,))], report=told.events.append)
    with pytest.raises(HookFailedError, match=r"failed at after-thaw: .*secret belongs to user"), hooks.quiet([]):
        owned_by_another(secret)
    assert moments == [("before-freeze", True), ("after-thaw", False)]
    assert Note("hook 1 (holding): it was not held until the end") in told.events


def test_a_file_in_a_folder_where_nobody_touches_what_others_own_is_obeyed(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    file = shared / "hooks.toml"
    file.write_text(f"[[hook]]\n{RUN}{AT}")
    assert len(read_hooks(file)) == 1
