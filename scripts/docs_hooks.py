"""Hooks of the documentation site: the Python reference has the public names that this version has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "mlx_lora" / "__init__.py"
ENTRY = re.compile(r"^::: mlx_lora\.(\w+)$", re.MULTILINE)


def public_names() -> set[str]:
    """Return the names in the package's `__all__`."""
    for node in ast.parse(PACKAGE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace entries of names that the package does not have."""
    names = public_names()
    return ENTRY.sub(lambda found: found[0] if found[1] in names else f"`{found[1]}` is not in this version.", markdown)
