"""The files that carry a kernel command line or the device to resume from. Pure.

/etc/default/grub and its drop-ins, /etc/kernel/cmdline, the entries of the Boot Loader Specification
(loader/entries/*.conf), GRUB's environment block, dracut's and initramfs-tools' configuration. What the words of a
command line mean is told in `cmdline`.

Sources: GRUB manual ("Simple configuration", "Environment block"), kernel-install(8), UAPI.1 Boot Loader Specification,
dracut.conf(5), initramfs-tools(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from remetal.adapt.cmdline import plan_cmdline
from remetal.adapt.identity import Gone, Identities, Kind, Named, find_named, plan_name
from remetal.adapt.names import as_path, is_hardware_name
from remetal.adapt.text import Edit, TextPlan, plan_edits

_ASSIGNMENT = (
    r"^[ \t]*(?:export[ \t]+)?{}\+?=(?:\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>[^']*)'|(?P<plain>[^\s\"'#]*))"
)
_DEFAULT_GRUB = re.compile(_ASSIGNMENT.format(r"GRUB_CMDLINE_[A-Z0-9_]+"), re.MULTILINE | re.DOTALL)
_KERNEL_CMDLINE = re.compile(_ASSIGNMENT.format("kernel_cmdline"), re.MULTILINE | re.DOTALL)
_ADD_DEVICE = re.compile(_ASSIGNMENT.format("add_device"), re.MULTILINE | re.DOTALL)
_RESUME = re.compile(_ASSIGNMENT.format("RESUME"), re.MULTILINE | re.DOTALL)
_OPTIONS = re.compile(r"^[ \t]*options[ \t]+(.*)$", re.MULTILINE)
_LINUX = re.compile(r"^[ \t]*linux[ \t]", re.MULTILINE)
_INITRD = re.compile(r"^[ \t]*initrd[ \t]", re.MULTILINE)
_LINES = re.compile(r"^(?![ \t]*#)(.+)$", re.MULTILINE)
_VARIABLES = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*=(.*)$", re.MULTILINE)
_WORD = re.compile(r"\S+")
_RESUMED: tuple[Kind, ...] = ("swap", "filesystem")
_ANY: tuple[Kind, ...] = ("luks", "filesystem", "swap", "pv", "member", "md", "lv", "partition", "disk")


def plan_default_grub(text: str, identities: Identities, path: str = "/etc/default/grub") -> TextPlan:
    """Plan the GRUB_CMDLINE_… assignments of /etc/default/grub or one of its drop-ins."""
    return _plan_spans(text, identities, path, _values(_DEFAULT_GRUB, text))


def plan_kernel_cmdline(text: str, identities: Identities, path: str = "/etc/kernel/cmdline") -> TextPlan:
    """Plan a file that is a command line as a whole; lines that begin with # are comments."""
    return _plan_spans(text, identities, path, (match.span(1) for match in _LINES.finditer(text)))


def plan_boot_entry(text: str, identities: Identities, path: str) -> TextPlan:
    """Plan the `options` of an entry of the Boot Loader Specification."""
    bare = _LINUX.search(text) is not None and _INITRD.search(text) is None
    spans = (match.span(1) for match in _OPTIONS.finditer(text))
    return _plan_spans(text, identities, path, spans, bare_kernel=bare)


def plan_grubenv(text: str, identities: Identities, path: str) -> TextPlan:
    """Plan the command lines in GRUB's environment block, whose size in bytes stays: `#` fill it at the end."""
    body = text.rstrip("#")
    if body and not body.endswith("\n"):
        return plan_edits(path, text, ())
    edits, notes = _plan_all(body, identities, (match.span(1) for match in _VARIABLES.finditer(body)))
    more = _size(plan_edits(path, body, edits).text) - _size(body)
    fill = len(text) - len(body) - more
    if not edits or fill < 0:
        full = f"{path}: the environment block has no room for what has to change: {_told(edits)}"
        return plan_edits(path, text, (), [*notes, full] if edits else notes)
    return plan_edits(path, text, [*edits, Edit(len(body), len(text), "#" * fill)], notes)


def plan_dracut_conf(text: str, identities: Identities, path: str) -> TextPlan:
    """Plan `kernel_cmdline` and `add_device` of a dracut.conf or a file in dracut.conf.d."""
    edits, notes = _plan_all(text, identities, _values(_KERNEL_CMDLINE, text))
    for start, end in _values(_ADD_DEVICE, text):
        for match in _WORD.finditer(text, start, end):
            found = find_named(match[0], identities, _ANY)
            name = plan_name(match[0], found) if isinstance(found, Named) else None
            if isinstance(found, Gone):
                notes.append(f"{path}: add_device {match[0]}: {found.why}; take it out before you run dracut")
            elif name is not None and name != match[0]:
                edits.append(Edit(*match.span(), as_path(name), f"add_device {as_path(name)} replaces {match[0]}"))
    return plan_edits(path, text, edits, notes)


def plan_resume(text: str, identities: Identities, path: str = "/etc/initramfs-tools/conf.d/resume") -> TextPlan:
    """Plan the RESUME= of a configuration file of initramfs-tools."""
    edits: list[Edit] = []
    notes: list[str] = []
    for start, end in _values(_RESUME, text):
        spec = text[start:end]
        found = find_named(spec, identities, _RESUMED)
        name = plan_name(spec, found) if isinstance(found, Named) else None
        if isinstance(found, Gone):
            edits.append(Edit(start, end, "none", f"RESUME=none replaces RESUME={spec}: {found.why}"))
        elif name is not None and name != spec:
            edits.append(Edit(start, end, name, f"the system resumes from {name} instead of {spec}"))
        elif name is None and is_hardware_name(spec):
            notes.append(f"{path}: RESUME={spec} names no swap space that was restored; it was left as it is")
    return plan_edits(path, text, edits, notes)


def _plan_spans(
    text: str, identities: Identities, path: str, spans: Iterator[tuple[int, int]], *, bare_kernel: bool = False
) -> TextPlan:
    edits, notes = _plan_all(text, identities, spans, bare_kernel=bare_kernel)
    return plan_edits(path, text, edits, notes)


def _plan_all(
    text: str, identities: Identities, spans: Iterator[tuple[int, int]], *, bare_kernel: bool = False
) -> tuple[list[Edit], list[str]]:
    edits: list[Edit] = []
    notes: list[str] = []
    for start, end in spans:
        more, told = plan_cmdline(text, identities, start=start, end=end, bare_kernel=bare_kernel)
        edits += more
        notes += told
    return edits, notes


def _values(assignment: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield where the values of a shell assignment stand, without their quotes."""
    for match in assignment.finditer(text):
        group = next(name for name in ("double", "single", "plain") if match[name] is not None)
        yield match.span(group)


def _told(edits: list[Edit]) -> str:
    return "; ".join(edit.what for edit in edits)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
