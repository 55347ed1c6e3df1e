"""A folder served over HTTP with ranges, and with the faults that real servers have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

# (request's number, path, first and last byte or None) -> what goes wrong: "", a status, drop, stall, short, redirect
Fault = Callable[[int, str, tuple[int, int] | None], str]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: HttpFolder, *args: object) -> None:
        self.folder = server
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        span = self._span()
        fault = self.folder.next_fault(self.command, self.path, span)
        path = self.folder.root / self.path.lstrip("/")
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "stall":
            self.folder.stalled.wait(20)
            self.close_connection = True
            return
        if fault == "redirect":
            self._head(302, 0, {"Location": self.folder.redirect_to})
            return
        if fault.isdigit() or not path.is_file():
            self._head(int(fault) if fault else 404, 0)
            return
        data = path.read_bytes()
        if span is not None and self.folder.ranges and span[0] >= len(data):
            self._head(416, 0, {"Content-Range": f"bytes */{len(data)}"})
            return
        if span is not None and self.folder.ranges:
            part = data[span[0] : span[1] + 1]
            self._head(206, len(part), {"Content-Range": f"bytes {span[0]}-{span[0] + len(part) - 1}/{len(data)}"})
        else:
            part = data
            self._head(200, len(part))
        if self.command == "GET":
            self.wfile.write(part[: len(part) // 2] if fault == "short" else self.folder.altered(self.path, part))
            if fault == "short":
                self.close_connection = True

    def _span(self) -> tuple[int, int] | None:
        value = self.headers.get("Range")
        if value is None:
            return None
        first, _, last = value.removeprefix("bytes=").partition("-")
        return int(first), int(last)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


class HttpFolder:
    """Serves a folder while the block runs; `requests` are those that came, and `fault` decides what they meet."""

    def __init__(self, root: Path, fault: Fault | None = None, ranges: bool = True) -> None:
        self.root = root
        self.fault = fault or (lambda number, path, span: "")
        self.ranges = ranges
        self.requests: list[tuple[str, str, tuple[int, int] | None]] = []
        self.stalled = threading.Event()
        self.altered: Callable[[str, bytes], bytes] = lambda path, part: part
        self.redirect_to = ""
        self._lock = threading.Lock()

    def next_fault(self, method: str, path: str, span: tuple[int, int] | None) -> str:
        with self._lock:
            self.requests.append((method, path, span))
            return self.fault(len(self.requests), path, span)

    def __enter__(self) -> HttpFolder:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stalled.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
