"""A folder of another computer as a store, over SSH's file transfer: `sftp://user@host:port/folder`.

An object is a file, written, made durable and named as in `remetal.storage.local`; what that takes beyond version 3 of
the protocol are OpenSSH's extensions `fsync` and `hardlink`. No request makes a folder durable; so the file is made
durable once more under its name, which on a file system with a journal (ext4, XFS) or a log tree (btrfs) takes the
name along. Keys come from the agent and from ~/.ssh as `ssh` would
use them, or from the file that REMETAL_SSH_KEY names; the host's key has to be known (~/.ssh/known_hosts, or the file
that REMETAL_SSH_KNOWN_HOSTS names).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

import asyncssh

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.storage.address import split_address
from remetal.storage.store import AlreadyExistsError, Entry, NotFoundError, Pieces, check_name, is_name

_TEMPORARY = ".tmp"
_ABANDONED = 86400
"""Seconds after which a temporary file was left by a writer that is no more."""
_TIMEOUT = 30.0
_LONGEST_CALL = 600.0
_DIRECTORY, _REGULAR = 2, 1  # types of files in SFTP's attributes

ResultT = TypeVar("ResultT")


class SftpStore:
    """The store of `remetal.storage.store` on an SFTP server. It connects with the first call, and again if it must."""

    def __init__(self, location: str) -> None:
        example, secrets = "sftp://USER@HOST/FOLDER", "Keys are used as ssh uses them, or REMETAL_SSH_KEY names one."
        parts = split_address(location, example, secrets=secrets, user=True)
        folder = unquote(parts.path)
        if parts.hostname is None or not folder.strip("/"):
            raise UsageError(f"'{location}' is not a folder on an SFTP server", hint=f"Write {example}.")
        self._host, self._port, self._user = parts.hostname, parts.port, unquote(parts.username or "")
        # what follows `/~/` counts from the user's home, as in Git's addresses
        self._root = PurePosixPath(folder.removeprefix("/~/"))
        self._location = location
        self._folders: set[PurePosixPath] = set()
        self._swept = False
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._connection: asyncssh.SSHClientConnection | None = None
        self._client: asyncssh.SFTPClient | None = None
        self._connecting: asyncio.Lock | None = None

    @property
    def location(self) -> str:
        """The address as the person gave it."""
        return self._location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract."""
        check_name(name)
        with self._explained(name):
            self._run(self._put(name, data))

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        check_name(name)
        with self._explained(name):
            return self._run(self._get(name, start, size))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects in the order of names; see the contract."""
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return
        yield from self._walk(folder, prefix)

    def delete(self, name: str) -> None:
        """Remove an object; see the contract."""
        check_name(name)
        with self._explained(name):
            self._run(self._delete(name))

    def keep(self, names: Iterable[str]) -> int:
        """Do nothing: a folder protects nothing."""
        return 0

    def close(self) -> None:
        """End the connection."""
        with self._guard:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._disconnect(), loop).result(_TIMEOUT)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    async def _disconnect(self) -> None:
        """End the connection, and with it all that waits for it."""
        if self._connection is not None:
            self._connection.abort()
            await self._connection.wait_closed()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        with self._explained(prefix):
            found = self._run(self._list(folder))
        for path, size in sorted(found):
            if size is not None:
                if path.startswith(prefix):
                    yield Entry(path, size)
            elif path.startswith(prefix) or prefix.startswith(path):
                yield from self._walk(path[:-1], prefix)

    async def _put(self, name: str, data: Pieces) -> None:
        client = await self._connected()
        target = self._root / name
        await self._make_folder(client, target.parent)
        await self._make_folder(client, self._root / _TEMPORARY)
        if not self._swept:
            self._swept = True
            await self._sweep(client)
        temporary = self._root / _TEMPORARY / secrets.token_hex(12)
        try:
            async with client.open(temporary, "xb", asyncssh.SFTPAttrs(permissions=0o600)) as file:
                offset = 0
                for piece in data:
                    await file.write(bytes(piece), offset)
                    offset += len(piece)
                await file.fsync()
                await self._link(client, temporary, target)
                try:
                    await file.fsync()
                except asyncssh.SFTPError:
                    await client.remove(target)
                    raise
        finally:
            with suppress(asyncssh.SFTPError):
                await client.remove(temporary)

    async def _link(self, client: asyncssh.SFTPClient, temporary: PurePosixPath, target: PurePosixPath) -> None:
        """Give a file its name. If that is taken, make what has it durable: whoever wrote it may have been killed."""
        try:
            await client.link(temporary, target)
        except asyncssh.SFTPFailure:  # version 3 of the protocol has no other word for a name that is taken
            if not await client.lexists(target):
                raise
            async with client.open(target, "rb") as other:
                await other.fsync()
            name = target.relative_to(self._root)
            raise AlreadyExistsError(f"{self._location} has an object '{name}' already") from None

    async def _get(self, name: str, start: int, size: int | None) -> bytes:
        client = await self._connected()
        path = self._root / name
        try:
            state = await client.lstat(path)
            if state.type != _REGULAR:
                raise NotFoundError(f"{self._location} has no object '{name}'")
            rest = max((state.size or 0) - start, 0)
            wanted = rest if size is None else min(size, rest)
            if not wanted:
                return b""
            async with client.open(path, "rb") as file:
                found = await file.read(wanted, start)
                assert isinstance(found, bytes)
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
            raise NotFoundError(f"{self._location} has no object '{name}'") from error
        return found

    async def _list(self, folder: str) -> list[tuple[str, int | None]]:
        client = await self._connected()
        found: list[tuple[str, int | None]] = []
        try:
            async for child in client.scandir(self._root / folder):
                name = os.fsdecode(child.filename)
                path = f"{folder}/{name}" if folder else name
                if not is_name(path):
                    continue
                if child.attrs.type == _DIRECTORY:
                    found.append((path + "/", None))
                elif child.attrs.type == _REGULAR:
                    found.append((path, child.attrs.size or 0))
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory):
            return []
        return found

    async def _delete(self, name: str) -> None:
        client = await self._connected()
        with suppress(asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
            await client.remove(self._root / name)

    async def _make_folder(self, client: asyncssh.SFTPClient, folder: PurePosixPath) -> None:
        if folder not in self._folders:
            await client.makedirs(folder, asyncssh.SFTPAttrs(permissions=0o700), exist_ok=True)
            self._folders.add(folder)

    async def _sweep(self, client: asyncssh.SFTPClient) -> None:
        """Remove temporary files of writers that are no more, by the server's own clock."""
        folder = self._root / _TEMPORARY
        probe = folder / secrets.token_hex(12)
        async with client.open(probe, "xb"):
            now = (await client.stat(probe)).mtime or 0
        await client.remove(probe)
        async for child in client.scandir(folder):
            if child.attrs.type == _REGULAR and now - (child.attrs.mtime or now) > _ABANDONED:
                with suppress(asyncssh.SFTPError):
                    await client.remove(folder / os.fsdecode(child.filename))

    async def _connected(self) -> asyncssh.SFTPClient:
        """Return the client, connecting if there is no connection, or no longer one."""
        assert self._connecting is not None
        async with self._connecting:
            if self._client is None or self._connection is None or self._connection.is_closed():
                options: dict[str, Any] = {"connect_timeout": _TIMEOUT, "keepalive_interval": _TIMEOUT}
                if self._user:
                    options["username"] = self._user
                if self._port is not None:
                    options["port"] = self._port
                if key := os.environ.get("REMETAL_SSH_KEY"):
                    options["client_keys"] = [key]
                if hosts := os.environ.get("REMETAL_SSH_KNOWN_HOSTS"):
                    options["known_hosts"] = hosts
                self._connection = await asyncssh.connect(self._host, **options)
                self._client = await self._connection.start_sftp_client()
            return self._client

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Carry out a coroutine in the thread that the connection lives in."""
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._connecting = asyncio.Lock()
                self._connection = self._client = None
                self._thread = threading.Thread(target=self._loop.run_forever, name="sftp", daemon=True)
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_LONGEST_CALL)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn errors of the connection and the server into sentences."""
        try:
            yield
        except asyncssh.HostKeyNotVerifiable as error:
            raise RefusedError(
                f"the key of the host {self._host} is not known, or is another than it was",
                hint="Compare its fingerprint, then add it: `ssh-keyscan HOST >> ~/.ssh/known_hosts`, or name a file "
                "with REMETAL_SSH_KNOWN_HOSTS.",
            ) from error
        except asyncssh.PermissionDenied as error:
            raise RefusedError(
                f"the host {self._host} lets nobody in with the keys that are here",
                hint="Check the user's name; name the private key with REMETAL_SSH_KEY, or load it into ssh-agent.",
            ) from error
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
            raise UsageError(
                f"the SSH key cannot be used: {error}", hint="Load a key with a passphrase into ssh-agent."
            ) from error
        except (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded) as error:
            raise UnavailableError(f"{self._location} is full", hint="Free some space there.") from error
        except asyncssh.SFTPPermissionDenied as error:
            raise UnavailableError(
                f"{self._location} does not allow it at '{name}'", hint="Check the folder's owner and mode there."
            ) from error
        except asyncssh.SFTPOpUnsupported as error:
            raise RefusedError(
                f"the server of {self._location} cannot make a file durable or name it safely ({error})",
                hint="Use OpenSSH's server; it needs the extensions fsync@openssh.com and hardlink@openssh.com.",
            ) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            self._folders.clear()
            raise UnavailableError(
                f"{self._location} failed at '{name}': {str(error) or type(error).__name__}",
                hint="Is the host up, and the folder's disk not full? Then run the command again.",
            ) from error
