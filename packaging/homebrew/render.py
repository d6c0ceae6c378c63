"""Fill in the Homebrew formula from a built source archive.

    python -m build --sdist
    python packaging/homebrew/render.py dist/mlx_lora-0.1.0.tar.gz --out mlx-lora.rb

It needs nothing but Python. Without --out, the formula goes to standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
from pathlib import Path

TEMPLATE = Path(__file__).with_name("mlx-lora.rb")


class Unusable(Exception):
    """The archive is not a source archive of ours; the message says why."""


def archive_version(archive: Path) -> str:
    """Return the version in an archive's own PKG-INFO, which must agree with its name.

    Raises:
        Unusable: it is no such archive.
    """
    named = re.fullmatch(r"mlx_lora-(.+)\.tar\.gz", archive.name)
    if named is None:
        raise Unusable(f"{archive.name}: not named mlx_lora-VERSION.tar.gz; give what `python -m build --sdist` made")
    try:
        with tarfile.open(archive) as content:
            member = content.extractfile(f"mlx_lora-{named[1]}/PKG-INFO")
            fields = member.read().decode() if member else ""
    except (OSError, tarfile.TarError, KeyError) as error:
        raise Unusable(f"{archive}: cannot be read as a source archive ({error}); build it again") from None
    if f"\nVersion: {named[1]}\n" not in fields:
        raise Unusable(f"{archive.name}: its PKG-INFO has another version; build it again")
    return named[1]


def render(archive: Path, template: str) -> str:
    """Return the formula with version and SHA-256 of the archive.

    Raises:
        Unusable: see `archive_version`.
    """
    version = archive_version(archive)
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    first, _, rest = template.partition("\n")  # the first line says what the placeholders are
    assert "placeholders" in first
    return rest.replace("@VERSION@", version).replace("@SHA256@", checksum)


def main() -> None:
    """Render the formula of the archive that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the source archive, dist/mlx_lora-VERSION.tar.gz")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    try:
        formula = render(options.archive, TEMPLATE.read_text(encoding="utf-8"))
    except Unusable as problem:
        sys.exit(f"Error: {problem}")
    if options.out:
        options.out.write_text(formula, encoding="utf-8")
    else:
        print(formula, end="")


if __name__ == "__main__":
    main()
