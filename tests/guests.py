"""Real guests of a real libvirt, which an unprivileged user runs by emulation, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.root import Root, build_root
from remetal.events import silent
from remetal.media.root import plan_module_order
from remetal.ondisk.cpio_write import Entry, write_archive

USER = "daemon"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "crc32c_generic")
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
for each in $(cat /modules/order); do insmod /modules/$each; done
until mount -t ext4 /dev/vda /mnt; do sleep 0.2; done
[ ! -e /dev/vport*p1 ] || qemu-ga --method virtio-serial --path /dev/vport*p1 --daemonize
number=0
while :; do number=$((number + 1)); echo $number >/mnt/count; sync; echo "count $number"; sleep 0.2; done
"""
_DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory>
<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{boot}/vmlinuz</kernel><initrd>{boot}/initrd</initrd>
<cmdline>console=ttyS0 quiet no_timer_check</cmdline></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk>
<serial type='file'><source path='{console}'/></serial>{channel}</devices></domain>
"""
_CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


@dataclass(frozen=True)
class Host:
    """Where libvirt is asked, and the folder in which it has its files."""

    uri: str
    folder: Path

    def virsh(self, *words: str | Path) -> str:
        """Return what virsh says."""
        return subprocess.run(
            ["virsh", "-q", "-c", self.uri, *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def start(self, name: str, disk: Path, *, agent: bool) -> None:
        """Boot a guest that counts on the ext4 of its disk, and wait until it does, and its agent answers."""
        described = self.folder / f"{name}.xml"
        described.write_text(
            _DOMAIN.format(
                name=name,
                boot=self.folder,
                disk=disk,
                console=self.folder / f"{name}.console",
                channel=_CHANNEL if agent else "",
            )
        )
        self.virsh("create", described)
        until = time.monotonic() + 300
        while self.count(name) == 0 or (agent and not self.answers(name)):
            assert time.monotonic() < until, (self.folder / f"{name}.console").read_text(errors="replace")
            time.sleep(0.5)

    def count(self, name: str) -> int:
        """Return the last number that a guest has written."""
        console = self.folder / f"{name}.console"
        found = re.findall(r"count (\d+)\r?\n", console.read_text(errors="replace")) if console.exists() else []
        return int(found[-1]) if found else 0

    def answers(self, name: str) -> bool:
        """Whether a guest's agent answers."""
        argv = ["virsh", "-c", self.uri, "qemu-agent-command", name, '{"execute":"guest-ping"}']
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def status(self, name: str) -> str:
        """Return what a guest's agent says of its file systems: `frozen` or `thawed`."""
        said = self.virsh("qemu-agent-command", name, '{"execute":"guest-fsfreeze-status"}')
        return said.partition('"return":"')[2].partition('"')[0]


@contextmanager
def running_libvirt(folder: Path) -> Iterator[Host]:
    """Run libvirtd in a folder that belongs to its user; its guests end with it."""
    _make_boot_files(folder)
    run = folder / "run"
    settings = folder / "libvirt/qemu.conf"
    settings.parent.mkdir()
    settings.write_text('stdio_handler = "file"\n')
    run.mkdir()
    for each in (run, settings.parent):
        os.chown(each, folder.stat().st_uid, folder.stat().st_gid)
    own = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_RUNTIME_DIR": str(run), "XDG_CACHE_HOME": str(run)}
    socket = run / "libvirt/libvirt-sock"
    host = Host(f"qemu+unix:///session?socket={socket}", folder)
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            ["libvirtd"], user=USER, group=USER, extra_groups=[], env=os.environ | own, stdout=log, stderr=log
        ) as process,
    ):
        try:
            while not socket.exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield host
        finally:
            for name in host.virsh("list", "--name").split():
                host.virsh("destroy", name)
            process.terminate()


def _make_boot_files(folder: Path) -> None:
    """Take the kernel of the lab's machines, and make an initramfs with an agent; both for everybody to read."""
    agent = Path("/usr/sbin/qemu-ga")
    linked = subprocess.run(["ldd", agent], check=True, stdout=subprocess.PIPE, text=True).stdout
    libraries = [Path(each) for each in re.findall(r"(/\S+) \(0x", linked)]
    members = [Entry(each, None) for each in ("bin", "dev", "lib", "lib64", "mnt", "modules", "proc", "run", "sys")]
    members += [Entry("var", None), Entry("var/run", None), Entry("lib/x86_64-linux-gnu", None)]
    members += [
        Entry("init", _INIT.encode()),
        Entry("bin/busybox", Path("/bin/busybox")),
        Entry("bin/qemu-ga", agent),
    ]
    members += [Entry(str(each).removeprefix("/usr").lstrip("/"), each.resolve()) for each in libraries]
    with tarfile.open(build_root(Root(), silent)) as root:
        names = {each.removeprefix("./"): each for each in root.getnames()}

        def content(path: str) -> bytes:
            file = root.extractfile(names[path])
            assert file is not None
            return file.read()

        kernel = next(each for each in names if each.startswith("boot/vmlinuz-"))
        (folder / "vmlinuz").write_bytes(content(kernel))
        modules = f"usr/lib/modules/{kernel.removeprefix('boot/vmlinuz-')}"
        order = plan_module_order(content(f"{modules}/modules.dep").decode(), _MODULES)
        for path in order:
            members.append(Entry(f"modules/{Path(path).name}", content(f"{modules}/{path}")))
    members.append(Entry("modules/order", "\n".join(Path(each).name for each in order).encode()))
    with (folder / "initrd").open("wb") as output:
        write_archive(output, members)
