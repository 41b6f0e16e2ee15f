"""A load that knows what it has written: runs inside a machine with nothing but Python's own library.

    load.py run FOLDER...     write until /run/stop is there
    load.py check FOLDER...   print how many writes are there; fail if they are not just the first so many

Every write is durable before the next one begins, and goes to the next folder in turn, onto one block of a file there.
So a copy of the folders that is of one moment holds some number of first writes, all of them, and nothing else. Beside
that, other files are written, overwritten, cut and deleted as it comes.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

BLOCK = 4096
BLOCKS = 64
STOP = Path("/run/stop")


def place(number: int, folders: int) -> tuple[int, int]:
    """Return the folder and the block that a write goes to."""
    block = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
    return number % folders, int.from_bytes(block, "little") % BLOCKS


def content(number: int) -> bytes:
    """Return what a write writes; the number is in its first bytes."""
    if number == 0:
        return bytes(BLOCK)
    head = number.to_bytes(8, "little")
    return head + hashlib.shake_128(head).digest(BLOCK - 8)


def write_in_turn(folders: list[Path]) -> None:
    """Write one block after the other, each durable before the next."""
    files = []
    for folder in folders:
        path = folder / "blocks"
        path.write_bytes(bytes(BLOCK * BLOCKS))
        files.append(os.open(path, os.O_WRONLY | os.O_DSYNC))
        os.fsync(files[-1])
    number = 0
    while not STOP.exists():
        number += 1
        index, block = place(number, len(folders))
        os.pwrite(files[index], content(number), block * BLOCK)
    for each in files:
        os.close(each)
    print(number)


def churn(folders: list[Path]) -> None:
    """Write, overwrite, cut and delete files, some of them durably."""
    dice = random.Random(7)
    while not STOP.exists():
        path = dice.choice(folders) / f"file-{dice.randrange(9)}"
        if path.exists() and dice.random() < 0.2:
            path.unlink()
            continue
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(dice.randrange(1 << 20))
            file.write(dice.randbytes(dice.randrange(1, 200_000)))
            if dice.random() < 0.2:
                file.truncate()
            if dice.random() < 0.2:
                os.fsync(file.fileno())


def check(folders: list[Path]) -> int:
    """Return how many writes are there. Raises SystemExit if one is missing, torn, or of another moment."""
    found: dict[tuple[int, int], int] = {}
    for index, folder in enumerate(folders):
        data = (folder / "blocks").read_bytes()
        if len(data) != BLOCK * BLOCKS:
            raise SystemExit(f"{folder}/blocks has {len(data)} bytes")
        for block in range(BLOCKS):
            piece = data[block * BLOCK :][:BLOCK]
            number = int.from_bytes(piece[:8], "little")
            if piece != content(number):
                raise SystemExit(f"{folder}: block {block} is torn, it begins as write {number}")
            found[index, block] = number
    count = max(found.values())
    expected = dict.fromkeys(found, 0)
    for number in range(1, count + 1):
        expected[place(number, len(folders))] = number
    wrong = [
        f"{folders[index]}: block {block} is of write {found[index, block]}, not {number}"
        for (index, block), number in expected.items()
        if found[index, block] != number
    ]
    if wrong:
        raise SystemExit(f"not of one moment, which was after write {count}: " + "; ".join(wrong))
    return count


def main() -> None:
    """Do what the command line says."""
    what, folders = sys.argv[1], [Path(each) for each in sys.argv[2:]]
    if what == "check":
        print(check(folders))
        return
    thread = threading.Thread(target=churn, args=(folders,))
    thread.start()
    write_in_turn(folders)
    thread.join()


if __name__ == "__main__":
    main()
