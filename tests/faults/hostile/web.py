"""Web servers that answer with anything: a repository is read from them, and nothing else may come of it."""

from __future__ import annotations

import http.server
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.faults.hostile.case import ESCAPES, NAMES, Case
from tests.faults.hostile.sample import MAPS

Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler, Path], None]
"""What answers one request for what lies at this path of the repository."""

_WORDS = (("snapshots",), ("plan", "latest", *MAPS))


def serve(handler: Handler, path: Path) -> None:
    """Answer as a good server does: folders as a page of links, and files."""
    if path.is_dir():
        names = [f"{each.name}/" if each.is_dir() else each.name for each in sorted(path.iterdir())]
        answer(handler, "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode())
    elif path.is_file():
        whole = path.read_bytes()
        wanted = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(wanted[0] or 0), int(wanted[2] or len(whole) - 1)
        part = whole[start : end + 1]
        headers = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(whole)}"}
        answer(handler, part, 206 if wanted[1] else 200, headers)
    else:
        answer(handler, b"", 404)


def answer(
    handler: Handler, data: bytes, status: int = 200, headers: dict[str, str] | None = None, kind: str = "text/html"
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(data)), "Content-Type": kind} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def stream(piece: bytes, status: int = 200, headers: dict[str, str] | None = None, pause: float = 0) -> Answer:
    """Return an answer that never ends."""

    def endless(handler: Handler, path: Path) -> None:
        handler.send_response(status)
        for name, value in (headers or {"Content-Type": "text/html"}).items():
            handler.send_header(name, value)
        handler.end_headers()
        for _ in range(1 << 16):
            handler.wfile.write(piece)
            time.sleep(pause)

    return endless


@contextmanager
def running(folder: Path, listing: Answer, item: Answer) -> Iterator[str]:
    """Run a server in a child process for the length of a block; yield its address."""

    class Server(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / unquote(urlsplit(self.path).path).lstrip("/")
            self.close_connection = True
            with suppress(OSError):
                (listing if path.is_dir() else item)(self, path)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    child = os.fork()
    if not child:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.server_close()
        os.kill(child, 9)
        os.waitpid(child, 0)


def case(name: str, *, listing: Answer = serve, item: Answer = serve, good: bool = False, seconds: float = 2.0) -> Case:
    return Case(
        "web",
        name,
        lambda attacker: None,
        _WORDS,
        frozenset({0, 3, 5, 6}),
        refused=not good,
        seconds=seconds,
        around=lambda attacker: running(attacker.repository, listing, item),
    )


def page(text: str) -> Answer:
    return lambda handler, path: answer(handler, text.encode("utf-8", "surrogateescape"))


def rows(data: object) -> Answer:
    return lambda handler, path: answer(handler, json.dumps(data).encode(), kind="application/json")


def raw_rows(data: bytes) -> Answer:
    return lambda handler, path: answer(handler, data, kind="application/json")


def moved(target: str, status: int = 302) -> Answer:
    return lambda handler, path: answer(handler, b"", status, {"Location": target})


def more(extra: str) -> Answer:
    """Return a good listing with something else in it."""

    def both(handler: Handler, path: Path) -> None:
        names = [f"{each.name}/" if each.is_dir() else each.name for each in sorted(path.iterdir())]
        answer(handler, (extra + "".join(f'<a href="{name}">x</a>' for name in names)).encode("utf-8", "replace"))

    return both


def header(name: str, value: str) -> Answer:
    """Return a good answer with one header that is not."""

    def spoiled(handler: Handler, path: Path) -> None:
        data = path.read_bytes() if path.is_file() else b""
        answer(handler, data, 200 if path.is_file() else 404, {name: value})

    return spoiled


def deep(handler: Handler, path: Path) -> None:
    answer(handler, "".join(f'<a href="{letter}/">x</a>' for letter in "abcdefghijklmnop").encode())


SIZES: tuple[object, ...] = (-1, 1 << 63, 1 << 200, 1.5, "x", True, None, [], {})


def both_kinds(name: str) -> list[dict[str, object]]:
    return [{"name": name, "type": "directory"}, {"name": name, "type": "file", "size": 1}]


def sized(size: object) -> Answer:
    return rows([{"name": "keys", "type": "directory"}, {"name": "a", "type": "file", "size": size}])


def with_status(status: int, reason: str | None = None) -> Answer:
    def bad(handler: Handler, path: Path) -> None:
        handler.send_response(status, reason)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return bad


CASES = [
    case("a good one", good=True),
    *(case(f"a link to {each[:30]!r}", listing=more(f'<a href="{each}">x</a>'), good=True) for each in NAMES),
    *(
        case(f"a link to {each}", listing=more(f'<a href="{each}">x</a>'), good=True)
        for each in (
            "file:///etc/shadow",
            "http://[",
            "//[::1",
            "http://127.0.0.1:1/x",
            "%2e%2e%2f%2e%2e%2fetc",
            "..%00/x",
            "javascript:x",
            "?C=N;O=D",
            "http://127.0.0.1:99999999/",
            "\ud800",
            "/" * 10_000,
        )
    ),
    *(
        case(f"listings moved to {each}", listing=moved(each))
        for each in ("file:///etc/", "http://127.0.0.1:1/", "/", "gopher://x/", ESCAPES.replace("\x07", ""))
    ),
    *(case(f"objects moved to {each}", item=moved(each)) for each in ("file:///etc/shadow", "/", "x/", "//x")),
    case("listings that never end", listing=stream(b'<a href="x">' * 1000)),
    case("listings of nothing that never end", listing=stream(bytes(1 << 16))),
    case("objects that never end", item=stream(bytes(1 << 16))),
    case("objects that never end, in parts", item=stream(bytes(1 << 16), 206, {"Content-Range": "bytes 0-0/1"})),
    case("headers that never end", item=stream(b"X: y\r\n" * 1000, headers={"X": "y"})),
    case(
        "a million links", listing=page('<a href="a">' + "".join(f'<a href="{each:x}">' for each in range(1_000_000)))
    ),
    case("folders in folders without end", listing=deep),
    case("folders that hold themselves", listing=page('<a href="x/">x</a>')),
    case("tags without end", listing=page("<a " * 1_000_000)),
    case("comments without end", listing=page("<!--" * 1_000_000)),
    case("entities", listing=page('<a href="&#x110000;&#0;&bomb;">' * 1000)),
    case("an attribute of 10 MB", listing=page(f'<a href="{"x" * 10_000_000}">')),
    case("JSON, 10^5 deep", listing=raw_rows(b"[" * 100_000)),
    case("JSON objects, 10^5 deep", listing=raw_rows(b'{"name":' * 100_000)),
    case(
        "JSON with a number of 10^6 digits",
        listing=raw_rows(b'[{"name":"a","type":"file","size":' + b"9" * 1_000_000 + b"}]"),
    ),
    case("JSON that is no list", listing=rows({"name": "x"})),
    case("JSON of texts", listing=rows(["name", "type"])),
    case("JSON of lists", listing=rows([["name"], ["type"]])),
    case("JSON of nothing", listing=rows(None)),
    case("JSON without names", listing=rows([{"type": "file"}])),
    case("JSON with NaN", listing=raw_rows(b'[{"name":"a","type":"file","size":NaN}]')),
    *(case(f"JSON with the size {str(size)[:20]}", listing=sized(size)) for size in SIZES),
    *(case(f"JSON with the name {name[:30]!r}", listing=rows(both_kinds(name))) for name in NAMES),
    *(
        case(f"listings with {status}", listing=with_status(status))
        for status in (204, 206, 301, 401, 403, 404, 500, 999)
    ),
    *(case(f"objects with {status}", item=with_status(status)) for status in (204, 301, 401, 403, 404, 416, 500, 999)),
    *(
        case(f"{name}: {value[:30]}", item=header(name, value), good=True)
        for name, value in (
            ("Content-Length", "99999999999999999999999"),
            ("Content-Length", "-1"),
            ("Content-Length", "x"),
            ("Content-Range", "bytes 0-0/99999999999999999999999999"),
            ("Content-Encoding", "gzip"),
            ("Content-Encoding", "zstd"),
            ("Transfer-Encoding", "chunked"),
            ("X", "y" * 100_000),
        )
    ),
    case("a reason of escapes", item=with_status(500, "\x1b[2Jno\x9b")),
]
