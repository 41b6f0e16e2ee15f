"""What blkid(8) recognises in a range of a disk, by its low-level probing: no cache, no device needed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from remetal.system.blockdev import Span
from remetal.system.run import run

_NOTHING, _SEVERAL = 2, 8
_BOOT_SECTORS = {"vfat", "exfat", "ntfs"}
"""Types whose boot sector ends as a DOS partition table does."""
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Signature:
    """Content type, UUID and label as blkid names them; `table` is the type of a partition table.

    `ambiguous` if several contents claim the range; `type` is then empty.
    """

    type: str = ""
    uuid: str = ""
    label: str = ""
    table: str = ""
    ambiguous: bool = False

    @property
    def is_content(self) -> bool:
        """Whether there is content, and what looks like a partition table is but its boot sector's last two bytes."""
        return bool(self.type) and (not self.table or (self.table == "dos" and self.type in _BOOT_SECTORS))


def probe_signature(span: Span) -> Signature:
    """Return what blkid recognises in a span of a disk. Raises ProgramFailedError if it cannot be read."""
    done = run(
        [
            *("blkid", "--probe", "--output", "udev"),
            *("--offset", str(span.start), "--size", str(span.size), span.path),
        ],
        allowed=(0, _NOTHING, _SEVERAL),
    )
    if done.returncode == _SEVERAL:
        return Signature(ambiguous=True)
    return parse_signature(done.stdout)


def parse_signature(output: bytes) -> Signature:
    """Parse blkid's output in the format `udev`."""
    values = dict(line.split(b"=", 1) for line in output.splitlines() if b"=" in line)

    def value(key: str) -> str:
        return values.get(key.encode(), b"").decode("utf-8", "replace")

    label = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), values.get(b"ID_FS_LABEL_ENC", b""))
    return Signature(
        type=value("ID_FS_TYPE"),
        uuid=value("ID_FS_UUID"),
        label=label.decode("utf-8", "replace").split("\0")[0].rstrip(),
        table=value("ID_PART_TABLE_TYPE"),
        ambiguous=b"ID_FS_AMBIVALENT" in values,
    )
