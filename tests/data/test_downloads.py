"""Pictures on the web: downloaded once with --fetch-images, refused without it, and whatever a server does is one line."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from picture_server import picture_server, png
from PIL import Image
from refusing import refuses
from run_cli import run
from tiny_vision import write_model_here
from vision_rows import picture

from mlx_lora.data import downloads
from mlx_lora.data.downloads import ImageDownloads, download, is_public
from mlx_lora.data.examples import FormatError
from mlx_lora.data.images import ImageFiles


@pytest.fixture(scope="module")
def server():
    with picture_server() as found:
        yield found


@pytest.fixture
def web(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for told in (server.asked, server.hosts, server.keys):
        told.clear()
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("name", ["0.png", "turned", "a b", "0.png?size=2#part"])
def test_a_picture_is_that_of_the_server(web, name):
    assert download(web + name) == png()


# The words are what tells one failure from another.
FAILURES = {
    "none": "404", "claims": "MiB", "endless": "MiB", "short": "end is missing", "silent": "does not answer", "drip": "not there after",
    "to-file": "redirected", "to-ftp": "redirected", "to-data": "redirected", "loop": "too often",
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_server_does_wrong_is_one_line(web, name, monkeypatch):
    if name == "silent":
        monkeypatch.setattr(downloads, "ANSWER_S", 0.2)
    refuses(FAILURES[name], download, web + name, most_bytes=1 << 20, seconds=1.0, kind=FormatError)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://127.0.0.1:99999/a", "http://127.0.0.1:1/a", "file:///etc/passwd",
                                 "ftp://127.0.0.1/a", "http://no.such.host.invalid/a.png", "http://127.0.0.1\r\nHost: a/b"])  # fmt: skip
def test_an_address_that_leads_nowhere_is_one_line(web, url):
    with pytest.raises(FormatError) as refused:
        download(url, seconds=5.0)
    assert "\n" not in str(refused.value)


# An IPv6 address that has an IPv4 address inside may be one of the local network, behind a gateway.
PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:80b::200e", "2620:fe::fe"]
LOCAL = [
    "127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3",
    "192.0.0.1", "198.18.0.1", "240.0.0.1", "255.255.255.255", "224.0.0.1", "239.255.255.250", "::", "::1", "fe80::1", "fe80::1%eth0",
    "fec0::1", "feff::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "2001:db8::1", "100::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
    "::ffff:0:7f00:1", "::127.0.0.1", "::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b:1::10.0.0.1", "2002:7f00:1::",
    "2002:808:808::1", "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2606:4700::5efe:127.0.0.1", "2606:4700::200:5efe:10.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC + LOCAL)
def test_addresses_of_the_local_network_are_known(address):
    assert is_public(address) == (address in PUBLIC)


# Servers that are named by more than a name or an address.
ESCAPED = [
    # escapes
    "http://%31%32%37.0.0.1:PORT/0.png", "http://%6cocalhost:PORT/0.png", "http://%6Cocalhost:PORT/0.png", "http://%256cocalhost:PORT/0.png",
    "http://127%2e0%2E0.1:PORT/0.png", "http://127.0.0.1%3aPORT/0.png", "http://127.0.0.1%2f@public.example:PORT/0.png",
    "http://public.example%00.127.0.0.1:PORT/0.png", "http://127.0.0.1%00:PORT/0.png", "http://127.0.0.1%09:PORT/0.png",
    "http://%5b::1%5d:PORT/0.png", "http://public.example%23@127.0.0.1:PORT/0.png", "http://%e3%80%82:PORT/0.png", "http://%:PORT/0.png",
    "http%3a//127.0.0.1:PORT/0.png", "//%31%32%37.0.0.1:PORT/0.png", "http://%2531%2532%2537.0.0.1:PORT/0.png",
    # users, backslashes, blanks and control characters
    "http://public.example@127.0.0.1:PORT/0.png", "http://public.example:80@127.0.0.1:PORT/0.png", "http://a:b@localhost:PORT/0.png",
    "http://@127.0.0.1:PORT/0.png", "http://:@127.0.0.1:PORT/0.png", "http://a@b@127.0.0.1:PORT/0.png", "http://127.0.0.1:PORT\\@public.example/0.png",
    "http://public.example\\@127.0.0.1:PORT/0.png", "http:\\\\127.0.0.1:PORT\\0.png", "\\\\127.0.0.1:PORT\\0.png", "/\\127.0.0.1:PORT/0.png",
    "http://127.0.0.1\t:PORT/0.png", "ht\ttp://127.0.0.1:PORT/0.png", "http://127.0.0.1\n:PORT/0.png", "http://127.0.0.1\r\n\r\n:PORT/0.png",
    "\x01http://127.0.0.1:PORT/0.png", "http://127.0.0.1 :PORT/0.png", "http:// 127.0.0.1:PORT/0.png", "http://127.0.0.1\x7f:PORT/0.png",
    "http://public.example 127.0.0.1:PORT/0.png",
]  # fmt: skip
# Where a public server redirects to. PORT is that of a server of this machine, and every name leads to this machine.
REDIRECTIONS = [
    *ESCAPED,
    # the address, written in every way
    "http://127.0.0.1:PORT/0.png", "http://127.1:PORT/0.png", "http://127.0.1:PORT/0.png", "http://2130706433:PORT/0.png",
    "http://0x7f000001:PORT/0.png", "http://0X7F.0.0.1:PORT/0.png", "http://017700000001:PORT/0.png", "http://0177.0.0.01:PORT/0.png",
    "http://0x7f.1:PORT/0.png", "http://0:PORT/0.png", "http://0.0.0.0:PORT/0.png", "http://00000177.0.0.1:PORT/0.png",
    "http://127.0.0.1.:PORT/0.png", "http://127.0.0.1..:PORT/0.png", "http://127.000.000.001:PORT/0.png", "http://127.9.9.9:PORT/0.png",
    "http://[::1]:PORT/0.png", "http://[0:0:0:0:0:0:0:1]:PORT/0.png", "http://[::]:PORT/0.png", "http://[::ffff:127.0.0.1]:PORT/0.png",
    "http://[::ffff:7f00:1]:PORT/0.png", "http://[::127.0.0.1]:PORT/0.png", "http://[64:ff9b::7f00:1]:PORT/0.png", "http://[::1%25lo]:PORT/0.png",
    "http://[::1%lo]:PORT/0.png", "http://[fe80::1%25lo]:PORT/0.png", "http://[2002:7f00:1::]:PORT/0.png", "http://[fec0::1]:PORT/0.png",
    "http://[v1.1]:PORT/0.png", "http://[127.0.0.1]:PORT/0.png", "http://[::1:PORT/0.png", "http://::1:PORT/0.png", "http://::1]:PORT/0.png",
    # names
    "http://localhost:PORT/0.png", "http://LOCALHOST:PORT/0.png", "http://localhost.:PORT/0.png", "http://localhost.localdomain:PORT/0.png",
    "http://ip6-localhost:PORT/0.png", "http://a.localhost:PORT/0.png", "http://127.0.0.1.nip.io:PORT/0.png", "http://both.example:PORT/0.png",
    "http://both.example.:PORT/0.png", "http://-localhost:PORT/0.png", "http://_.example:PORT/0.png",
    # letters that stand for others
    "http://127。0。0。1:PORT/0.png", "http://127.0.0．1:PORT/0.png", "http://①②⑦.⓪.⓪.①:PORT/0.png", "http://１２７.0.0.1:PORT/0.png",
    "http://ⓛocalhost:PORT/0.png", "http://LocalHoſt:PORT/0.png", "http://١٢٧.0.0.1:PORT/0.png", "http://127.0.0.1：PORT/0.png",
    "http://127.0.0.1\u00ad:PORT/0.png", "http://127.0.0.1\u200b:PORT/0.png", "http://localhost\u2024:PORT/0.png",
    "http://127.0.0.1:PORT#@public.example/0.png", "http://127.0.0.1:PORT?@public.example/0.png",
    # relative ones, other schemes, and chains
    "//127.0.0.1:PORT/0.png", "//localhost:PORT/0.png", "///127.0.0.1:PORT/0.png", "////127.0.0.1:PORT/0.png", "http:///127.0.0.1:PORT/0.png",
    "http:127.0.0.1:PORT/0.png", "http:/127.0.0.1:PORT/0.png", "HTTP://127.0.0.1:PORT/0.png", "https://127.0.0.1:PORT/0.png",
    "HtTpS://localhost:PORT/0.png", "ftp://127.0.0.1:PORT/0.png", "file://127.0.0.1:PORT/0.png", "gopher://127.0.0.1:PORT/0.png",
    "ws://127.0.0.1:PORT/", "dict://127.0.0.1:PORT/", "unix:/run/x", "data:image/png;base64,AAAA", "javascript:1", "http://", "http:", "://",
    "http://127.0.0.1:0PORT/0.png", "http://127.0.0.1:+PORT/0.png", "http://127.0.0.1:１/0.png", "http://127.0.0.1:99999999/0.png",
    "http://127.0.0.1:PORT:80/0.png", "http://public.example/to?HEX", "http://public.example/loop",
]  # fmt: skip


@pytest.fixture
def world(web, server, monkeypatch):
    """Return what is connected to, where one name is a public server's, which `server` plays, and all others are this machine's."""
    connected, look_up, connect = [], socket.getaddrinfo, socket.create_connection

    def addresses(host, port, *args, **kwargs):
        names = {"public.example": PUBLIC[:1], "both.example": [PUBLIC[1], "127.0.0.1"]}
        try:
            found = look_up(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = [(2, 1, 6, "", (name, port)) for name in names.get(host.rstrip("."), ["127.0.0.1"])]
        return found

    def connection(address, *args, **kwargs):
        connected.append(address[0])
        return connect(server.server_address if address[0] in PUBLIC else address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(socket, "create_connection", connection)
    return connected


@pytest.fixture
def silent():
    """Return a server of this machine that says nothing, and the function that tells whether it was connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        def was_asked():
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield listening.getsockname()[1], was_asked


@pytest.mark.parametrize("where", REDIRECTIONS)
def test_a_public_server_may_not_lead_into_the_local_network(world, silent, where):
    port, was_asked = silent
    where = where.replace("PORT", str(port)).replace("HEX", f"http://127.0.0.1:{port}/0.png".encode().hex())
    with pytest.raises(FormatError) as refused:
        download(f"http://public.example/to?{where.encode().hex()}", seconds=5.0)
    assert "\n" not in str(refused.value)
    assert set(world) == {PUBLIC[0]}
    assert not was_asked()


@pytest.mark.parametrize("url", ESCAPED)
def test_a_servers_name_is_never_escaped(world, silent, url):
    with pytest.raises(FormatError, match="no web address"):
        download(url.replace("PORT", str(silent[0])), seconds=5.0)
    assert not world


def test_a_public_server_may_redirect_to_another(world, server):
    for where in ("//public.example/a b", "/0.png?size=2", "HTTP://Public.Example.:80/0.png#a"):
        assert download(f"http://public.example/to?{where.encode().hex()}") == png()
    refuses("404", download, f"http://public.example/to?{'http://public.example:/é'.encode().hex()}", kind=FormatError)
    assert server.asked[-1] == "%C3%A9"
    assert set(world) == {PUBLIC[0]}


def test_a_local_server_may_redirect_anywhere_until_a_public_one_was_asked(world, web):
    there = f"http://public.example/to?{(web + '0.png').encode().hex()}"
    assert download(f"{web}to?{(web + '0.png').encode().hex()}") == png()
    assert download(f"{web}to?{b'http://public.example/0.png'.hex()}") == png()
    refuses("local network", download, f"{web}to?{there.encode().hex()}", kind=FormatError)


def test_a_proxy_is_asked_for_the_first_address_and_for_no_redirection(world, web, server, silent, monkeypatch):
    monkeypatch.setenv("http_proxy", web.replace("://", "://me:a%20b@"))
    monkeypatch.setenv("https_proxy", web)
    assert download("http://one.example:8000/0.png?size=2") == png()
    assert server.hosts == ["one.example:8000"]
    assert server.keys == ["Basic bWU6YSBi"]
    refuses("403", download, "https://one.example/0.png", kind=FormatError)
    assert server.hosts[1:] == ["one.example:443"]
    for where in (f"http://localhost:{silent[0]}/", f"http://both.example:{silent[0]}/", "http://%6cocalhost/0.png"):
        refuses("redirected", download, f"http://one.example/to?{where.encode().hex()}", kind=FormatError)
    assert server.hosts[2:] == ["one.example"] * 3
    assert download(f"http://one.example/to?{b'http://public.example/0.png'.hex()}") == png()
    assert world[-1] == PUBLIC[0]
    monkeypatch.setenv("no_proxy", "public.example")
    assert download("http://public.example/0.png") == png()
    assert world[-1] == PUBLIC[0]


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """Return a server with TLS, and the context that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=DNS:localhost", "-keyout", key, "-out", file]  # fmt: skip
    if shutil.which("openssl") is None or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("openssl makes no certificate here")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(file, key)
    with picture_server() as server:
        server.socket = ours.wrap_socket(server.socket, server_side=True)
        yield server, ssl.create_default_context(cafile=str(file))


def test_tls_names_the_server_and_its_certificate_counts(secure, web, monkeypatch):
    server, trusted = secure
    port = server.server_address[1]
    refuses("certificate", download, f"https://localhost:{port}/0.png", kind=FormatError)
    monkeypatch.setattr(downloads, "_certificates", lambda: trusted)
    assert download(f"https://localhost:{port}/turned") == png()
    assert server.hosts[-1] == f"localhost:{port}"
    refuses("certificate", download, f"https://127.0.0.1:{port}/0.png", kind=FormatError)
    begun = time.monotonic()
    refuses("not there after", download, f"https://localhost:{port}/drip", seconds=1.0, kind=FormatError)
    assert time.monotonic() - begun < 8, "the server goes on for hours"


def test_a_picture_is_downloaded_once(web, server):
    files = ImageFiles([])
    refuses("--fetch-images", files.open, web + "0.png", kind=FormatError)
    for _ in range(2):
        files.downloads = ImageDownloads()
        files.downloads.fetch_all([web + "0.png", web + "0.png", web + "none"])
        found = files.open(web + "0.png")
        assert found.size == picture(0).size
        assert found.pixels().tobytes() == picture(0).tobytes()
        refuses("404", files.open, web + "none", kind=FormatError)
    assert sorted(server.asked) == ["0.png", "none", "none"]


def test_what_is_no_picture_is_not_kept(web, server):
    for _ in range(2):
        files = ImageFiles([])
        files.downloads = ImageDownloads()
        for _ in range(2):
            refuses("none of PNG", files.open, web + "page", kind=FormatError)
    assert server.asked == ["page", "page"]


def test_a_silent_server_is_asked_three_times(web, server, monkeypatch):
    monkeypatch.setattr(downloads, "ANSWER_S", 0.2)
    kept = ImageDownloads()
    for number in range(5):
        refuses("answer", kept.file, f"{web}silent?{number}", kind=FormatError)
    assert server.asked == ["silent"] * downloads.MOST_SILENT


def test_the_cache_is_bounded(web, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_DISK_BYTES", len(png(0)) + len(png(1)))
    kept = ImageDownloads()
    assert kept.file(web + "0.png").read_bytes() == png(0)
    assert kept.file(web + "1.png").is_file()
    for one in (kept, ImageDownloads()):
        refuses("limit", one.file, web + "2.png", kind=FormatError)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("mlx_vlm")
    return write_model_here("llava", tmp_path_factory.mktemp("model") / "llava")


def rows_of(web: str, folder: Path) -> Path:
    names = [web + "0.png", web + "none", "local.png", web + "to-file", web + "1.png"]
    Image.new("RGB", (20, 20)).save(folder / "local.png")
    rows = []
    for name in names:
        parts = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "What?"}]
        rows.append(
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"It is {len(name)}."}]}
        )
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_a_run_fetches_pictures_only_with_the_flag(web, server, model, tmp_path):
    data = rows_of(web, tmp_path)
    asked = ("train", "--model", model, "--data", data, "--iters", 1, "--batch-size", 1, "--kernels",
             "mlx", "--valid-fraction", 0)  # fmt: skip
    plain = run(*asked, "--adapter-path", tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert "--fetch-images" in plain.err
    assert "1 picture" in plain.err
    assert not server.asked
    fetched = run(*asked, "--adapter-path", tmp_path / "fetched", "--fetch-images")
    assert fetched.code == 0, fetched.err
    assert "3 pictures" in fetched.err
    assert "train.jsonl line 2" in fetched.err
    assert "404" in fetched.err
    assert sorted(server.asked) == ["0.png", "1.png", "none", "to-file"]
    server.asked.clear()
    measured = run("evaluate", "--model", model, "--data", data, "--fetch-images", "--json")
    assert measured.code == 0, measured.err
    assert "0.png" not in server.asked
