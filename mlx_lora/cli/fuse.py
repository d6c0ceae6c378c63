"""Merge an adapter into its base model.

python -m mlx_lora fuse --model DIR --adapter-path my-adapter --out fused
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --dequantize
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --fused-bits 8 --data valid.jsonl
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --compensate train.jsonl
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --compensate train.jsonl --bits-budget +10%
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.fuse import FADED, NOT_MEASURED, FuseSettings, Gain, fuse
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.data.data_sets import find_sets
from mlx_lora.exporters.rounding import Budget
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

FUSED_BITS = ("5", "6", "8")


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("quantized_matmul", "decode_weights"))
@flags.adapter_options(required=True, help="Adapter folder or hub id, ours, mlx-lm's or PEFT's.")
@click.option("--out", "--save-path", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dequantize",
    is_flag=True,
    help="Write a float model for a quantized base, so that nothing of the update is lost.",
)
@click.option(
    "--fused-bits",
    type=click.Choice(FUSED_BITS),
    default=None,
    help="Bits of the layers that have an update, if --model has fewer [default: those of --model].",
)
@click.option(
    "--compensate",
    type=str,
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[DATA]",
    help="Round so that each layer's outputs on these rows stay close [default: the run's training rows, if they "
    "are on this disk].",
)
@click.option(
    "--no-compensate", is_flag=True, help="Round each weight separately, even if the run's rows are on this disk."
)
@click.option(
    "--bits-budget",
    type=str,
    default=None,
    metavar="SIZE",
    help="Give the layers that lose most 5, 6 or 8 bits, within this size of the model: 120MB, or +10%.",
)
@click.option(
    "--data",
    type=str,
    default=None,
    help="Measure on these rows what the fused model keeps [default: what the adapter's run held out, if it is there].",
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@flags.json_option({
    "out": "string: the folder of the fused model",
    "model": "string: the base",
    "adapter_path": "string: as it was given",
    "layers": "integer: layers that were rounded",
    "bits": "integer|null: least bits of a rounded layer",
    "error_mean": "number: mean rounding error as a share of the adapter's change",
    "error_most": "number: that of the worst layer",
    "most_layer": "string|null: the worst layer",
    "loss_base": "number|null: without the adapter; all losses are null if nothing needed to be measured",
    "loss_adapter": "number|null: with the adapter beside the base",
    "loss_fused": "number|null: of the fused model",
    "kept": "number|null: share of the adapter's gain that the fused model has; low: see docs/adapters.md",
    "kl": "number|null: divergence of the fused model from the adapted one, in nats per token",
    "general": "string|null: why general texts were measured instead of rows of the run",
    "rows": "integer: rows that were measured",
    "of": "string|null: where they come from",
})  # fmt: skip
def main(adapter: flags.OneAdapter, out: Path, data: str | None, as_json: bool, **given: Any) -> None:
    """Merge the adapter into --model, and measure how much of what it learned is kept."""
    folder, force = adapter.folder(), given.pop("force")
    if folder is None:
        raise InputError("--adapter-path: empty; give the adapter's folder or hub id")
    check_options("fuse", given | {"compensate": given["compensate"] is not None})
    dequantize, bits, rows, plain, size = (
        given.pop(name) for name in ("dequantize", "fused_bits", "compensate", "no_compensate", "bits_budget")
    )
    for source in filter(None, (data, rows)):
        find_sets(source)  # refused before the work if it is not there
    compensate = False if plain else True if rows is not None else None
    budget = Budget.parse(size) if size else None
    asked = FuseSettings(out, dequantize, int(bits or 0) or None, compensate, rows or None, budget, data, force)
    fused = fuse(train_settings(given).model, folder, asked, adapter.ignore_fingerprint)
    if fused.full:
        console.echo(f"{fused.full} parameters trained in full are in it unchanged, in float")
    summary, gain = fused.summary(), fused.gain
    given = {"--compensate": fused.rounding.compensate, "--bits-budget": fused.rounding.budget is not None}
    console.echo(f"{out}: {words(summary, gain, tuple(flag for flag, is_given in given.items() if is_given))}")
    if as_json:
        measured = {**asdict(gain), "kept": gain.kept} if gain else NOT_MEASURED
        console.print_json(
            {"out": str(out), "model": fused.model_id, "adapter_path": adapter.adapter_path, **summary, **measured}
        )


def words(rounding: dict[str, Any], gain: Gain | None, used: tuple[str, ...] = ()) -> str:
    """Return what became of the adapter as text, with advice if too little of it is left.

    Args:
        rounding: from `Fused.summary`.
        gain: what was measured; None: nothing needed to be.
        used: flags that were given to keep more.
    """
    error, bits = rounding["error_mean"], rounding["bits"]
    size = f"{error:.0f} times" if error >= 9.95 else f"{error:.1f} times" if error >= 1 else f"{error:.1%} of"
    kind = f"rounding to {bits} bits" if bits else "rounding"
    line = f"{rounding['layers']} layers fused; "
    if gain is None:
        return f"{line}{kind} adds an error of {size} the update's size"
    if gain.general is not None:
        line += f"{kind} adds an error of {size} the update's size; "
        return line + gain.words() + (f". {ways_out(bits, used)}" if bits else "")
    if bits is None or gain.kept is None or gain.kept >= FADED:
        return line + gain.words()
    return f"{line}{gain.words()}. Warning: that is less than {FADED:.0%}. {ways_out(bits, used)}"


def ways_out(bits: int, used: tuple[str, ...] = ()) -> str:
    """Return what keeps more of an adapter than fused layers of so many bits do, but for what was used already."""
    ways = {
        "--compensate": "`mlx-lora fuse ... --compensate FILE`, with rows like those of the run (the same size)",
        "--bits-budget": "`--compensate --bits-budget +10%` (a little larger)",
        "--fused-bits": "`--fused-bits 8` (larger, much less rounding)" if bits < 8 else "",
        "--dequantize": "`--dequantize` (a float model, without this rounding)",
    }
    named = [
        words for flag, words in ways.items() if words and flag not in used and (bits < 8 or flag == "--dequantize")
    ]
    return (
        f"To keep more: {', '.join(named)}, train with `--qat` or `--method qa-lora`, or leave the adapter apart, as "
        "`mlx-lora generate --adapter-path` does"
    )
