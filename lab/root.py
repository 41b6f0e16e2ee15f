"""The root of the lab's machines: the host's own distribution, installed once by mmdebstrap, as a tar archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import CHECKOUT
from lab.cache import cached
from remetal.events import Report, Step
from remetal.media.apt import AptSources, probe_apt_sources
from remetal.system.run import run

_KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-virtual"}
_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "initramfs-tools", "iproute2", "python3-minimal", "zstd"),
    *("e2fsprogs", "xfsprogs", "dosfstools"),
    *("grub2-common", "grub-pc-bin", "grub-efi-amd64-bin", "grub-efi-amd64-signed", "shim-signed"),
)
# What nobody reads on a machine without people, left out the way that dpkg offers for it.
_LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
)
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("e2scrub_reap.service", "grub-common.service", "grub-initrd-fallback.service", "motd-news.timer"),
)
_EPOCH = "1700000000"
# $6$remetal: the SHA-512 crypt(5) hash of the lab's password.
_PASSWORD = "$6$remetal$im0MbJvVrHTTe2x1RzwAPSZqfLZFGYISm/d1BaoE.iPIDHJa/Uc.aAI1oD72gatliwmz0S922qE7xP2/ECMcq/"

_BEFORE_KERNEL = """
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/default"
# The swap is no place to resume from, so nothing waits for it.
printf 'RESUME=none\\n' >"$1/etc/initramfs-tools/conf.d/lab"
cat >"$1/etc/default/grub" <<'END'
GRUB_DEFAULT=0
GRUB_TIMEOUT=1
GRUB_DISTRIBUTOR=`lsb_release -i -s 2> /dev/null || echo Debian`
GRUB_CMDLINE_LINUX_DEFAULT="quiet"
# On a busy host, an emulated timer can be late for the check that the kernel makes of it, and then it gives up.
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200 no_timer_check"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --speed=115200"
GRUB_DISABLE_OS_PROBER=true
END
"""

_AT_THE_END = """
chroot "$1" systemctl --quiet mask {masked}
chroot "$1" usermod --password '{password}' root
rm -f "$1"/etc/ssh/ssh_host_* "$1"/var/log/*.log "$1"/var/log/apt/* "$1/etc/resolv.conf"
"""


@dataclass(frozen=True, slots=True)
class Root:
    """What is installed: a suite by its code name (by default the host's), and packages besides those of all."""

    suite: str = ""
    packages: tuple[str, ...] = ()


def root_inputs(root: Root) -> list[str]:
    """Return what the root is made from, for the cache's keys."""
    sources = probe_apt_sources(root.suite or None)
    text = (CHECKOUT / "lab" / "root.py").read_text()
    return [text, sources.distribution, sources.suite, *sources.lines, *root.packages]


def build_root(root: Root, report: Report) -> Path:
    """Return the root as a tar archive from the cache, installing it first if need be (half a minute or more)."""

    def build(path: Path) -> None:
        sources = probe_apt_sources(root.suite or None)
        report(Step(f"Installing {sources.distribution} {sources.suite} for the lab's machines"))
        _install(path, sources, root.packages)

    return cached("root", root_inputs(root), build)


def _install(path: Path, sources: AptSources, packages: tuple[str, ...]) -> None:
    at_the_end = _AT_THE_END.format(masked=" ".join(_MASKED), password=_PASSWORD)
    with TemporaryDirectory(dir=path.parent) as work:
        listing = Path(work) / "sources.list"
        listing.write_text("\n".join(sources.lines) + "\n")
        run(
            [
                *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar"),
                f"--include={','.join([_KERNELS[sources.distribution], *_PACKAGES, *packages])}",
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
                *(f"--aptopt={option}" for option in sources.options),
                f"--essential-hook={_BEFORE_KERNEL}",
                f"--customize-hook={at_the_end}",
                *(sources.suite, path, listing),
            ],
            env={"SOURCE_DATE_EPOCH": _EPOCH},
        )
