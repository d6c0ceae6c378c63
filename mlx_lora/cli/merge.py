"""Merge several adapters of one base into one adapter.

python -m mlx_lora merge --model DIR --adapter bard=0.7 --adapter tutor=0.3 --out both
python -m mlx_lora merge --model DIR --adapter bard=1 --adapter tutor=1 --how ties_svd --density 0.5 --out both
python -m mlx_lora merge --model DIR --adapter bard=1 --how svd --svd-rank 4 --out smaller
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.adapters.merge import ALIASES, COMBINATIONS, SIGNS, MergeSettings
from mlx_lora.api import options as flags
from mlx_lora.api.fuse import check_out, check_weights, merge_adapters
from mlx_lora.cli.evaluate import print_table
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("quantized_matmul", "decode_weights"))
@click.option(
    "--adapter", "--adapter-path", "adapters", multiple=True, required=True, metavar="DIR=WEIGHT",
    help="Adapter folder or hub id, ours, mlx-lm's or PEFT's, and its weight; repeat it for each. Weights need not add up to "
    "1, and may be negative.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Adapter folder to write.")
@click.option(
    "--how", type=click.Choice((*COMBINATIONS, *ALIASES)), default="cat", show_default=True, metavar="NAME",
    help=f"The way of merging, named as in PEFT: one of {', '.join((*COMBINATIONS, *ALIASES))}.",
)  # fmt: skip
@click.option(
    "--density", type=float, default=None,
    help="Share of the numbers that ties, dare and magnitude_prune keep [default: 0.5].",
)  # fmt: skip
@click.option(
    "--svd-rank", type=int, default=None, help="Rank of the result, with svd [default: the adapters' largest]."
)
@click.option("--seed", type=int, default=None, help="Seed of what dare drops [default: 0].")
@click.option(
    "--majority-sign-method", type=click.Choice(SIGNS), default=None,
    help="How ties elects signs: by the sum of the numbers, or by the count of adapters [default: total].",
)  # fmt: skip
@click.option(
    "--data", type=str, default=None,
    help="Measure on these rows [default: what the adapters' runs held out, where it is on this disk].",
)  # fmt: skip
@click.option("--no-evaluate", is_flag=True, help="Measure nothing.")
@click.option("--force", is_flag=True, help="Replace a merged adapter.")
@click.option(
    "--ignore-fingerprint", is_flag=True, help="Use adapters that were trained on another base of the same shape."
)
@flags.json_option({
    "out": "string: the folder of the merged adapter",
    "model": "string: the base",
    "how": "string: how they were merged",
    "adapters": "object: folder or hub id -> weight",
    "rank": "integer: of the merged adapter",
    "layers": "integer: that it is on",
    "losses": "array: for each set of rows the losses of the base, of each adapter, and of the merged one",
    "not_measured": "object: adapter -> why nothing was measured on its rows",
    "density?": "number: share of an adapter's change that was kept",
    "svd_rank?": "integer: of the approximation",
    "seed?": "integer: of what was kept by chance",
    "majority_sign_method?": "string: how signs were elected",
})  # fmt: skip
def main(
    adapters: tuple[str, ...], out: Path, data: str | None, no_evaluate: bool, as_json: bool, **given: Any
) -> None:  # fmt: skip
    """Write one adapter that is the weighted sum of several, or an approximation of it, and measure it beside them."""
    names = ("how", "density", "svd_rank", "seed", "majority_sign_method")
    how = MergeSettings(**{name: given.pop(name) for name in names})
    force, ignore_fingerprint = given.pop("force"), given.pop("ignore_fingerprint")
    check_options("merge", {"data": data, "no_evaluate": no_evaluate})
    of, out = check_weights(weights(adapters)), check_out(out, force)
    base = load_base(train_settings(given).model)
    merged = merge_adapters(base, of, how, out, ignore_fingerprint, data, evaluate=not no_evaluate)
    for name, why in (merged.not_measured or {}).items():
        console.echo(f"Not measured on rows of {name}: {why}; name rows with --data FILE")
    if as_json:
        console.print_json({"out": str(out), "model": base.model_id, **merged.facts()})
    elif losses := merged.losses:
        # A row for each model, a column for each set of rows.
        found = {"base": [one.base for one in losses]}
        found |= {name: [one.adapters[name] for one in losses] for name in losses[0].adapters}
        found[f"merged ({merged.settings.name})"] = [one.merged for one in losses]
        sets = [f"{one.rows} {one.of}" for one in losses]
        print_table([
            {"loss of": name, **{of: f"{loss:.3f}" for of, loss in zip(sets, row, strict=True)}} for name, row in found.items()
        ])  # fmt: skip


def weights(adapters: tuple[str, ...]) -> dict[str, float]:
    """Return the weights by folder or hub id, given the values of --adapter.

    Raises:
        InputError: a value has no weight, or an adapter is given twice.
    """
    found: dict[str, float] = {}
    for text in adapters:
        adapter, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            adapter = ""
        if not adapter:
            raise InputError(
                f"--adapter {text}: has no weight; write DIR=WEIGHT, such as {text.rpartition('=')[2]}=0.5"
            )
        if adapter in found:
            raise InputError(f"--adapter {adapter}: given twice; give it once, with the sum of the weights")
        found[adapter] = weight
    return found
