"""The lab's own kernel: it carries exit codes and output, scans partitions, and fails with what was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import UmlFailedError, disk_device, python_argv, run_in_uml

pytestmark = pytest.mark.storage


def test_partitions_vfat_lvm_and_exit_code(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(96 << 20)
    outcome = run_in_uml(
        """
        printf 'label: gpt\\n,32M\\n,\\n' | sfdisk --quiet $DISK
        udevadm settle
        mkfs.vfat ${DISK}1 >&2
        mount ${DISK}1 /mnt && echo kept >/mnt/file && umount /mnt
        pvcreate -q ${DISK}2 >&2 && vgcreate -q lab ${DISK}2 >&2 && lvcreate -q -L 8M -n one lab >&2
        test -b /dev/lab/one
        printf 'the end'
        exit 7
        """,
        disks=[disk],
        env={"DISK": disk_device(0)},
        allowed=(7,),
    )
    assert outcome.returncode == 7
    assert outcome.stdout == "the end"
    assert "mkfs.fat" in outcome.stderr
    read_back = run_in_uml(
        python_argv(
            "from pathlib import Path\n"
            "from remetal.system.mounts import mounted\n"
            f"with mounted(Path({disk_device(0, 1)!r})) as folder: print((folder / 'file').read_text())"
        ),
        disks=[disk],
    )
    assert read_back.stdout == "kept\n\n"


def test_a_failure_says_what_the_work_said(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "console"
    with pytest.raises(UmlFailedError) as caught:
        run_in_uml("echo said >&2; false; echo never", log=log)
    assert "exit code 1" in caught.value.message
    assert "said" in caught.value.message
    assert "udevd" in log.read_text()


def test_a_dead_kernel_is_an_error() -> None:
    with pytest.raises(UmlFailedError, match="died"):
        run_in_uml("echo c >/proc/sysrq-trigger; sleep 60", timeout=60)


def test_a_timeout_is_an_error() -> None:
    with pytest.raises(UmlFailedError, match="did not end within 5"):
        run_in_uml("sleep 100", timeout=5)
