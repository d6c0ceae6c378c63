"""Merge an adapter into its base model.

python -m mlx_lora fuse --model DIR --adapter-path my-adapter --out fused
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --dequantize
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --fused-bits 8 --data valid.jsonl
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --compensate
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --compensate --bits-budget +10%
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from mlx_lora.api.fused_gain import FADED, NOT_MEASURED, Gain, calibration_tokens, measure_gain
from mlx_lora.cli import options as flags
from mlx_lora.config.load import train_settings
from mlx_lora.data.files import find_sets
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.bits_budget import Budget
from mlx_lora.exporters.fuse import Rounding, Survival, write_fused
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

# A larger error of rounding, relative to the update, is not taken for harmless without measuring.
HARMLESS = 0.05
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
    help="Round so that the layers' outputs on these rows stay, not each weight [default: the run's training rows].",
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(adapter: flags.OneAdapter, out: Path, data: str | None, as_json: bool, **options: Any) -> None:
    """Write --model with the adapter folded in, and measure how much of what the adapter learned is in it."""
    folder, force = adapter.folder(), options.pop("force")
    if folder is None:
        raise InputError("--adapter-path: empty; give the adapter's folder or hub id")
    asked = {name: options.pop(name) for name in ("dequantize", "fused_bits", "compensate", "bits_budget")}
    for given in (data, asked["compensate"]):
        if given:
            find_sets(given)  # refused before the work if it is not there
    budget = Budget.parse(asked["bits_budget"]) if asked["bits_budget"] else None
    settings = train_settings(flags.given(options)).model
    base = load_base(settings)
    info = load_adapter(base, folder, adapter.ignore_fingerprint, scores=None)
    model_id, scores = base.model_id, SCORE_WEIGHT in info.full
    if data and scores:
        raise InputError(
            "--data: a reward model has no loss on answers; leave it out, and use evaluate --objective reward"
        )
    rounding = Rounding(asked["dequantize"], int(asked["fused_bits"] or 0) or None)
    if asked["compensate"] is not None or budget is not None:
        rounding = replace(rounding, compensate=asked["compensate"] is not None, budget=budget)
        rounding.check(base)
        flag = "--compensate" if rounding.compensate else "--bits-budget"
        rounding = replace(rounding, tokens=calibration_tokens(base, folder, asked["compensate"], flag))
    survival = write_fused(base, out, info, rounding, force=force, keep_dtype=settings.dtype != "auto")
    del base  # it is changed, and the next lines load models
    summary = summarize(survival)
    if info.full:
        console.echo(f"{len(info.full)} parameters trained in full are in it unchanged, in float")
    gain: Gain | None = None
    if data or (summary["error_mean"] > HARMLESS and not scores):
        written = partial(load_base, replace(settings, model=str(out), revision=None, bits=None))
        gain = measure_gain(settings, folder, written, data, adapter.ignore_fingerprint)
    console.echo(f"{out}: {words(summary, gain, used_flags(rounding))}")
    if as_json:
        measured = gain.facts() if gain else NOT_MEASURED
        console.print_json(
            {"out": str(out), "model": model_id, "adapter_path": adapter.adapter_path, **summary, **measured}
        )


def summarize(survival: dict[str, Survival]) -> dict[str, Any]:
    """Return the size of the rounding error relative to the update, the layers' mean and the worst layer's, and the bits."""
    if not survival:
        return {"layers": 0, "bits": None, "error_mean": 0.0, "error_most": 0.0, "most_layer": None}
    most = max(survival, key=lambda path: survival[path].error)
    return {
        "layers": len(survival),
        "bits": min((s.bits for s in survival.values() if s.bits), default=None),
        "error_mean": sum(s.error for s in survival.values()) / len(survival),
        "error_most": survival[most].error,
        "most_layer": most,
    }


def words(rounding: dict[str, Any], gain: Gain | None, used: tuple[str, ...] = ()) -> str:
    """Return what became of the adapter as text, with advice if too little of it is left.

    Args:
        rounding: from `summarize`.
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


def used_flags(rounding: Rounding) -> tuple[str, ...]:
    """Return the flags that were given to keep more of an adapter."""
    given = {"--compensate": rounding.compensate, "--bits-budget": rounding.budget is not None}
    return tuple(flag for flag, is_given in given.items() if is_given)


def ways_out(bits: int, used: tuple[str, ...] = ()) -> str:
    """Return what keeps more of an adapter than fused layers of so many bits do, but for what was used already."""
    ways = {
        "--compensate": "`mlx-lora fuse ... --compensate` (the same size)",
        "--bits-budget": "`--compensate --bits-budget +10%` (a little larger)",
        "--fused-bits": "`--fused-bits 8` (larger, much less rounding)" if bits < 8 else "",
        "--dequantize": "`--dequantize` (a float model, without this rounding)",
    }
    named = [
        words for flag, words in ways.items() if words and flag not in used and (bits < 8 or flag == "--dequantize")
    ]
    return (
        f"To keep more: {', '.join(named)}, train with `--qat` or `--method qa-lora`, or leave the adapter apart, as "
        "`mlx-lora serve --adapter` and `mlx-lora export` do"
    )
