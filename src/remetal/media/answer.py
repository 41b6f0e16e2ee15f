"""What an unattended recovery is told: an answer file, or the kernel's command line.

An answer file is TOML, named `remetal-answer.toml`, at the top of an attached volume:

    repository = "backup"                # a folder on the same volume
    passphrase-file = "usb:KEYS/phrase"  # a file on the volume with the label KEYS
    map = { sda = "serial:S4EVNX0M1" }
    end = "poweroff"

The kernel's command line says the same with `remetal.` in front:

    remetal.repo=usb:BACKUP/backup remetal.passphrase-file=usb:KEYS/phrase remetal.end=reboot

Both are parsed strictly: a word that is not understood is an error, never ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

import msgspec

from remetal.errors import RefusedError, UsageError

FILE_NAME = "remetal-answer.toml"
MAX_SIZE = 64 * 1024
"""Bytes that an answer file may have; a larger one is not an answer."""

End: TypeAlias = Literal["shell", "reboot", "poweroff"]
Mode: TypeAlias = Literal["auto", "dialogue", "shell"]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
_Seconds = Annotated[int, msgspec.Meta(ge=0, le=3600)]

_HINT = "How an answer file looks is in the how-to 'Recover without a keyboard'."


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Everything that an unattended recovery needs to know. Places are written as `Place` understands them.

    `map` is a target for the only disk, or source disk = target; `nic` is a network card of the target for cards of the
    captured machine, or `none`; `overwrite` are targets that are named a second time,
    because what is on them may be lost, and `protect` disks that are never written to. A LUKS file is the place of one
    that is tried on every container, or space = place. `pause` is how many seconds the plan is shown before it is
    carried out. `drivers` is a folder, `settings_file` holds variables such as REMETAL_SMB_PASSWORD. `repeat` lets the
    same snapshot be restored onto the same disks again.
    """

    repository: _Text
    snapshot: _Text = "latest"
    machine: _Text | None = None
    map: _Text | dict[_Text, _Text] = msgspec.field(default_factory=dict)
    nic: dict[_Text, _Text] = msgspec.field(default_factory=dict)
    passphrase: _Text | None = None
    passphrase_file: _Text | None = None
    kit_file: _Text | None = None
    luks_passphrase: _Text | None = None
    luks_passphrase_file: _Text | dict[_Text, _Text] = msgspec.field(default_factory=dict)
    luks_key_file: _Text | dict[_Text, _Text] = msgspec.field(default_factory=dict)
    only: tuple[_Text, ...] = ()
    keep: tuple[_Text, ...] = ()
    without: tuple[_Text, ...] = ()
    dissolve: tuple[_Text, ...] = ()
    overwrite: tuple[_Text, ...] = ()
    protect: tuple[_Text, ...] = ()
    grow: tuple[_Text, ...] = ()
    settings_file: _Text | None = None
    drivers: _Text | None = None
    regenerate: bool = False
    even_unbootable: bool = False
    keep_sizes: bool = False
    verify: bool = False
    end: End = "shell"
    log: _Text | None = None
    pause: _Seconds = 5
    repeat: bool = False


class CommandLine(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel's command line tells the recovery: `fields` override those of an answer file."""

    mode: Mode = "auto"
    answer: str | None = None
    fields: dict[str, object] = {}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A file or folder: `path` on the volume with a label or a UUID, on the answer's own volume, or of this system.

    `volume` is `label`, `uuid`, `own` or `system`; `key` is the label or the UUID.
    """

    volume: Literal["label", "uuid", "own", "system"]
    key: str = ""
    path: str = ""

    def __str__(self) -> str:
        prefix = {"label": f"usb:{self.key}/", "uuid": f"uuid:{self.key}/", "own": "", "system": ""}
        return f"{prefix[self.volume]}{self.path}"


def parse_answer(data: bytes, origin: str) -> Answer:
    """Parse an answer file; `origin` names it in errors.

    Raises RefusedError that names the file and the field for anything that is not a complete answer.
    """
    if len(data) > MAX_SIZE:
        raise RefusedError(f"the answer file {origin} is larger than {MAX_SIZE} bytes", hint=_HINT)
    try:
        table = msgspec.toml.decode(data, type=dict[str, object])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RefusedError(f"the answer file {origin} is not valid TOML: {error}", hint=_HINT) from error
    return convert_answer(table, f"the answer file {origin}")


def convert_answer(fields: dict[str, object], origin: str) -> Answer:
    """Return the answer that these fields make. Raises RefusedError that names `origin` and the field."""
    try:
        answer = msgspec.convert(fields, Answer)
        for place in named_places(answer):
            parse_place(place)
    except (msgspec.ValidationError, UsageError) as error:
        raise RefusedError(f"{origin} is not a good answer: {_told(error)}", hint=_HINT) from error
    except UnicodeEncodeError as error:  # bytes of a command line that are no text where a word is expected
        raise RefusedError(f"{origin} is not a good answer: {error.object!r} is not UTF-8", hint=_HINT) from error
    secrets = [answer.passphrase, answer.passphrase_file, answer.kit_file]
    if sum(secret is not None for secret in secrets) != 1:
        raise RefusedError(
            f"{origin} needs exactly one of passphrase, passphrase-file and kit-file, to open the repository",
            hint=_HINT,
        )
    return answer


def is_address(repository: str) -> bool:
    """Whether a repository is on the network, as nfs://… and s3://…, and not on an attached volume."""
    return "://" in repository


def named_places(answer: Answer) -> list[str]:
    """Return all places on volumes that an answer names."""
    own = None if is_address(answer.repository) else answer.repository
    single = (own, answer.settings_file, answer.passphrase_file, answer.kit_file, answer.drivers, answer.log)
    paired = (*pairs_of(answer.luks_passphrase_file), *pairs_of(answer.luks_key_file))
    return [place for place in single if place is not None] + [place for _, place in paired]


def pairs_of(field: str | dict[str, str]) -> list[tuple[str, str]]:
    """Return what a field of pairs says; the first of a pair is empty where the field is one text for all."""
    return [("", field)] if isinstance(field, str) else list(field.items())


def parse_place(text: str) -> Place:
    """Parse `usb:LABEL/path`, `uuid:UUID/path`, `/path` or `path`. Raises UsageError for anything else."""
    scheme, colon, rest = text.partition(":")
    if not colon or "/" in scheme:
        _check_path(text, text)
        return Place(volume="system" if text.startswith("/") else "own", path=text)
    key, _, path = rest.partition("/")
    if scheme not in {"usb", "uuid"} or not key:
        raise UsageError(f"'{text}' is no place", hint="Write usb:LABEL/path, uuid:UUID/path, or a path.")
    _check_path(path, text)
    return Place(volume="uuid" if scheme == "uuid" else "label", key=key, path=path)


def _check_path(path: str, text: str) -> None:
    if "\0" in path or ".." in path.split("/"):
        raise UsageError(f"'{text}' is no place: its path must not contain '..'")


def _told(error: Exception) -> str:
    """Return msgspec's complaint with the field in front, as it is spelled in the file."""
    text = error.message if isinstance(error, UsageError) else str(error)
    match = re.fullmatch(r"(.*) - at `\$\.?(.*)`", text)
    return f"{match[2]}: {match[1]}" if match and match[2] else text


_WORDS = {"repo": "repository"}
_SWITCHES = {"keep-sizes", "verify", "repeat", "regenerate", "even-unbootable"}
_LISTS = {"map", "only", "keep", "without", "dissolve", "overwrite", "protect", "grow"}
_PAIRS = {
    "map": "Write remetal.map=SOURCE=TARGET for every disk, or remetal.map=TARGET where there is one.",
    "nic": "Write remetal.nic=OLD=NEW for each network card, by name or address.",
    "luks-passphrase-file": "Write remetal.luks-passphrase-file=SPACE=PLACE for each container, or PLACE for all.",
    "luks-key-file": "Write remetal.luks-key-file=SPACE=PLACE for each container, or PLACE for all.",
}
"""Fields of pairs, and how they are written."""
_PLAIN = {"repository", "snapshot", "machine", "passphrase-file", "kit-file", "settings-file", "drivers", "end", "log"}


def parse_command_line(text: str) -> CommandLine:
    """Parse what follows `remetal.` on the kernel's command line (/proc/cmdline).

    The kernel protects spaces by double quotes, around a value or around a whole word. A passphrase cannot be given
    here, because everybody on the machine reads it. Raises RefusedError for words that are not understood.
    """
    fields: dict[str, object] = {}
    mode: Mode = "auto"
    answer: str | None = None
    lists: dict[str, list[str]] = {}
    for word in _split_arguments(text):
        name, equals, value = word.partition("=")
        if not name.startswith("remetal."):
            continue
        name = _WORDS.get(name.removeprefix("remetal."), name.removeprefix("remetal."))
        if name in _SWITCHES and (not equals or value in {"yes", "no"}):
            fields[name] = value != "no"
        elif name in _LISTS and all(value.split(",")):
            lists.setdefault(name, []).extend(value.split(","))
        elif name in _PAIRS and value:
            lists.setdefault(name, []).append(value)
        elif name == "mode" and value in {"auto", "dialogue", "shell"}:
            mode = msgspec.convert(value, Mode)
        elif name == "answer" and value:
            answer = value
        elif name == "pause" and re.fullmatch(r"[0-9]{1,4}", value, re.ASCII):
            fields[name] = int(value)
        elif name in _PLAIN and value:
            fields[name] = value
        else:
            raise RefusedError(
                f"'{word}' on the kernel's command line is not understood",
                hint="Correct it in the boot menu (key e).",
            )
    for name, words in lists.items():
        fields[name] = _parse_pairs(name, words) if name in _PAIRS else words
    return CommandLine(mode=mode, answer=answer, fields=fields)


def merge_answer(file: Answer | None, line: CommandLine, origin: str) -> Answer:
    """Return the answer file's answer with what the command line says put over it. Raises RefusedError."""
    fields: dict[str, object] = {} if file is None else msgspec.to_builtins(file)
    fields = {name: value for name, value in fields.items() if value is not None}
    secrets = {"passphrase", "passphrase-file", "kit-file"}
    if secrets & line.fields.keys():
        fields = {name: value for name, value in fields.items() if name not in secrets}
    where = f"{origin} with the kernel's command line" if file is not None else "the kernel's command line"
    return convert_answer(fields | line.fields, where)


def _parse_pairs(name: str, words: list[str]) -> str | dict[str, str]:
    """Return the one word, or the table that several words `LEFT=RIGHT` make. Raises RefusedError."""
    pairs = [word.partition("=") for word in words]
    if len(pairs) == 1 and not pairs[0][1]:
        return words[0]
    table = {left: right for left, equals, right in pairs if equals and left and right}
    if len(table) != len(words):
        raise RefusedError(f"remetal.{name}={','.join(words)} is not understood", hint=_PAIRS[name])
    return table


def _split_arguments(text: str) -> list[str]:
    """Split as the kernel does (lib/cmdline.c, next_arg): at spaces outside double quotes, which then vanish."""
    return [word.replace('"', "") for word in re.findall(r'(?:[^\s"]|"[^"]*"?)+', text)]
