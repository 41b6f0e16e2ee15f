"""Which volumes of a machine are in use and will be held still: where they are mounted, who must not wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir

from remetal.errors import RefusedError
from remetal.image.live import FROZEN_KINDS, READ_ONLY_KINDS, SMALL
from remetal.layout.disks import Use
from remetal.layout.model import FileSystem, SpaceId
from remetal.layout.probe import Probed
from remetal.layout.uses import holds, numbers_of_mount
from remetal.system.blockdev import is_block_device
from remetal.system.freeze import writing_in_memory
from remetal.system.mounts import find_mount_of
from remetal.system.tracing import can_track
from remetal.workflows.stores import OpenedStore


class VolumesInUse:
    """The volumes whose file systems are mounted read-write, and will be held still: where, by volume."""

    def __init__(self, probed: Probed) -> None:
        self.folders: dict[SpaceId, Path] = {}
        self._devices: set[Path] = set()
        self._layout = probed.layout

    def will_hold(self, space: SpaceId, use: Use) -> bool:
        """Whether a volume can be held still; then it is taken up."""
        layer = self._layout.layer_on(space)
        live = (
            use.what == "mount"
            and isinstance(layer, FileSystem)
            and (layer.type in FROZEN_KINDS or (layer.type in READ_ONLY_KINDS and layer.size <= SMALL))
            and is_block_device(Path(use.base))
            and _leads_to(Path(use.where), use)
        )
        if live:
            self.folders.setdefault(space, Path(use.where))
            self._devices.add(Path(use.base))
        return live

    def need_elsewhere(self, opened: OpenedStore) -> None:
        """Raise RefusedError if the repository lies on one of them: storing anything there would wait for it."""
        if opened.folder is not None and self._holds(opened.folder):
            raise RefusedError(
                f"the repository {opened.store.location} lies on a file system that would be held still while it is "
                "captured",
                hint="Keep backups on another disk than the one that is backed up.",
            )

    @contextmanager
    def spooling(self) -> Iterator[bool]:
        """Decide where temporary files lie; yield whether they would have to wait while file systems are held still.

        They lie in memory only if it is known already that something will have to be stored meanwhile.
        """
        with ExitStack() as stack:
            waits = self._holds(Path(gettempdir()))
            if waits and not all(can_track(device) for device in self._devices):
                stack.enter_context(writing_in_memory())
                waits = False
            yield waits

    def _holds(self, path: Path) -> bool:
        return any(holds(folder, path) for folder in self.folders.values())


def _leads_to(folder: Path, use: Use) -> bool:
    """Whether what is mounted at a folder is what uses the volume, and not something else that was mounted over it."""
    return Path(use.device).stat().st_rdev in {os.makedev(*each) for each in numbers_of_mount(find_mount_of(folder))}
