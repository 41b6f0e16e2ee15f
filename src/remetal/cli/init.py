"""`remetal init`: a new repository and its first recipient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.key import new_kit_page
from remetal.cli.options import Output, Repo, new_passphrase
from remetal.cli.output import print_result
from remetal.cli.tables import escape
from remetal.repository.config import DEFAULT_CHUNK_SIZE
from remetal.repository.repository import init_repository
from remetal.storage import is_redundant
from remetal.units import format_bytes, parse_bytes
from remetal.workflows.stores import opened_store


def init(
    *,
    repo: Repo,
    passphrase_file: Annotated[
        Path | None,
        Parameter(
            name="--passphrase-file",
            env_var="REMETAL_PASSPHRASE_FILE",
            help="Take the passphrase from the first line of this file instead of asking twice.",
            metavar="FILE",
        ),
    ] = None,
    chunk_size: Annotated[
        str,
        Parameter(
            name="--chunk-size",
            help="The unit of deduplication, a power of two from 64K to 4M; it can not be changed later.",
            metavar="SIZE",
        ),
    ] = f"{DEFAULT_CHUNK_SIZE // 1024}K",
    parity: Annotated[
        bool | None,
        Parameter(
            name="--parity",
            negative="--no-parity",
            help="Protect packs by parity, for 1/16 more space: a damaged or missing pack is rebuilt from others. "
            "By default so, but for S3, which keeps everything several times itself; it can not be changed later.",
        ),
    ] = None,
    kit_page: Annotated[
        Path | None,
        Parameter(
            name="--kit-page",
            help="Also write the recovery kit as a page to print, with a QR code.",
            metavar="FILE",
        ),
    ] = None,
    output: Output = Output(),
) -> None:
    """Make a repository and its first recipient, and print the recovery kit.

    Whoever has the passphrase or the recovery kit can restore every machine from this repository; nobody else can.
    Print the kit and keep it where no machine can reach it: without both, the backups cannot be read.

    Example: `remetal init --repo /mnt/usb/backup --kit-page kit.html`
    """
    size = parse_bytes(chunk_size)
    with opened_store(repo) as opened, new_kit_page(kit_page) as write_page:
        passphrase = new_passphrase(passphrase_file, what="the repository")
        repository, kit = init_repository(
            opened.store,
            passphrase=passphrase,
            chunk_size=size,
            parity=not is_redundant(repo) if parity is None else parity,
        )
        write_page(kit)
    location = repository.store.location
    result = {
        "repository": repository.config.id,
        "location": location,
        "format": repository.config.format,
        "chunk_size": repository.config.chunk_size,
        "parity": repository.config.parity,
        "kit": kit.text(),
    }
    print_result(
        output,
        result,
        f"Made repository {repository.config.id} at {escape(location)} (chunks of {format_bytes(size)}, "
        f"{'with' if repository.config.parity else 'without'} parity).\n",
        escape(kit.text()),
        "Print this recovery kit and keep it in a safe place. Then: `remetal backup`.",
        lost="The repository is made. Print its recovery kit with `remetal key kit`.",
    )
