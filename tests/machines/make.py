"""Make the recorded machines of this folder: `python -m tests.machines.make`.

Each is what `remetal probe --json` prints on such a machine, put together from the documented formats of the kernel
and of the tools. Containers (LVM, MD, LUKS, btrfs) are shown as probing shows them: unopened, by blkid's name.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.machines.parts import Machine
from tests.machines.personal import DESKTOPS, LAPTOPS, SMALL
from tests.machines.servers import CLOUDS, SERVERS

FOLDER = Path(__file__).parent
MACHINES = (*LAPTOPS, *DESKTOPS, *SERVERS, *CLOUDS, *SMALL)

README = """# Recorded machines

Each `.json` file is what `remetal probe --json` prints on such a machine. `python -m tests.machines.make` makes all of
them from the tables in `personal.py` and `servers.py`: change a machine there, never its file. From the same tables
`sysfs.py` makes the sysfs and procfs that the kernel would show, which the probe is tested with.

`raw/` holds what real machines showed: trees of sysfs, recorded by `python -m tests.machines.record`, and what blkid(8)
prints, with the program that made the content.

Try a machine: `remetal plan latest --repo REPO --onto tests/machines/server-blank.json`

| machine | what it is |
|---|---|
"""


def render_machine(machine: Machine) -> str:
    """Return the machine's file, as `remetal probe --json` prints it."""
    return msgspec.json.format(msgspec.json.encode(machine.layout()), indent=2).decode() + "\n"


def render_readme() -> str:
    """Return the README with a line for every machine."""
    return README + "".join(f"| `{machine.name}` | {machine.about} |\n" for machine in MACHINES)


if __name__ == "__main__":
    for each in FOLDER.glob("*.json"):
        each.unlink()
    for machine in MACHINES:
        (FOLDER / f"{machine.name}.json").write_text(render_machine(machine))
    (FOLDER / "README.md").write_text(render_readme())
