"""What is tried: which database runs where, on which release of Debian, and how its storage is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FOLDERS = ("data", "log", "space")
"""Where a database keeps its files: the folder itself, its log, and one table. Each is a volume of its own."""

PORTS = {"postgresql": 5432, "mariadb": 3306}
"""Where a database listens."""

KEY = "a key of the lab"
KEY_FILE = "/etc/lab.key"
"""What opens the machine's LUKS containers when it starts."""


@dataclass(frozen=True, slots=True)
class Place:
    """A volume: the kind of its file system, and what it stands on: a partition, LVM, LVM-thin, MD or LUKS."""

    kind: str
    on: str


@dataclass(frozen=True, slots=True)
class LiveCase:
    """A machine that is backed up while its database is at work. The places are in the order of FOLDERS."""

    name: str
    suite: str
    database: Literal["postgresql", "mariadb"]
    places: tuple[Place, ...]


def _places(*words: str) -> tuple[Place, ...]:
    return tuple(Place(*each.split()) for each in words)


CASES = (
    LiveCase("postgresql-12", "bookworm", "postgresql", _places("ext4 LVM", "xfs partition", "btrfs MD")),
    LiveCase("mariadb-12", "bookworm", "mariadb", _places("xfs MD", "ext4 LUKS", "ext4 LVM-thin")),
    LiveCase("postgresql-13", "trixie", "postgresql", _places("btrfs LUKS", "xfs LVM", "ext4 LVM-thin")),
    LiveCase("mariadb-13", "trixie", "mariadb", _places("btrfs partition", "xfs LUKS", "btrfs LVM")),
)
"""Every database on every release; XFS and btrfs on all that they may stand on, ext4 on LVM, LUKS and thin pools.

ext4 on a partition is what every machine's root is; on MD it is among the stacks that are held against their writes.
"""


def expected_way(case: LiveCase, volume: str) -> str:
    """Return how a volume with a file system is to be captured: from a snapshot if it is a thin one, else tracked."""
    thin = {
        f"{folder}group/volume" for folder, place in zip(FOLDERS, case.places, strict=True) if place.on == "LVM-thin"
    }
    return "snapshot" if volume in thin else "tracked"


TABLE = "label: gpt\n" + "size=400MiB\n" * 2 * len(FOLDERS)
"""The partitions of the machine's second disk, two for each volume, as sfdisk(8) wants them told."""


def plan_storage(case: LiveCase) -> str:
    """Return the script that makes the volumes on /dev/vdb, mounts them, and lets every later boot do the same."""
    lines = ["set -eux", f"(umask 077; printf '{KEY}' > {KEY_FILE})", ": > /etc/crypttab"]
    for number, (folder, place) in enumerate(zip(FOLDERS, case.places, strict=True)):
        first, second = (f"/dev/vdb{2 * number + 1}", f"/dev/vdb{2 * number + 2}")
        device, make = _plan_device(folder, place, first, second)
        options = "" if place.kind == "btrfs" else " 0 2"
        lines += [*make, "udevadm settle", f"mkfs.{place.kind} -q {device}", f"mkdir -p /{folder}"]
        lines.append(
            f"echo UUID=$(blkid -s UUID -o value {device}) /{folder} {place.kind} defaults{options} >> /etc/fstab"
        )
    lines += ["systemctl daemon-reload", *(f"mount /{folder}" for folder in FOLDERS)]
    return "\n".join(lines) + "\n"


def plan_database(case: LiveCase) -> str:
    """Return the script that moves the database that Debian has made onto the volumes, and opens it to this host."""
    return {"postgresql": _POSTGRESQL, "mariadb": _MARIADB}[case.database]


_POSTGRESQL = """
set -eux
version=$(ls /usr/lib/postgresql)
systemctl stop postgresql@$version-main postgresql
conf=/etc/postgresql/$version/main
chown postgres: /data /log /space
mv /var/lib/postgresql/$version/main /data/cluster
mv /data/cluster/pg_wal /log/wal
ln -s /log/wal /data/cluster/pg_wal
install -d -o postgres -g postgres /space/tables
cat > $conf/conf.d/lab.conf <<'conf'
data_directory = '/data/cluster'
listen_addresses = '*'
min_wal_size = 64MB
max_wal_size = 192MB
conf
echo host all all 10.0.2.0/24 trust >> $conf/pg_hba.conf
runuser -u postgres -- /usr/lib/postgresql/$version/bin/pg_checksums --enable --no-sync -D /data/cluster
systemctl start postgresql@$version-main
runuser -u postgres -- psql -c "CREATE TABLESPACE space LOCATION '/space/tables'"
"""

_MARIADB = """
set -eux
systemctl stop mariadb
install -d -o mysql -g mysql /log/redo /space/tables
mv /var/lib/mysql /data/mysql
mv /data/mysql/ib_logfile0 /log/redo
cat > /etc/mysql/mariadb.conf.d/99-lab.cnf <<'conf'
[mariadbd]
datadir = /data/mysql
innodb_log_group_home_dir = /log/redo
bind-address = 0.0.0.0
skip-name-resolve
conf
systemctl start mariadb
mariadb -e "CREATE DATABASE ledger; CREATE USER root@'10.0.2.2'; GRANT ALL ON *.* TO root@'10.0.2.2'"
"""


def _plan_device(folder: str, place: Place, first: str, second: str) -> tuple[str, list[str]]:
    """Return the device of a volume, and the commands that make it of two partitions."""
    match place.on:
        case "partition":
            return first, []
        case "LVM":
            make = [f"vgcreate -q {folder}group {first} {second}", f"lvcreate -q -y -n volume -L 600M {folder}group"]
            return f"/dev/{folder}group/volume", make
        case "LVM-thin":
            make = [
                f"vgcreate -q {folder}group {first} {second}",
                f"lvcreate -q -y --type thin-pool -n pool -L 600M --poolmetadatasize 8M {folder}group",
                f"lvcreate -q -y -n volume -V 500M --thinpool {folder}group/pool",
            ]
            return f"/dev/{folder}group/volume", make
        case "MD":
            make = [
                f"mdadm --create /dev/md/{folder} --run --metadata=1.2 --level=1 --raid-devices=2 {first} {second}",
                f"mdadm --detail --brief /dev/md/{folder} >> /etc/mdadm/mdadm.conf",
            ]
            return f"/dev/md/{folder}", make
        case "LUKS":
            make = [
                f"cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {first} {KEY_FILE}",
                f"cryptsetup open --key-file {KEY_FILE} {first} {folder}",
                f"echo {folder} UUID=$(blkid -s UUID -o value {first}) {KEY_FILE} luks >> /etc/crypttab",
            ]
            return f"/dev/mapper/{folder}", make
        case _:
            raise ValueError(place.on)
