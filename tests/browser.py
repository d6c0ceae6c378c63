"""Headless Chromium for pages of ours: files that are looked at once, and a served page that is used (`Live`)."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROBE = """<script>addEventListener("load", () => {
  const clipped = [...document.querySelectorAll("h1,h2,p,dd,figure,td,pre")].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline");
  const charts = [...document.querySelectorAll("svg.chart")].filter(svg => svg.getBoundingClientRect().width > 0); // shown
  const outside = charts.flatMap(svg => { const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(t => { const r = t.getBoundingClientRect(); return r.left < frame.left - 1 || r.right > frame.right + 1; }); });
  const sizes = charts.flatMap(svg => [...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width));
  const found = {width: innerWidth, needed: document.documentElement.scrollWidth, charts: charts.length,
    lines: charts.flatMap(svg => [...svg.querySelectorAll("polyline")]).length, clipped: clipped.length, outside: outside.map(t => t.textContent), smallest: Math.min(...sizes),
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor};
  parent.postMessage("FOUND" + JSON.stringify(found) + "END", "*");
});</script>"""
# A window of the browser has a least width of 500; a frame in it has not. The body keeps the frame from its own edges.
FRAME = """<!doctype html><body style="margin:0"><script>addEventListener("message", e => { document.title = e.data; });</script>
<iframe src="probed.html" style="border:0;width:{width}px;height:2000px"></iframe></body>"""


@dataclass(frozen=True)
class Seen:
    """What a page was in the browser: what the probe measured, and the lines of the console.

    `found` has the window's `width` and the width `needed`; counts of `charts`, `lines` and `clipped` elements; texts that
    stand `outside` their chart; the `smallest` size of a chart's text, in pixels; colors of `ink` and `paper`.
    """

    found: dict
    console: list[str]


def find_browser() -> str:
    """Return Chromium's path, or skip the test."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium: apt install chromium")
    return browser


def look(page: Path, width: int = 1200, dark: bool = False) -> Seen:
    """Open a copy of a page that measures itself."""
    browser = find_browser()
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    line = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={max(width, 600)},2000",
        "--virtual-time-budget=3000", "--enable-logging=stderr",
    ]  # fmt: skip
    line += ["--force-dark-mode"] if dark else []
    ran = subprocess.run([*line, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r"FOUND(\{.*?\})END", ran.stdout)
    assert match, ran.stderr[-2000:]
    return Seen(
        json.loads(match[1].replace("&quot;", '"')), [one for one in ran.stderr.splitlines() if "CONSOLE" in one]
    )


# The browser reads commands from file 3 and answers on file 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}


class Live:
    """A browser with one page, driven over Chrome's debugging protocol through a pipe, until the block ends.

    Attributes:
        problems: errors and warnings of the page: console, exceptions, what its policy forbade, failed loads.
        requests: (method, URL, headers) of what it asked for.
    """

    def __init__(self, profile: Path):
        browser = find_browser()
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        line = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), browser, *flags]
        self._process = subprocess.Popen(
            line, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._count, self._answers = b"", 0, {}
        self._session: str | None = None
        self._replies: list[tuple[str, int, str, str]] = []
        self.problems: list[str] = []
        self.requests: list[tuple[str, str, dict]] = []

    def __enter__(self) -> Live:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict:
        """Send a command and return its result."""
        number = self._send(method, parameters)
        while number not in self._answers:
            self._read(time.monotonic() + 60)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of a size and color scheme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.problems, self.requests = [], []
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, awaited when it is a promise."""
        found = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            allowUnsafeEvalBlockedByCSP=False,  # as the page's own script
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, most_s: float = 60) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + most_s
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, (expression, self.problems, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Put text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key and let it go."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def answer_for(self, path: str, status: int, kind: str, body: str) -> None:
        """Answer requests whose URL ends so in the server's place."""
        self._replies.append((path, status, kind, body))
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{path}"} for path, *_ in self._replies])

    def no_more_answers(self) -> None:
        """Let the server answer again."""
        self._replies = []
        self.call("Fetch.disable")

    def picture(self, path: Path) -> None:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _send(self, method: str, parameters: dict) -> int:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._count

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
        part = os.read(self._in, 1 << 20) if ready else b""
        assert part, "the browser does not answer"
        *whole, self._rest = (self._rest + part).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, told: dict) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(told["exceptionDetails"]["exception"].get("description", "exception"))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(str([one.get("value") for one in told["args"]]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(told["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            request = told["request"]
            self.requests.append((request["method"], request["url"], request["headers"]))
        elif event == "Fetch.requestPaused":
            url = told["request"]["url"]
            _, status, kind, body = next(reply for reply in self._replies if url.endswith(reply[0]))
            content = base64.b64encode(body.encode()).decode()
            headers = [{"name": "Content-Type", "value": kind}]
            self._send(
                "Fetch.fulfillRequest",
                {"requestId": told["requestId"], "responseCode": status, "responseHeaders": headers, "body": content},
            )
