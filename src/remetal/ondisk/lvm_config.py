"""LVM's configuration text: the grammar of lvm.conf and of the metadata that lies on physical volumes.

Source: lvm.conf(5) and lvmconfig(8); what the words of the grammar are and which value wins where a name stands
twice was tried out with lvmconfig.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB, format_bytes

Scalar: TypeAlias = int | float | str
Value: TypeAlias = Scalar | tuple[Scalar, ...]

MAX_TEXT = 16 * MIB
"""Characters. Ten thousand logical volumes take about four million."""

_MAX_DEPTH = 32
_MAX_TOKENS = 2_000_000
_MAX_DIGITS = 400
_INTEGERS = range(-(1 << 63), 1 << 63)

_SPACE = re.compile(r"(?:[ \t\n\v\f\r]++|#[^\n]*+)*+")
_ESCAPED = re.compile(r'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_PLAIN = re.compile(r"'([^']*+)'")
_NUMBER = re.compile(r"[-+]?+[0-9]*+(?:\.[0-9]*+)?+")
_WORD = re.compile(r"[^ \t\n\v\f\r#={}]++")
_BARE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_BACKSLASHED = re.compile(r'\\(["\\])')


@dataclass(frozen=True, slots=True)
class Section:
    """A section, or the whole text: names and what they hold, in the order of the text. No name stands twice."""

    entries: tuple[tuple[str, Entry], ...] = ()


Entry: TypeAlias = "Value | Section"
_Tree: TypeAlias = dict[str, "Value | _Tree"]


@dataclass(frozen=True, slots=True)
class _Token:
    """`kind` is the character itself for punctuation; else `name`, `quoted` (either of them), `value` or `end`."""

    kind: str
    place: int
    value: Scalar = ""


def parse_config(text: str) -> Section:
    """Return what the text says, as LVM understands it.

    Sections of the same name are one, the last of several values counts, and `a/b = 1` means `a { b = 1 }`.
    A list of one stays a list. Raises BadStructureError for what LVM does not take, for names that are a section
    and a value, and for a text that is larger or deeper than any that LVM writes.
    """
    if len(text) > MAX_TEXT:
        raise BadStructureError(f"the LVM configuration is larger than {format_bytes(MAX_TEXT)}")
    tokens = _tokens(text)
    root: _Tree = {}
    opened = [(root, 0)]
    for token in tokens:
        if token.kind == "end" and len(opened) == 1:
            return _freeze(root)
        if token.kind == "}" and len(opened) > 1:
            opened.pop()
        elif token.kind in {"name", "quoted"}:
            tree, depth = opened[-1]
            path = _path(token, depth, text)
            follower = next(tokens)
            if follower.kind == "{":
                opened.append((_descend(tree, path, token, text), depth + len(path)))
            elif follower.kind == "=":
                tree = _descend(tree, path[:-1], token, text)
                if isinstance(tree.get(path[-1]), dict):
                    raise _bad(text, token, f"'{path[-1]}' is a section and a value")
                tree[path[-1]] = _parse_value(tokens, text)
            else:
                raise _bad(text, follower, "there is neither '=' nor '{' after a name")
        else:
            raise _bad(text, token, "a section is not closed" if token.kind == "end" else "a name is missing")
    raise AssertionError("the last token is the end")


def format_config(section: Section) -> str:
    """Return the text of a whole tree, as LVM reads it: one entry a line, strings quoted.

    Raises BadStructureError for what the grammar cannot express: an empty name or one with a slash, NUL, infinite
    numbers, integers of more than 64 bits.
    """
    lines: list[str] = []
    _format_section(section, 0, lines)
    return "".join(f"{line}\n" for line in lines)


def find_entry(section: Section, *path: str) -> Entry | None:
    """Return what stands under these names, one for each level; None if there is nothing."""
    found: Entry = section
    for name in path:
        if not isinstance(found, Section):
            return None
        entry = next((entry for key, entry in found.entries if key == name), None)
        if entry is None:
            return None
        found = entry
    return found


def replace_entry(section: Section, path: tuple[str, ...], entry: Entry) -> Section:
    """Return the tree with this entry under the names of the path: in its place, or as the last of its section.

    Raises BadStructureError if a section on the way does not exist.
    """
    name, *rest = path
    old = dict(section.entries)
    if rest:
        inner = old.get(name)
        if not isinstance(inner, Section):
            raise BadStructureError(f"the LVM configuration has no section '{name}'")
        entry = replace_entry(inner, tuple(rest), entry)
    return Section(tuple({**old, name: entry}.items()))


def _tokens(text: str) -> Iterator[_Token]:
    """Return the words of the text and, as the last one, its end."""
    place = 0
    wants_value = False
    for _ in range(_MAX_TOKENS):
        space = _SPACE.match(text, place)
        assert space is not None
        place = space.end()
        token, place = _token(text, place, wants_value)
        yield token
        if token.kind == "end":
            return
        wants_value = token.kind in {"=", "[", ","}
    raise BadStructureError("the LVM configuration has too many entries")


def _token(text: str, place: int, wants_value: bool) -> tuple[_Token, int]:
    """Return the word at `place` and where it ends. Numbers and bare words are values only where one can stand."""
    first = text[place : place + 1]
    if first == "":
        return _Token("end", place), place
    if first in "{}[],=":
        return _Token(first, place), place + 1
    if first in "\"'":
        match = (_ESCAPED if first == '"' else _PLAIN).match(text, place)
        if match is None or "\0" in match[1]:
            raise _bad(text, _Token("quoted", place), "a quoted text does not end")
        value = _BACKSLASHED.sub(r"\1", match[1]) if first == '"' else match[1]
        return _Token("quoted", place, value), match.end()
    if wants_value and first in "0123456789+-.":
        match = _NUMBER.match(text, place)
        assert match is not None
        return _Token("value", place, _parse_number(match[0], text, place)), match.end()
    match = _WORD.match(text, place)
    if match is None or "\0" in match[0]:
        raise _bad(text, _Token("name", place), "there is a character that cannot stand here")
    return _Token("value" if wants_value else "name", place, match[0]), match.end()


def _parse_number(digits: str, text: str, place: int) -> int | float:
    token = _Token("value", place)
    if len(digits) > _MAX_DIGITS:
        raise _bad(text, token, "a number is too long")
    try:
        if "." in digits:
            return float(digits)
        # A leading zero makes it octal, as in C.
        number = int(digits, 8 if digits.lstrip("+-").startswith("0") else 10)
    except ValueError:
        raise _bad(text, token, f"'{digits[:40]}' is not a number") from None
    if number not in _INTEGERS:
        raise _bad(text, token, "a number is too large")
    return number


def _parse_value(tokens: Iterator[_Token], text: str) -> Value:
    token = next(tokens)
    if token.kind != "[":
        return _scalar(token, text)
    items = []
    token = next(tokens)
    while token.kind != "]":
        items.append(_scalar(token, text))
        token = next(tokens)
        if token.kind == ",":
            token = next(tokens)
    return tuple(items)


def _scalar(token: _Token, text: str) -> Scalar:
    if token.kind not in {"value", "quoted"}:
        raise _bad(text, token, "a value is missing")
    return token.value


def _path(token: _Token, depth: int, text: str) -> list[str]:
    path = re.split("/++", str(token.value).lstrip("/"), maxsplit=_MAX_DEPTH + 1)
    if path[-1] == "":
        raise _bad(text, token, "a name is empty")
    if depth + len(path) > _MAX_DEPTH:
        raise _bad(text, token, "the sections are nested too deeply")
    return path


def _descend(tree: _Tree, path: list[str], token: _Token, text: str) -> _Tree:
    """Return the tree under this path, made where it is not there yet."""
    for name in path:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise _bad(text, token, f"'{name}' is a section and a value")
        tree = inner
    return tree


def _freeze(tree: _Tree) -> Section:
    return Section(tuple((name, _freeze(entry) if isinstance(entry, dict) else entry) for name, entry in tree.items()))


def _bad(text: str, token: _Token, what: str) -> BadStructureError:
    line = text.count("\n", 0, token.place) + 1
    return BadStructureError(f"line {line} of the LVM configuration is wrong: {what}")


def _format_section(section: Section, depth: int, lines: list[str]) -> None:
    if depth > _MAX_DEPTH:
        raise BadStructureError("the sections of the LVM configuration are nested too deeply")
    indent = "\t" * depth
    for name, entry in section.entries:
        if name == "" or "/" in name:
            raise BadStructureError(f"'{name}' cannot be a name in an LVM configuration")
        key = name if _BARE_NAME.fullmatch(name) else _quote(name)
        if isinstance(entry, Section):
            lines.append(f"{indent}{key} {{")
            _format_section(entry, depth + 1, lines)
            lines.append(f"{indent}}}")
        elif isinstance(entry, tuple):
            lines.append(f"{indent}{key} = [{', '.join(map(_format_scalar, entry))}]")
        else:
            lines.append(f"{indent}{key} = {_format_scalar(entry)}")


def _format_scalar(value: Scalar) -> str:
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadStructureError("an LVM configuration cannot hold a number without end")
        digits = f"{Decimal(repr(value)):f}"
        return digits if "." in digits else f"{digits}.0"
    if value not in _INTEGERS:
        raise BadStructureError(f"the number {value} is too large for an LVM configuration")
    return f"{value:d}"


def _quote(value: str) -> str:
    if "\0" in value:
        raise BadStructureError("an LVM configuration cannot hold a text with NUL")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
