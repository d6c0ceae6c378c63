"""Measure the loss of a model, with or without an adapter, on a data file.

python -m mlx_lora.evaluate --model DIR --adapter-path my-adapter --data data/alpaca/valid.jsonl --json
"""

from __future__ import annotations

from typing import Any

import click

from mlx_lora import cli
from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.config import DEFAULT_BATCH_TOKENS, train_settings
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.loading import load_eval_set
from mlx_lora.errors import InputError
from mlx_lora.models.load import load_base
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.training.losses import choose_loss
from mlx_lora.training.trainer import mean_loss


@click.command(cls=cli.Command)
@cli.settings_options("model", "data", leave_out=("valid_fraction",))
@click.option("--adapter-path", type=str, default=None, help="Adapter folder, or hub id, to put on the model.")
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@click.option("--ignore-fingerprint", is_flag=True, help="Use the adapter on another base of the same shape.")
@click.option("--batch-tokens", type=click.IntRange(min=2), default=None, help="Tokens per batch, padding included.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    adapter_path: str | None,
    adapter_revision: str | None,
    ignore_fingerprint: bool,
    batch_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print loss, perplexity and the count of supervised tokens of --data."""
    settings = train_settings(cli.given(options))
    if not settings.data.data:
        raise InputError("--data: missing; give a data file, or a folder with a test or valid split")
    adapter = resolve_adapter(adapter_path, adapter_revision)
    base = load_base(settings.model)
    template = load_adapter(base, adapter, ignore_fingerprint).chat_template if adapter else None
    if template and not settings.data.chat_template:
        base.hf_tokenizer.chat_template = template
    rows = load_eval_set(settings.data.data, settings.data, base.hf_tokenizer, cli.echo)
    plan = BatchPlan(rows, batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
    loss, tokens = mean_loss(base.model, choose_loss(base.model, base.config).measure, plan.batches())
    result = {"loss": loss, "perplexity": cli.perplexity(loss), "supervised_tokens": tokens, "rows": len(rows)}
    if as_json:
        cli.print_json({**result, "model": base.model_id, "adapter_path": adapter_path, "data": settings.data.data})
    else:
        click.echo(
            f"loss {loss:.4f}, perplexity {result['perplexity']:.3f}, {tokens} supervised tokens in {len(rows)} rows"
        )


if __name__ == "__main__":
    main()
