"""Show the whole path on a small real model: fetch it, ask it, train it on verse, and ask it again.

python -m mlx_lora demo
python -m mlx_lora demo --out somewhere --force
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.demo import ITERS, OUT, run_demo


@click.command(cls=flags.ShortCommand)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=OUT,
    show_default=True,
    help="Folder for the model and the run.",
)
@click.option("--model", default=None, help="Another chat model instead of SmolLM2-135M: hub id, folder or .gguf file.")
@click.option("--iters", type=click.IntRange(min=1), default=ITERS, show_default=True, help="Optimizer steps.")
@click.option("--force", is_flag=True, help="Train again if --out already holds a demo's run.")
def main(**given: Any) -> int:
    """Train a small model to answer in verse, and show its answers before and after (two to six minutes on two CPU cores).

    To continue a demo that was interrupted, start it again with the same --out.
    """
    return run_demo(**given)
