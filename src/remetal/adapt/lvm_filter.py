"""LVM's filters: which of a device's names they let through, decided as LVM itself decides. Pure.

Its regular expressions are its own: `^` and `$` are two invisible characters at the ends of the name, which `.` and
`[^…]` match too, and there are no counts and no classes by name. They are run here as a set of states, so that
no pattern takes longer than its length times the name's.

Source: lvm.conf(5), devices/filter; what LVM takes and what it lets through was tried out with pvs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BEGIN, _END = 2, 3
_DOT = frozenset(range(256)) - {0, 10, 13}
_ESCAPES = {ord("n"): 10, ord("r"): 13, ord("t"): 9}
_BRACKETS = {ord("("): ord(")"), ord("["): ord("]"), ord("{"): ord("}")}
_MAX_PATTERN = 1000
_MAX_DEPTH = 40


class PatternError(Exception):
    """A pattern is not one that LVM takes, means nothing, or is larger than any that somebody would write."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression as states: each is a set of characters and the next state, or states to go to at once."""

    steps: tuple[tuple[frozenset[int], int] | None, ...]
    jumps: tuple[tuple[int, ...], ...]
    first: int
    last: int

    def matches(self, name: str) -> bool:
        """Whether the expression matches anywhere in the name."""
        states = self._reach({self.first})
        for byte in (_BEGIN, *name.encode("utf-8", "surrogateescape"), _END):
            moved = {step[1] for state in states if (step := self.steps[state]) is not None and byte in step[0]}
            states = self._reach(moved | {self.first})
            if self.last in states:
                return True
        return False

    def _reach(self, states: set[int]) -> set[int]:
        pending = list(states)
        while pending:
            for state in self.jumps[pending.pop()]:
                if state not in states:
                    states.add(state)
                    pending.append(state)
        return states


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a filter: names that match are let through, or are not."""

    accepts: bool
    pattern: Pattern


def parse_rules(entries: Iterable[str]) -> tuple[Rule, ...]:
    """Return the rules of a filter. Raises PatternError for one that cannot be decided."""
    return tuple(_parse_rule(each.encode("utf-8", "surrogateescape")) for each in entries)


def accepts(rules: Sequence[Rule], names: Iterable[str]) -> bool:
    """Whether a filter lets a device with these names through.

    For each name the first rule that matches counts. One accepted name is enough; a device without any match passes.
    """
    verdicts = [next((rule.accepts for rule in rules if rule.pattern.matches(name)), None) for name in names]
    return True in verdicts or False not in verdicts


def format_accept(node: str) -> str:
    """Return the entry that lets this device node through."""
    return f"a|^{''.join(each if each.isalnum() or each in '/_-' else '.' for each in node)}$|"


def _parse_rule(entry: bytes) -> Rule:
    if len(entry) > _MAX_PATTERN or len(entry) < 4 or entry[:1] not in {b"a", b"r"}:
        raise PatternError
    if entry[-1] != _BRACKETS.get(entry[1], entry[1]):
        raise PatternError
    return Rule(entry[:1] == b"a", _Parser(entry[2:-1]).parse())


class _Parser:
    """Makes states of an expression, by recursive descent; one use."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = pattern
        self.at = 0
        self.steps: list[tuple[frozenset[int], int] | None] = []
        self.jumps: list[list[int]] = []

    def parse(self) -> Pattern:
        first, last = self._either(0)
        if self.at != len(self.pattern):
            raise PatternError
        return Pattern(tuple(self.steps), tuple(map(tuple, self.jumps)), first, last)

    def _peek(self) -> int:
        return self.pattern[self.at] if self.at < len(self.pattern) else -1

    def _next(self) -> int:
        byte = self._peek()
        if byte < 0:
            raise PatternError
        self.at += 1
        return byte

    def _state(self) -> int:
        self.steps.append(None)
        self.jumps.append([])
        return len(self.steps) - 1

    def _either(self, depth: int) -> tuple[int, int]:
        """Parse `one|other|…`."""
        if depth > _MAX_DEPTH:
            raise PatternError
        first, last = self._state(), self._state()
        while True:
            start, end = self._sequence(depth)
            self.jumps[first].append(start)
            self.jumps[end].append(last)
            if self._peek() != ord("|"):
                return first, last
            self.at += 1

    def _sequence(self, depth: int) -> tuple[int, int]:
        first, last = self._repeated(depth)
        while self._peek() not in {-1, ord("|"), ord(")")}:
            start, end = self._repeated(depth)
            self.jumps[last].append(start)
            last = end
        return first, last

    def _repeated(self, depth: int) -> tuple[int, int]:
        """Parse one character, class or group, and the `*`, `+` and `?` behind it."""
        first, last = self._term(depth)
        while (sign := self._peek()) in {ord("*"), ord("+"), ord("?")}:
            self.at += 1
            start, end = self._state(), self._state()
            self.jumps[start].append(first)
            self.jumps[last].append(end)
            if sign != ord("?"):
                self.jumps[last].append(first)
            if sign != ord("+"):
                self.jumps[start].append(end)
            first, last = start, end
        return first, last

    def _term(self, depth: int) -> tuple[int, int]:
        byte = self._next()
        if byte == ord("("):
            inner = self._either(depth + 1)
            if self._next() != ord(")"):
                raise PatternError
            return inner
        if byte in b")*+?|":
            raise PatternError
        first, last = self._state(), self._state()
        self.steps[first] = (self._characters(byte), last)
        return first, last

    def _characters(self, byte: int) -> frozenset[int]:
        if byte == ord("["):
            return self._class()
        if byte == ord("."):
            return _DOT
        if byte == ord("\\"):
            byte = self._next()
            return frozenset({_ESCAPES.get(byte, byte)})
        return frozenset({{ord("^"): _BEGIN, ord("$"): _END}.get(byte, byte)})

    def _class(self) -> frozenset[int]:
        """Parse what stands behind `[`: characters and ranges; `^` at the beginning turns it round."""
        is_negated = self._peek() == ord("^")
        self.at += is_negated
        found: set[int] = set()
        before = 0
        while (byte := self._next()) != ord("]"):
            if byte == ord("-") and before:
                byte = self._next()
                found |= set(range(min(before, byte), max(before, byte) + 1))
                before = max(before, byte)
                continue
            if byte == ord("\\"):
                byte = self._next()
                byte = _ESCAPES.get(byte, byte)
            found.add(byte)
            before = byte
        return frozenset(range(1, 256)) - found if is_negated else frozenset(found)
