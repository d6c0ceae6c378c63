"""The server's own page: two models side by side in a browser, through the same endpoints as every client.

One file without any other, and with a policy under which nothing but its own script and style can run in it, whatever a
model says: `pages/chat.html`. It holds no secrets, so it needs no key; what it asks the server for does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

FILE = Path(__file__).parent / "pages" / "chat.html"


def page_route() -> Route:
    """Return GET / with the page."""
    text = FILE.read_text(encoding="utf-8")
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


def policy(text: str) -> str:
    """Return the Content-Security-Policy under which a page's own inline script and style work, and nothing else."""
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(_hashes(text, "script")),
        "style-src": " ".join(_hashes(text, "style")),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which browsers ask for one
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        # Text of a model that were put into the page as markup would be an error, not an attack.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(text: str, tag: str) -> list[str]:
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inside]
