"""The test lab: builds real machines, runs the kernel's real storage stack, boots disks.

Nothing of the product imports it. For people: `python -m lab.machine --output m.img` makes a machine's disk.
"""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
"""The checkout that this lab belongs to."""
