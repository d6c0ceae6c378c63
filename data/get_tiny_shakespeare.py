"""Fetch Tiny Shakespeare and print where it is: `python data/get_tiny_shakespeare.py`.

Training does this by itself: `python -m mlx_lora.train --data tiny-shakespeare ...`.
"""

import sys

from mlx_lora.system.errors import InputError
from mlx_lora.sources.shakespeare import tiny_shakespeare

if __name__ == "__main__":
    try:
        print(tiny_shakespeare())
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
