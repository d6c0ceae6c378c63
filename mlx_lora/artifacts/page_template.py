"""Report pages: one head and style sheet for all, filled in without letting anybody's text be markup."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

COMMON = Path(__file__).parent / "pages"


def render_page(folder: Path, template: str, /, **values: Any) -> str:
    """Return a page's text.

    Args:
        folder, template: where it lies and its name; it extends page.html.
        values: for it. What is not marked `safe` in the template, as our own SVG is, gets escaped.
    """
    css = (COMMON / "page.css").read_text(encoding="utf-8")
    return _environment(folder).get_template(template).render(css=css, **values)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader([folder, COMMON])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
