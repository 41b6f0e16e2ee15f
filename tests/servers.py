"""Real servers on loopback, for the length of a block: OpenSSH's and nginx, each in a folder of its own."""

from __future__ import annotations

import getpass
import http.server
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SshServer:
    """Where the server is, and the files that a client needs. `log` is what the server has said."""

    port: int
    key: Path
    known_hosts: Path
    log: Path

    def location(self, folder: Path) -> str:
        """Return the address of a folder on it."""
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{folder}"


@contextmanager
def running_sshd(folder: Path, *options: str) -> Iterator[SshServer]:
    """Run sshd with a fresh host key, which one fresh key of ours opens; `options` are lines of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    authorized = folder / "authorized_keys"
    authorized.write_text((folder / "client.pub").read_text())
    authorized.chmod(0o600)
    port = free_port()
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    config = folder / "sshd_config"
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {authorized}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "PidFile none",
        "MaxStartups 100",
        *options,
    ]
    if not any("Subsystem" in each for each in options):
        lines.append("Subsystem sftp internal-sftp")
    config.write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    log = folder / "log"
    with _running(["/usr/sbin/sshd", "-D", "-E", str(log), "-f", str(config)], port):
        yield SshServer(port, folder / "client", known, log)


@dataclass(frozen=True)
class Certificate:
    """A certificate that nobody but itself vouches for, and its private key."""

    path: Path
    key: Path


def make_certificate(folder: Path, address: str) -> Certificate:
    """Make a certificate for an IP address."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Certificate(folder / "certificate.pem", folder / "key.pem")
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=vault"]
    argv = ["openssl", "req", "-x509", *words, "-addext", f"subjectAltName=IP:{address}", "-days", "2"]
    subprocess.run([*argv, "-keyout", found.key, "-out", found.path], check=True, capture_output=True)
    return found


@contextmanager
def running_nginx(folder: Path, root: Path, *directives: str, certificate: Certificate | None = None) -> Iterator[str]:
    """Run nginx over `root` and yield its address; `directives` stand in the block of the location."""
    folder.mkdir(parents=True, exist_ok=True)
    secured = ""
    if certificate is not None:
        secured = f"    ssl_certificate {certificate.path};\n    ssl_certificate_key {certificate.key};\n"
    port = free_port()
    own = "".join(f"      {each};\n" for each in directives)
    temporary = "".join(
        f"  {kind}_temp_path {folder / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"user {getpass.getuser()};\ndaemon off;\nworker_processes 1;\nerror_log {folder / 'error.log'};\n"
        f"pid {folder / 'pid'};\nevents {{ worker_connections 256; }}\n"
        f"http {{\n{temporary}  access_log off;\n"
        f"  server {{\n    listen 127.0.0.1:{port}{' ssl' if secured else ''};\n{secured}    root {root};\n"
        f"    location / {{\n{own}    }}\n  }}\n}}\n"
    )
    with _running(["/usr/sbin/nginx", "-c", str(config), "-e", str(folder / "error.log")], port):
        yield f"http{'s' if secured else ''}://127.0.0.1:{port}"


@contextmanager
def running_smbd(folder: Path, root: Path, *, user: str, password: str) -> Iterator[int]:
    """Run Samba over `root`, which it shares as `vault` with one user, and yield its port. `folder/log` is its log."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    places = ("private dir", "lock directory", "state directory", "cache directory", "pid directory", "ncalrpc dir")
    lines = [
        "[global]",
        "interfaces = lo",
        "bind interfaces only = yes",
        *(f"{place} = {folder}" for place in places),
        f"log file = {folder / 'log'}",
        f"smb ports = {port}",
        "disable netbios = yes",
        "load printers = no",
        "[vault]",
        f"path = {root}",
        "read only = no",
    ]
    config = folder / "smb.conf"
    config.write_text("\n".join(lines) + "\n")
    secret = f"{password}\n{password}\n".encode()
    argv = ["smbpasswd", "-s", "-a", "-c", str(config), user]
    subprocess.run(argv, input=secret, check=True, capture_output=True)
    with _running(["/usr/sbin/smbd", "--foreground", "-s", str(config)], port):
        yield port


@contextmanager
def running_ganesha(folder: Path, root: Path) -> Iterator[int]:
    """Run an NFS server in user space (version 4) that exports `root` as `/vault`, and yield its port."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "ganesha.conf"
    config.write_text(
        f"NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1; Enable_NLM = false;"
        " Enable_RQUOTA = false; Plugins_Dir = /usr/lib/x86_64-linux-gnu/ganesha; }\n"
        f"NFSv4 {{ Grace_Period = 1; Lease_Lifetime = 10; RecoveryRoot = {folder}; Only_Numeric_Owners = true; }}\n"
        f"EXPORT {{ Export_Id = 1; Path = {root}; Pseudo = /vault; Access_Type = RW; Squash = No_Root_Squash;"
        " SecType = sys; Transports = TCP; FSAL { Name = VFS; } }\n"
    )
    argv = ["ganesha.nfsd", "-F", "-f", str(config), "-L", str(folder / "log"), "-p", str(folder / "pid")]
    with _running(argv, port):
        yield port


@contextmanager
def running_handler(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server in this process that answers as the handler does, and yield its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


@contextmanager
def _running(argv: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not _answers(port):
            assert process.poll() is None, f"{argv[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{argv[0]} does not listen"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
