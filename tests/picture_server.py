"""A web server with pictures, whose answers are right or wrong in all ways that a test asks for."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from vision_rows import picture


def png(number: int = 0) -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


class Web(BaseHTTPRequestHandler):
    """Answers each path in its way; the server counts what it was asked for."""

    server: Any

    def do_GET(self) -> None:
        url = urlsplit(self.path)  # a proxy is asked for a whole one
        name = url.path.strip("/")
        self.server.asked.append(name)
        self.server.hosts.append(url.netloc or self.headers["Host"])
        self.server.keys += self.headers.get_all("Proxy-Authorization", [])
        turns = {"turned": "/0.png", "to-file": "file:///etc/passwd", "to-ftp": "ftp://127.0.0.1/0.png", "loop": "/loop", "to-data": "data:image/png;base64,AAAA"}  # fmt: skip
        if name in turns:
            return self.reply(302, b"", Location=turns[name])
        if name == "to":
            return self.reply(302, b"", Location=bytes.fromhex(url.query).decode("latin-1"))
        if name.endswith(".png"):
            return self.reply(200, png(int(name.removesuffix(".png"))), **{"Content-Type": "text/html"})
        if name == "a%20b":
            return self.reply(200, png())
        if name == "page":
            return self.reply(200, b"<html>not found</html>", **{"Content-Type": "image/png"})
        if name == "claims":
            return self.reply(200, b"x", length=10**12)
        if name == "short":
            return self.reply(200, png()[:50], length=5000)
        if name == "silent":
            return time.sleep(3)
        if name in ("endless", "drip"):
            return self.pour(b"x" * 4096 if name == "endless" else b"x", 0 if name == "endless" else 0.1)
        return self.reply(404, b"")

    def do_CONNECT(self) -> None:
        self.server.hosts.append(self.path)
        self.reply(403, b"")

    def reply(self, code: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(length or len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def pour(self, part: bytes, pause_s: float) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100_000):
                self.wfile.write(part)
                time.sleep(pause_s)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def picture_server() -> Iterator[Any]:
    """Run one; `asked` has the paths that were asked for, `hosts` of which server, and `keys` for a proxy."""
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    found.daemon_threads, found.asked, found.hosts, found.keys = True, [], [], []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()
