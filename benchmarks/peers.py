"""Install the trainers that versus.py compares with, each in a Python environment of its own in our cache folder.

    python benchmarks/peers.py                  # all
    python benchmarks/peers.py mlx-lm-lora

Versions are pinned in _peers.py. TRL and PEFT are installed beside us: `pip install trl peft torch`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from _peers import PEERS, install


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
