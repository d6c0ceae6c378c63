"""The studio's real server as a user starts it, its API over HTTP, and the ways through its page that several tests take."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from child_environment import child_environment
from studio_browser import Watched

ROOT = Path(__file__).parents[1]
PATIENCE_MS = 480_000  # loading and training on a machine that others use too


@contextmanager
def studio(home: Path, models: Path, **variables: str) -> Iterator[str]:
    """Run the command as a user does, and give the page's address."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    words = [
        "-m",
        "mlx_lora",
        "studio",
        "--home",
        str(home),
        "--model-folder",
        str(models),
        "--port",
        "0",
        "--no-browser",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=home.parent, stdout=out, stderr=out, env=child_environment(**variables)
        )
    try:
        deadline = time.monotonic() + 120
        while not (ready := re.search(r"^ready\s+(\S+)", log.read_text(), re.M)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield ready[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def asked(url: str, path: str, body: Any = None) -> Any:
    """Ask the server's API, without a page: GET, or POST with a body."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    request = urllib.request.Request(f"{url.rstrip('/')}/api/{path}", content, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=PATIENCE_MS / 1000) as answer:
        return json.load(answer)


def choose(watched: Watched, name: str) -> None:
    """Choose a model, and wait for its plan from the configuration alone."""
    page = watched.page
    watched.go("model")
    page.get_by_role("radio", name=re.compile(re.escape(name))).check(timeout=PATIENCE_MS)
    page.locator(".chosen-model .memory-bar").wait_for(timeout=PATIENCE_MS)


def add_data(watched: Watched, file: Path, words: str) -> None:
    """Drop a file, and wait until the page shows what of it is trained."""
    watched.go("data")
    watched.page.locator("input[type=file]").set_input_files(str(file))
    watched.page.locator("mark", has_text=words).first.wait_for(timeout=PATIENCE_MS)


def train(watched: Watched, name: str, **settings: Any) -> None:
    """Start a run with these settings, each found by the search over all settings."""
    page = watched.page
    watched.go("train")
    page.get_by_text("Change settings").click()
    for setting, value in settings.items():
        page.get_by_role("searchbox").fill(setting)
        page.locator(f".settings[aria-live] #set-{setting}").fill(str(value))  # of what was found
        page.keyboard.press("Tab")
    page.get_by_role("searchbox").fill("")
    page.get_by_label("Name of the run").fill(name)
    page.locator(".plan .memory-bar").wait_for(timeout=PATIENCE_MS)
    page.get_by_role("button", name="Start training").click()
    page.locator(".live").get_by_text(re.compile("^(running|done)$")).first.wait_for(timeout=PATIENCE_MS)


def run_folder(home: Path, name: str) -> Path:
    """Return where a run of the studio has its folder."""
    return home / "runs" / name
