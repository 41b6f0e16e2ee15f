"""Recovering this machine from its recovery medium: answer → volumes → plan → restore → log.

A dialogue and an unattended recovery go the same way; they differ in who made the answer and who agrees to
the plan.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from remetal.errors import RefusedError, RemetalError
from remetal.events import Note, Report, Step, Warn
from remetal.media.answer import (
    FILE_NAME,
    MAX_SIZE,
    Answer,
    CommandLine,
    is_address,
    merge_answer,
    named_places,
    pairs_of,
    parse_answer,
    parse_place,
)
from remetal.media.volumes import (
    AttachedVolume,
    Places,
    opened_places,
    opened_volume,
    probe_disks,
    probe_volumes,
    read_from,
    select_disk,
    select_volume,
)
from remetal.system.run import run

if TYPE_CHECKING:
    from remetal.layout.keys import Key
    from remetal.workflows.access import Secret
    from remetal.workflows.passphrases import AskPassphrase
    from remetal.workflows.restore import Prepared, RestoreReport, RestoreRequest

BAKED = Path("/etc/remetal") / FILE_NAME
"""Where `media build --answer` puts its answer."""

MAX_KEY_FILE = 8 << 20
"""Bytes of the longest key file that cryptsetup(8) takes."""

LOG_FOLDER = "remetal-log"
ANSWER_LABEL = "REMETAL"

NEW_VOLUME_SECONDS = 3.0
"""How long a search for answers waits for disks that are slow to appear."""

NAMED_VOLUME_SECONDS = 30.0
"""How long a recovery waits for a volume that its answer names."""


@dataclass(frozen=True, slots=True)
class Found:
    """An answer, where it comes from in words, and the volume that it lies on, if any."""

    answer: Answer
    origin: str
    volume: AttachedVolume | None = None


@dataclass(slots=True)
class Recovery:
    """What a recovery did, as far as it came; filled while it goes, so that a failure can be told as well.

    `found` is None where the search for an answer failed already.
    """

    found: Found | None
    seconds: float = 0.0
    plan: bytes = b""
    """The plan as JSON; empty until it was made."""
    report: RestoreReport | None = None
    log_volume: AttachedVolume | None = None
    log_folder: str = ""
    mark: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


def find_answer(line: CommandLine, report: Report, *, baked: Path = BAKED) -> Found | None:
    """Return what this machine was told to do, or None if nobody told anything.

    The kernel's command line goes before an answer file. An answer file on the volume labelled REMETAL goes
    before the one in the medium, and that before those on other volumes. Raises RefusedError if two answers of
    the same rank differ, or if an answer is not a good one.
    """
    if line.mode != "auto":
        return None
    if "repository" in line.fields and line.answer is None:
        return Found(merge_answer(None, line, ""), "the kernel's command line")
    if line.answer is not None:
        data, origin, volume = _read_named(line.answer)
    else:
        report(Step(f"Looking for {FILE_NAME} on attached volumes"))
        answers = _collect_answers(baked)
        if not answers:
            return None
        data, origin, volume = choose_answer(answers)
    return Found(merge_answer(parse_answer(data, origin), line, origin), origin, volume)


_Candidate = tuple[bytes, str, AttachedVolume | None]


def choose_answer(candidates: Sequence[_Candidate]) -> _Candidate:
    """Return the answer that counts: the first of the best rank. Raises RefusedError if that rank holds two."""

    def rank(candidate: _Candidate) -> int:
        volume = candidate[2]
        if volume is None:
            return 1
        return 0 if volume.label.upper() == ANSWER_LABEL else 2

    best = min(rank(each) for each in candidates)
    first, *others = [each for each in candidates if rank(each) == best]
    for other in others:
        if other[0] != first[0]:
            raise RefusedError(
                f"two answers say different things: {first[1]} and {other[1]}",
                hint=f"Detach one, or give the right volume the label {ANSWER_LABEL}.",
            )
    return first


def _collect_answers(baked: Path) -> list[_Candidate]:
    answers: list[_Candidate] = []
    if baked.is_file():
        answers.append((baked.read_bytes(), f"{FILE_NAME} in the recovery medium", None))
    looked_at: set[AttachedVolume] = set()
    deadline = time.monotonic() + NEW_VOLUME_SECONDS
    while True:
        for volume in probe_volumes():
            if volume in looked_at:
                continue
            looked_at.add(volume)
            data = read_from(volume, FILE_NAME, MAX_SIZE)
            if data is not None:
                answers.append((data, f"{FILE_NAME} on {volume}", volume))
        if answers or time.monotonic() >= deadline:
            return answers
        time.sleep(0.5)


def _read_named(text: str) -> _Candidate:
    """Return the answer file that the kernel's command line names."""
    volumes = _await_volumes([text])
    with opened_places(volumes, None) as places:
        path = places.path(text)
        if not path.is_file():
            raise RefusedError(f"remetal.answer={text} is not a file")
        with path.open("rb") as file:
            return file.read(MAX_SIZE + 1), text, places.find_volume(text)


def _await_volumes(texts: Sequence[str]) -> list[AttachedVolume]:
    """Return the attached volumes as soon as all named places have one, or after a while as they are."""
    deadline = time.monotonic() + NAMED_VOLUME_SECONDS
    while True:
        volumes = probe_volumes()
        missing = 0
        for place in map(parse_place, texts):
            if place.volume in {"label", "uuid"}:
                try:
                    select_volume(place, volumes)
                except RefusedError:
                    missing += 1
        if not missing or time.monotonic() >= deadline:
            return volumes
        time.sleep(0.5)


def recover(
    recovery: Recovery, agree: Callable[[Prepared], None], report: Report, *, ask: AskPassphrase | None = None
) -> None:
    """Restore what the answer in `recovery` says, and note in it what was done.

    `agree` is called with the plan before the first write and raises RefusedError to stop; `ask` for encrypted
    containers that the answer has no key for. All volumes are unmounted when this returns or raises. Raises what
    planning and restoring raise.
    """
    from remetal.workflows.restore import apply_restore, prepared_restore

    began = time.monotonic()
    assert recovery.found is not None, "somebody has to say what to recover"
    answer = recovery.found.answer
    volumes = _await_volumes(named_places(answer))
    with opened_places(volumes, recovery.found.volume) as places:
        recovery.log_volume, recovery.log_folder = _choose_log(recovery.found, places, volumes)
        if answer.settings_file is not None:
            os.environ.update(parse_settings(_read_text(places, answer.settings_file), answer.settings_file))
        request = _make_request(answer, places)
        with prepared_restore(request, _read_secret(answer, places), report, ask=ask) as prepared:
            recovery.plan = msgspec.json.format(msgspec.json.encode(prepared.plan), indent=2)
            recovery.mark = plan_mark(prepared.snapshot.id, prepared.targets)
            agree(prepared)
            recovery.report = apply_restore(
                prepared, verify=answer.verify, even_unbootable=answer.even_unbootable, report=report
            )
    recovery.seconds = time.monotonic() - began


def _make_request(answer: Answer, places: Places) -> RestoreRequest:
    """Return what an answer asks for, with the disks and files of this machine in place of their names."""
    from remetal.workflows.restore import RestoreRequest

    disks = probe_disks()
    pairs = [(source, select_disk(target, disks)) for source, target in pairs_of(answer.map)]
    return RestoreRequest(
        repository=answer.repository if is_address(answer.repository) else str(places.path(answer.repository)),
        snapshot=answer.snapshot,
        machine=answer.machine,
        mapping=tuple(f"{source}={target}" if source else str(target) for source, target in pairs),
        keep_sizes=answer.keep_sizes,
        only=answer.only,
        keep=answer.keep,
        grow=answer.grow,
        without=answer.without,
        dissolve=answer.dissolve,
        overwrite=tuple(str(select_disk(each, disks)) for each in answer.overwrite),
        protect=tuple(str(select_disk(each, disks)) for each in answer.protect),
        keys=tuple(_read_luks_keys(answer, places)),
        drivers=None if answer.drivers is None else places.path(answer.drivers),
        regenerate=answer.regenerate,
        nics=tuple(f"{old}={new}" for old, new in answer.nic.items()),
    )


def _read_luks_keys(answer: Answer, places: Places) -> Iterator[Key]:
    """Yield the keys for encrypted containers that an answer names."""
    from remetal.layout.keys import Key

    if answer.luks_passphrase is not None:
        yield Key(answer.luks_passphrase.encode())
    for space, place in pairs_of(answer.luks_passphrase_file):
        first = _read_key_file(places, place).partition(b"\n")[0].removesuffix(b"\r")
        if not first:
            raise RefusedError(f"the first line of '{place}' is empty; it should be the passphrase")
        yield Key(first, space)
    for space, place in pairs_of(answer.luks_key_file):
        data = _read_key_file(places, place)
        if not data:
            raise RefusedError(f"'{place}' is empty; it should be a key file")
        yield Key(data, space)


def _read_key_file(places: Places, place: str) -> bytes:
    try:
        with places.path(place).open("rb") as file:
            data = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise RefusedError(f"'{place}' cannot be read: {os.strerror(error.errno or 0)}") from error
    if len(data) > MAX_KEY_FILE:
        raise RefusedError(f"'{place}' is larger than {MAX_KEY_FILE} bytes; cryptsetup takes no such key file")
    return data


def _read_secret(answer: Answer, places: Places) -> Secret:
    from remetal.workflows.access import Secret

    if answer.passphrase is not None:
        return Secret(passphrase=answer.passphrase)
    name = answer.passphrase_file or answer.kit_file
    assert name is not None
    text = _read_text(places, name)
    if answer.kit_file is not None:
        return Secret(kit=text)
    passphrase = text.partition("\n")[0].removesuffix("\r")
    if not passphrase:
        raise RefusedError(f"the first line of '{name}' is empty; it should be the passphrase")
    return Secret(passphrase=passphrase)


def _read_text(places: Places, name: str) -> str:
    try:
        return places.path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"'{name}' cannot be read as a text file: {error}") from error


_SETTING = re.compile(r"(?:REMETAL|AWS)_[A-Z0-9_]+")


def parse_settings(text: str, origin: str) -> dict[str, str]:
    """Return the variables that a file of `NAME=VALUE` lines sets: how this machine gets at a repository.

    Raises RefusedError, without showing a value, for a line that sets anything else.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not _SETTING.fullmatch(name):
            raise RefusedError(
                f"line {number} of '{origin}' is not understood",
                hint="Each line is NAME=VALUE; the names begin with REMETAL_ or AWS_, and no value is quoted.",
            )
        found[name] = value
    return found


def _choose_log(found: Found, places: Places, volumes: Sequence[AttachedVolume]) -> tuple[AttachedVolume | None, str]:
    """Return the volume and folder that take the log: the answer's wish, its volume, or the repository's."""
    if found.answer.log is not None:
        return places.find_volume(found.answer.log), parse_place(found.answer.log).path
    if found.volume is not None:
        return found.volume, ""
    labelled = next((each for each in volumes if each.label.upper() == ANSWER_LABEL), None)
    repository = None if is_address(found.answer.repository) else places.find_volume(found.answer.repository)
    return repository or labelled, ""


def plan_mark(snapshot: str, targets: Mapping[str, Path]) -> str:
    """Return the name of the file that says that this snapshot was restored onto these disks."""
    disks = {str(each.path): (each.wwn, each.serial) for each in probe_disks()}
    identity = [[name, str(path), *disks.get(str(path), ())] for name, path in sorted(targets.items())]
    return f"finished-{sha256(msgspec.json.encode([snapshot, identity])).hexdigest()[:16]}"


def check_first_time(recovery: Recovery) -> None:
    """Raise RefusedError if the log says that this very recovery was carried out already.

    A medium that stays in the machine would otherwise roll the restored system back at every start.
    """
    volume = recovery.log_volume
    if volume is None or (recovery.found is not None and recovery.found.answer.repeat):
        return
    name = str(Path(recovery.log_folder) / LOG_FOLDER / recovery.mark)
    with opened_volume(volume) as folder:
        done = (folder / name).exists()
    if done:
        raise RefusedError(
            f"this recovery was carried out already: {name} on {volume} says so",
            hint="Remove the recovery medium and start the machine. To recover once more, delete that file, or say "
            "`repeat = true` in the answer (remetal.repeat on the kernel's command line).",
        )


def leave_log(recovery: Recovery, text: bytes, report: Report) -> str | None:
    """Write the log, the plan and the report to the recovery's volume, and return where, or None if there is none.

    `text` is what was shown. The volume is written to for this moment only. A volume that cannot be written
    to is reported, never raised: the log must not turn a success into a failure.
    """
    if recovery.log_volume is None:
        recovery.log_volume = (recovery.found.volume if recovery.found else None) or _find_log_volume()
    if recovery.log_volume is None:
        report(Warn("there is no volume to leave the log on", hint="It is in /run/remetal/recovery.log."))
        return None
    stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    files = {"recovery.log": text, "dmesg.txt": run(["dmesg"], allowed=range(256)).stdout, **recovery.files}
    if recovery.plan:
        files["plan.json"] = recovery.plan
    if recovery.report is not None:
        files["report.json"] = msgspec.json.format(msgspec.json.encode(recovery.report), indent=2)
    try:
        with opened_volume(recovery.log_volume, writable=True) as top:
            folder = top / recovery.log_folder / LOG_FOLDER / stamp
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                _write_durably(folder / name, data)
            if recovery.report is not None:
                _write_durably(folder.parent / recovery.mark, f"{stamp}\n".encode())
    except (OSError, RemetalError) as error:
        report(Warn(f"the log could not be left on {recovery.log_volume}: {error}"))
        return None
    place = f"{Path(recovery.log_folder) / LOG_FOLDER / stamp} on {recovery.log_volume}"
    report(Note(f"the log is in {place}"))
    return place


def _find_log_volume() -> AttachedVolume | None:
    """Return the volume labelled REMETAL, else one that holds an answer, however bad that may be."""
    volumes = probe_volumes()
    labelled = next((each for each in volumes if each.label.upper() == ANSWER_LABEL), None)
    return labelled or next((each for each in volumes if read_from(each, FILE_NAME, MAX_SIZE) is not None), None)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
