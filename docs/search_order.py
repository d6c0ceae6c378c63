"""A hook of mkdocs: which pages the search box shows first, and words that people type and the pages do not use.

Material's search takes both from a page's front matter. They are here instead, because GitHub shows front matter as a table.
"""

from __future__ import annotations

from typing import Any

# By section of the navigation. Its long pages have every word, and most readers look for something else.
SECTIONS = {"Development": 0.1, "Reference": 0.3}
PAGES = {
    "continue.md": 2.0,
    "images.md": 2.0,
    "learning-rate.md": 2.0,
    "license.md": 2.0,
    "merge-adapters.md": 2.0,
    "overfitting.md": 2.0,
    "tools.md": 2.0,
    "transformers.md": 2.0,
    "troubleshooting.md": 1.0,
    "which-model.md": 4.0,  # "model" is in most titles
}
# A page -> words that lead to it. They weigh more than titles, so give only words that belong to no other page. Each word of a query also
# finds words that begin with it, so "agent" would be found by "choose a model".
WORDS = {
    "images.md": ["photos", "pictures", "vision", "VLM", "multimodal"],
    "learning-rate.md": ["LR"],
    "license.md": ["licence", "copyright", "sell", "commercial"],
    "memory.md": ["8GB", "16GB", "24GB", "32GB"],
    "transformers.md": ["Huggingface"],
    "which-model.md": ["8GB", "16GB", "24GB", "32GB"],
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text as it is, and set its place in the search (mkdocs calls this for each page)."""
    name = page.file.src_uri
    section = page.parent.title if page.parent else ""
    page.meta.setdefault("search", {})["boost"] = PAGES.get(name, SECTIONS.get(section, 1.0))
    if name in WORDS:
        page.meta["tags"] = WORDS[name]
    return markdown
