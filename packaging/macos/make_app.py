"""Make MLX LoRA.app, which starts the studio with a double click: unsigned, and on any system, because it is a folder of plain files.

    python packaging/macos/make_app.py --out build
    python packaging/macos/make_app.py --out build --wheel dist/mlx_lora-0.1.0-py3-none-any.whl

The app has a launcher (launcher.sh), an icon, and with --wheel mlx-lora itself; the rest comes from PyPI when it is first opened. It
needs nothing but Python. packaging/README.md says how to sign it.
"""

from __future__ import annotations

import argparse
import plistlib
import shutil
import struct
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from release_notes import package_version  # noqa: E402

NAME = "MLX LoRA"
IDENTIFIER = "io.github.mlx-lora.studio"
OLDEST_MACOS = "14.0"  # of MLX's wheels
ICONS = {b"ic07": 128, b"ic08": 256, b"ic09": 512}  # type of an .icns entry -> pixels of its PNG
GROUND, INK = (63, 81, 181), (255, 255, 255)
BARS = ((0.30, 0.62), (0.50, 0.36), (0.70, 0.70))  # of the icon: three sliders, by height and place of the knob


def coverage(distance: float) -> float:
    """Return how much of a pixel lies inside of a shape whose edge is this many pixels away (negative: inside)."""
    return min(1.0, max(0.0, 0.5 - distance))


def pixel(x: float, y: float, size: int) -> bytes:
    """Return red, green, blue and alpha of a pixel of the icon, a rounded square with three sliders."""
    # In the units of the icon: 1 is its width.
    u, v = (x + 0.5) / size, (y + 0.5) / size
    half, corner = 0.41, 0.18
    across, down = max(0.0, abs(u - 0.5) - half + corner), max(0.0, abs(v - 0.5) - half + corner)
    alpha = coverage(((across**2 + down**2) ** 0.5 - corner) * size)
    ink = 0.0
    for height, knob in BARS:
        line = max(abs(v - height) - 0.018, abs(u - 0.5) - 0.26)
        ink = max(ink, coverage(line * size), coverage((((u - knob) ** 2 + (v - height) ** 2) ** 0.5 - 0.06) * size))
    color = [round(ground + (front - ground) * ink) for ground, front in zip(GROUND, INK, strict=True)]
    return bytes((*color, round(255 * alpha)))


def png(size: int) -> bytes:
    """Return the icon as a PNG file."""
    rows = b"".join(b"\0" + b"".join(pixel(x, y, size) for x in range(size)) for y in range(size))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def icns() -> bytes:
    """Return the icon as an .icns file, which is a list of PNG files with their lengths."""
    entries = [(kind, png(size)) for kind, size in ICONS.items()]
    body = b"".join(kind + struct.pack(">I", len(data) + 8) + data for kind, data in entries)
    return b"icns" + struct.pack(">I", len(body) + 8) + body


def property_list(version: str) -> dict[str, object]:
    """Return what Info.plist says of the app."""
    return {
        "CFBundleDevelopmentRegion": "en",
        "CFBundleDisplayName": NAME,
        "CFBundleExecutable": "launcher",
        "CFBundleIconFile": "icon",
        "CFBundleIdentifier": IDENTIFIER,
        "CFBundleInfoDictionaryVersion": "6.0",
        "CFBundleName": NAME,
        "CFBundlePackageType": "APPL",
        "CFBundleShortVersionString": version,
        "CFBundleVersion": version,
        "LSApplicationCategoryType": "public.app-category.developer-tools",
        "LSArchitecturePriority": ["arm64"],
        "LSMinimumSystemVersion": OLDEST_MACOS,
        "LSUIElement": True,  # no icon in the Dock that never answers: a script has no windows, only its dialogs
        "NSHighResolutionCapable": True,
    }


def make_app(out: Path, version: str, wheel: Path | None = None) -> Path:
    """Write the app into a folder, in place of an older one, and return its path."""
    app = out / f"{NAME}.app"
    if app.exists():
        shutil.rmtree(app)
    contents = app / "Contents"
    for folder in ("MacOS", "Resources"):
        (contents / folder).mkdir(parents=True)
    (contents / "Info.plist").write_bytes(plistlib.dumps(property_list(version)))
    (contents / "PkgInfo").write_text("APPL????")
    launcher = contents / "MacOS" / "launcher"
    shutil.copyfile(HERE / "launcher.sh", launcher)
    launcher.chmod(0o755)
    (contents / "Resources" / "icon.icns").write_bytes(icns())
    (contents / "Resources" / "version").write_text(version)
    if wheel is not None:
        shutil.copy(wheel, contents / "Resources")
    return app


def main() -> None:
    """Make the app of this checkout's version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the app into")
    parser.add_argument("--wheel", type=Path, help="mlx-lora's wheel, to be in the app")
    options = parser.parse_args()
    version = package_version((HERE.parents[1] / "mlx_lora" / "__init__.py").read_text(encoding="utf-8"))
    if options.wheel and not options.wheel.name.startswith(f"mlx_lora-{version}-"):
        sys.exit(f"Error: --wheel {options.wheel}: not a wheel of version {version}; build it with `python -m build`")
    print(make_app(options.out, version, options.wheel))


if __name__ == "__main__":
    main()
