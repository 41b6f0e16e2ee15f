"""A good layout record with something of every kind in it, and every place where a hostile value can stand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from remetal.layout.model import Inventory, Layout, Link, Luks, Nic, Route
from remetal.layout.record import encode_layout
from tests.sample_layout import sample

MAPS = ("--map=sda=sda.img", "--map=m.img=m.img", "--map=sdb=sdb.img", "--map=sdc=sdc.img")
"""Where its disks are to go."""

_INVENTORY = Inventory(
    firmware="uefi",
    architecture="x86_64",
    vendor="Vendor",
    product="Product",
    serial="1234",
    cpu="CPU",
    cores=2,
    memory=1 << 30,
    kernel="6.1",
    nics=(
        Nic(
            name="eth0",
            mac="02:00:00:00:00:01",
            driver="e1000",
            place="pci-0000:00:03.0",
            permanent="02:00:00:00:00:01",
            kind="wlan",
            path="pci-0000:00:03.0",
            properties=("ID_NET_NAME_PATH=enp0s3",),
        ),
    ),
    modaliases=("pci:v00008086d0000100E",),
    routes=(
        Route(
            kind="disk",
            name="sda",
            links=(Link(modalias="pci:v00008086d00002922", driver="ahci", module="ahci"),),
        ),
    ),
)


def layout_with_all() -> Layout:
    """Return a layout with one of everything, and the hardware that it was on."""
    return msgspec.structs.replace(sample(), inventory=_INVENTORY)


def plain_layout() -> Layout:
    """Return the same without its LUKS container, so that it can be planned without a key."""
    whole = layout_with_all()
    layers = [each for each in whole.layers if not isinstance(each, Luks) and getattr(each, "on", "") != "md/root:luks"]
    return msgspec.structs.replace(whole, layers=tuple(layers))


def sample_layout() -> bytes:
    """Return the record of the whole."""
    return encode_layout(layout_with_all())


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the way to every text and number in a record, and what stands there."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from leaves(each, (*path, number))
    else:
        yield path, value


def changed(path: tuple[Any, ...], value: Any) -> bytes:
    """Return the record with another value at one place."""
    record = json.loads(sample_layout())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(record).encode()
