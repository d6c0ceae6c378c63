"""A browser on the studio's page: Debian's Chromium, driven by Playwright, with all that went wrong on the page noted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser

SERIOUS = ("serious", "critical")
# What the page asks of the window: paints, tasks that block it, and what its policy forbade.
WATCH = """
window.seen = {long: [], paints: {}, forbidden: [], listed: 0};
new MutationObserver(() => { if (!seen.listed && document.querySelector('tbody tr')) seen.listed = Math.round(performance.now()); }).observe(document, {childList: true, subtree: true});
new PerformanceObserver(list => list.getEntries().forEach(e => seen.long.push(Math.round(e.duration)))).observe({type: 'longtask', buffered: true});
new PerformanceObserver(list => list.getEntries().forEach(e => seen.paints[e.name] = Math.round(e.startTime))).observe({type: 'paint', buffered: true});
addEventListener('securitypolicyviolation', e => seen.forbidden.push(e.violatedDirective + ' ' + e.blockedURI));
"""
KEPT = "mlx_lora studio project"  # where the page keeps the project


@dataclass
class Watched:
    """A page, and what went wrong on it: console errors and warnings, exceptions, requests that failed."""

    page: Any
    problems: list[str] = field(default_factory=list)

    def go(self, place: str, until: str = "") -> None:
        """Go to a place of the studio, and wait for its heading and for some text of it."""
        self.page.evaluate("place => { location.hash = '#/' + place }", place)
        self.page.locator("main h1").first.wait_for()
        if until:
            self.page.get_by_text(until).first.wait_for()

    def forbidden(self) -> list[str]:
        """What the content security policy stopped."""
        return self.page.evaluate("seen.forbidden")

    def complaints(self) -> list[tuple[str, str, list[str]]]:
        """What axe-core finds serious or critical: rule, severity, elements."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        found = axe.Axe().run(self.page).response["violations"]
        return [
            (one["id"], one["impact"], [node["html"][:160] for node in one["nodes"]][:4])
            for one in found
            if one["impact"] in SERIOUS
        ]

    def memory(self) -> tuple[int, int]:
        """Bytes of the page's JavaScript heap, and its DOM nodes, after the garbage was collected."""
        client = self.page.context.new_cdp_session(self.page)
        client.send("HeapProfiler.enable")
        client.send("Performance.enable")
        for _ in range(2):
            client.send("HeapProfiler.collectGarbage")
        found = {one["name"]: one["value"] for one in client.send("Performance.getMetrics")["metrics"]}
        client.detach()
        return int(found["JSHeapUsedSize"]), int(found["Nodes"])


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser, or skip the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'mlx-lora[studio-test]'")
    path = find_browser()
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_studio(
    browser: Any,
    url: str,
    dark: bool = False,
    width: int = 1280,
    project: dict[str, Any] | None = None,
    checked: bool = True,
) -> Iterator[Watched]:
    """Open the page in a window of its own, with a project that was chosen before; at the end, nothing may have gone wrong."""
    page = browser.new_page(
        viewport={"width": width, "height": 860}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    watched = Watched(page)
    page.on("console", lambda said: watched.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: watched.problems.append(str(error)))
    page.add_init_script(WATCH)
    if project is not None:
        page.add_init_script(f"localStorage.setItem({json.dumps(KEPT)}, {json.dumps(json.dumps(project))})")
    page.goto(url)
    page.locator("main h1").first.wait_for()
    yield watched
    if checked:
        assert (watched.problems, watched.forbidden()) == ([], [])
    page.close()


def save_small(page: Any, path: Path, colors: int = 256) -> None:
    """Save a picture of the window as a small PNG with a palette."""
    image = pytest.importorskip("PIL.Image")
    page.screenshot(path=path)
    with image.open(path) as full:
        # The usual method averages colors of few pixels, such as those of a legend, into one.
        small = full.convert("RGB").quantize(colors, image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)
