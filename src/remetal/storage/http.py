"""A folder that a web server shows, to read from: network recovery and mass deployment.

The server has to list folders, as HTML (nginx, Apache, Caddy, `python -m http.server`) or as JSON (nginx's
`autoindex_format json`), and to serve ranges. Nothing can be written.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote, unquote, urljoin, urlsplit

import msgspec
import urllib3

from remetal.errors import DamagedError, RefusedError, UnavailableError
from remetal.storage.address import split_address
from remetal.storage.store import Entry, NotFoundError, Pieces, check_name, is_name

_TIMEOUT = urllib3.Timeout(connect=20.0, read=60.0)
_PIECE = 1 << 20
_LONGEST_LISTING = 128 << 20
_LONGEST_JSON = 32 << 20
_LONGEST_OBJECT = 128 << 20
_LONGEST_LINK = 2048
_MOST_LINKS = 1 << 19
_BARREN = 1 << 12
"""So many folders without an object among them are no repository: a server can show folders in folders without end."""
_CONNECTIONS = 16
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d{1,18})", re.ASCII)
_LINK = re.compile(rb"""href\s{0,8}=\s{0,8}["']([^"'<>\s]{1,1024})["']""", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/?")


class HttpStore:
    """The store of `remetal.storage.store` behind `http://` or `https://`, read-only."""

    def __init__(self, location: str) -> None:
        secrets = "Let the server allow this machine's address without a password, or use sftp:// or s3://."
        split_address(location, "https://HOST/FOLDER", secrets=secrets)
        self._location = location
        self._root = location.rstrip("/") + "/"
        self._pool = urllib3.PoolManager(maxsize=_CONNECTIONS, timeout=_TIMEOUT, retries=False)

    @property
    def location(self) -> str:
        """The address as the person gave it."""
        return self._location

    def put(self, name: str, data: Pieces) -> None:
        """Refuse: see the module."""
        check_name(name)
        raise self._read_only()

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        check_name(name)
        if size == 0:
            self._size(name)
            return b""
        ranged = start > 0 or size is not None
        end = "" if size is None else str(start + size - 1)
        limit = None if size is None else start + size
        answer, data = self._ask(quote(name), {"Range": f"bytes={start}-{end}"} if ranged else {}, limit)
        if _is_missing(answer):
            raise NotFoundError(f"{self._location} has no object '{name}'")
        if answer.status == 416:
            return b""
        if answer.status not in {200, 206}:
            raise self._failed(name, f"the server answered {answer.status} {answer.reason or ''}".strip())
        if answer.status == 200:  # the whole object, although a part was asked for
            return data[start:] if size is None else data[start : start + size]
        return data if size is None else data[:size]

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects in the order of names; see the contract."""
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return
        yield from self._walk(folder, prefix, [0])

    def delete(self, name: str) -> None:
        """Refuse: see the module."""
        check_name(name)
        raise self._read_only()

    def keep(self, names: Iterable[str]) -> int:
        """Refuse: see the module."""
        raise self._read_only()

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.clear()

    def _walk(self, folder: str, prefix: str, barren: list[int]) -> Iterator[Entry]:
        """Yield what is below a folder; `barren` counts the folders since the last object."""
        barren[0] += 1
        if barren[0] > _BARREN:
            raise self._no_repository(folder, f"it shows {_BARREN} folders one after the other with nothing in them")
        found: list[tuple[str, int | None]] = []
        for child, size in self._list(folder):
            path = f"{folder}/{child.rstrip('/')}" if folder else child.rstrip("/")
            if is_name(path):
                found.append((path + "/", None) if child.endswith("/") else (path, size))
        for path, size in sorted(found, key=lambda each: each[0]):
            if path.endswith("/"):
                if path.startswith(prefix) or prefix.startswith(path):
                    yield from self._walk(path[:-1], prefix, barren)
            elif path.startswith(prefix):
                with suppress(NotFoundError):  # what is listed and not there is no object
                    yield Entry(path, self._size(path) if size is None else size)
                    barren[0] = 0

    def _list(self, folder: str) -> list[tuple[str, int | None]]:
        """Return what a folder holds: names, those of folders with a slash behind, and sizes where they are told."""
        path = f"{quote(folder)}/" if folder else ""
        with self._answer(path, {"Accept": "application/json, text/html"}) as answer:
            if answer.status == 404:
                return []
            if answer.status != 200:
                raise RefusedError(
                    f"{self._location} does not list the folder '{folder}': {answer.status} {answer.reason or ''}",
                    hint="Let the server list folders (nginx: autoindex on; autoindex_format json).",
                )
            if "json" in answer.headers.get("Content-Type", ""):
                return self._parse_json(folder, answer.read(_LONGEST_JSON + 1, decode_content=False))
            return [(each, None) for each in self._parse_links(folder, answer)]

    def _parse_json(self, folder: str, data: bytes) -> list[tuple[str, int | None]]:
        if len(data) > _LONGEST_JSON:
            raise self._endless(folder)
        try:
            rows = msgspec.json.decode(data, type=list[_Row])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self._failed(folder, "the listing is not what nginx makes") from error
        return [
            (f"{each.name}/", None) if each.type == "directory" else (each.name, _size_told(each.size)) for each in rows
        ]

    def _parse_links(self, folder: str, answer: urllib3.BaseHTTPResponse) -> dict[str, None]:
        """Return the names of what a folder's page links to that lies right in the folder, a piece of it at a time."""
        base = urljoin(self._root, f"{quote(folder)}/" if folder else "")
        names: dict[str, None] = {}
        rest, size, links = b"", 0, 0
        while piece := answer.read(_PIECE, decode_content=False):
            size += len(piece)
            rest += piece
            end = 0
            for link in _LINK.finditer(rest):
                end = link.end()
                links += 1
                if links > _MOST_LINKS:
                    break
                name = find_name(base, link[1])
                if name:
                    names[name] = None
            if size > _LONGEST_LISTING or links > _MOST_LINKS:
                raise self._endless(folder)
            rest = rest[max(end, len(rest) - _LONGEST_LINK) :]
        return names

    def _size(self, name: str) -> int:
        with self._answer(quote(name), {"Range": "bytes=0-0"}) as answer:
            if _is_missing(answer):
                raise NotFoundError(f"{self._location} has no object '{name}'")
            total = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status in {206, 416} and total:
                return int(total[1])
            if answer.status != 200:
                raise self._failed(name, f"the server answered {answer.status} {answer.reason or ''}".strip())
            size = 0
            while piece := answer.read(_PIECE, decode_content=False):
                size += len(piece)
                if size > _LONGEST_OBJECT:
                    raise self._endless(name)
            return size

    def _ask(self, path: str, headers: dict[str, str], limit: int | None) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Return an answer and its body, or the first `limit` bytes of that."""
        with self._answer(path, headers) as answer:
            data = answer.read(_LONGEST_OBJECT + 1 if limit is None else limit, decode_content=False)
            if len(data) > _LONGEST_OBJECT:
                raise self._endless(path)
            return answer, data

    @contextmanager
    def _answer(self, path: str, headers: dict[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """Ask, and yield the answer for the length of a block that reads as much of it as it wants."""
        url = self._root + path
        try:
            answer = self._pool.request(
                "GET", url, headers={"Accept-Encoding": "identity"} | headers, redirect=False, preload_content=False
            )
            try:
                yield answer
            finally:
                if answer.length_remaining == 0:
                    answer.release_conn()
                else:
                    answer.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = next((each for each in error.args if isinstance(each, ssl.SSLCertVerificationError)), None)
            if reason is not None:
                raise RefusedError(
                    f"{self._location} shows a certificate that is not trusted: {reason.verify_message}",
                    hint="If an authority of your own has signed it, name that one's certificate: SSL_CERT_FILE=FILE.",
                ) from error
            raise self._failed(path, str(error)) from error

    def _endless(self, name: str) -> DamagedError:
        return self._no_repository(name, "the answer is longer than anything remetal makes")

    def _no_repository(self, name: str, what: str) -> DamagedError:
        return DamagedError(
            f"{self._location} is not right at '{name}': {what}", hint="Is this address that of a repository?"
        )

    def _failed(self, name: str, what: str) -> UnavailableError:
        return UnavailableError(
            f"{self._location} failed at '{name}': {what}", hint="Is the server up and the address right?"
        )

    def _read_only(self) -> RefusedError:
        return RefusedError(
            f"{self._location} can only be read",
            hint="Back up to a folder, sftp:// or s3://; a web server may then show what is there.",
        )


def _is_missing(answer: urllib3.BaseHTTPResponse) -> bool:
    """Whether there is no such file: nothing at all, or a folder, which servers answer with the way to its page."""
    return answer.status == 404 or (answer.status in {301, 302} and answer.headers.get("Location", "").endswith("/"))


class _Row(msgspec.Struct):
    """What nginx tells of a file or folder."""

    name: str
    type: str
    size: int | float | str | None = None


def _size_told(size: object) -> int | None:
    return size if isinstance(size, int) and 0 <= size < 1 << 63 else None


def find_name(base: str, link: bytes) -> str:
    """Return the name of what a link on the page at `base` leads to if that lies right in there, else nothing."""
    target = link.decode("ascii", "replace")
    name = unquote(target)
    if not _PLAIN.fullmatch(target):
        try:
            whole = urljoin(base, target)
            if not whole.startswith(base) or urlsplit(whole).query:
                return ""
        except ValueError:  # an address that is none
            return ""
        name = unquote(whole.removeprefix(base))
    return "" if "/" in name.rstrip("/") or "?" in target else name
