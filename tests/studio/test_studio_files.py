"""The studio's page as files: what is vendored, what it imports, what it never does, and the contrast of its colors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from mlx_lora.reports import charts as page_template

PAGES = Path(page_template.__file__).parents[1] / "studio" / "pages"
VENDOR = PAGES / "vendor"
TOKENS = (Path(page_template.__file__).parent / "pages" / "tokens.css").read_text(encoding="utf-8")
OWN = sorted([*PAGES.glob("*.js"), *PAGES.parent.glob("places/*.js")])
PACKAGE = PAGES.parents[1]
FROM_ELSEWHERE = {"/static/tokens.css", "/static/markdown.js"}  # one copy of each, which other pages use too


def test_vendored_files_are_those_of_the_table():
    table = (VENDOR / "VENDORED.md").read_text(encoding="utf-8")
    listed = dict(reversed(line.split()) for line in re.search(r"```sha256\n(.*?)```", table, re.S)[1].splitlines())
    there = {path.name for path in VENDOR.iterdir()} - {"VENDORED.md"}
    assert there == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert set(re.findall(r"^\| (\S+\.(?:js|css)) \|", table, re.M)) == {
        n for n in there if not n.startswith("LICENSE")
    }


def test_every_import_and_every_file_of_the_page_is_there():
    found = 0
    for path in [*OWN, *VENDOR.glob("*.js")]:
        for name in re.findall(r"""(?:\bfrom\s*|\bimport\()["']([^"'\s]+)["']""", path.read_text(encoding="utf-8")):
            assert name.startswith(("./", "../pages/")), (
                f"{path.name} imports {name}, which only a build step or a network would find"
            )
            assert (path.parent / name).is_file(), (path.name, name)
            found += 1
    page = (PAGES / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert name == "data:," or name in FROM_ELSEWHERE or (PAGES.parent / name.removeprefix("/static/")).is_file(), (
            name
        )
    assert found > 40
    assert not re.search(r"<style|\sstyle=|<script>|\son\w+=", page), "the policy allows nothing inline"


@pytest.mark.parametrize("path", [*OWN, *PAGES.glob("*.css")], ids=lambda path: path.name)
def test_own_files_are_short_and_never_parse_markup(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text), "nothing is loaded from elsewhere"


def _long_lines(paths: Iterable[Path]) -> list[tuple[str, int]]:
    return [
        (path.name, number)
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]


def test_javascript_has_at_most_120_columns():
    """Biome breaks code, and leaves comments, texts and templates as they are."""
    scripts = [path for path in PACKAGE.rglob("*.js") if path.parent != VENDOR]
    assert {"studio.js", "chat.js", "markdown.js"} <= {path.name for path in scripts}
    assert _long_lines(scripts) == []
    assert _long_lines([VENDOR / "preact.module.js"])


def test_biome_is_the_one_that_its_settings_are_for():
    settings = json.loads((PACKAGE.parent / "biome.json").read_text(encoding="utf-8"))
    pinned = re.findall(r"@biomejs/biome@(\d+\.\d+\.\d+)", (PACKAGE.parent / "Makefile").read_text(encoding="utf-8"))
    assert len(pinned) == 1
    assert f"/schemas/{pinned[0]}/" in settings["$schema"]
    assert settings["formatter"]["lineWidth"] == 120


def test_only_one_file_asks_the_server():
    asking = [path.name for path in OWN if re.search(r"\bfetch\(|XMLHttpRequest|EventSource", path.read_text("utf-8"))]
    assert asking == ["api.js"]


def _schemes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\n\s*\}", TOKENS, re.S)
    colors = {"light": dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", light))}
    colors["dark"] = {**colors["light"], **dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", dark))}
    return colors


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of two colors. Source: WCAG 2.2, relative luminance."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_can_be_read(scheme):
    colors = _schemes()[scheme]
    texts = [(ink, ground) for ink in ("ink", "soft", "accent", "bad") for ground in ("paper", "card", "well")]
    texts += [(tone, f"{tone}-wash") for tone in ("good", "bad", "warn", "accent")]
    texts += [("on-accent", "accent-fill"), ("ink", "mark"), ("ink", "fill"), ("bad", "fill"), ("ink", "accent-wash")]
    low = {pair: round(_contrast(colors[pair[0]], colors[pair[1]]), 2) for pair in texts}
    assert min(low.values()) >= 4.5, {pair: ratio for pair, ratio in low.items() if ratio < 4.5}
    lines = [("edge", "card"), ("accent", "paper"), *((f"c{n}", "card") for n in range(6))]
    low = {pair: round(_contrast(colors[pair[0]], colors[pair[1]]), 2) for pair in lines}
    assert min(low.values()) >= 3, {pair: ratio for pair, ratio in low.items() if ratio < 3}
    assert _contrast("#ffffff", "#000000") == pytest.approx(21)
