"""Try an architecture of mlx-lm or mlx-vlm on its first day: a tiny random model of it goes through all stages of the sweep.

python scripts/new_architecture.py qwen4_exp     what is found, and a measured gradient
python scripts/new_architecture.py --new         all of both packages that docs/models.md does not name

The configuration is made from the settings that the module reads. If it does not fit (an error names what is missing), add what the
family needs to CHANGES in tests/architectures/vlm.py. A family that transformers has is compared with it, which needs torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from architectures.build import tiny_architecture, tiny_config
from architectures.configs import CONFIGS, architecture_modules
from architectures.sweep import try_architecture
from architectures.table import images_text, read_found, row_of, saved_text
from architectures.trial import batch, naive_loss
from architectures.vlm import CHANGES

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.kernels.measure import left_unchanged

STEP = 3e-5  # along the gradient, as a share of the size of the factors: a larger one changes which experts and keys are chosen


def measured_gradient(name: str) -> float:
    """Return the slope of the loss along its gradient, from two losses, as a share of the gradient's size: 1 if it is right."""
    model = tiny_architecture(name)
    adapt_model(model, AdapterSettings(rank=4), seed=0)
    mx.random.seed(1)
    factors = tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(factors)
    arrays = batch(256)
    with left_unchanged(model):
        _, gradient = nn.value_and_grad(model, naive_loss)(model, arrays)
    size, length = (
        mx.sqrt(sum(mx.square(value).sum() for _, value in tree_flatten(tree))).item() for tree in (gradient, factors)
    )
    step, losses = STEP * length / max(size, 1e-30), []
    for sign in (1, -1):
        model.update(tree_map(lambda p, g, sign=sign: p + sign * step * g, factors, gradient))
        losses.append(naive_loss(model, arrays).item())
    return (losses[0] - losses[1]) / (2 * step * size * size)


@click.command()
@click.option("--new", is_flag=True, help="All that docs/models.md does not name.")
@click.argument("names", nargs=-1)
def main(new: bool, names: Sequence[str]) -> None:
    """Print what is found of each architecture; exit with 1 if one is not right."""
    known, bad = {*CONFIGS, *CHANGES, *read_found().rows}, 0
    for name in [*names, *(name for name in architecture_modules() if new and name not in known)]:
        try:
            tiny_config(name)
            result = try_architecture(name, tied=False)
        except Exception as error:  # whatever a new module raises is what this prints
            click.echo(
                f"| {name} | | no configuration | {type(error).__name__}: {' '.join(str(error).split())[:200]} | | |"
            )
            bad += 1
            continue
        row = row_of(name, [result])
        click.echo(f"| {name} | | {row.verdict} | {row.text} | {images_text([result])} | {saved_text([result])} |")
        bad += not row.verdict.startswith("right")
        if row.verdict.startswith("right"):
            click.echo(f"    slope along the gradient, measured: {measured_gradient(name):.3f} of its size")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
