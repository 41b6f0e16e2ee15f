"""The steps of a plan, in the order in which a restore applies them. Each may be repeated at any time.

All sizes and places are in bytes; `device` is a source disk's name, whose target the plan names, or the name of a
device that an earlier step opened.
"""

from __future__ import annotations

from typing import TypeAlias

from remetal.layout.layers.remaking import Remake
from remetal.layout.model import Container, FileSystem, SpaceId, Struct, Table, VolumeGroup


class ImageFacts(Struct, frozen=True, kw_only=True):
    """What a plan needs to know of a captured image: its size and captured bytes, and the identity of its map."""

    size: int
    used: int
    digest: str
    image: SpaceId = ""
    """Whose image it is, where that is not the space that it goes to: what was on an array may go onto a disk."""


class CreateFile(Struct, frozen=True, kw_only=True, tag_field="step", tag="create-file"):
    """Make a sparse disk file of this size, unless one of at least this size is there."""

    device: SpaceId
    size: int


class WriteTable(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-table"):
    """Write a partition table without its boot code, unless the very same one is there."""

    device: SpaceId
    size: int
    sector: int
    table: Table


class ClearRange(Struct, frozen=True, kw_only=True, tag_field="step", tag="clear-range"):
    """Fill a range outside of all volumes with zeros, where remains of other tables or arrays could mislead."""

    device: SpaceId
    start: int
    size: int


class ClearSignatures(Struct, frozen=True, kw_only=True, tag_field="step", tag="clear-signatures"):
    """Wipe the signatures of whatever stood on a volume's place, unless it is that volume already."""

    volume: SpaceId
    device: SpaceId
    start: int
    size: int
    type: str
    uuid: str


class WriteImage(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-image"):
    """Make the place equal to the captured image, which is that of `volume` or, if it was elsewhere, named by `image`.

    `used` are the image's captured bytes.
    `size` is the image's whole size, or that of the place where the volume ends before the image does.
    """

    volume: SpaceId
    image: SpaceId
    device: SpaceId
    start: int
    size: int
    used: int
    digest: str


class RemakeFileSystem(Struct, frozen=True, kw_only=True, tag_field="step", tag="remake"):
    """Make a file system anew, empty, with the captured features and identity, unless this very one is there."""

    volume: FileSystem
    device: SpaceId
    start: int
    size: int
    remake: Remake


class CopyFiles(Struct, frozen=True, kw_only=True, tag_field="step", tag="copy-files"):
    """Make the files on a file system that was made anew equal to those in the captured image.

    `used` are the image's captured bytes.
    """

    volume: SpaceId
    image: SpaceId
    device: SpaceId
    start: int
    size: int
    type: str
    used: int
    digest: str


class ShrunkPart(Struct, frozen=True, kw_only=True):
    """One device of a file system that shrinks from `before` bytes to `size`, or stays as it is where these are equal.

    `number` is its id in the file system; `volume`, `image` and `used` are as in `WriteImage`.
    """

    volume: SpaceId
    number: int
    image: SpaceId
    device: SpaceId
    start: int
    before: int
    size: int
    used: int
    digest: str


class ShrinkFileSystem(Struct, frozen=True, kw_only=True, tag_field="step", tag="shrink"):
    """Write the images of a file system's devices as far as these reach, and let it move there what lies behind."""

    volume: FileSystem
    parts: tuple[ShrunkPart, ...]


class MakeSwap(Struct, frozen=True, kw_only=True, tag_field="step", tag="make-swap"):
    """Make swap space with the captured identity, unless it is there."""

    volume: SpaceId
    device: SpaceId
    start: int
    size: int
    page_size: int
    uuid: str
    label: str


class GrowFileSystem(Struct, frozen=True, kw_only=True, tag_field="step", tag="grow"):
    """Let a restored file system grow from `before` to `after` bytes inside its space of `size` bytes."""

    volume: SpaceId
    device: SpaceId
    start: int
    size: int
    type: str
    before: int
    after: int


class WriteBootCode(Struct, frozen=True, kw_only=True, tag_field="step", tag="write-boot-code"):
    """Write the boot code of sector 0: the last step, so that a half-restored disk does not boot."""

    device: SpaceId
    code: bytes


class OpenContainer(Struct, frozen=True, kw_only=True, tag_field="step", tag="open"):
    """Make an array or a volume group, unless this very one is there, and open it for the steps that follow.

    A LUKS container is only opened: its header is an image, which was written before. Where `make` is False, what is
    not there is not made.
    """

    container: Container
    make: bool = True


class TakeSnapshot(Struct, frozen=True, kw_only=True, tag_field="step", tag="snapshot"):
    """Make a thin snapshot of its origin, which is restored by now, so that both share what is equal; and open it."""

    group: VolumeGroup
    volume: str


class GrowSpanning(Struct, frozen=True, kw_only=True, tag_field="step", tag="grow-spanning"):
    """Let a restored file system of several devices grow from `before` bytes to what it says of itself."""

    volume: FileSystem
    before: int


Step: TypeAlias = (
    CreateFile
    | WriteTable
    | ClearRange
    | ClearSignatures
    | OpenContainer
    | TakeSnapshot
    | WriteImage
    | RemakeFileSystem
    | CopyFiles
    | ShrinkFileSystem
    | MakeSwap
    | GrowFileSystem
    | GrowSpanning
    | WriteBootCode
)


def images_in(step: Step) -> tuple[WriteImage | CopyFiles | ShrunkPart, ...]:
    """Return what a step brings of images: whose image, where to, and how many bytes."""
    match step:
        case WriteImage() | CopyFiles():
            return (step,)
        case ShrinkFileSystem():
            return step.parts
        case _:
            return ()
