"""Capturing the volumes of a layout: those in use as they are at one moment, then the others, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from remetal.errors import UnavailableError
from remetal.events import Report, Step, Warn
from remetal.image.capture import capture_bytes, capture_volume
from remetal.image.extents import probe_used, probe_used_spanning
from remetal.image.live import LiveVolume, Manner, Pause
from remetal.image.ranges import Extent, Extents
from remetal.image.snapshots import Policy, Way, capture_mounted
from remetal.layout.model import Captured, FileSystem, Layout, Raw, SpaceId
from remetal.layout.opened import span_of
from remetal.repository.session import Session
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import Span, find_partition, probe_changed
from remetal.units import format_bytes
from remetal.workflows.leftout import LeavingOut


@dataclass(frozen=True, slots=True)
class CapturedVolume:
    """A volume, blkid's name for what it holds if that is known, the way it was captured, and its used bytes."""

    volume: SpaceId
    kind: str
    way: Way
    used: int


class VolumeCapture:
    """Captures one volume after the other."""

    def __init__(
        self,
        session: Session,
        layout: Layout,
        devices: Mapping[SpaceId, Path],
        volume_keys: Mapping[SpaceId, bytes],
        live: Mapping[SpaceId, Path],
        leaving: LeavingOut,
        manner: Manner,
        report: Report,
    ) -> None:
        """`live` are the volumes that will be held still, in this manner, and the folders where they are mounted."""
        self.session = session
        self.layout = layout
        self.devices = devices
        self.volume_keys = volume_keys
        self.live = live
        self.leaving = leaving
        self.manner = manner
        self.report = report
        self.before = {image.volume: image for image in session.previous.images} if session.previous else {}
        self.spanning = self._probe_spanning()
        self.ways: dict[SpaceId, Way] = {}

    def run(self, policy: Policy) -> tuple[Sequence[ImageRecord], Pause | None]:
        """Capture everything that has an image; what is live may be read from snapshots as the policy says.

        Raises UnavailableError if somebody has written to what is not, which nobody was seen to use.
        """
        images: list[ImageRecord] = []
        pause: Pause | None = None
        rest = [each for each in self.layout.captured() if each.volume not in self.live]
        written = self._count_written(each.volume for each in rest if each.volume not in self.volume_keys)
        if self.live:
            self.leaving.rehearse(self.live)
            volumes = [self._live_volume(each) for each in self.layout.captured() if each.volume in self.live]
            images, pause, self.ways = capture_mounted(self.session, volumes, policy, self.manner, self.report)
        images += map(self._capture, rest)
        self._check_rest(written)
        return images, pause

    def _count_written(self, volumes: Iterable[SpaceId]) -> dict[SpaceId, tuple[Path, int]]:
        """Return the devices of volumes, where they have one of their own, and how many bytes were written to each."""
        found: dict[SpaceId, tuple[Path, int]] = {}
        for volume in volumes:
            device = find_partition(self._span(volume))
            if device is None:
                continue
            written = probe_changed(device)
            if written is not None:
                found[volume] = device, written
            else:
                self.report(
                    Warn(
                        f"the kernel does not count what is written to {volume} ({device}), so it cannot be noticed if "
                        "somebody who is not seen here writes to it while it is captured",
                        hint=f"Let it count: echo 1 > /sys/class/block/{device.name}/queue/iostats (or its disk's).",
                    )
                )
        return found

    def _check_rest(self, before: Mapping[SpaceId, tuple[Path, int]]) -> None:
        for volume, (device, written) in before.items():
            if probe_changed(device) != written:
                raise UnavailableError(
                    f"a program has written to {volume} ({device}) while it was captured, which is not mounted here",
                    hint=f"See who uses it (fuser -v {device}): a virtual machine, a container, a pool? Nothing is "
                    "kept of this backup. Stop that and run it again, or back up from the recovery medium.",
                )

    def volumes(self, images: Sequence[ImageRecord]) -> tuple[CapturedVolume, ...]:
        """Return how the volumes of these images were captured."""
        kinds = {each.volume: each.type for each in self.layout.captured()}
        return tuple(
            CapturedVolume(each.volume, kinds[each.volume], self.ways.get(each.volume, "at rest"), each.used)
            for each in images
        )

    def _live_volume(self, captured: Captured) -> LiveVolume:
        volume, span = captured.volume, self._span(captured.volume)
        layer = self.layout.layer_on(volume)
        if isinstance(layer, FileSystem) and layer.parts:
            look = partial(self._look_at_part, layer, volume)
        else:
            look = partial(probe_used, span, captured.type, frozen=True)
        return LiveVolume(
            volume,
            span,
            captured.type,
            self.live[volume],
            self.leaving.around(volume, look),
            self._previous(volume),
            self.leaving.from_copy(volume),
        )

    def _look_at_part(self, layer: FileSystem, space: SpaceId) -> Extents:
        """Return what is used of one space of a file system that may span several, while it is held still."""
        used = probe_used_spanning({part.number: self._span(part.space) for part in layer.parts}, frozen=True)
        return Extents(next(used[part.number] for part in layer.parts if part.space == space))

    def _previous(self, volume: SpaceId) -> ImageRecord | None:
        """Return the volume's image in the snapshot before, if it was of the same size."""
        image = self.before.get(volume)
        return image if image is not None and image.size == self._span(volume).size else None

    def _probe_spanning(self) -> dict[SpaceId, Sequence[Extent]]:
        """Return the used extents of file systems that span several spaces, by space."""
        found: dict[SpaceId, Sequence[Extent]] = {}
        for volume in self.layout.volumes():
            if isinstance(volume, FileSystem) and volume.parts and volume.on not in self.live:
                spans = {part.number: self._span(part.space) for part in volume.parts}
                used = probe_used_spanning(spans, report=self.report)
                found |= {part.space: used[part.number] for part in volume.parts}
        return found

    def _span(self, space: SpaceId) -> Span:
        return span_of(space, self.layout, self.devices)

    def _capture(self, captured: Captured) -> ImageRecord:
        volume = captured.volume
        if volume in self.volume_keys:
            self.report(Step(f"Putting the volume key {volume} into escrow"))
            key, previous = self.volume_keys[volume], self.before.get(volume)
            return capture_bytes(self.session, key, volume=volume, previous=previous)
        span = self._span(volume)
        self.report(Step(f"Capturing {volume} ({self._content(captured)}, {format_bytes(span.size)})"))
        extents = self.spanning.get(volume)
        if extents is None:
            extents = self.leaving.find_rest(volume, span, captured.type, self.report)
        return capture_volume(
            self.session,
            span,
            volume=volume,
            kind=captured.type,
            extents=extents,
            previous=self._previous(volume),
            pace=self.manner.pace,
            report=self.report,
        )

    def _content(self, captured: Captured) -> str:
        layer = self.layout.layer_on(captured.volume)
        kind = layer.type if isinstance(layer, Raw) else captured.type
        return kind or ("unknown content" if layer else "LUKS header")
