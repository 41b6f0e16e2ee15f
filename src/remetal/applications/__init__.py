"""The applications that remetal can make ready for a backup, one file each. A new one is a file and a line below."""

from __future__ import annotations

from collections.abc import Mapping

from remetal.applications.contract import AnyKind, Kind
from remetal.applications.libvirt import Libvirt, LibvirtSettings
from remetal.applications.mariadb import Mariadb, MariadbSettings
from remetal.applications.postgresql import Postgresql, PostgresqlSettings
from remetal.applications.redis import Redis, RedisSettings

APPLICATIONS: Mapping[str, AnyKind] = {
    "postgresql": Kind(PostgresqlSettings, Postgresql),
    "mariadb": Kind(MariadbSettings, Mariadb),
    "redis": Kind(RedisSettings, Redis),
    "libvirt": Kind(LibvirtSettings, Libvirt),
}
"""By the name that the hooks' file calls it."""
