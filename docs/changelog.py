"""A hook of mkdocs: the changelog's page has the text of CHANGELOG.md, with links that lead to this site's pages.

The file stays at the top of the repository, where people and package indexes look for it. Its page in docs/ has only a link to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
PAGE = "changelog.md"
LINK = re.compile(r"(?<=\]\()docs/")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of CHANGELOG.md for its page, and any other page's as it is (mkdocs calls this for each page)."""
    return LINK.sub("", CHANGELOG.read_text(encoding="utf-8")) if page.file.src_uri == PAGE else markdown
