"""Write the golden repository of the present format: run once per format, never again for a released one.

    .venv/bin/python -m tests.golden.make

`format-1.json` was written before snapshots told what was left out and keys were sealed twice, `format-1-left-out.json`
since. The result is one
JSON file with every object in base64, and what it takes to read them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from remetal.repository.config import FORMAT
from remetal.repository.objects import encode_json
from remetal.repository.repository import (
    accept_recipients,
    add_recipient,
    enroll_machine,
    init_repository,
    unlock_with_kit,
)
from remetal.repository.session import open_session
from remetal.repository.snapshots import LeftOut
from tests.repositories import CHUNK, MemoryStore, batches_of

FOLDER = Path(__file__).parent
PASSPHRASE = "golden Grüße"
LEFT_OUT = (
    LeftOut(volume="sda:1", path="/var/tmp", bytes=123_456_789),
    LeftOut(volume="sda:2", path="/Grüße/\\xff", bytes=0),
)
"""What the second snapshot says was left out."""


def golden_image(number: int) -> bytes:
    """Return the bytes of an image: text, zeros, noise that can be made again, and a short last chunk."""
    noise = hashlib.shake_256(b"golden noise").digest(5000)
    text = b"".join(b"line %d of the golden image\n" % each for each in range(4000))
    return (text[: CHUNK + 300 * number].ljust(2 * CHUNK, b".") + bytes(2 * CHUNK) + noise)[: 4 * CHUNK + 5000]


def main() -> None:
    """Make the repository and write the file."""
    store = MemoryStore()
    repository, kit = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
    keys = enroll_machine(repository, "golden")
    ids: list[str] = []
    for number in range(2):
        if number:
            add_recipient(repository, unlock_with_kit(repository, kit.text()), "second")
            accept_recipients(repository, keys)
        with open_session(repository, keys, workers=1) as session:
            data = golden_image(number)
            session.write_image("sda:1", len(data), batches_of(data))
            session.write_image("sda:2", 10 * CHUNK, batches_of(bytes(10 * CHUNK), holes=range(1, 9)))
            snapshot = session.commit(
                layout=b'{"golden":true}',
                hostname="golden.example",
                tags=("one", "two"),
                left_out=LEFT_OUT if number else (),
                time="2025-01-02T03:04:05Z",
            )
        ids.append(snapshot.id)
    golden = {
        "passphrase": PASSPHRASE,
        "kit": kit.lines(),
        "machine_keys": encode_json(keys.stored).decode(),
        "snapshots": ids,
        "images": [hashlib.sha256(golden_image(number)).hexdigest() for number in range(2)],
        "objects": {name: base64.b64encode(data).decode() for name, data in sorted(store.objects.items())},
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (FOLDER / f"format-{FORMAT}-left-out.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
