"""Merge an adapter into its base model.

python -m mlx_lora fuse --model DIR --adapter-path my-adapter --out fused
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --dequantize
python -m mlx_lora fuse --model DIR-4bit --adapter-path my-adapter --out fused --fused-bits 8 --data valid.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.api.fused_gain import NOT_MEASURED, Gain, measure_gain
from mlx_lora.cli import options as flags
from mlx_lora.config.load import train_settings
from mlx_lora.data.files import find_sets
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.fuse import Survival, write_fused
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

# A larger error of rounding, relative to the update, is not taken for harmless without measuring.
HARMLESS = 0.05
# If the fused model keeps less of the gain than this, the ways out are named.
FADED = 0.9
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
    "--data",
    type=str,
    default=None,
    help="Measure on these rows what the fused model keeps [default: what the adapter's run held out, if it is there].",
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    adapter: flags.OneAdapter, out: Path, dequantize: bool, fused_bits: str | None, data: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Write --model with the adapter folded in, and measure how much of what the adapter learned is in it."""
    folder, force = adapter.folder(), options.pop("force")
    if folder is None:
        raise InputError("--adapter-path: empty; give the adapter's folder or hub id")
    if data:
        find_sets(data)  # refused before the work if it is not there
    settings = train_settings(flags.given(options)).model
    base = load_base(settings)
    info = load_adapter(base, folder, adapter.ignore_fingerprint, scores=None)
    model_id, scores = base.model_id, SCORE_WEIGHT in info.full
    if data and scores:
        raise InputError(
            "--data: a reward model has no loss on answers; leave it out, and use evaluate --objective reward"
        )
    survival = write_fused(
        base,
        out,
        info,
        dequantize=dequantize,
        force=force,
        keep_dtype=settings.dtype != "auto",
        bits=int(fused_bits) if fused_bits else None,
    )
    del base  # it is changed, and the next lines load models
    rounding = summarize(survival)
    if info.full:
        console.echo(f"{len(info.full)} parameters trained in full are in it unchanged, in float")
    gain: Gain | str | None = None
    if data or (rounding["error_mean"] > HARMLESS and not scores):
        gain = measure_gain(settings, folder, out, data, adapter.ignore_fingerprint)
    console.echo(f"{out}: {words(rounding, gain)}")
    if as_json:
        measured = gain.facts() if isinstance(gain, Gain) else NOT_MEASURED
        console.print_json(
            {"out": str(out), "model": model_id, "adapter_path": adapter.adapter_path, **rounding, **measured}
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


def words(rounding: dict[str, Any], gain: Gain | str | None) -> str:
    """Return what became of the adapter as text, with advice if too little of it is left.

    Args:
        rounding: from `summarize`.
        gain: what was measured, or why nothing was; None: nothing needed to be.
    """
    error, bits = rounding["error_mean"], rounding["bits"]
    size = f"{error:.0f} times" if error >= 9.95 else f"{error:.1f} times" if error >= 1 else f"{error:.1%} of"
    kind = f"rounding to {bits} bits" if bits else "rounding"
    line = f"{rounding['layers']} layers fused; "
    if isinstance(gain, Gain):
        if bits is None or gain.kept is None or gain.kept >= FADED:
            return line + gain.words()
        return f"{line}{gain.words()}. {_ways_out(bits)}"
    line += f"{kind} adds an error of {size} the update's size"
    if gain is not None:
        line += f"; what this costs was not measured, because {gain}: measure it with --data FILE"
    return line if gain is None or bits is None else f"{line}. {_ways_out(bits)}"


def _ways_out(bits: int) -> str:
    """Return what keeps more of an adapter than fused layers of so many bits do."""
    more = "--fused-bits 8 (larger, much less rounding), " if bits < 8 else ""
    return (
        f"To keep more: --dequantize (a float model, without this rounding), {more}or leave the adapter apart, as "
        "`mlx-lora serve --adapter` and `mlx-lora export` do"
    )
