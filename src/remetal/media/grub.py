"""The medium's boot menu, and the boot images that lead to it."""

from __future__ import annotations

import re
import shlex

from remetal.errors import UsageError

TIMEOUT = 3
"""Seconds until the default entry starts by itself."""

CONSOLES = "console=tty0 console=ttyS0,115200"

BIOS_MODULES = (
    *("biosdisk", "iso9660", "part_gpt", "part_msdos", "fat", "ext2"),
    *("normal", "configfile", "search", "search_fs_file", "search_label", "linux", "chain", "boot", "gzio"),
    *("regexp", "echo", "test", "true", "ls", "cat", "halt", "reboot", "sleep", "serial", "terminal", "minicmd"),
    "smbios",
)
"""All that GRUB needs on BIOS is in its core image: the medium carries no module files."""

BIOS_SEARCH = """\
search --no-floppy --file --set=root /.disk/info
set prefix=($root)/boot/grub
"""
"""What the BIOS core image does first: find the medium, be it a CD or a USB stick."""


def plan_menu(identity: str, initrd_size: int, append: str = "") -> str:
    """Return grub.cfg for the medium of that identity; `append` joins the kernel's command line.

    In QEMU the kernel does not check its timer, which on a busy host may be late for that check, and then it gives
    up. `initrd_size` is in bytes. Raises UsageError for arguments that would not reach the kernel as typed.
    """
    if not re.fullmatch(r"[\x20-\x7e]*", append):
        raise UsageError("kernel arguments must be plain ASCII on one line")
    arguments = f"{CONSOLES} quiet"
    extra = f" {_quoted(append)}" if append else ""
    megabytes = -(-initrd_size // 1_000_000)
    return f"""\
set boot_disk=$root
search --no-floppy --file --set=root /.disk/{identity}
if [ "$grub_platform" = pc ]; then
  if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
  fi
fi
set emulated=
smbios --type 1 --get-string 4 --set maker
if [ "$maker" = QEMU ]; then set emulated=no_timer_check; fi
set timeout={TIMEOUT}
set timeout_style=menu
set default=recover

function start {{
  echo "Loading the recovery system ({megabytes} MB) into memory ..."
  linux /remetal/vmlinuz {arguments} $emulated "$@"{extra}
  initrd /remetal/initrd.img
}}

menuentry "Recover this machine (remetal)" --id recover {{
  start
}}
menuentry "Recovery shell, nothing starts by itself" --id shell {{
  start remetal.mode=shell
}}
menuentry "Boot from the first disk" --id disk {{
  if [ "$grub_platform" = efi ]; then
    exit
  fi
  set root=hd0
  if regexp "^hd0" "$boot_disk"; then set root=hd1; fi
  chainloader +1
}}
"""


def _quoted(text: str) -> str:
    """Return kernel arguments for GRUB's script language (GRUB manual, "Quoting").

    A word with spaces in it is one argument to GRUB, which then puts double quotes around it for the kernel.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"the kernel arguments '{text}' have an open quote") from error
    return " ".join(
        word if re.fullmatch(r"[\w=.,:/@+-]+", word) else "'" + word.replace("'", "'\\''") + "'" for word in words
    )
