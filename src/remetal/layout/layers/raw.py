"""Whatever remetal does not know, or need not know: carried whole, byte by byte."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.model import Raw


def probe_volume(content: Content) -> Raw:
    """Describe the space as bytes."""
    return Raw(on=content.space, size=content.span.size, type=content.type, uuid=content.uuid)
