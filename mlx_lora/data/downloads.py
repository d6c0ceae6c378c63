"""Download pictures that data name by a web address, each once.

    <cache>/downloads/<SHA-256 of the address>     the file as it came

What comes is checked like any other picture (data/images.py), whatever its server calls it. Data can be anybody's, so an address
may lead to an http or https server only, also after it was redirected, and a public server may not redirect to one in the local
network. A server that downloads for its clients allows no local addresses at all: the addresses that a name stands for are
looked up once, checked, and these are then connected to, so that a second look-up cannot give another one.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib import request as web
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from mlx_lora.data.examples import FormatError
from mlx_lora.utils.errors import first_line
from mlx_lora.utils.files import cache_dir, replacing_file, sha256_of
from mlx_lora.utils.progress import long_task

KIND = "downloads"
MOST_BYTES = 64 << 20  # of a picture
MOST_DISK_BYTES = 10 << 30  # of all that are kept
ROOM_LEFT_BYTES = 1 << 30
ANSWER_S, WHOLE_S = 10.0, 60.0  # until a server says something, and until a picture is there
AT_A_TIME = 8
MOST_SILENT = 3  # addresses of a server that does not answer, which are tried
MOST_REDIRECTIONS = 5
PART_BYTES = 1 << 16
AGENT = "mlx-lora (reads pictures of a training set)"
SCHEMES = ("http", "https")


def is_on_web(source: str | bytes) -> bool:
    """Return whether the source of a picture is a web address."""
    return isinstance(source, str) and re.match(r"https?:", source, re.IGNORECASE) is not None


class ImageDownloads:
    """The pictures of a run that were downloaded, by this run or an earlier one."""

    def __init__(self) -> None:
        """Prepare; nothing is downloaded yet."""
        self._refused: dict[str, str] = {}
        self._silent: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._kept_bytes: int | None = None

    def fetch_all(self, urls: Iterable[str]) -> None:
        """Download pictures, several at a time; `file` then returns them, or says why one cannot be used."""
        waiting = [url for url in dict.fromkeys(urls) if not _file_of(url).is_file() and url not in self._refused]
        if not waiting:
            return
        with ThreadPoolExecutor(AT_A_TIME) as pool, long_task("Downloading", len(waiting), "pictures") as task:
            for done, _ in enumerate(pool.map(self._try, waiting), 1):
                task.reach(done)

    def file(self, url: str) -> Path:
        """Return the file of a picture.

        Raises:
            FormatError: it cannot be downloaded; the message is the reason.
        """
        file = _file_of(url)
        if not file.is_file():
            if url not in self._refused:
                self._try(url)
            if url in self._refused:
                raise FormatError(self._refused[url])
        return file

    def drop(self, url: str, why: str) -> None:
        """Forget a picture that turned out to be none, so that a later run downloads it again."""
        _file_of(url).unlink(missing_ok=True)
        self._refused[url] = why

    def _try(self, url: str) -> None:
        host = _host_of(url)
        if self._silent[host] >= MOST_SILENT:
            self._refused[url] = f"its server did not answer {MOST_SILENT} times"
            return
        try:
            self._keep(_file_of(url), download(url))
        except NoAnswer as error:
            self._silent[host] += 1
            self._refused[url] = str(error)
        except FormatError as error:
            self._refused[url] = str(error)

    def _keep(self, file: Path, content: bytes) -> None:
        """Write a picture, completely or not at all.

        Raises:
            FormatError: there is no room for it.
        """
        with self._lock:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                if self._kept_bytes is None:
                    self._kept_bytes = sum(one.stat().st_size for one in file.parent.iterdir())
                if self._kept_bytes + len(content) > MOST_DISK_BYTES:
                    raise FormatError(
                        f"{file.parent} has {MOST_DISK_BYTES >> 30} GiB of pictures, the limit; delete old ones"
                    )
                if shutil.disk_usage(file.parent).free < len(content) + ROOM_LEFT_BYTES:
                    raise FormatError(f"{file.parent} has no room for it; make some")
                with replacing_file(file) as part:
                    part.write_bytes(content)
                self._kept_bytes += len(content)
            except OSError as error:
                raise FormatError(f"{file.parent}: {error.strerror or error}; make it writable") from error


def _file_of(url: str) -> Path:
    return cache_dir(KIND) / sha256_of(url)


def _host_of(url: str) -> str:
    with suppress(ValueError):
        return urlsplit(url).netloc
    return ""


# One download


class NoAnswer(FormatError):
    """A server cannot be reached, or says nothing."""


def download(
    url: str,
    public_only: bool = False,
    most_bytes: int = MOST_BYTES,
    seconds: float = WHOLE_S,
    body: bytes | None = None,
) -> bytes:
    """Return the file at a web address.

    Args:
        url: http or https.
        public_only: allow no address of the local network, and use no proxy.
        most_bytes: of the file.
        seconds: until it is there.
        body: JSON that is sent to the address, whose server may think until then; None: nothing is sent.

    Raises:
        FormatError: it cannot be downloaded; the message is the reason.
    """
    try:
        asked = _Request(_quoted(url), public_only, body=body)
    except ValueError as error:
        raise FormatError(f"is no web address ({first_line(error)})") from error
    late = threading.Timer(seconds, asked.stop)  # a server that sends a byte now and then
    late.daemon = True
    late.start()
    try:
        return _content(_opener(public_only), asked, most_bytes, seconds if body else min(ANSWER_S, seconds))
    except FormatError:
        raise
    except HTTPError as error:
        error.close()
        turned = 300 <= error.code < 400
        raise FormatError(
            "is redirected too often, or to where a picture may not be"
            if turned
            else f"its server says {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, FormatError):
            raise reason from error
        if asked.is_late:
            raise NoAnswer(f"was not there after {seconds:.0f} s") from error
        if isinstance(reason, TimeoutError):
            raise NoAnswer("its server does not answer") from error
        words = getattr(reason, "strerror", None) or str(reason).partition("\n")[0] or type(error).__name__
        raise NoAnswer(f"cannot be downloaded ({words})") from error
    finally:
        late.cancel()


def _quoted(url: str) -> str:
    """Return an address without spaces and letters that must be written in another way.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in SCHEMES or not parts.hostname:
        raise ValueError("it has no server")
    path, query = (quote(part, safe="%/:?@!$&'()*+,;=~[]") for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query, fragment="").geturl()


def _content(opener: web.OpenerDirector, asked: _Request, most_bytes: int, answer_s: float) -> bytes:
    parts, size = [], 0
    with opener.open(asked, timeout=answer_s) as reply:
        said = reply.headers.get("Content-Length", "")
        if said.isdecimal() and int(said) > most_bytes:
            raise FormatError(f"has {int(said) / (1 << 20):,.0f} MiB, more than {most_bytes >> 20}")
        while part := reply.read1(PART_BYTES):
            size += len(part)
            if size > most_bytes:
                raise FormatError(f"has more than {most_bytes >> 20} MiB")
            parts.append(part)
    if asked.is_late or (said.isdecimal() and size != int(said)):
        raise OSError("its end is missing")
    return b"".join(parts)


class _Request(web.Request):
    """A request, what it found of its server's addresses, and the way to stop it.

    Attributes:
        public_only: whether addresses of the local network are refused.
        is_local: whether the server that answered has such an address.
        is_late: whether the request was stopped.
    """

    def __init__(self, url: str, public_only: bool, before: _Request | None = None, body: bytes | None = None):
        headers = {"User-Agent": AGENT, "Accept": "image/*"} if body is None else {"Content-Type": "application/json"}
        super().__init__(url, body, headers)
        self.public_only, self.is_local = public_only, False
        self.first = before.first if before else self
        self.turns: int = before.turns + 1 if before else 0
        self.is_late, self.socket = False, None

    socket: socket.socket | None

    @property
    def uses_proxy(self) -> bool:
        """Whether it goes to a proxy, which looks the address up."""
        return self.host != urlsplit(self.full_url).netloc

    def opened(self, connection: socket.socket) -> None:
        """Note what `stop` is to close."""
        self.first.socket = connection
        if self.first.is_late:
            self.stop()

    def stop(self) -> None:
        """End the request from another thread."""
        self.first.is_late = True
        if self.first.socket is not None:
            with suppress(OSError):
                self.first.socket.shutdown(socket.SHUT_RDWR)


class _CheckedConnection(HTTPConnection):
    """A connection to an address that was checked."""

    def __init__(self, asked: _Request, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._asked = asked

    def connect(self) -> None:
        if self._asked.uses_proxy:
            super().connect()
        else:
            self.sock = _connected(self._asked, self.host, self.port, self.timeout)
        self._asked.opened(self.sock)


class _CheckedTLSConnection(HTTPSConnection, _CheckedConnection):
    """The same with TLS, which is put around the connection."""


def _connected(asked: _Request, host: str, port: int, timeout: float | None) -> socket.socket:
    """Return a connection to one of a host's addresses.

    Raises:
        FormatError: one is of the local network, where that is not allowed.
        OSError: none answers.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    asked.is_local = not all(map(is_public, addresses))
    if asked.is_local and asked.public_only:
        raise FormatError("leads into the local network, where no picture is fetched from")
    failed: OSError = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout)
        except OSError as error:
            failed = error
    raise failed


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return (mapped or found).is_global and not found.is_multicast


class _Connecting(web.HTTPHandler):
    def http_open(self, req: Any) -> HTTPResponse:
        return self.do_open(partial(_CheckedConnection, req), req)  # pyright: ignore[reportArgumentType] # it is only called


class _ConnectingTLS(web.HTTPSHandler):
    def https_open(self, req: Any) -> HTTPResponse:
        made = partial(_CheckedTLSConnection, req, context=_certificates())
        return self.do_open(made, req)  # pyright: ignore[reportArgumentType] # it is only called


class _Redirecting(web.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> _Request:
        if (elsewhere := urlsplit(newurl).scheme.lower() not in SCHEMES) or req.turns >= MOST_REDIRECTIONS:
            fp.close()
            raise FormatError(f"is redirected {'to where a picture may not be' if elsewhere else 'too often'}")
        return _Request(newurl, req.public_only or not req.is_local, req)


def _opener(public_only: bool) -> web.OpenerDirector:
    """Return what opens addresses of http and https, and no others."""
    proxies = web.ProxyHandler({} if public_only else None)
    handlers: Sequence[Any] = (
        proxies, _Connecting(), _ConnectingTLS(), _Redirecting(), web.HTTPDefaultErrorHandler(), web.HTTPErrorProcessor(),
    )  # fmt: skip
    opener = web.OpenerDirector()
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _certificates() -> ssl.SSLContext:
    """Return whom to trust: those whom the system trusts, and Mozilla's list, because Python on a Mac may have none."""
    import certifi  # comes with the hub's client

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


# For a server's clients


def downloaded(urls: Sequence[str], most_bytes: int = MOST_BYTES, seconds: float = WHOLE_S) -> list[bytes]:
    """Return the pictures at some public addresses, which nothing keeps.

    Args:
        urls: in order.
        most_bytes: of all of them.
        seconds: for all of them.

    Raises:
        FormatError: one cannot be downloaded.
    """
    found: list[bytes] = []
    end = time.monotonic() + seconds
    for url in urls:
        left = end - time.monotonic()
        if left <= 0:
            raise NoAnswer(f"was not there after {seconds:.0f} s")
        found.append(download(url, True, most_bytes - sum(map(len, found)), left))
    return found
