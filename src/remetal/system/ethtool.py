"""What a network card itself says, and sysfs does not show.

Sources: Linux include/uapi/linux/ethtool.h, netdevice(7).
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_GPERMADDR = 0x20
_ADDRESS_MAX = 32


def read_permanent_address(name: str) -> str:
    """Return the address that an interface's hardware has, as `52:54:00:12:34:56`; empty if it has or tells none."""
    data = array.array("B", struct.pack("=II", _GPERMADDR, _ADDRESS_MAX) + bytes(_ADDRESS_MAX))
    place, _ = data.buffer_info()
    try:
        request = struct.pack("16sP", name.encode(), place)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            fcntl.ioctl(opened, _SIOCETHTOOL, request)
    except OSError:
        return ""
    size = struct.unpack_from("=I", data, 4)[0]
    address = data[8 : 8 + min(size, _ADDRESS_MAX)].tobytes()
    return address.hex(":") if any(address) else ""
