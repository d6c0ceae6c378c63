"""Install the trainers that versus.py compares with, each in a Python environment of its own in our cache folder.

    python benchmarks/peers.py                  # all
    python benchmarks/peers.py mlx-lm-lora

TRL and PEFT are installed beside us: `pip install trl peft torch`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

# Versions that the figures in docs/development/performance.md were taken with. MLX and mlx-lm are those of this environment.
PEERS: dict[str, tuple[list[str], list[str]]] = {
    "mlx-lm-lora": (["mlx-lm-lora==5.10.2"], []),
    # Its own requirements include torch on Linux, which its MLX trainer does not use.
    "unsloth-zoo": (["transformers<=5.17", "datasets<5", "pillow"], ["unsloth-zoo==2026.10.9"]),
}


def peers_folder() -> Path:
    """Return the folder of all environments; the cache of `mlx_lora.utils.files`, without importing it."""
    return Path(os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora") / "peers"


def peer_python(name: str) -> str | None:
    """Return the interpreter of an installed peer, or None."""
    python = peers_folder() / name / "bin" / "python"
    return str(python) if (python.parent.parent / "installed").exists() else None


def install(name: str) -> str:
    """Install a peer from PyPI into a new environment, and return its interpreter.

    Raises:
        CalledProcessError: pip failed.
    """
    packages, without_dependencies = PEERS[name]
    folder = peers_folder() / name
    (folder / "installed").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    mlx = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    same = [f"{mlx}=={metadata.version('mlx')}", f"mlx-lm=={metadata.version('mlx-lm')}"]
    blas = [] if sys.platform == "darwin" else ["scipy-openblas32"]
    subprocess.run([python, "-m", "pip", "install", *same, *blas, *packages], check=True)
    if without_dependencies:
        subprocess.run([python, "-m", "pip", "install", "--no-deps", *without_dependencies], check=True)
    (folder / "installed").write_text("\n".join([*same, *packages, *without_dependencies]) + "\n", encoding="utf-8")
    return python


def main(argv: Sequence[str]) -> int:
    """Install the peers; return 0, or 1 if pip fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"Of: {', '.join(PEERS)} (default: all).")
    names = parser.parse_args(argv).names or list(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(PEERS)}")
    for name in names:
        try:
            print(f"{name}: {install(name)}")
        except subprocess.CalledProcessError as error:
            print(f"Error: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
