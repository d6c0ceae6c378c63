"""Train an adapter.

python -m mlx_lora.train --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca --adapter-path my-adapter
python -m mlx_lora.train --model model.Q4_1.gguf --data tiny-shakespeare --adapter-path bard --iters 200
python -m mlx_lora.train --config run.yaml --learning-rate 1e-4
python -m mlx_lora.train --model model.Q4_1.gguf --data chats.csv --dry-run
python -m mlx_lora.train --model model.Q4_1.gguf --data chats.csv --adapter-path shop --json
python -m mlx_lora.train --runs a.yaml b.yaml c.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.cli.forms import DATA_REPORT, PLAN, REPORT, RESULT
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.rules import check_options, idle_notes
from mlx_lora.config.settings import AUTO, MODEL, TRAINING, TrainSettings
from mlx_lora.parallel.ranks import find_launch, together
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.supervise import run_supervised
from mlx_lora.utils.text import counted

RUNS = "--runs"


def _starting() -> None:
    """Say what takes the first seconds, unless it is loaded already."""
    if "mlx_lm" not in sys.modules:
        console.echo("Starting: loading MLX and the libraries for models and tokenizers")


@click.command(cls=flags.SettingsCommand, several=(RUNS,))
@flags.config_option
@click.option(
    RUNS,
    "runs",
    multiple=True,
    cls=console.Option,
    group=MODEL,
    common=False,
    metavar="FILE ...",
    help="Train the runs of several settings files at once, on one base, each as if alone; flags override all files.",
)
@click.option(
    "--dry-run", is_flag=True, cls=console.Option, group=TRAINING,
    help="Report on the data and plan the run as `plan` does; train and write nothing.",
)  # fmt: skip
@flags.json_option(
    {
        "event": "=start: the first line",
        "steps": "integer: updates of the whole run",
        "adapter_path": "string: its folder",
    },
    REPORT,
    {"event": "=end: the last line"} | RESULT,
    PLAN | DATA_REPORT,
    help="Print lines of JSON: the start, each report, and the end with the verdict; with --dry-run one object.",
)
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None, allow_code: bool, runs: tuple[str, ...], dry_run: bool, as_json: bool, **given: Any
) -> int:  # fmt: skip
    """Train an adapter for --model on --data, and write it to --adapter-path."""
    named = {"runs": runs, "config": config_file, "allow_code": allow_code, "dry_run": dry_run, "json": as_json}
    if runs:
        check_options("train", {**given, **named})
        return run_several(runs, given, allow_code)
    settings = train_settings(given, read_settings(config_file, given, allow_code))
    check_options("train", {**settings.to_flat(), **named})
    for note in idle_notes(settings.to_flat(), given):
        console.echo(f"note: {note}")
    if find_launch(dict(os.environ)) is None:  # else each process would say it
        from mlx_lora.data.data_sets import look_at_data  # --help needs none of it

        look_at_data(settings.data.data)  # which --config may name
    try:
        return run(settings, dry_run, as_json)
    except InputError as refused:
        from mlx_lora.data.notes import ToolsNotShown  # slow to import, see `run`

        if not isinstance(refused, ToolsNotShown) or not console.agreed(
            f"The model's chat template does not show the tool calls of {counted(refused.rows, 'row')}. Train with the built-in "
            "template chatml, which does?"
        ):
            raise
        return run(replace(settings, data=replace(settings.data, chat_template="chatml")), dry_run, as_json)


def run_several(
    files: Sequence[str], given: dict[str, Any], allow_code: bool = False
) -> int:  # fmt: skip
    """Train the runs of several settings files, and return the exit code.

    Args:
        files: of --runs.
        given: flags, which override what all files say.
        allow_code: whether the files may name code to run.

    Raises:
        InputError: they cannot be trained together.
        RunError: some of them failed.
    """
    if len(files) < 2:
        raise InputError(f"--runs: found {counted(len(files), 'settings file')}; give two or more, or --config for one")
    if find_launch(dict(os.environ)) is not None:
        raise InputError("--runs: trains in a single process; start it without a launcher")
    settings = [train_settings(given, read_settings(file, given, allow_code)) for file in files]
    _starting()
    from mlx_lora.trainer.header import interrupted_line  # slow to import, see `run`
    from mlx_lora.trainer.several_runs import SeveralRuns, failures

    members = SeveralRuns.open(settings).train()
    for member in members:
        if member.outcome is not None and member.outcome.interrupted:
            console.echo(f"{member.name}: {interrupted_line(str(member.folder), member.outcome)}")
    if failed := failures(members):
        raise failed
    return 130 if any(member.outcome is None or member.outcome.interrupted for member in members) else 0


def run(settings: TrainSettings, dry_run: bool, as_json: bool) -> int:
    """Train, or with --dry-run only plan, and return the exit code."""
    if dry_run:
        _starting()
        from mlx_lora.api.plan import dry_run as dry_plan
        from mlx_lora.cli.plan import render_plan

        planned = dry_plan(settings)
        console.print_json(planned) if as_json else click.echo(render_plan("plan", planned))
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
        from mlx_lora.reports.run_report import read_result
        from mlx_lora.trainer.callbacks import JsonLines
        from mlx_lora.trainer.header import interrupted_line
        from mlx_lora.trainer.progress import LiveProgress
        from mlx_lora.trainer.run import train_run

        base = None
        if settings.optimizer.learning_rate == AUTO:
            from mlx_lora.trainer.sweep import Interrupted, find_learning_rate

            try:
                settings, base = find_learning_rate(settings, ranks)
            except Interrupted:
                console.echo(
                    "Interrupted while learning rates were tried; the same command with --resume goes on from there"
                )
                return 130
        show = LiveProgress if sys.stderr.isatty() else None
        outcome = train_run(settings, ranks, show, base, [JsonLines()] if as_json else [])
        if as_json and ranks.leads:
            console.print_json({"event": "end", **read_result(Path(settings.loop.adapter_path))})
        if outcome.interrupted:
            console.echo(interrupted_line(settings.loop.adapter_path, outcome))
    return 130 if outcome.interrupted else 0
