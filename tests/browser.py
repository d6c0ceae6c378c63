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
  const found = {width: innerWidth, needed: document.documentElement.scrollWidth, charts: document.querySelectorAll("svg.chart").length,
    lines: document.querySelectorAll("svg polyline").length, clipped: clipped.length,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor};
  document.title = "FOUND" + JSON.stringify(found) + "END";
});</script>"""


@dataclass(frozen=True)
class Seen:
    """What a page was in the browser: what the probe measured, and the lines of the console."""

    found: dict
    console: list[str]


def look(page: Path, width: int = 1200, dark: bool = False) -> Seen:
    """Open a copy of a page that measures itself."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium: apt install chromium")
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    line = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        "--enable-logging=stderr",
    ]
    line += ["--force-dark-mode"] if dark else []
    ran = subprocess.run([*line, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r"FOUND(\{.*?\})END", ran.stdout)
    assert match, ran.stderr[-2000:]
    return Seen(
        json.loads(match[1].replace("&quot;", '"')), [one for one in ran.stderr.splitlines() if "CONSOLE" in one]
    )
