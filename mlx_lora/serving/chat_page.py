"""Serve the chat page, which shows two models side by side in a browser and uses the same endpoints as other clients.

The page, `pages/chat.html`, is served as a single file, with `pages/markdown.js` and the common
tokens.css inside. Its policy only allows its own script and style to run, whatever a model
writes. It has no secrets, so it is served without an API key; its requests to the server need the key.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from mlx_lora.artifacts.page_template import tokens_css

FOLDER = Path(__file__).parent / "pages"
SCRIPTS = ("markdown.js",)  # each stands in the page where a line names it


def page_route() -> Route:
    """Return the route GET / that serves the page."""
    text = page_text()
    headers = {
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # frame-ancestors, for old browsers
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    async def page(request: Request) -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return Route("/", page, methods=["GET"])


def page_text() -> str:
    """Return the page with its scripts, and the colors and type sizes that all pages of ours share."""
    text = (FOLDER / "chat.html").read_text(encoding="utf-8").replace("/* tokens.css */\n", tokens_css())
    for name in SCRIPTS:
        text = text.replace(f"// {name}\n", (FOLDER / name).read_text(encoding="utf-8"))
    return text


def policy(text: str) -> str:
    """Return a Content-Security-Policy that allows the page's own inline script and style, and nothing else."""
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(_hashes(text, "script")),
        "style-src": " ".join(_hashes(text, "style")),
        "connect-src": "'self'",
        "img-src": "data:",  # for the empty icon, without which browsers request one
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        # If the page ever used a model's text as markup, the browser would raise an error instead of running it.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(text: str, tag: str) -> list[str]:
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inside]
