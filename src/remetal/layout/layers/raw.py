"""Whatever remetal does not know, or need not know: carried whole, byte by byte."""

from __future__ import annotations

import re

from remetal.layout.layers.contract import Content
from remetal.layout.model import Raw
from remetal.ondisk.foreign import read_sector


def probe_volume(content: Content) -> Raw:
    """Describe the space as bytes. What blkid says of it may be anything; the record holds plain words."""
    return Raw(
        on=content.space,
        size=content.span.size,
        type=re.sub(r"[^A-Za-z0-9_.+-]", "_", content.type)[:64],
        uuid=re.sub(r"[^A-Za-z0-9-]", "", content.uuid)[:64].lstrip("-"),
        sector=read_sector(content.type, content.read),
    )
