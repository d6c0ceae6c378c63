"""Train a grid of learning rates and seeds in full, and replay which rate a sweep of less work would have chosen.

    python benchmarks/learning_rates.py --model MODEL --data chats.jsonl --folder grid --out learning-rates.json

All rates of a seed train in one pass (`train --runs`), each as if alone, and measure the held-out rows every few steps. A sweep's trials
are the same runs, stopped earlier, so what it would have chosen can be read from these curves: candidates are ranked by their mean
held-out loss over the seeds at the ends of its rounds. A group that is done is not trained again. Ends with a table and one line of JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _harness import environment, options, record, say, table

from mlx_lora.config.load import train_settings
from mlx_lora.trainer.several_runs import SeveralRuns, failures
from mlx_lora.trainer.sweep import held_out_curve
from mlx_lora.utils import console

OPTIONS = (
    ("--model", ..., "Folder, hub id or GGUF file of the base."),
    ("--data", ..., "Training data, with validation rows."),
    ("--chat-template", str, "As of `train`."),
    ("--folder", ..., "Folder of the runs."),
    ("--low", 5e-5, "Lowest learning rate."),
    ("--high", 1e-2, "Highest learning rate."),
    ("--rates", 12, "Rates, with equal ratios."),
    ("--seeds", 2, "Seeds of each rate."),
    ("--steps", 32, "Steps of a run."),
    ("--rows", 4, "Rows of a step."),
    ("--every", 4, "Steps between validations."),
    ("--out", str, "JSON file of everything."),
)
# Rounds as (candidates of 12, share of a run), and their names.
PLANS = {
    "one round": ((1.0, 1 / 8),),
    "two rounds, three times as far": ((1.0, 1 / 8), (1 / 3, 3 / 8)),
    "three rounds, twice as far": ((1.0, 1 / 8), (1 / 3, 1 / 4), (1 / 6, 1 / 2)),
}


def rates_of(args: argparse.Namespace) -> list[float]:
    """Return the rates of the grid."""
    ratio = args.high / args.low
    return [float(f"{args.low * ratio ** (n / (args.rates - 1)):.3g}") for n in range(args.rates)]


def train_seed(args: argparse.Namespace, seed: int) -> None:
    """Train all rates with a seed, unless they are done."""
    runs = []
    for number, rate in enumerate(rates_of(args)):
        flat = {
            "model": args.model, "data": args.data, "adapter_path": str(folder_of(args, seed, number)), "learning_rate": rate, "seed": seed,
            "iters": args.steps, "batch_size": args.rows, "steps_per_eval": args.every, "steps_per_report": args.every,
            "val_batches": -1, "save_every": 0, "sample_tokens": 0, "force": True, "chat_template": args.chat_template,
        }  # fmt: skip
        runs.append(train_settings(flat))
    curves = [held_out_curve(Path(run.loop.adapter_path)) for run in runs]
    if all(curve and curve[-1][0] == args.steps for curve in curves):
        say(f"seed {seed}: done before")
        return
    with console.log_to(None):
        failed = failures(SeveralRuns.open(runs).train())
    say(f"seed {seed}: {failed or 'done'}")


def folder_of(args: argparse.Namespace, seed: int, number: int) -> Path:
    """Return the folder of a run."""
    return Path(args.folder) / f"seed{seed}-{number:02d}"


def replayed(means: list[dict[int, float]], plan: tuple[tuple[float, float], ...], steps: int) -> tuple[int, float]:
    """Return the rate that a sweep would have chosen, and its work in runs of all, the winner's own run included.

    Args:
        means: of each rate, step -> mean held-out loss over the seeds.
        plan: rounds as in PLANS.
        steps: of a run.
    """
    left, work, before = list(range(len(means))), 0.0, 0
    for share, until in plan:
        at = round(until * steps)
        left = sorted(left, key=lambda one: means[one][before] if before else 0)[: max(2, round(share * len(means)))]
        work, before = work + len(left) * (at - before) / steps, at
    return min(left, key=lambda one: means[one][before]), work


def main() -> None:
    """Train the grid, replay sweeps, and print both."""
    args = options(__doc__, *OPTIONS).parse_args()
    for seed in range(args.seeds):
        train_seed(args, seed)
    rates = rates_of(args)
    curves = [[dict(held_out_curve(folder_of(args, s, n))) for s in range(args.seeds)] for n in range(args.rates)]
    steps = sorted(curves[0][0])
    means = [{at: sum(seed.get(at, float("inf")) for seed in one) / args.seeds for at in steps} for one in curves]
    final = [mean[steps[-1]] for mean in means]
    best = min(range(args.rates), key=final.__getitem__)
    say(
        table(
            ["rate", *(f"step {at}" for at in steps)],
            [[f"{rate:.3g}", *(f"{mean[at]:.3f}" for at in steps)] for rate, mean in zip(rates, means, strict=True)],
        )
    )
    found: list[dict[str, Any]] = []
    for name, plan in PLANS.items():
        chosen, work = replayed(means, plan, args.steps)
        share = (work * args.seeds + 1) / (args.rates * args.seeds)
        found.append(
            {
                "sweep": name,
                "rate": rates[chosen],
                "work": share,
                "loss": final[chosen],
                "above": final[chosen] / final[best] - 1,
            }
        )
    rows = [
        [one["sweep"], f"{one['rate']:.3g}", f"{one['work']:.0%}", f"{one['loss']:.4f}", f"{one['above']:.1%}"]
        for one in found
    ]
    say(table(["sweep", "rate", "work of the grid", "loss", "above the best"], rows))
    facts = {
        "rates": rates,
        "seeds": args.seeds,
        "best": rates[best],
        "best_loss": final[best],
        "means": means,
        "sweeps": found,
    }
    record({**environment(), **facts}, args.out, facts)


if __name__ == "__main__":
    main()
