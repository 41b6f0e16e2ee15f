"""A real S3 server for the length of a block: Ceph's monitor, one object store in memory, and its RADOS gateway."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.config
import botocore.session

from tests.servers import free_port

_REGION = "default"
_CLUSTER = "5e2b3a1c-0f7d-4c55-9d6b-6a1f2e3d4c5b"
_OSD = "8c1d5f5e-64b3-4c8e-9a53-0d8f3c1f6a72"


@dataclass(frozen=True)
class Gateway:
    """The server's address and the keys of its one user."""

    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Return the variables that lead a client to it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """Return a client of another make than the one that is tested."""
        return botocore.session.Session().create_client(
            "s3",
            region_name=_REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def running_gateway(folder: Path) -> Iterator[Gateway]:
    """Run Ceph in a folder. It takes half a minute, and half a GiB of memory."""
    monitor, port = free_port(), free_port()
    config = folder / "ceph.conf"
    config.write_text(
        f"""[global]
fsid = {_CLUSTER}
mon host = [v1:127.0.0.1:{monitor}]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
mon warn on pool no redundancy = false
mon max pg per osd = 1000
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = 127.0.0.1
"""
    )
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()

    def run(*argv: str) -> str:
        whole = [argv[0], "-c", str(config), *argv[1:]]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    monmap = folder / "monmap"
    subprocess.run(
        ["monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{monitor}]", "--fsid", _CLUSTER, str(monmap)],
        check=True,
        capture_output=True,
    )
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
    with ExitStack() as stack:
        stack.enter_context(_daemon(folder, "ceph-mon", "-c", str(config), "-i", "a", "-f"))
        # A monitor that has only just formed its quorum of one may refuse whoever asks first.
        _wait(lambda: bool(run("ceph", "--connect-timeout", "60", "osd", "create", _OSD)), "the monitor refuses")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", _OSD)
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=local")
        stack.enter_context(_daemon(folder, "ceph-osd", "-c", str(config), "-i", "0", "-f"))
        _wait(lambda: "1 up" in run("ceph", "osd", "stat"), "the object store is not up")
        stack.enter_context(_daemon(folder, "radosgw", "-c", str(config), "-n", "client.rgw", "-f"))
        made = json.loads(run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test"))
        keys = made["keys"][0]
        gateway = Gateway(f"http://127.0.0.1:{port}", keys["access_key"], keys["secret_key"])
        _wait(lambda: bool(gateway.client().list_buckets()), "the gateway does not answer")
        yield gateway


@contextmanager
def _daemon(folder: Path, *argv: str) -> Iterator[None]:
    with (folder / f"{argv[0]}.out").open("wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(os.environ))
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(done: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if done():
                return
        except Exception as error:  # noqa: BLE001 - not yet there
            last: object = error
        else:
            last = "not yet"
        assert time.monotonic() < deadline, f"{what}: {last}"
        time.sleep(0.3)
