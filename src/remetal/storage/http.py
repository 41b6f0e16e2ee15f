"""A folder that a web server shows, to read from: network recovery and mass deployment.

The server has to list folders, as HTML (nginx, Apache, Caddy, `python -m http.server`) or as JSON (nginx's
`autoindex_format json`), and to serve ranges. Nothing can be written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin, urlsplit

import urllib3

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.storage.store import Entry, NotFoundError, Pieces, check_name, is_name

_TIMEOUT = urllib3.Timeout(connect=20.0, read=60.0)
_LONGEST_LISTING = 256 << 20
_CONNECTIONS = 16
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


class HttpStore:
    """The store of `remetal.storage.store` behind `http://` or `https://`, read-only."""

    def __init__(self, location: str) -> None:
        parts = urlsplit(location)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"'{location}' is not a folder on a web server", hint="Write https://HOST/FOLDER.")
        if parts.password is not None or parts.username is not None:
            raise UsageError(
                "an address must not hold a password: others see it in the list of processes",
                hint="Let the server allow this machine's address, or use sftp:// or s3://.",
            )
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
        yield from self._walk(folder, prefix)

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

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        found: list[tuple[str, int | None]] = []
        for child, size in self._list(folder):
            path = f"{folder}/{child.rstrip('/')}" if folder else child.rstrip("/")
            if is_name(path):
                found.append((path + "/", None) if child.endswith("/") else (path, size))
        for path, size in sorted(found, key=lambda each: each[0]):
            if path.endswith("/"):
                if path.startswith(prefix) or prefix.startswith(path):
                    yield from self._walk(path[:-1], prefix)
            elif path.startswith(prefix):
                yield Entry(path, self._size(path) if size is None else size)

    def _list(self, folder: str) -> list[tuple[str, int | None]]:
        """Return what a folder holds: names, those of folders with a slash behind, and sizes where they are told."""
        path = f"{quote(folder)}/" if folder else ""
        answer, data = self._ask(path, {"Accept": "application/json, text/html"}, _LONGEST_LISTING + 1)
        if answer.status == 404:
            return []
        if answer.status != 200:
            raise RefusedError(
                f"{self._location} does not list the folder '{folder}': {answer.status} {answer.reason or ''}",
                hint="Let the server list folders (nginx: autoindex on; autoindex_format json).",
            )
        if len(data) > _LONGEST_LISTING:
            raise self._failed(folder, "the listing is longer than anything remetal makes")
        text = data.decode("utf-8", "replace")
        if "json" in answer.headers.get("Content-Type", ""):
            return self._parse_json(folder, text)
        links = _Links(urljoin(self._root, path))
        links.feed(text)
        return [(each, None) for each in links.names]

    def _parse_json(self, folder: str, text: str) -> list[tuple[str, int | None]]:
        try:
            rows = [(str(row["name"]), str(row["type"]), row.get("size")) for row in json.loads(text)]
        except (ValueError, TypeError, KeyError) as error:
            raise self._failed(folder, "the listing is not what nginx makes") from error
        return [
            (f"{name}/" if kind == "directory" else name, size if isinstance(size, int) and size >= 0 else None)
            for name, kind, size in rows
        ]

    def _size(self, name: str) -> int:
        answer, data = self._ask(quote(name), {"Range": "bytes=0-0"}, None)
        if _is_missing(answer):
            raise NotFoundError(f"{self._location} has no object '{name}'")
        total = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status in {206, 416} and total:
            return int(total[1])
        if answer.status == 200:
            return len(data)
        raise self._failed(name, f"the server answered {answer.status} {answer.reason or ''}".strip())

    def _ask(self, path: str, headers: dict[str, str], limit: int | None) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Return an answer and its body, or the first `limit` bytes of that."""
        url = self._root + path
        try:
            answer = self._pool.request(
                "GET", url, headers={"Accept-Encoding": "identity"} | headers, redirect=False, preload_content=False
            )
            try:
                return answer, answer.read(limit, decode_content=False)
            finally:
                if limit is None or answer.length_remaining == 0:
                    answer.release_conn()
                else:
                    answer.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._failed(path, str(error)) from error

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


class _Links(HTMLParser):
    """The names of what a folder's page links to that lies right in the folder."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self._base = base
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href") if tag == "a" else None
        if not target:
            return
        whole = urljoin(self._base, target)
        if whole.startswith(self._base) and not urlsplit(whole).query:
            name = unquote(whole.removeprefix(self._base))
            if name and "/" not in name.rstrip("/") and name not in self.names:
                self.names.append(name)
