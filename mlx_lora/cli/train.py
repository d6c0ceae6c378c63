"""Train an adapter.

python -m mlx_lora.train --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca --adapter-path my-adapter
python -m mlx_lora.train --model model.Q4_1.gguf --data tiny-shakespeare --adapter-path bard --iters 200
python -m mlx_lora.train --config run.yaml --learning-rate 1e-4
python -m mlx_lora.train --model model.Q4_1.gguf --data chats.csv --dry-run
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click

from mlx_lora.cli import options as flags
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import TRAINING, TrainSettings
from mlx_lora.parallel.launch import together
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.supervise import run_supervised
from mlx_lora.utils.text import counted


def _starting() -> None:
    """Say what takes the first seconds, unless it is loaded already."""
    if "mlx_lm" not in sys.modules:
        console.echo("Starting: loading MLX and the libraries for models and tokenizers")


@click.command(cls=flags.SettingsCommand)
@flags.config_option
@click.option(
    "--dry-run", is_flag=True, cls=console.Option, group=TRAINING,
    help="Report on the data and plan the run as `plan` does; train and write nothing.",
)  # fmt: skip
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(config_file: str | None, dry_run: bool, **options: Any) -> int:
    """Train an adapter for --model on --data, and write it to --adapter-path."""
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given))
    try:
        return run(settings, dry_run)
    except InputError as refused:
        from mlx_lora.data.notes import ToolsNotShown  # slow to import, see `run`

        if not isinstance(refused, ToolsNotShown) or not console.agreed(
            f"The model's chat template does not show the tool calls of {counted(refused.rows, 'row')}. Train with the built-in "
            "template chatml, which does?"
        ):
            raise
        return run(replace(settings, data=replace(settings.data, chat_template="chatml")), dry_run)


def run(settings: TrainSettings, dry_run: bool) -> int:
    """Train, or with --dry-run only plan, and return the exit code."""
    if dry_run:
        _starting()
        from mlx_lora.api.dry_run import dry_run as dry_plan
        from mlx_lora.cli.plan import render

        click.echo(render(dry_plan(settings)))
        return 0
    if settings.loop.max_restarts:
        run_supervised(settings.loop.max_restarts)
    if settings.loop.short_buffers:
        device.restart_with_short_buffers()
    if settings.loop.shard_base != "off":
        device.plan_whole_graphs()
    with together(console.describe_error) as ranks:
        _starting()
        # These take seconds, so they are imported when the user knows that something happens.
        from mlx_lora.trainer.header import interrupted_line
        from mlx_lora.trainer.progress import LiveProgress
        from mlx_lora.trainer.run import train_run

        outcome = train_run(settings, ranks, LiveProgress if sys.stderr.isatty() else None)
        if outcome.interrupted:
            console.echo(interrupted_line(settings.loop.adapter_path, outcome))
    return 130 if outcome.interrupted else 0
