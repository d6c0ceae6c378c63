"""What each kind of unwelcome request gets: the table of docs/serving-reference.md, and more."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from make_adapters import make_adapter
from serving_process import Server
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_lora.utils.guard import Guard, GuardLimits, error_response, not_here

KEY = "correct horse"
GOOD = {"model": "bard", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters") / "offered"
    make_adapter(tiny_folder, root / "bard")
    outside = make_adapter(tiny_folder, root.parent / "outside")
    os.symlink(outside, root / "link")
    return root


@pytest.fixture(scope="module")
def server(tiny_folder, adapters, tmp_path_factory):
    arguments = ("--model", tiny_folder, "--adapter", f"bard={adapters / 'bard'}", "--adapters-from", adapters)
    limits = (
        "--max-body",
        "4KB",
        "--read-timeout",
        1,
        "--request-timeout",
        20,
        "--allow-origin",
        "https://friend.example",
    )
    limits += ("--max-batch", 2, "--max-waiting", 1, "--max-tokens", 10**6, "--max-context", 10**7)
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(*arguments, *limits, log=log, environment={"MLX_LORA_API_KEY": KEY}) as server:
        yield server


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.long
def test_a_wrong_or_missing_key_gets_401(http, server):
    assert http.post("/v1/completions", json=GOOD).status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": "Bearer " + KEY * 9},
    ):
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/nothing"):
            answer = httpx.get(server.url + path, headers=headers)
            assert code(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}, "open, and says no more than that"


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", "a\\b", "", "x" * 65, "a\0b", "né", 7, None]
)
def test_an_adapters_name_is_no_path(http, name):
    assert code(http.post("/v1/adapters", json={"name": name, "path": "bard"})) == (400, "invalid_value")
    if isinstance(name, str) and name:
        assert http.post("/v1/completions", json={**GOOD, "model": name}).status_code == 404
        from urllib.parse import quote

        assert http.delete(f"/v1/adapters/{quote(name, safe='')}").status_code in (404, 405)


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", ".", "bard/..", "bard/../../outside"])
def test_a_path_outside_the_offered_folder_gets_403(http, path):
    assert code(http.post("/v1/adapters", json={"name": "x", "path": path})) == (403, "path_outside")


def test_other_paths_that_lead_nowhere(http):
    assert code(http.post("/v1/adapters", json={"name": "x", "path": "none"})) == (404, "not_found")
    assert code(http.post("/v1/adapters", json={"name": "x", "path": "a\0b"})) == (400, "invalid_value")
    assert code(http.post("/v1/adapters", json={"name": "x", "hub": "owner/name"})) == (403, "hub_off")


@pytest.mark.long
def test_without_an_offered_folder_nothing_on_disk_can_be_loaded(tiny_folder, adapters, tmp_path):
    with Server("--model", tiny_folder, log=tmp_path / "log") as server:
        answer = httpx.post(f"{server.url}/v1/adapters", json={"name": "x", "path": str(adapters / "bard")})
        assert code(answer) == (403, "path_off")
        rebound = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
        assert code(rebound) == (403, "wrong_host"), "a name that was pointed at this machine"
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": f"localhost:{server.port}"}).status_code == 200


def test_an_oversize_body_gets_413_declared_or_not(http):
    large = json.dumps({**GOOD, "prompt": "x" * 5000}).encode()
    headers = {"Content-Type": "application/json"}
    assert code(http.post("/v1/completions", content=large, headers=headers)) == (413, "body_too_large")
    chunks = iter([large[:3000], large[3000:]])
    assert code(http.post("/v1/completions", content=chunks, headers=headers)) == (413, "body_too_large")


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 4000, b'{"prompt": "\\ud800"}',
    b'{"prompt": {"a": 1}}', b'{"prompt": "x", "max_tokens": 1e400}', b'{"prompt": "x", "max_tokens": true}',
    b'{"prompt": "x", "seed": 99999999999999999999999}', b'{"prompt": [-1]}', b'{"prompt": [1.5]}',
    b'{"prompt": ["a", "b"]}', b'{"messages": [{"role": "user"}]}',
])  # fmt: skip
def test_malformed_bodies_get_400(http, body):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/adapters"):
        assert http.post(path, content=body, headers=headers).status_code == 400


def test_other_pages_get_403_and_friends_are_let_in(http):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert code(http.post("/v1/completions", json=GOOD, headers={"Origin": origin})) == (403, "cross_origin")
    image = http.get("/v1/models", headers={"Sec-Fetch-Site": "cross-site"})
    assert code(image) == (403, "cross_origin")
    form = http.post("/v1/completions", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert code(form) == (415, "unsupported_media_type"), "what a page can send without asking"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    evil = http.options("/v1/completions", headers={**preflight, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in evil.headers
    friend = http.options("/v1/completions", headers={**preflight, "Origin": "https://friend.example"})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    assert http.post("/v1/completions", json=GOOD, headers={"Origin": "https://friend.example"}).status_code == 200
    own = str(http.base_url).rstrip("/")
    assert http.post("/v1/completions", json=GOOD, headers={"Origin": own}).status_code == 200


STRANGE = [
    b"[::1", b"::1]", b"[", b"]", b"[]", b"[::1]]", b"[[::1]]", b"[::1]x", b"[::1%lo]", b"[127.0.0.1]", b"[v1.x]", b"[::ffff:127.0.0.1",
    b"http://[::1", b"https://[", b"http://[::1]x", b"http://]", b"//[", b"http:[::1", b"a@[::1", b"localhost@[", b"localhost/[", b"localhost#[",
    b"localhost?[", b"evil.example@localhost", b"localhost\\@evil.example", b"localhost/../evil", b"localhost localhost", b"localhost,evil.example",
    b"localhost:a", b"localhost:80:80", b"localhost:\xb2", b"\xb9\xb2\xb7.0.0.1", b"\xff", b"\x00", b"\x7f", b"a\tb", b"%6cocalhost",
    b"%5b::1%5d", b"127.1", b"2130706433", b"0x7f.1", b"..", b"x" * 5000, b"[" * 5000, b"9" * 5000, b"bytes=[", b"null, null", b"Bearer [",
    b"\xe2\x84\x80", b"http://\xe2\x84\x80.example", b"http://a\xbf@b", b"1e400", b"-1", b"\xb2", b";", b"application/json;[=\xff",
]  # fmt: skip
PARSED = ("host", "origin", "authorization", "x-api-key", "content-length", "content-type", "sec-fetch-site", "sec-fetch-dest", "range",
          "if-range", "if-modified-since", "if-none-match", "accept", "accept-encoding", "cookie", "referer", "forwarded", "expect",
          "x-forwarded-host", "access-control-request-method", "access-control-request-headers")  # fmt: skip


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", PARSED)
def test_a_strange_header_opens_and_breaks_nothing(name, local):
    """The guard and the errors of all servers, around a route that says where it was reached."""

    async def reached(request):
        return PlainTextResponse(f"{request.url} {request.url.netloc}")

    async def missing(request, error):
        return error_response(not_here(request, error))

    folder = Mount("/static", StaticFiles(directory=Path(__file__).parent))
    limits = GuardLimits(KEY, local, ("https://friend.example",), open_folder="/static/", key_header="x-api-key")
    app = Starlette(
        routes=[Route("/here", reached, methods=["GET", "POST"]), Route("/health", reached), folder],
        middleware=[
            Middleware(CORSMiddleware, allow_origins=limits.origins),
            Middleware(Guard, limits=limits, answers=Counter()),
        ],
        exception_handlers={HTTPException: missing},
    )

    async def status(method, path, headers):
        sent, coming = [], [{"type": "http.request", "body": b""}]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
                 "headers": [(key.encode(), value) for key, value in headers.items()], "server": ("127.0.0.1", 80)}  # fmt: skip

        async def receive():
            return coming.pop() if coming else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    async def all_of_them():
        json_type = {"host": b"localhost", "content-type": b"application/json"}
        with_key = {**json_type, "authorization": f"Bearer {KEY}".encode()}
        assert await status("POST", "/here", with_key) == 200
        for value in STRANGE:
            strange = {name: value}
            assert await status("GET", f"/static/{Path(__file__).name}", json_type | strange) < 500
            for method in ("GET", "POST", "OPTIONS"):
                assert await status(method, "/here", json_type | strange) in (400, 401, 403, 405, 413, 415)
                for path in ("/here", "/health", "/nothing"):
                    assert await status(method, path, with_key | strange) < 500
            if name == "origin" or (name == "host" and local):
                assert await status("POST", "/here", with_key | strange) == 403

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "headers", [{"Host": "[::1"}, {"Host": "::1]"}, {"Origin": "http://[::1"}, {"Origin": "http://["}]
)
def test_a_broken_host_or_origin_gets_403(server, headers):
    for path in ("/", "/health", "/v1/models", "/nothing"):
        assert code(httpx.get(server.url + path, headers=headers))[0] == 403


def test_the_page_needs_no_key_and_is_the_servers_own_alone(http, server, tiny_folder, adapters, tmp_path):
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert httpx.head(server.url + "/").status_code == 200
    assert KEY not in page.text
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert code(httpx.get(server.url + "/", headers=headers)) == (403, "cross_origin")
    for kind in ("empty", "image", "script", "iframe", "object"):
        other = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": kind}
        assert code(httpx.get(server.url + "/", headers=other)) == (403, "cross_origin"), kind
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(server.url + "/", headers=link).status_code == 200, "a link may lead to it"
    assert code(http.get("/v1/models", headers=link)) == (403, "cross_origin"), "and to nothing else"
    assert httpx.post(server.url + "/", json={}).status_code == 405
    with Server("--model", tiny_folder, log=tmp_path / "log") as local:
        assert code(httpx.get(local.url + "/", headers={"Host": "evil.example"})) == (403, "wrong_host")
    # What the page itself sends.
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "empty"}
    assert http.post("/v1/completions", json=GOOD, headers=own).status_code == 200
    assert http.get("/v1/models", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_the_pages_policy_lets_its_own_script_and_style_run_and_nothing_else(server):
    page = httpx.get(server.url + "/")
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert rules[name] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    inside = Inside()
    inside.feed(page.text)
    assert inside.attributes.keys().isdisjoint({"src", "srcset", "style", "action", "onclick", "onload"})
    assert inside.attributes["href"] == ["data:,"]
    for tag in ("script", "style"):
        (text,) = inside.texts[tag]
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


class Inside(HTMLParser):
    """Collects what scripts and styles a page has, and its attributes."""

    def __init__(self):
        super().__init__()
        self.texts, self.attributes, self._open = {"script": [], "style": []}, {}, None

    def handle_starttag(self, tag, attrs):
        self._open = tag
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)

    def handle_data(self, data):
        if self._open in self.texts:
            self.texts[self._open].append(data)

    def handle_endtag(self, tag):
        self._open = None


def test_a_template_that_makes_something_huge_gets_400(tmp_path, tiny_folder):
    bomb = make_adapter(tiny_folder, tmp_path / "bomb", chat_template="{{ 'a' * 10**10 }}")
    ask = {"model": "bomb", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    with Server("--model", tiny_folder, "--adapter", f"bomb={bomb}", log=tmp_path / "log") as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask, timeout=60)
        assert code(answer) == (400, "template")
        assert "the chat template takes more than" in answer.text


def received(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.long
def test_a_slow_head_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        start = time.monotonic()
        for byte in b"POST /v1/compl":
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        assert received(connection) == b""
        assert time.monotonic() - start < 8
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        assert received(connection) == b"", "a connection that says nothing"


def test_a_slow_body_gets_408(server):
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode())
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


@pytest.mark.slow
def test_a_full_queue_gets_429_and_a_client_that_does_not_read_is_cut_off(http, server):
    endless = json.dumps({"prompt": "x", "max_tokens": 10**6, "ignore_eos": True, "stream": True})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(endless)}\r\n\r\n{endless}"
    )
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for connection in connections:
        connection.sendall(head.encode())
    for _ in range(100):
        answer = http.post("/v1/completions", json=GOOD)
        if answer.status_code == 429:
            break
        time.sleep(0.02)
    assert code(answer) == (429, "queue_full")
    assert answer.headers["retry-after"] == "1"
    # Nobody reads; after --request-timeout the places are free all the same.
    deadline = time.monotonic() + 40
    while http.post("/v1/completions", json=GOOD).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert http.post("/v1/completions", json=GOOD).status_code == 200
    for connection in connections:
        connection.close()


@pytest.mark.long
def test_an_answer_that_takes_too_long_gets_504(tiny_folder, tmp_path):
    limits = ("--request-timeout", 1, "--max-tokens", 10**6, "--max-context", 10**7)
    endless = {"prompt": "x", "max_tokens": 10**6, "ignore_eos": True}
    with Server("--model", tiny_folder, *limits, log=tmp_path / "log") as server:
        assert code(httpx.post(f"{server.url}/v1/completions", json=endless, timeout=30)) == (504, "timeout")
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**endless, "stream": True}, timeout=30
        ) as stream:
            last = [line for line in stream.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        for _ in range(100):  # the row goes with the engine's next step
            if "mlx_lora_unfinished 0\n" in httpx.get(f"{server.url}/metrics").text:
                break
            time.sleep(0.1)
        assert "mlx_lora_unfinished 0\n" in httpx.get(f"{server.url}/metrics").text


def test_unknown_paths_and_methods_are_json_too(http):
    assert code(http.get("/nothing")) == (404, "not_found")
    assert code(http.get("/v1/completions")) == (405, "method_not_allowed")


@pytest.mark.long
def test_clients_on_many_connections_do_not_disturb_each_other(http, server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=GOOD).status_code))
    thread.start()
    thread.join(20)
    assert answers == [200]
    for connection in idle:
        connection.close()
