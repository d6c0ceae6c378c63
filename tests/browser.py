"""Headless Chromium for pages of ours: what it prints to the console, and how wide a page really is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROBE = """<script>addEventListener("load", () => {
  const clipped = [...document.querySelectorAll("h1,h2,p,dd,figure,td,pre")].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline");
  const outside = [...document.querySelectorAll("svg.chart")].flatMap(svg => { const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(t => { const r = t.getBoundingClientRect(); return r.left < frame.left - 1 || r.right > frame.right + 1; }); });
  const sizes = [...document.querySelectorAll("svg.chart text")].map(t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width / 640);
  const found = {width: innerWidth, needed: document.documentElement.scrollWidth, charts: document.querySelectorAll("svg.chart").length,
    lines: document.querySelectorAll("svg polyline").length, clipped: clipped.length, outside: outside.map(t => t.textContent), smallest: Math.min(...sizes),
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
    stand `outside` their chart; the `smallest` size of a chart's text, in pixels; colours of `ink` and `paper`.
    """

    found: dict
    console: list[str]


def look(page: Path, width: int = 1200, dark: bool = False) -> Seen:
    """Open a copy of a page that measures itself."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium: apt install chromium")
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    line = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={max(width, 600)},2000",
        "--virtual-time-budget=3000",
        "--enable-logging=stderr",
    ]
    line += ["--force-dark-mode"] if dark else []
    ran = subprocess.run([*line, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r"FOUND(\{.*?\})END", ran.stdout)
    assert match, ran.stderr[-2000:]
    return Seen(
        json.loads(match[1].replace("&quot;", '"')), [one for one in ran.stderr.splitlines() if "CONSOLE" in one]
    )
