"""The steps of a plan, in the order in which a restore applies them. Each may be repeated at any time.

All sizes and places are in bytes; `disk` is the source disk's name, whose target the plan names.
"""

from __future__ import annotations

from typing import TypeAlias

from remetal.layout.model import SpaceId, Struct, Table


class ImageFacts(Struct, frozen=True, kw_only=True):
    """What a plan needs to know of a captured image: its size and captured bytes, and the identity of its map."""

    size: int
    used: int
    digest: str


class CreateFile(Struct, frozen=True, kw_only=True, tag_field="step", tag="create-file"):
    """Make a sparse disk file of this size, unless one of at least this size is there."""

    disk: str
    size: int


class WriteTable(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-table"):
    """Write a partition table without its boot code, unless the very same one is there."""

    disk: str
    size: int
    sector: int
    table: Table


class ClearRange(Struct, frozen=True, kw_only=True, tag_field="step", tag="clear-range"):
    """Fill a range outside of all volumes with zeros, where remains of other tables or arrays could mislead."""

    disk: str
    start: int
    size: int


class ClearSignatures(Struct, frozen=True, kw_only=True, tag_field="step", tag="clear-signatures"):
    """Wipe the signatures of whatever stood on a volume's place, unless it is that volume already."""

    volume: SpaceId
    disk: str
    start: int
    size: int
    type: str
    uuid: str


class WriteImage(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-image"):
    """Make the place equal to the captured image; `used` are the image's captured bytes, `size` its whole size."""

    volume: SpaceId
    disk: str
    start: int
    size: int
    used: int
    digest: str


class MakeSwap(Struct, frozen=True, kw_only=True, tag_field="step", tag="make-swap"):
    """Make swap space with the captured identity, unless it is there."""

    volume: SpaceId
    disk: str
    start: int
    size: int
    page_size: int
    uuid: str
    label: str


class GrowFileSystem(Struct, frozen=True, kw_only=True, tag_field="step", tag="grow"):
    """Let a restored file system grow from `before` to `after` bytes inside its space of `size` bytes."""

    volume: SpaceId
    disk: str
    start: int
    size: int
    type: str
    before: int
    after: int


class WriteBootCode(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-boot-code"):
    """Write the boot code of sector 0: the last step, so that a half-restored disk does not boot."""

    disk: str
    code: bytes


Step: TypeAlias = (
    CreateFile | WriteTable | ClearRange | ClearSignatures | WriteImage | MakeSwap | GrowFileSystem | WriteBootCode
)
