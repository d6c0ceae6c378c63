"""Find good settings by many short runs at once, and train the best ones in full.

python -m mlx_lora sweep --model smollm2 --data chats.jsonl --out rates
python -m mlx_lora sweep --config run.yaml --vary learning_rate=5e-5..2e-3 --vary rank=8,16,32 --seeds 2 --budget 4x --out found
python -m mlx_lora sweep --config run.yaml --vary learning_rate=5e-5..2e-3 --out found --resume
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import MODEL
from mlx_lora.config.sweep import BUDGET, SET_BY_SWEEP, read_budget
from mlx_lora.utils import console


@click.command(cls=flags.SettingsCommand)
@flags.config_option
@click.option(
    "--vary", multiple=True, cls=console.Option, group=MODEL, metavar="NAME=VALUES",
    help="Setting and its values: learning_rate=5e-5..2e-3 (each about twice the one before), learning_rate=5e-5..2e-3/12 (twelve), or "
    "rank=8,16,32; repeat it for each setting [default: learning rates from an eighth to four times the default].",
)  # fmt: skip
@click.option(
    "--seeds", type=int, default=1, show_default=True, cls=console.Option, group=MODEL, metavar="N",
    help="Runs of each candidate, with seeds from --seed on.",
)  # fmt: skip
@click.option(
    "--budget", type=str, default=f"{BUDGET:g}x", show_default=True, cls=console.Option, group=MODEL, metavar="Nx",
    help="Work of the whole sweep, in full runs, including the best candidate's own run.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, cls=console.Option, group=MODEL,
    help="Folder to write: winner/ (a run folder), sweep.html, sweep.json, and the trials.",
)  # fmt: skip
@click.option("--resume", is_flag=True, cls=console.Option, group=MODEL, help="Go on with the sweep in --out.")
@click.option("--force", is_flag=True, cls=console.Option, group=MODEL, help="Replace the sweep in --out.")
@flags.json_option({
    "out": "string: the folder; its winner/ is the best candidate's run",
    "best": "object: the settings of the best candidate",
    "val_loss": "number|null: held-out loss of the best candidate's run",
    "val_score": "number|null: its score, if candidates were compared by one",
    "table": "array: all candidates",
    "advice": "string: what to do next",
})  # fmt: skip
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop", leave_out=SET_BY_SWEEP)
def main(
    config_file: str | None, vary: tuple[str, ...], seeds: int, budget: str, out: Path, resume: bool, as_json: bool, **given: Any
) -> int:  # fmt: skip
    """Train all combinations of the values for a few steps, the better ones for more, and the best one in full."""
    force, allow_code = given.pop("force"), given.pop("allow_code")
    check_options("sweep", {"config": config_file, "allow_code": allow_code})
    content = {
        name: value for name, value in read_settings(config_file, given, allow_code).items() if name not in SET_BY_SWEEP
    }
    settings = train_settings(given, content)
    amount = read_budget(budget)
    from mlx_lora.api.train import SweepJob  # slow to import, and --help does not need it
    from mlx_lora.reports.sweep_page import advice
    from mlx_lora.trainer.progress import LiveProgress
    from mlx_lora.trainer.sweep import Interrupted

    job = SweepJob(settings, out, vary, seeds, amount, resume, force)
    try:
        outcome = job.run(show=LiveProgress if sys.stderr.isatty() else None)
        interrupted = outcome.interrupted
    except Interrupted:
        interrupted = True
    if interrupted:
        console.echo(f"Interrupted; everything is saved. The same command with --resume goes on from there ({out})")
        return 130
    compared = job.sweep.compared()
    console.echo(f"{out / 'sweep.html'} compares all candidates, and {out / 'winner'} is the best one's run")
    if as_json:
        best = compared.candidates[compared.winner or 0]
        console.print_json(
            {
                "out": str(out),
                "best": best,
                "val_loss": compared.val_loss,
                "val_score": compared.val_score,
                "table": compared.table(),
                "advice": advice(compared),
            }
        )
    return 0
