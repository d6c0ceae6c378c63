"""Fill in the Homebrew formula from a built source archive and a lock file of the wheels that a Mac needs.

    python -m build --sdist
    MACOSX_DEPLOYMENT_TARGET=26.0 uv pip compile pyproject.toml packaging/homebrew/build.in --extra serve --extra plots \\
        --python-platform aarch64-apple-darwin --python-version 3.13 --only-binary :all: --format pylock.toml -o pylock.toml
    python packaging/homebrew/render.py dist/mlx_lora-0.1.0.tar.gz --lock pylock.toml --out mlx-lora.rb

uv reads addresses and checksums from the index; this script reads the file and asks nobody. The newest macOS is the target
there, so that the file also has wheels that are built for it, such as MLX's; here, each macOS gets the best wheel that it can
install. It needs Python 3.11 and the package `packaging`. Without --out, the formula goes to standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
import tomllib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import compatible_tags, cpython_tags, mac_platforms
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

TEMPLATE = Path(__file__).with_name("mlx-lora.rb")
PYTHON = (3, 13)  # of the formula
# Homebrew's name of each macOS that the formula can be installed on -> its version. The last one stands for newer ones, too.
SYSTEMS = {"sonoma": (14, 0), "sequoia": (15, 0), "tahoe": (26, 0)}
MAC = {
    "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix",
    "platform_python_implementation": "CPython", "implementation_name": "cpython",
    "python_version": ".".join(map(str, PYTHON)), "python_full_version": f"{PYTHON[0]}.{PYTHON[1]}.0",
}  # fmt: skip
SHA256 = re.compile(r"[0-9a-f]{64}")
ADDRESS = re.compile(r"https://files\.pythonhosted\.org/packages/[\w./+-]+\.whl")
Wheel = tuple[str, str]  # address, SHA-256


class Unusable(Exception):
    """The archive is not a source archive of ours, or the lock file lacks something; the message says what."""


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


def best_wheel(name: str, wheels: Iterable[dict[str, Any]], macos: tuple[int, int]) -> Wheel:
    """Return the wheel of a package that pip would choose on an Apple silicon Mac.

    Args:
        name: of the package.
        wheels: its wheels, as a lock file lists them.
        macos: version of macOS.

    Raises:
        Unusable: no wheel can be installed there, or the best one has no checksum or is not PyPI's.
    """
    platforms = list(mac_platforms(macos, "arm64"))
    tags = chain(
        cpython_tags(PYTHON, platforms=platforms), compatible_tags(PYTHON, f"cp{PYTHON[0]}{PYTHON[1]}", platforms)
    )
    place = {tag: number for number, tag in enumerate(dict.fromkeys(tags))}  # the best first
    ranked = []
    for wheel in wheels:
        try:
            fits = [place[tag] for tag in parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] if tag in place]
        except InvalidWheelFilename as error:
            raise Unusable(f"{name}: {error}; make the lock file again") from None
        ranked += [(min(fits), wheel["url"], wheel.get("hashes", {}).get("sha256", ""))] if fits else []
    if not ranked:
        raise Unusable(f"{name}: no wheel in the lock file for macOS {macos[0]}, arm64, Python {MAC['python_version']}")
    _, address, checksum = min(ranked)
    if not SHA256.fullmatch(checksum) or not ADDRESS.fullmatch(address):
        raise Unusable(
            f"{name}: no address at PyPI with a SHA-256 in the lock file; make it again with uv and PyPI's index"
        )
    return address, checksum


def resource(name: str, wheel: Wheel, indent: str) -> str:
    """Return a `resource` of the formula; Homebrew leaves the wheel as it is."""
    address, checksum = wheel
    lines = (f'resource "{name}" do', f'  url "{address}", using: :nounzip', f'  sha256 "{checksum}"', "end")
    return "\n".join(indent + line for line in lines)


def resources(lock: dict[str, Any]) -> str:
    """Return the `resource` blocks of all packages, in the blocks of a macOS where its wheels differ from those of others.

    Raises:
        Unusable: see `best_wheel`; or the lock file has no packages, or not all that are needed.
    """
    shared, own = list[str](), {system: list[str]() for system in SYSTEMS}
    packages = [
        one for one in lock.get("packages", ()) if Marker(one.get("marker", "python_version > '3'")).evaluate(MAC)
    ]
    if missing := {"mlx", "mlx-lm", "mlx-metal", "setuptools"} - {one["name"] for one in packages}:
        raise Unusable(
            f"the lock file has no {', '.join(sorted(missing))} for a Mac; make it with the command in render.py"
        )
    for one in sorted(packages, key=lambda each: each["name"]):
        best = {system: best_wheel(one["name"], one.get("wheels", ()), SYSTEMS[system]) for system in SYSTEMS}
        if len(set(best.values())) == 1:
            shared.append(resource(one["name"], best.popitem()[1], "  "))
            continue
        for system, wheel in best.items():
            own[system].append(resource(one["name"], wheel, "    "))
    newest = list(SYSTEMS)[-1]
    for system, blocks in own.items():
        if blocks:
            shared.append(
                f"  on_{system}{' :or_newer' if system == newest else ''} do\n" + "\n\n".join(blocks) + "\n  end"
            )
    return "\n\n".join(shared)


def render(archive: Path, lock: dict[str, Any], template: str) -> str:
    """Return the formula with version and SHA-256 of the archive, and with address and SHA-256 of each wheel.

    Raises:
        Unusable: see `archive_version` and `resources`.
    """
    version = archive_version(archive)
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    first, _, rest = template.partition("\n")  # the first line says what the placeholders are
    assert "placeholders" in first
    values = {"@VERSION@": version, "@SHA256@": checksum, "@RESOURCES@": resources(lock)}
    return re.sub("|".join(values), lambda found: values[found[0]], rest)


def main() -> None:
    """Render the formula of the archive that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the source archive, dist/mlx_lora-VERSION.tar.gz")
    parser.add_argument("--lock", type=Path, required=True, help="the lock file that uv wrote, pylock.toml")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    try:
        lock = tomllib.loads(options.lock.read_text(encoding="utf-8"))
        formula = render(options.archive, lock, TEMPLATE.read_text(encoding="utf-8"))
    except (Unusable, OSError, tomllib.TOMLDecodeError) as problem:
        sys.exit(f"Error: {problem}")
    if options.out:
        options.out.write_text(formula, encoding="utf-8")
    else:
        print(formula, end="")


if __name__ == "__main__":
    main()
