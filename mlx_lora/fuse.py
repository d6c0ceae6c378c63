"""Merge an adapter into its base model.

python -m mlx_lora.fuse --model DIR --adapter-path my-adapter --out fused
python -m mlx_lora.fuse --model DIR-4bit --adapter-path my-adapter --out fused --dequantize
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.artifacts.fused_model import Survival, write_fused
from mlx_lora.models.load import load_base
from mlx_lora.settings import flags
from mlx_lora.settings.resolve import train_settings
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.system import console

# If less than this share of the update survives, a fused model is not the one that was trained.
FADED = 0.9


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("quantized_matmul", "decode_weights"))
@flags.adapter_option(required=True, help="Adapter folder or hub id, ours, mlx-lm's or PEFT's.")
@click.option("--out", "--save-path", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dequantize",
    is_flag=True,
    help="Write a float model for a quantized base, so that nothing of the update is lost.",
)
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@flags.ignore_fingerprint_option
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    adapter_path: str,
    adapter_revision: str | None,
    out: Path,
    dequantize: bool,
    ignore_fingerprint: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write --model with the adapter folded in, and print how much of the adapter's effect survived."""
    adapter = resolve_adapter(adapter_path, adapter_revision)
    settings = train_settings(flags.given(options)).model
    base = load_base(settings)
    info = load_adapter(base, adapter, ignore_fingerprint, scores=None)
    survival = write_fused(
        base,
        out,
        dequantize=dequantize,
        force=force,
        chat_template=info.chat_template,
        full=info.full,
        keep_dtype=settings.dtype != "auto",
    )
    summary = summarize(survival)
    if info.full:
        console.echo(f"{len(info.full)} parameters trained in full are in it unchanged, in float")
    console.echo(f"{out}: {words(summary)}")
    if as_json:
        console.print_json({"out": str(out), "model": base.model_id, "adapter_path": adapter_path, **summary})


def summarize(survival: dict[str, Survival]) -> dict[str, Any]:
    """Return means and the worst layer; without layers, all of the update survived."""
    if not survival:
        return {"layers": 0, "kept_mean": 1.0, "kept_least": 1.0, "least_layer": None, "error_mean": 0.0}
    least = min(survival, key=lambda path: survival[path].kept)
    return {
        "layers": len(survival),
        "kept_mean": sum(s.kept for s in survival.values()) / len(survival),
        "kept_least": survival[least].kept,
        "least_layer": least,
        "error_mean": sum(s.error for s in survival.values()) / len(survival),
    }


def words(summary: dict[str, Any]) -> str:
    """Return the survival of the adapter as text, with advice if too little survived."""
    worst = f" (worst layer: {summary['kept_least']:.0%}, {summary['least_layer']})" if summary["layers"] else ""
    error = summary["error_mean"]
    size = f"{error:.0f}x" if error >= 9.95 else f"{error:.1f}x" if error >= 1 else f"{error:.1%} of"
    line = (
        f"{summary['layers']} layers fused; {summary['kept_mean']:.0%} of the adapter's effect survived{worst}. "
        f"Rounding error is {size} the update"
    )
    if summary["kept_least"] < FADED:
        line += "; use --dequantize, or keep the adapter separate"
    return line


if __name__ == "__main__":
    main()
