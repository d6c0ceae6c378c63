"""Write the hashes of the chat templates that are rendered without a process of their own: data/templates/known.txt.

    python scripts/known_templates.py            the built-in ones, and those in tests/templates
    python scripts/known_templates.py FOLDER     also those in a folder, for example the one of get_templates.py

Only give templates to it that you have read: they have no limits on time and memory. Lines of other templates are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_lora.utils.files import sha256_of

ROOT = Path(__file__).parents[1]
BUILT_IN = ROOT / "mlx_lora" / "data" / "templates"
KNOWN = BUILT_IN / "known.txt"
FOLDERS = (BUILT_IN, ROOT / "tests" / "templates")
BOS = "{{- bos_token }}"  # data/chat_template.py puts it before a built-in template


def hashes_of(folder: Path) -> dict[str, str]:
    """Return hash -> name of the templates in a folder."""
    found = {}
    for file in sorted(folder.glob("*.jinja")):
        text = file.read_text(encoding="utf-8")
        found[sha256_of(text)] = f"{folder.name}/{file.name}"
        if folder == BUILT_IN:
            found[sha256_of(BOS + text)] = f"{folder.name}/{file.name}, with the first token"
    return found


def main() -> None:
    """Write the file again."""
    known = dict(line.split(maxsplit=1) for line in KNOWN.read_text(encoding="utf-8").splitlines())
    for folder in (*FOLDERS, *map(Path, sys.argv[1:])):
        known |= hashes_of(folder)
    KNOWN.write_text("".join(f"{digest} {name}\n" for digest, name in sorted(known.items(), key=lambda one: one[::-1])), encoding="utf-8")


if __name__ == "__main__":
    main()
