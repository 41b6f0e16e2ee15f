"""Kernels on hardware that they were not made for: predicted, and given what they lack."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest

from remetal.adapt.change import Adaptation
from remetal.adapt.kernels.adapt import KernelChoices, adapt_kernels
from remetal.adapt.kernels.bootability import Outcome, Verdict, judge
from remetal.adapt.kernels.drivers import opened_drivers
from remetal.adapt.kernels.generators import PROGRAMS, SERVICE, SERVICE_LINK, plan_drop_in, plan_service
from remetal.adapt.kernels.initramfs import Initramfs, probe_initramfs
from remetal.adapt.kernels.installed import version_key
from remetal.adapt.kernels.modules import Modules, read_modules
from remetal.adapt.kernels.needs import Need, plan_hardware, plan_network, plan_storage
from remetal.adapt.kernels.predict import predict_systems
from remetal.adapt.kernels.survey import Hardware
from remetal.adapt.restored import Restored
from remetal.adapt.roots import find_systems
from remetal.errors import RemetalError, UsageError
from remetal.events import Event, Warn, silent
from remetal.layout.model import Disk, FileSystem, Inventory, Layout, Link, Luks, Route, Swap
from remetal.ondisk.cpio import read_initramfs
from remetal.ondisk.cpio_write import encode_archive
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import (
    ESP,
    LINUX,
    ROOT_UUID,
    SWAP_UUID,
    ext4,
    layout_of,
    make_esp,
    make_ext4,
    partition,
    read_table,
    vfat,
)
from tests.kernels import (
    MODULES,
    VERSION,
    VIRTIO_ONLY,
    Module,
    encode_image,
    encode_initramfs,
    encode_module,
    install_kernel,
)
from tests.unit.test_ondisk_cpio import PACKERS

MEGARAID = "pci:v00001000d00000060sv00001028sd00001F0Cbc01sc04i00"
AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"
VIRTIO = "virtio:d00000002v00001AF4"
UNKNOWN = "pci:v0000FFFFd00000001sv00000000sd00000000bc01sc07i00"
DISK = Link(modalias="scsi:t-0x00", driver="sd", module="sd_mod")


def route(modalias: str, driver: str, module: str, name: str = "sda", kind: str = "disk") -> Route:
    links = (Link(modalias=modalias, driver=driver, module=module),)
    return Route(kind=kind, name=name, links=(*links, DISK) if driver in {"megaraid_sas", "ahci"} else links)


def machine(*routes: Route, **facts: object) -> Inventory:
    disks = tuple(Disk(name=each.name, size=1 << 40, bus="sata") for each in routes if each.kind == "disk")
    return Inventory(firmware="bios", architecture="x86_64", disks=disks, routes=routes, **facts)  # type: ignore[arg-type]


ON_MEGARAID = machine(route(MEGARAID, "megaraid_sas", "megaraid_sas"))
ON_AHCI = machine(route(AHCI, "ahci", "ahci"))
ON_VIRTIO = machine(route(VIRTIO, "virtio_blk", "virtio_blk", "vda"))
ON_UNKNOWN = machine(route(UNKNOWN, "newraid", "newraid"))


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Modules:
    root = tmp_path_factory.mktemp("root")
    install_kernel(root)
    found = read_modules(root, VERSION)
    assert found is not None
    return found


def holds(*held: str, **files: bytes) -> Initramfs:
    return probe_initramfs(BytesIO(encode_initramfs(held, files=files)))


def verdict(modules: Modules, inventory: Inventory, initramfs: Initramfs | None, *names: str) -> Verdict:
    needs = (*plan_hardware(inventory), Need("the ext4 on sda:1", names=("fs-ext4", *names)))
    return judge(modules, initramfs, needs, plan_network(inventory))


def test_what_is_there_boots(modules: Modules) -> None:
    assert verdict(modules, ON_VIRTIO, holds(*VIRTIO_ONLY)).outcome is Outcome.BOOTS


def test_what_is_missing_comes_with_all_that_it_needs(modules: Modules) -> None:
    found = verdict(modules, ON_AHCI, holds(*VIRTIO_ONLY))
    assert found.outcome is Outcome.ADAPTED
    assert found.missing == ("scsi_common", "scsi_mod", "libata", "libahci", "ahci", "sd_mod")
    assert found.reasons[0] == "the disk sda (ahci) needs ahci, which its initramfs lacks"


def test_a_module_that_is_there_without_what_it_needs_is_not_enough(modules: Modules) -> None:
    found = verdict(modules, ON_AHCI, holds(*VIRTIO_ONLY, "ahci", "scsi_common", "scsi_mod", "sd_mod"))
    assert (found.outcome, found.missing) == (Outcome.ADAPTED, ("libata", "libahci"))


def test_a_device_that_no_module_knows(modules: Modules) -> None:
    found = verdict(modules, ON_UNKNOWN, holds(*VIRTIO_ONLY))
    assert found.outcome is Outcome.CANNOT
    assert found.reasons == (f"it has no driver for the disk sda (newraid): {UNKNOWN}",)


def test_a_driver_that_is_older_than_the_device(modules: Modules) -> None:
    newer = machine(route("pci:v00001000d0000FFFFsv*sd*bc01sc04i00", "megaraid_sas", "megaraid_sas"))
    found = verdict(modules, newer, holds(*VIRTIO_ONLY))
    assert found.outcome is Outcome.CANNOT
    assert found.reasons[0].startswith("its megaraid_sas does not know the disk sda")


def test_without_an_initramfs_everything_has_to_be_built_in(modules: Modules) -> None:
    found = verdict(modules, ON_AHCI, None)
    assert found.outcome is Outcome.CANNOT
    assert "it has no initramfs" in found.reasons[0]


def test_what_is_blacklisted_is_loaded_by_name(modules: Modules) -> None:
    hidden = Modules(
        modules.version,
        modules.files,
        modules.needs,
        modules.builtin,
        modules.aliases,
        hidden={"ahci": "/etc/modprobe.d/no.conf"},
    )
    everything = holds(*MODULES)
    found = judge(hidden, everything, plan_hardware(ON_AHCI))
    assert (found.outcome, found.missing, found.unloaded) == (Outcome.ADAPTED, (), ("ahci",))
    named = judge(hidden, holds(*MODULES, **{"conf/modules": b"# comment\nahci\n"}), plan_hardware(ON_AHCI))
    assert named.outcome is Outcome.BOOTS


def test_a_network_card_without_a_driver_is_noted(modules: Modules) -> None:
    nic = "pci:v000014E4d00001657sv0000103Csd000022BEbc02sc00i00"
    both = machine(
        *ON_VIRTIO.routes,
        route(nic, "tg3", "tg3", "eno1", "network"),
        route("pci:v00008086d000010D3sv00008086sd0000A01Fbc02sc00i00", "e1000e", "e1000e", "eno2", "network"),
    )
    found = verdict(modules, both, holds(*VIRTIO_ONLY))
    assert found.outcome is Outcome.BOOTS
    assert found.notes == (f"it has no driver for the network card eno1 (tg3): {nic}",)


def test_a_record_that_does_not_say_how_disks_are_reached(modules: Modules) -> None:
    older = machine(modaliases=(AHCI, "pci:v00008086d00001237sv*sd*bc06sc00i00"))
    assert verdict(modules, older, holds(*VIRTIO_ONLY)).missing[-1] == "ahci"
    assert verdict(modules, machine(modaliases=(UNKNOWN,)), holds(*VIRTIO_ONLY)).outcome is Outcome.CANNOT
    unused = machine(modaliases=(UNKNOWN, VIRTIO))  # nobody knows on which of them the disks are
    assert verdict(modules, unused, holds(*VIRTIO_ONLY)).outcome is Outcome.BOOTS


def test_a_stick_that_is_plugged_in_needs_no_driver() -> None:
    both = Inventory(
        firmware="bios",
        architecture="x86_64",
        disks=(Disk(name="sda", size=1 << 40, bus="sata"), Disk(name="sdb", size=1 << 34, bus="usb")),
        routes=(route(AHCI, "ahci", "ahci"), route("usb:v0781p5567", "usb-storage", "usb_storage", "sdb")),
    )
    assert {each.seen for each in plan_hardware(both)} == {"ahci", "sd_mod"}
    assert "usb_storage" in {each.seen for each in plan_hardware(both, {"sdb"})}


def test_a_passphrase_wants_a_keyboard() -> None:
    keyed = machine(*ON_AHCI.routes, route("usb:v046DpC31C", "usbhid", "usbhid", "Logitech", "keyboard"))
    assert "usbhid" not in {each.seen for each in plan_hardware(keyed)}
    assert "usbhid" in {each.seen for each in plan_hardware(keyed, keyboard=True)}


def test_storage_needs_what_it_stands_on() -> None:
    layout = Layout(
        disks=(Disk(name="sda", size=1 << 30),),
        layers=(
            Luks(
                on="sda",
                version=2,
                uuid=ROOT_UUID,
                header_size=16 * MIB,
                size=1 << 29,
                key_size=64,
                cipher="aes-xts-plain64",
            ),
            FileSystem(on="sda:luks", type="ext4", size=1 << 29, used=0, block_size=4096, uuid=ROOT_UUID),
        ),
    )
    names = [name for need in plan_storage(layout, ["sda:luks"]) for name in need.names]
    assert names == ["fs-ext4", "dm_crypt", "crypto-aes", "crypto-xts"]


def test_versions_are_sorted_as_people_do() -> None:
    versions = ["6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-30-amd64", "6.10.1", "6.9.12"]
    assert sorted(versions, key=version_key) == [versions[2], versions[0], versions[1], versions[4], versions[3]]


# On disks -------------------------------------------------------------------------------------------------------------


class Box:
    """A disk file with an installed system in its one partition, behind an ESP if it is asked for."""

    def __init__(self, folder: Path, fill: Callable[[Path], None] = install_kernel, *, size: int = 60) -> None:
        self.path = folder / "sda.img"
        partition(self.path, (size + 40) * MIB, f"label: gpt\nsize={size}M,type={LINUX}\nsize=36M,type={ESP}\n")
        self.table = read_table(self.path, "sda")
        root = folder / "root"
        (root / "etc/initramfs-tools/hooks").mkdir(parents=True)
        (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
        (root / "usr/lib/systemd").mkdir(parents=True)
        (root / "usr/lib/systemd/systemd").write_bytes(b"\x7fELF")
        (root / "usr/sbin").mkdir(parents=True)
        (root / "usr/sbin/update-initramfs").write_text("#!/bin/sh\n")
        (root / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="Debian"\n')
        (root / "etc/fstab").write_text(
            f"UUID={ROOT_UUID} / ext4 defaults 0 1\nUUID=1234-ABCD /boot/efi vfat umask=0 0 1"
        )
        fill(root)
        (root / "boot/efi").mkdir(parents=True, exist_ok=True)
        make_ext4(self.path, self.table.partitions[0], root)
        self.layout = layout_of(self.path, {1: ext4(1)})
        self.events: list[Event] = []

    def fill_esp(self, files: dict[str, bytes]) -> None:
        make_esp(self.path, self.table.partitions[1], files)
        self.layout = layout_of(self.path, {1: ext4(1), 2: vfat(2)})

    @property
    def restored(self) -> Restored:
        return Restored(source=self.layout, result=self.layout, devices={"sda": self.path})

    def adapt(self, inventory: Inventory) -> Adaptation:
        (system,) = find_systems(self.restored, silent)
        return adapt_kernels(system, self.restored, Hardware(inventory), self.events.append)

    def predict(self, inventory: Inventory) -> Outcome | None:
        (system,) = predict_systems(self.restored, Hardware(inventory))
        return system.outcome

    def read(self, path: str) -> bytes:
        part = self.table.partitions[0]
        with attach_loop(Span(self.path, part.start, part.size)) as device, mounted(device) as folder:
            return (folder / path).read_bytes()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_what_an_initramfs_lacks_is_put_behind_it(box: Box, tmp_path: Path) -> None:
    before = box.read(f"boot/initrd.img-{VERSION}")
    assert box.predict(ON_AHCI) is Outcome.ADAPTED
    done = box.adapt(ON_AHCI)
    after = box.read(f"boot/initrd.img-{VERSION}")
    assert after.startswith(before)
    assert done.bytes_written >= len(after) - len(before) > 0
    assert [each.path for each in done.changes] == [
        f"/boot/initrd.img-{VERSION}",
        "/etc/initramfs-tools/hooks/remetal",
        "/etc/systemd/system/remetal-initramfs.service",
        "/etc/systemd/system/multi-user.target.wants/remetal-initramfs.service",
    ]
    assert "the disk sda (ahci) needs ahci" in done.changes[0].what
    assert "+manual_add_modules scsi_common scsi_mod libata libahci ahci sd_mod" in done.changes[1].diff
    unpacked = tmp_path / "unpacked"
    for each in read_initramfs(BytesIO(after), lambda name, size: name.endswith((".ko", "modules.dep"))):
        if each.data:
            path = unpacked / each.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(each.data)
    listed = (unpacked / f"usr/lib/modules/{VERSION}/modules.dep").read_text()
    assert re.search(r"^kernel/drivers/ata/ahci\.ko: .*libahci\.ko", listed, re.MULTILINE)
    assert re.search(r"^kernel/drivers/block/virtio_blk\.ko:", listed, re.MULTILINE), "what was there is still listed"


def test_twice_is_once(box: Box) -> None:
    box.adapt(ON_AHCI)
    content = box.path.read_bytes()
    assert box.predict(ON_AHCI) is Outcome.BOOTS
    assert box.adapt(ON_AHCI) == Adaptation()
    assert box.path.read_bytes() == content


@pytest.mark.parametrize("packing", ["gzip", "lz4", "zstd"])
@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_whatever_the_size_of_what_was_there(tmp_path: Path, packing: str, length: int) -> None:
    """The kernel finds an archive only where it looks for one; and so does our reader."""

    def fill(root: Path) -> None:
        install_kernel(root)
        plain = encode_initramfs(files={"length": os.urandom(999 + length)})
        packed = subprocess.run(PACKERS[packing], input=plain, capture_output=True, check=True).stdout
        (root / f"boot/initrd.img-{VERSION}").write_bytes(packed)

    box = Box(tmp_path, fill)
    assert box.adapt(ON_AHCI).changes
    assert box.predict(ON_AHCI) is Outcome.BOOTS
    assert box.adapt(ON_AHCI) == Adaptation()


def test_where_nothing_is_missing_nothing_is_touched(box: Box) -> None:
    content = box.path.read_bytes()
    assert box.adapt(ON_VIRTIO) == Adaptation()
    assert box.path.read_bytes() == content


def test_what_cannot_boot_is_told_and_left_alone(box: Box) -> None:
    content = box.path.read_bytes()
    done = box.adapt(ON_UNKNOWN)
    assert done.changes == ()
    assert "cannot boot here: it has no driver for the disk sda (newraid)" in done.notes[0]
    assert [each for each in box.events if isinstance(each, Warn)]
    assert box.path.read_bytes() == content


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1024):
            with suppress(OSError):
                while True:
                    file.write(os.urandom(size))


def test_a_full_boot_leaves_the_initramfs_as_it_was(tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        install_kernel(root)

    box = Box(tmp_path, fill, size=12)
    part = box.table.partitions[0]
    with attach_loop(Span(box.path, part.start, part.size), writable=True) as device, mounted(device) as folder:
        fill_up(folder / "filler")
    before = box.read(f"boot/initrd.img-{VERSION}")
    with pytest.raises(RemetalError, match=r"cannot be put behind /boot/initrd.*No space left") as raised:
        box.adapt(ON_AHCI)
    assert "Make room in /boot" in raised.value.hint
    assert box.read(f"boot/initrd.img-{VERSION}") == before


def test_kernels_on_the_efi_system_partition(tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        install_kernel(root)
        shutil.rmtree(root / "boot")

    box = Box(tmp_path, fill)
    folder = f"/0123456789abcdef0123456789abcdef/{VERSION}"
    entry = f"title Debian\nlinux {folder}/linux\ninitrd {folder}/initrd.img-{VERSION}\noptions root=UUID={ROOT_UUID}\n"
    before = encode_initramfs()
    box.fill_esp(
        {
            f"/loader/entries/0123456789abcdef0123456789abcdef-{VERSION}.conf": entry.encode(),
            f"{folder}/linux": encode_image(),
            f"{folder}/initrd.img-{VERSION}": before,
        }
    )
    assert box.predict(ON_AHCI) is Outcome.ADAPTED
    done = box.adapt(ON_AHCI)
    assert done.changes[0].path == f"/boot/efi{folder}/initrd.img-{VERSION}"
    assert box.predict(ON_AHCI) is Outcome.BOOTS


def test_firmware_that_a_module_names_comes_with_it(tmp_path: Path) -> None:
    fibre = machine(route("pci:v00001077d00002532sv*sd*bc0Csc04i00", "qla2xxx", "qla2xxx"))

    def fill(root: Path) -> None:
        install_kernel(root)
        (root / "usr/lib/firmware").mkdir()
        (root / "usr/lib/firmware/ql2500_fw.bin.xz").write_bytes(b"firmware")

    box = Box(tmp_path, fill)
    box.adapt(fibre)
    names = {
        each.name for each in read_initramfs(BytesIO(box.read(f"boot/initrd.img-{VERSION}")), lambda name, size: False)
    }
    assert "usr/lib/firmware/ql2500_fw.bin.xz" in names


def test_firmware_that_is_not_installed_is_told(box: Box) -> None:
    fibre = machine(route("pci:v00001077d00002532sv*sd*bc0Csc04i00", "qla2xxx", "qla2xxx"))
    assert any("lacks the firmware" in note and "ql2500_fw.bin" in note for note in box.adapt(fibre).notes)


def test_an_initramfs_that_is_damaged_is_told(tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        install_kernel(root)
        (root / f"boot/initrd.img-{VERSION}").write_bytes(encode_initramfs()[:-3000] + b"garbage")

    box = Box(tmp_path, fill)
    assert box.predict(ON_VIRTIO) is Outcome.CANNOT
    assert any("cannot be read" in note for note in box.adapt(ON_VIRTIO).notes)


def test_a_system_without_a_kernel_is_told(tmp_path: Path) -> None:
    box = Box(tmp_path, lambda root: (root / "boot").mkdir())
    (system,) = predict_systems(box.restored, Hardware(ON_VIRTIO))
    assert system.outcome is None
    assert "has no kernel" in system.problem


def test_a_kernel_whose_modules_are_gone_is_told(tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        install_kernel(root)
        shutil.rmtree(root / "usr/lib/modules")

    box = Box(tmp_path, fill)
    assert box.predict(ON_VIRTIO) is Outcome.CANNOT


def test_copies_of_what_names_the_storage_say_what_the_system_says(tmp_path: Path) -> None:
    resume = {"conf/conf.d/resume": f"RESUME=UUID={SWAP_UUID}\n".encode(), "conf/conf.d/other": b"X=1\n"}

    def fill(root: Path) -> None:
        install_kernel(root)
        (root / f"boot/initrd.img-{VERSION}").write_bytes(encode_initramfs(files=resume))

    box = Box(tmp_path, fill)
    gone = Swap(on="sdb", size=MIB, uuid=SWAP_UUID)
    before = Layout(disks=(*box.layout.disks, Disk(name="sdb", size=MIB)), layers=(*box.layout.layers, gone))
    restored = Restored(source=before, result=box.layout, devices={"sda": box.path})
    (system,) = find_systems(restored, silent)
    done = adapt_kernels(system, restored, None, silent)
    assert [each.path for each in done.changes][:2] == [f"/boot/initrd.img-{VERSION}", SERVICE]
    assert "RESUME=none replaces" in done.changes[0].what
    assert f"-RESUME=UUID={SWAP_UUID}\n+RESUME=none" in done.changes[0].diff
    members = read_initramfs(BytesIO(box.read(f"boot/initrd.img-{VERSION}")), lambda name, size: "conf.d" in name)
    found = [(each.name, each.data) for each in members if each.data]
    assert found[-1] == ("conf/conf.d/resume", b"RESUME=none\n"), "the last one of a name counts"
    assert adapt_kernels(system, restored, None, silent) == Adaptation()


# What is left for the generators --------------------------------------------------------------------------------------


def test_the_hook_for_initramfs_tools_is_a_program(tmp_path: Path) -> None:
    file = plan_drop_in("initramfs-tools", ["ahci", "libata"], ["ahci"])
    assert file is not None
    assert file.mode & stat.S_IXUSR
    functions = tmp_path / "hook-functions"
    functions.write_text('manual_add_modules() { echo "add $*"; }\nforce_load() { echo "load $*"; }\n')
    hook = tmp_path / "hook"
    hook.write_text(file.text.replace("/usr/share/initramfs-tools/hook-functions", str(functions)))
    said = subprocess.run(["sh", "-eu", hook, ""], check=True, capture_output=True, text=True).stdout
    assert said == "add libata\nload ahci\n"
    assert subprocess.run(["sh", "-eu", hook, "prereqs"], check=True, capture_output=True, text=True).stdout == ""


def test_the_files_for_dracut_and_mkinitcpio_are_shell(tmp_path: Path) -> None:
    for generator, wanted in (("dracut", " libata | ahci "), ("mkinitcpio", "base libata ahci")):
        file = plan_drop_in(generator, ["ahci", "libata"], ["ahci"])  # type: ignore[arg-type]
        assert file is not None
        script = f'add_drivers= force_drivers= MODULES=(base)\n. {tmp_path}/conf\necho "$add_drivers|$force_drivers"; '
        (tmp_path / "conf").write_text(file.text)
        said = subprocess.run(
            ["bash", "-euc", script + 'echo "${MODULES[*]}"'], check=True, capture_output=True, text=True
        ).stdout
        assert wanted in said


def test_the_service_removes_itself_when_it_is_done(tmp_path: Path) -> None:
    text = plan_service(PROGRAMS[0])
    (tmp_path / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (tmp_path / SERVICE[1:]).write_text(text)
    (tmp_path / SERVICE_LINK[1:]).symlink_to(SERVICE)
    line = next(each for each in text.splitlines() if each.startswith("ExecStart="))
    found = re.fullmatch(r"ExecStart=/bin/sh -c '(.*)'", line)
    assert found is not None
    script = found[1].replace("$$", "$").replace("%%", "%").replace(" /etc/", f" {tmp_path}/etc/")
    (tmp_path / "loadavg").write_text("0.42 0.50 0.60 1/123 4567\n")
    script = script.replace("sleep 600", "sleep 0").replace("/proc/loadavg", f"{tmp_path}/loadavg")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "update-initramfs"
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for body, stays in (("exit 1", True), (f'echo "$*" >{tmp_path}/called', False)):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        subprocess.run(["sh", "-c", script], check=False, env=environment)
        assert (tmp_path / SERVICE[1:]).exists() is stays
    assert (tmp_path / "called").read_text() == "-u -k all\n"
    assert not (tmp_path / SERVICE_LINK[1:]).is_symlink()


def test_a_module_with_a_name_of_its_own_is_found_by_it(modules: Modules) -> None:
    assert modules.resolve("virtio-blk") == ("virtio_blk",)
    assert modules.resolve("md-level-1") == ("raid1",)
    assert Module().aliases == ()


# Drivers from outside -------------------------------------------------------------------------------------------------

NEW = {"newraid": Module(("pci:v0000FFFFd00000001sv*sd*bc*sc*i*",), ("scsi_mod",))}


def supply(folder: Path, version: str = VERSION) -> Path:
    """Make a folder with a module as a vendor gives it."""
    folder.mkdir()
    (folder / "newraid.ko").write_bytes(encode_module("newraid", NEW["newraid"], version))
    return folder


def test_a_driver_from_outside_is_added_and_put_behind_the_initramfs(box: Box, tmp_path: Path) -> None:
    with opened_drivers(supply(tmp_path / "drivers")) as drivers:
        (system,) = predict_systems(box.restored, Hardware(ON_UNKNOWN), silent, drivers)
        assert system.outcome is Outcome.ADAPTED
        (found,) = find_systems(box.restored, silent)
        done = adapt_kernels(found, box.restored, Hardware(ON_UNKNOWN), silent, KernelChoices(drivers))
    assert done.changes[0].path == f"/lib/modules/{VERSION}/updates/remetal/newraid.ko"
    assert "not signed" in done.changes[0].what
    assert "newraid" in done.changes[1].what
    assert box.predict(ON_UNKNOWN) is Outcome.BOOTS, "the system's own lists have it now"
    listed = box.read(f"usr/lib/modules/{VERSION}/modules.dep").decode()
    assert re.search(r"^updates/remetal/newraid\.ko: kernel/drivers/scsi/scsi-mod\.ko", listed, re.MULTILINE)


def test_a_driver_for_another_kernel_is_told(box: Box, tmp_path: Path) -> None:
    with opened_drivers(supply(tmp_path / "drivers", "5.14.0-70.el9")) as drivers:
        (system,) = predict_systems(box.restored, Hardware(ON_UNKNOWN), silent, drivers)
    assert system.outcome is Outcome.CANNOT
    lack = "is for the kernel 5.14.0-70.el9, which the system does not have"
    assert system.notes == (f"the driver newraid (newraid.ko) {lack}; it has: {VERSION}",)


def test_a_package_with_a_driver_is_looked_into(box: Box, tmp_path: Path) -> None:
    tree = tmp_path / "package"
    (tree / "DEBIAN").mkdir(parents=True)
    facts = ("Package: newraid", "Version: 1", "Architecture: all", "Maintainer: x", "Description: x")
    (tree / "DEBIAN/control").write_text("\n".join(facts) + "\n")
    inner = tree / "lib/modules" / VERSION / "extra"
    inner.parent.mkdir(parents=True)
    supply(inner)
    folder = tmp_path / "drivers"
    folder.mkdir()
    subprocess.run(["dpkg-deb", "--build", tree, folder / "newraid.deb"], check=True, capture_output=True)
    with opened_drivers(folder) as drivers:
        assert {each.package for each in drivers.modules} == {folder / "newraid.deb"}
        (system,) = predict_systems(box.restored, Hardware(ON_UNKNOWN), silent, drivers)
        assert system.outcome is Outcome.ADAPTED


def test_an_rpm_with_a_driver_is_looked_into(tmp_path: Path) -> None:
    files = {f"lib/modules/{VERSION}/extra/newraid.ko": encode_module("newraid", NEW["newraid"])}
    header = b"\x8e\xad\xe8\x01" + bytes(12)  # without an entry
    lead = b"\xed\xab\xee\xdb\x03\x00" + bytes(90)
    package = tmp_path / "kmod-newraid.rpm"
    package.write_bytes(lead + header + header + gzip.compress(encode_archive(files).lstrip(b"\0")))
    with opened_drivers(tmp_path) as drivers:
        assert [(each.name, each.kernel, each.package) for each in drivers.modules] == [("newraid", VERSION, package)]


@pytest.mark.parametrize("name", ["x.ko", "x.deb", "x.rpm", "x.txt"])
def test_what_is_no_driver_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(UsageError), opened_drivers(tmp_path):
        pass
    with pytest.raises(UsageError, match="there is no folder"), opened_drivers(tmp_path / "none"):
        pass


# The system's own generator -------------------------------------------------------------------------------------------


def with_generator(script: str) -> Callable[[Path], None]:
    """Return what fills a root in which programs can be run, with a generator that does this."""

    def fill(root: Path) -> None:
        install_kernel(root)
        for name in ("dev", "proc", "sys", "run", "bin", "etc/initramfs-tools/conf.d"):
            (root / name).mkdir(parents=True)
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, root / "bin/busybox")
        for name in ("sh", "cat", "cp", "grep", "test"):
            (root / "bin" / name).symlink_to("busybox")
        program = root / "usr/sbin/update-initramfs"
        program.write_text(f"#!/bin/sh -e\n{script}\n")
        program.chmod(0o755)
        (root / "new-initrd").write_bytes(encode_initramfs((*VIRTIO_ONLY, *MODULES)))

    return fill


def regenerate(box: Box, inventory: Inventory) -> Adaptation:
    (system,) = find_systems(box.restored, silent)
    return adapt_kernels(system, box.restored, Hardware(inventory), silent, KernelChoices(regenerate=True))


def test_the_generator_is_run_in_the_restored_system(tmp_path: Path) -> None:
    conditions = (
        'test "$*" = "-u -k all"; test -c /dev/null; test -d /proc/1; grep -q most /etc/initramfs-tools/conf.d/*'
    )
    box = Box(tmp_path, with_generator(f"{conditions}\ncp /new-initrd /boot/initrd.img-{VERSION}"))
    done = regenerate(box, ON_AHCI)
    assert [each.path for each in done.changes] == ["/etc/initramfs-tools/hooks/remetal", f"/boot/initrd.img-{VERSION}"]
    assert box.predict(ON_AHCI) is Outcome.BOOTS
    assert box.read(f"boot/initrd.img-{VERSION}") == encode_initramfs((*VIRTIO_ONLY, *MODULES))
    with pytest.raises(FileNotFoundError):
        box.read("etc/initramfs-tools/conf.d/zz-remetal")


def test_a_generator_that_fails_leaves_the_initramfs_as_it_was(tmp_path: Path) -> None:
    box = Box(tmp_path, with_generator(f"cat /bin/sh >/boot/initrd.img-{VERSION}; cat /no/such/file"))
    before = box.read(f"boot/initrd.img-{VERSION}")
    with pytest.raises(RemetalError, match=r"update-initramfs failed in the restored system.*no/such/file") as raised:
        regenerate(box, ON_AHCI)
    assert "without --regenerate" in raised.value.hint
    assert box.read(f"boot/initrd.img-{VERSION}") == before


def test_a_generator_that_does_not_help_is_helped(tmp_path: Path) -> None:
    box = Box(tmp_path, with_generator(":"))
    done = regenerate(box, ON_AHCI)
    assert "put scsi_common" in done.changes[-1].what
    assert box.predict(ON_AHCI) is Outcome.BOOTS


def test_a_package_is_installed_by_the_system_itself(tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        with_generator(":")(root)
        (root / "var/cache").mkdir(parents=True)
        (root / "usr/bin").mkdir(exist_ok=True)
        program = root / "usr/bin/dpkg"
        program.write_text('#!/bin/sh -e\ntest "$1" = --install\ncat "$2" >/installed\n')
        program.chmod(0o755)

    box = Box(tmp_path, fill)
    tree, folder = tmp_path / "package", tmp_path / "drivers"
    (tree / "DEBIAN").mkdir(parents=True)
    facts = ("Package: newraid", "Version: 1", "Architecture: all", "Maintainer: x", "Description: x")
    (tree / "DEBIAN/control").write_text("\n".join(facts) + "\n")
    folder.mkdir()
    subprocess.run(["dpkg-deb", "--build", tree, folder / "newraid.deb"], check=True, capture_output=True)
    with opened_drivers(folder) as drivers:
        (system,) = find_systems(box.restored, silent)
        done = adapt_kernels(system, box.restored, Hardware(ON_VIRTIO), silent, KernelChoices(drivers))
    assert [each.path for each in done.changes] == ["newraid.deb"]
    assert box.read("installed") == (folder / "newraid.deb").read_bytes()
    with pytest.raises(FileNotFoundError):
        box.read("var/cache/remetal-drivers/newraid.deb")
