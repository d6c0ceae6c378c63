"""Hook of the documentation site: the Python reference has the public names that this version has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^::: (?P<module>mlx_lora(?:\.\w+)+)\.(?P<name>\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace entries whose module the package does not have."""

    def entry(found: re.Match[str]) -> str:
        there = (ROOT / found["module"].replace(".", "/")).with_suffix(".py").is_file()
        return found[0] if there else f"`{found['name']}` is not in this version."

    return ENTRY.sub(entry, markdown)
