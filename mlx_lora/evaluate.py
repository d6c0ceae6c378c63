"""Measure the loss of a model, with or without an adapter, on a data file; or what an adapter made it forget.

python -m mlx_lora.evaluate --model DIR --adapter-path my-adapter --data data/alpaca/valid.jsonl --json
python -m mlx_lora.evaluate --model DIR --adapter-path my-adapter --data my-data --forgetting --report forgetting.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.api.evaluation import check_adapter, measure_loss
from mlx_lora.api.run_columns import with_columns_of_run
from mlx_lora.artifacts.forgetting_page import verdict_rows, write_page
from mlx_lora.data.data_report import UNITS
from mlx_lora.models.load import load_base
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.forgetting_test import CHAT, TEXT, measure_forgetting
from mlx_lora.settings import flags
from mlx_lora.settings.config import TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.system import console, device
from mlx_lora.system.distributed import sharing_ranks
from mlx_lora.system.errors import InputError
from mlx_lora.system.program import this_command
from mlx_lora.system.units import words_of
from mlx_lora.training.drift import NO_CHANGE, SMALL_CHANGE


@click.command(cls=flags.Command)
@flags.settings_options("model", "data", "objective", leave_out=("decode_weights", "valid_fraction", "shared_prefix"))
@flags.adapter_option(help="Adapter folder, or hub id, to put on the model.")
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@flags.ignore_fingerprint_option
@click.option("--batch-tokens", type=click.IntRange(min=2), default=None, help="Tokens per batch, padding included.")
@click.option(
    "--forgetting", is_flag=True, help="Compare with the base on --data, general text and chat, and probe questions."
)
@click.option("--against", multiple=True, help="With --forgetting: another adapter to measure; may be repeated.")
@click.option("--general-text", type=str, default=None, help="With --forgetting: data instead of the built-in texts.")
@click.option("--general-chat", type=str, default=None, help="With --forgetting: data instead of the built-in chats.")
@click.option(
    "--report", type=str, default=None, help="With --forgetting: write an HTML page with charts to this file."
)
@flags.setting_option("shard_base")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    adapter_path: str | None, adapter_revision: str | None, ignore_fingerprint: bool, batch_tokens: int | None,
    forgetting: bool, against: tuple[str, ...], general_text: str | None, general_chat: str | None,
    report: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure loss and perplexity on --data, or with --forgetting what the adapter made the model forget."""
    settings = train_settings(flags.given(options))
    if not settings.data.data:
        raise InputError("--data is required: a data file, or a folder with a test or valid split")
    general = {name: source for name, source in ((TEXT, general_text), (CHAT, general_chat)) if source}
    if not forgetting:
        only = {
            "--against": against,
            "--general-text": general_text,
            "--general-chat": general_chat,
            "--report": report,
        }
        if given := [flag for flag, value in only.items() if value]:
            raise InputError(f"{', '.join(given)}: only with --forgetting; add it")
        adapter = resolve_adapter(adapter_path, adapter_revision)
        check_adapter(settings, adapter)
        settings = with_columns_of_run(settings, flags.given(options), adapter, console.echo)
        with sharing_ranks(settings.loop.shard_base, console.describe_error) as ranks:
            base = load_base(settings.model, read=settings.loop.shard_base == "off")
            result = measure_loss(settings, base, adapter, ignore_fingerprint, batch_tokens, console.echo, ranks)
            if ranks.leads:
                print_loss(settings, result, adapter_path, as_json)
        return
    if settings.loop.shard_base != "off":
        raise InputError("--forgetting with --shard-base: it needs the whole base; leave out one of the two")
    if not adapter_path:
        raise InputError("--forgetting: no adapter; give --adapter-path")
    page = Path(report).expanduser() if report else None
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise InputError(f"--report {report}: not a file in an existing folder; name one, as in forgetting.html")
    adapters = [
        resolve_adapter(adapter_path, adapter_revision),
        *(resolve_adapter(flags.adapter_source(a)) for a in against),
    ]
    settings = with_columns_of_run(settings, flags.given(options), adapters[0], console.echo)
    base = load_base(settings.model)
    found = measure_forgetting(base, adapters, settings.data, general, ignore_fingerprint, batch_tokens, console.echo)
    facts = found.to_dict()
    if page is not None:
        command = this_command()
        write_page(page, facts, (NO_CHANGE, SMALL_CHANGE), command, device.current_device().header())
        console.echo(f"page   {page}")
    if as_json:
        console.print_json(facts)
    else:
        print_table(verdict_rows(facts))


def print_loss(settings: TrainSettings, result: dict[str, Any], adapter_path: str | None, as_json: bool) -> None:
    """Print what `measure_loss` found."""
    if as_json:
        console.print_json({**result, "adapter_path": adapter_path, "data": settings.data.data})
        return
    *means, counted, rows, _ = result.items()
    sampled = settings.objective.samples  # then the loss is minus the reward
    words = ", ".join(
        f"{words_of(name)} {value:.{3 if name == 'perplexity' else 4}f}"
        for name, value in means
        if name != "loss" or not sampled
    )
    unit = UNITS[objective_of(settings.objective).records][: -1 if rows[1] == 1 else None]
    click.echo(f"{words}, {counted[1]} {counted[0].replace('_', ' ')} in {rows[1]} {unit}")


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows of equal columns, each as wide as its widest cell."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for cells in ({name: name for name in rows[0]}, *rows):
        click.echo("  ".join(cells[name].ljust(width) for name, width in widths.items()).rstrip())


if __name__ == "__main__":
    main()
