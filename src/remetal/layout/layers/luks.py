"""LUKS1 and LUKS2: opened to capture what is inside, restored with its own header, so with every key slot and token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

import msgspec.structs

from remetal.errors import DamagedError
from remetal.layout.keys import Key, keys_for
from remetal.layout.layers.contract import CannotOpenError, Content, Found
from remetal.layout.model import Luks, SpaceId
from remetal.ondisk.luks import LuksHeader, parse_luks
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mapped import claimed_device
from remetal.system.run import ProgramFailedError, ProgramMissingError, run
from remetal.system.standing import find_mapping_on
from remetal.units import align_down, align_up

TYPES: tuple[str, ...] = ("crypto_LUKS",)
PROGRAMS: tuple[str, ...] = ("cryptsetup",)

_WRONG_KEY, _NOT_THERE = 2, 4
"""cryptsetup(8): no permission, which is a wrong passphrase; no such device."""


def probe_groups(members: Sequence[Content]) -> list[Found]:
    """Describe every container by itself from its header."""
    return [_probe(member) for member in members]


def _probe(member: Content) -> Found:
    try:
        header = parse_luks(member.read, member.span.size)
        if header.problems:
            raise BadStructureError(f"it has {', '.join(header.problems)}")
        layer = _describe(member, header)
    except BadStructureError as error:
        return Found((member.space,), problem=f"{member.space} (LUKS) is captured whole: {error.message}")
    copy = f"{member.space}: one copy of its LUKS header is damaged; the other was read" if header.damaged_copy else ""
    return Found((member.space,), layer, problem=copy, hint="Repair it with `cryptsetup repair`." if copy else "")


def _describe(member: Content, header: LuksHeader) -> Luks:
    room = align_down(member.span.size - header.header_size, header.sector_size)
    size = room if header.payload_size is None else header.payload_size
    if not 0 < size <= room or header.key_size == 0:
        raise BadStructureError("its payload does not fit into its space, or no key slot is in use")
    return Luks(
        on=member.space,
        version=header.version,
        uuid=header.uuid,
        header_size=header.header_size,
        size=size,
        fixed=header.payload_size is not None,
        sector_size=header.sector_size,
        key_size=header.key_size,
        cipher=header.cipher,
        label=header.label,
        key_slots=tuple(slot.number for slot in header.keyslots),
        tokens=tuple(token.type for token in header.tokens),
    )


@contextmanager
def open_container(
    layer: Luks, members: Mapping[SpaceId, Span], keys: Sequence[Key], *, writable: bool
) -> Iterator[Mapping[SpaceId, Path]]:
    """Open the container with the first key that does, under a name that nobody else has."""
    known = find_mapping_on(_mapping_of(layer), members.values())
    if known is not None:
        yield {layer.device: known}
        return
    with ExitStack() as stack:
        try:
            opened = _decrypt(layer, members[layer.on], keys, stack, writable)
        except ProgramMissingError as error:
            raise CannotOpenError(
                f"the LUKS container on {layer.on} cannot be opened: {error.message}", hint=error.hint
            ) from error
        yield {layer.device: opened}


def _decrypt(layer: Luks, span: Span, keys: Sequence[Key], stack: ExitStack, writable: bool) -> Path:
    """Open a container until the stack is closed, or we are killed; return the device of its plain side."""
    name = f"remetal-{token_hex(6)}"
    # dm-crypt takes no device that ends within one of its sectors.
    whole = Span(span.path, span.start, align_down(span.size, layer.sector_size))
    device = stack.enter_context(attach_loop(whole, writable=writable))
    _open(layer, device, name, keys, writable=writable)
    stack.callback(run, ["cryptsetup", "close", name], allowed=(0, _NOT_THERE))
    opened = find_mapping_on(_mapping_of(layer) + name, [span])
    if opened is None:
        raise CannotOpenError(f"the kernel shows no plain side of the LUKS container on {layer.on}")
    stack.enter_context(claimed_device(opened))
    run(["cryptsetup", "close", "--deferred", name])  # takes effect at the last close, which is ours
    return opened


def _mapping_of(layer: Luks) -> str:
    """Return how the kernel calls the mappings of a container, up to their names."""
    return f"CRYPT-LUKS{layer.version}-{layer.uuid.replace('-', '')}-"


def _open(layer: Luks, device: Path, name: str, keys: Sequence[Key], *, writable: bool) -> None:
    mode = [] if writable else ["--readonly"]
    for key in keys_for(layer.on, keys):
        try:
            with _key_options(key) as options:
                run(
                    ["cryptsetup", "open", "--type", "luks", "--batch-mode", *mode, *options, device, name],
                    input=b"" if key.is_volume_key else key.data,
                )
        except ProgramFailedError as error:
            if error.returncode == _WRONG_KEY:
                continue
            raise CannotOpenError(
                f"the LUKS container on {layer.on} cannot be opened: {error.message}", hint=error.hint
            ) from error
        return
    raise CannotOpenError(
        f"no key was given that opens the LUKS container on {layer.on} (UUID {layer.uuid})",
        hint="Open it first (cryptsetup open), or give --luks-passphrase-file or --luks-key-file.",
    )


@contextmanager
def _secret_folder() -> Iterator[Path]:
    """Yield a folder of our own that exists in memory alone, where there is such a place."""
    memory = Path("/dev/shm")  # noqa: S108 - memory is the point; the folder is made with a random name and mode 0700
    with TemporaryDirectory(prefix="remetal-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@contextmanager
def _key_options(key: Key) -> Iterator[list[str]]:
    """Yield how cryptsetup is told this key: a volume key only by a file, which exists in memory alone."""
    if not key.is_volume_key:
        yield ["--key-file", "-"]
        return
    with _secret_folder() as folder:
        path = folder / "key"
        path.touch(0o600)
        path.write_bytes(key.data)
        yield ["--volume-key-file", str(path)]


def find_key(layer: Luks, header: bytes, keys: Sequence[Key]) -> Key | None:
    """Return the first key that opens a container with this header, or None; nothing is opened.

    `header` are the container's first `layer.header_size` bytes.
    """
    with _secret_folder() as folder:
        path = folder / "header"
        path.touch(0o600)
        path.write_bytes(header)
        for key in keys_for(layer.on, keys):
            with _key_options(key) as options:
                argv = ["cryptsetup", "open", "--test-passphrase", "--type", "luks", *options]
                done = run([*argv, path], input=b"" if key.is_volume_key else key.data, allowed=range(256))
            if done.returncode == 0:
                return key
    return None


def read_volume_key(layer: Luks, span: Span, keys: Sequence[Key]) -> bytes:
    """Return the volume key of the container on `span`. Raises CannotOpenError if no key gives it."""
    with _secret_folder() as folder, attach_loop(span) as device:
        path = folder / "key"
        for key in keys_for(layer.on, keys):
            argv = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--key-file", "-"]
            done = run([*argv, "--volume-key-file", path, device], input=key.data, allowed=range(256))
            if done.returncode == 0:
                return path.read_bytes()
    raise CannotOpenError(
        f"no key was given from which the volume key of the LUKS container on {layer.on} can be had",
        hint="Give --luks-passphrase-file or --luks-key-file, also if the container is open already.",
    )


def find_running(layer: Luks) -> tuple[Path, ...]:
    """Return nothing: a container and its copy may be open beside each other."""
    return ()


def is_made(layer: Luks, members: Mapping[SpaceId, Span]) -> bool:
    """Whether the container's header stands on its space; it comes there as an image."""
    span = members[layer.on]
    with open_disk(span.path) as disk:
        try:
            found = parse_luks(disk.reader(span.start), span.size)
        except BadStructureError:
            return False
    return (found.version, found.uuid) == (layer.version, layer.uuid)


def apply_container(layer: Luks, members: Mapping[SpaceId, Span]) -> int:
    """Never needed: a header is restored as an image before its container is opened."""
    raise DamagedError(
        f"the header of the LUKS container on {layer.on} does not stand where its image was written",
        hint="Run `remetal check --read-data`, and restore another snapshot if there is one.",
    )


def extensible_devices(layer: Luks) -> tuple[SpaceId, ...]:
    """Return the plain side, unless the header fixes its size."""
    return () if layer.fixed else (layer.device,)


def least_space(layer: Luks, space: SpaceId, size: int, needs: Mapping[SpaceId, int]) -> int:
    """Return what the plain side needs, and the header."""
    return layer.header_size + (layer.size if layer.fixed else align_up(needs[layer.device], layer.sector_size))


def plan_container(layer: Luks, gains: Mapping[SpaceId, int], wish: SpaceId, needs: Mapping[SpaceId, int]) -> Luks:
    """Return the container in a space of another size: its plain side reaches to the end, unless its header says."""
    if layer.fixed:
        return layer
    size = align_down(layer.size + gains[layer.on], layer.sector_size)
    if size <= 0:
        raise BadStructureError(f"the LUKS container on {layer.on} does not fit")
    return msgspec.structs.replace(layer, size=size)
