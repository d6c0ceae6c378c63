"""Render report pages, with a common head and style sheet, and with all text escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

COMMON = Path(__file__).parent / "pages"


def render_page(folder: Path, template: str, /, **values: Any) -> str:
    """Return a page's text.

    Args:
        folder, template: the template's folder and name; it extends page.html.
        values: for the template. They are escaped unless the template marks them `safe`, as it does for our SVG.
    """
    css = tokens_css() + (COMMON / "page.css").read_text(encoding="utf-8")
    return _environment(folder).get_template(template).render(css=css, **values)


def tokens_css() -> str:
    """Return the colors, type sizes and spacing that all pages of ours share; one that must stay one file copies them in."""
    return (COMMON / "tokens.css").read_text(encoding="utf-8")


@cache
def _environment(folder: Path) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader([folder, COMMON])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
