"""The header of Linux swap space. Source: Linux include/linux/swap.h, union swap_header; mkswap(8)."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Read

PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
_INFO = struct.Struct("<III16s16s")
_MARK = b"SWAPSPACE2"
_HIBERNATED = (b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001")


@dataclass(frozen=True, slots=True)
class SwapHeader:
    """`size` in bytes is what the header promises; `hibernated` if a suspended system's memory lies here."""

    size: int
    page_size: int
    uuid: str
    label: str
    hibernated: bool = False


def parse_swap(read: Read, size: int) -> SwapHeader:
    """Parse the header in a volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    for page_size in PAGE_SIZES:
        if size < 2 * page_size:
            break
        mark = read(page_size - 10, 10)
        if mark == _MARK or mark in _HIBERNATED:
            version, last_page, _, identity, label = _INFO.unpack(read(1024, _INFO.size))
            if version != 1 or not 0 < last_page < size // page_size:
                raise BadStructureError("the header of the swap space is damaged")
            return SwapHeader(
                size=(last_page + 1) * page_size,
                page_size=page_size,
                uuid=str(uuid.UUID(bytes=identity)),
                label=label.split(b"\0")[0].decode("utf-8", "ignore"),
                hibernated=mark != _MARK,
            )
    raise BadStructureError("there is no swap space of a known kind")
