"""Write the hashes of the chat templates that are rendered without a process of their own: data/templates/known.txt.

    python scripts/known_templates.py            the built-in ones, and those in tests/templates
    python scripts/known_templates.py FOLDER     also those in a folder, such as trl/chat_templates of TRL's wheel

Such templates have no limits on time and memory, so only give it those of publishers that you trust. Lines of other folders
are kept.
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
        found[sha256_of(text)] = f"{folder.parent.name}/{file.name}"
        if folder == BUILT_IN:
            found[sha256_of(BOS + text)] = f"{folder.parent.name}/{file.name}, after a first token"
    return found


def main() -> None:
    """Write the file again."""
    known = dict(line.split(maxsplit=1) for line in KNOWN.read_text(encoding="utf-8").splitlines())
    for folder in (*FOLDERS, *(Path(folder).resolve() for folder in sys.argv[1:])):
        others = {digest: name for digest, name in known.items() if not name.startswith(f"{folder.parent.name}/")}
        known = others | hashes_of(folder)
    lines = sorted((name, digest) for digest, name in known.items())
    KNOWN.write_text("".join(f"{digest} {name}\n" for name, digest in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
