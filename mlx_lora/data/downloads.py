"""Download pictures that data name by a web address, each once.

    <cache>/downloads/<SHA-256 of the address>     the file as it came

What comes is checked like any other picture (data/images.py), whatever its server calls it. Data can be anybody's, so an address
may lead to an http or https server only, also after it was redirected, and a public server may not redirect to one in the local
network. The addresses that a name stands for are looked up once and checked, and these are connected to, so that a second look-up
cannot give another one. A proxy looks names up itself, so only the first address is asked of it, and no redirection.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import ssl
import string
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

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
UNICAST = ipaddress.ip_network("2000::/3")  # the part of IPv6 that the internet has
MOVED = (301, 302, 303, 307, 308)
SERVER = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]*)?", re.IGNORECASE)  # a name or an address, and a port


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
        server = "/".join(url.split("/", 3)[:3])
        if self._silent[server] >= MOST_SILENT:
            self._refused[url] = f"its server did not answer {MOST_SILENT} times"
            return
        try:
            self._keep(_file_of(url), download(url))
        except FormatError as error:
            self._silent[server] += isinstance(error, NoAnswer)
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


# One download


class NoAnswer(FormatError):
    """A server cannot be reached, or says nothing."""


def download(url: str, most_bytes: int = MOST_BYTES, seconds: float = WHOLE_S, body: bytes | None = None) -> bytes:
    """Return the file at a web address.

    Args:
        url: http or https.
        most_bytes: of the file.
        seconds: until it is there.
        body: JSON that is sent to the address, whose server may think until then; None: nothing is sent.

    Raises:
        FormatError: it cannot be downloaded; the message is the reason.
    """
    way = _Way(seconds if body else min(ANSWER_S, seconds), body)
    late = threading.Timer(seconds, way.stop)  # a server that sends a byte now and then
    late.daemon = True
    late.start()
    try:
        for turn in range(MOST_REDIRECTIONS + 1):
            try:
                parts = _parsed(url)
            except ValueError as error:
                what = "is redirected to where a picture may not be" if turn else "is no web address"
                raise FormatError(f"{what} ({first_line(error)})") from error
            with way.reply(parts) as reply:
                moved = reply.headers.get("Location") if reply.status in MOVED else None
                if moved is None or body:
                    return _content(reply, most_bytes, way)
            # A header has bytes, which http.client reads as Latin-1.
            url = urljoin(parts.geturl(), quote(moved, safe=string.punctuation, encoding="latin-1"))
        raise FormatError("is redirected too often")
    except FormatError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        if way.is_late:
            raise NoAnswer(f"was not there after {seconds:.0f} s") from error
        if isinstance(error, TimeoutError):
            raise NoAnswer("its server does not answer") from error
        raise NoAnswer(f"cannot be downloaded ({getattr(error, 'strerror', None) or first_line(error)})") from error
    finally:
        late.cancel()


def _parsed(url: str) -> SplitResult:
    """Return the parts of an address, in the letters in which it is sent.

    Raises:
        ValueError: it has no http or https server, or names it in another way than by a name or an IP address.
    """
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise ValueError("it has control characters")
    parts = urlsplit(url)
    server = parts.netloc.encode("idna").decode("ascii")
    if parts.scheme not in SCHEMES or not SERVER.fullmatch(server):
        raise ValueError("it does not begin with http or https and the name of a server")
    path, query = (quote(part, safe="%/:?@!$&'()*+,;=~[]") for part in (parts.path or "/", parts.query))
    return parts._replace(netloc=server, path=path, query=query, fragment="")


def _content(reply: HTTPResponse, most_bytes: int, way: _Way) -> bytes:
    if not 200 <= reply.status < 300:
        raise FormatError(f"its server says {reply.status} {reply.reason}")
    parts, size = [], 0
    said = reply.headers.get("Content-Length", "")
    if said.isdecimal() and int(said) > most_bytes:
        raise FormatError(f"has {int(said) / (1 << 20):,.0f} MiB, more than {most_bytes >> 20}")
    while part := reply.read1(PART_BYTES):
        size += len(part)
        if size > most_bytes:
            raise FormatError(f"has more than {most_bytes >> 20} MiB")
        parts.append(part)
    if way.is_late or (said.isdecimal() and size != int(said)):
        raise OSError("its end is missing")
    return b"".join(parts)


class _Way:
    """The way to a picture, over all redirections.

    Attributes:
        public_only: whether only public servers may follow, because one was asked, or a proxy.
        is_late: whether it was stopped.
    """

    def __init__(self, answer_s: float, body: bytes | None):
        self.public_only = self.is_late = False
        self._answer_s, self._body = answer_s, body
        self._socket: socket.socket | None = None

    @contextmanager
    def reply(self, parts: SplitResult) -> Iterator[HTTPResponse]:
        """Ask a server, or a proxy for it, and yield what it says.

        Raises:
            FormatError: the server is in the local network, where that is not allowed.
            OSError, HTTPException: it does not answer.
        """
        host, path = str(parts.hostname), f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"User-Agent": AGENT, "Accept": "image/*", "Connection": "close"}
        proxy = None if self.public_only or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
        asked = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else parts
        if "https" in (parts.scheme, asked.scheme):
            connection = HTTPSConnection(
                str(asked.hostname), asked.port, timeout=self._answer_s, context=_certificates()
            )
        else:
            connection = HTTPConnection(str(asked.hostname), asked.port, timeout=self._answer_s)
        with closing(connection):
            if proxy:
                self.public_only = True
                name = f"{unquote(asked.username or '')}:{unquote(asked.password or '')}".encode()
                known = {"Proxy-Authorization": f"Basic {b64encode(name).decode()}"} if asked.username else {}
                if parts.scheme == "https":
                    connection.set_tunnel(host, parts.port or 443, known)
                else:
                    path, headers = parts.geturl(), headers | known
                connection.connect()
            else:
                connection.sock = self._connected(host, connection.port)
                if parts.scheme == "https":
                    connection.sock = _certificates().wrap_socket(connection.sock, server_hostname=host)
            self._socket = connection.sock
            if self.is_late:
                raise TimeoutError
            sent = {"Content-Type": "application/json"} if self._body else {}
            connection.request("POST" if self._body else "GET", path, self._body, headers | sent)
            with connection.getresponse() as reply:
                yield reply

    def _connected(self, host: str, port: int) -> socket.socket:
        """Return a connection to one of a host's addresses."""
        addresses = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if self.public_only and not all(map(is_public, addresses)):
            raise FormatError("is redirected into the local network, where no picture is fetched from")
        failed = OSError("no address")
        for address in addresses:
            try:
                found = socket.create_connection((address, port), self._answer_s)
            except OSError as error:
                failed = error
            else:
                self.public_only = self.public_only or is_public(address)
                return found
        raise failed

    def stop(self) -> None:
        """End it from another thread."""
        self.is_late = True
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of TLS, too, what is below it


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet.

    One with an IPv4 address inside is none, because a gateway may unpack it.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.teredo or found.sixtofour or (int(found) >> 32) & 0xFDFFFFFF == 0x5EFE  # the last: ISATAP
        return found in UNICAST and found.is_global and not inside
    return found.is_global and not found.is_multicast


@cache
def _certificates() -> ssl.SSLContext:
    """Return whom to trust: those whom the system trusts, and Mozilla's list, because Python on a Mac may have none."""
    import certifi  # comes with the hub's client

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
