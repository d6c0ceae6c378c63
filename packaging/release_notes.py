"""Check a release's tag, and print the changelog's section for it: `python packaging/release_notes.py v0.1.0`.

It needs nothing but Python, so that the release workflow can run it before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class NotReady(Exception):
    """The tag cannot be released; the message says what to change."""


def package_version(source: str) -> str:
    """Return `__version__` as mlx_lora/__init__.py has it."""
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise NotReady('mlx_lora/__init__.py has no line `__version__ = "..."`')
    return found[1]


def release_notes(tag: str, version: str, changelog: str) -> str:
    """Return the text below the version's heading, such as `## 0.1.0 (2026-12-01)`, up to the next version's.

    Args:
        tag: of git, such as `v0.1.0`.
        version: of the package.
        changelog: the text of CHANGELOG.md.

    Raises:
        NotReady: the tag is another version, or the changelog has no dated section for it.
    """
    if tag != f"v{version}":
        raise NotReady(f"tag {tag}: __version__ is {version}; tag v{version}, or change __version__ first")
    found = re.search(
        rf"^## {re.escape(version)}(?P<date>(?: .*)?)\n(?P<text>(?:(?!## ).*\n?)*)", changelog, re.MULTILINE
    )
    if found is None:
        raise NotReady(f"tag {tag}: CHANGELOG.md has no section `## {version} (YYYY-MM-DD)`; write it")
    if not re.fullmatch(r" \(\d{4}-\d\d-\d\d\)", found["date"]):
        raise NotReady(f"tag {tag}: CHANGELOG.md says `## {version}{found['date']}`; put the date in parentheses")
    return found["text"].strip() + "\n"


def main() -> None:
    """Print the notes of the tag that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python packaging/release_notes.py TAG")
    version = package_version((ROOT / "mlx_lora" / "__init__.py").read_text(encoding="utf-8"))
    print(release_notes(sys.argv[1], version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")), end="")


if __name__ == "__main__":
    try:
        main()
    except NotReady as problem:
        sys.exit(f"Error: {problem}")
