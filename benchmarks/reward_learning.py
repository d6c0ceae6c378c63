"""Train a recipe of sampled answers with several seeds, and compare held-out rewards, part by part, before and after.

    mlx-lora convert --model smollm2 --no-quantize --out dense
    python benchmarks/reward_learning.py --model dense --out reward_learning.json
    python benchmarks/reward_learning.py --model dense --seeds 0 --flags "--iters 20"

Each seed is one `mlx-lora train --config arithmetic-grpo --seed N`, as a user starts it. Afterwards the base and every
adapter answer the prompts of the recipe's test file, with the same random streams: --answers sampled answers to each,
and one greedy answer. Prints a table and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _ours import read_metrics
from _processes import ChildFailed, run_child

SIDE = Path(__file__).parent / "sides" / "reward_parts.py"
BASE = "base"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="Base model; on a CPU a float one samples faster.")
    parser.add_argument("--config", default="arithmetic-grpo", help="A recipe, or a settings file with a test split.")
    parser.add_argument("--seeds", default="0,1,2", help="Of the runs, separated by commas.")
    parser.add_argument("--flags", default="", help="More flags of `mlx-lora train`, in one string.")
    parser.add_argument("--answers", type=int, default=16, help="Sampled answers to each held-out prompt.")
    parser.add_argument("--timeout", type=float, default=7200, help="Seconds allowed for each process.")
    parser.add_argument("--out", help="JSON file of everything.")
    parser.add_argument("--keep", help="Folder to keep runs and logs in (default: a temporary one).")
    parser.add_argument("--reuse", action="store_true", help="Take the runs that are in --keep instead of training.")
    args = parser.parse_args(argv)
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}: write whole numbers separated by commas")
    if args.reuse and not args.keep:
        parser.error("--reuse: give the folder of the runs with --keep")
    if args.answers < 1:
        parser.error(f"--answers {args.answers}: give 1 or more")
    return args


def train(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Train with one seed, unless its run is to be reused, and return what the run cost.

    Raises:
        ChildFailed: the run ended with an error.
    """
    if args.reuse and (folder / f"seed{seed}" / "adapters.safetensors").is_file():
        return cost(read_metrics(folder / f"seed{seed}"))
    command = [sys.executable, "-m", "mlx_lora.train", "--config", args.config, "--model", args.model]
    command += ["--adapter-path", str(folder / f"seed{seed}"), "--seed", str(seed), "--force", *shlex.split(args.flags)]
    run_child(command, folder / f"seed{seed}.log", timeout_s=args.timeout)
    return {**cost(read_metrics(folder / f"seed{seed}")), "command": command}


def cost(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's steps and seconds, its rates, and its rewards on the way, from the lines of metrics.jsonl."""
    trained = [record for record in records if record["loss"] is not None]
    return {
        "steps": trained[-1]["step"],
        "seconds": records[-1]["elapsed_s"],
        "rollout_tokens_per_s": statistics.median(record["rollout_tokens_per_s"] for record in trained),
        "rollout_share": statistics.median(record["rollout_share"] for record in trained),
        "trained_rewards": [(record["step"], record["reward"]) for record in trained],
        "validation_rewards": [(record["step"], record["reward"]) for record in records if record["loss"] is None],
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what the base and each seed's adapter get on the held-out prompts, by name."""
    adapters = {BASE: None} | {str(seed): str(folder / f"seed{seed}") for seed in args.seeds}
    result = folder / "rewards.json"
    job = {"model": args.model, "config": args.config, "answers": args.answers, "seed": 0, "adapters": adapters}
    (folder / "rewards.job.json").write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    command = [sys.executable, str(SIDE), str(folder / "rewards.job.json")]
    run_child(command, folder / "rewards.log", timeout_s=args.timeout)
    return json.loads(result.read_text(encoding="utf-8"))


def render(result: dict[str, Any]) -> str:
    """Return the table: a line per seed, each with its values before and after."""
    before = result["rewards"][BASE]
    names = list(before["sampled"]["parts"])
    columns = ["seed", "steps", "minutes", "reward", *names, *(f"{name}, greedy" for name in names)]
    columns += ["tokens of an answer", "rollout tokens/s", "share of sampling"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for seed, run in result["runs"].items():
        after = result["rewards"][seed]
        cells = [seed, str(run["steps"]), f"{run['seconds'] / 60:.1f}", moved(before, after, "sampled", "reward")]
        cells += [moved(before, after, kind, "parts", name) for kind in ("sampled", "greedy") for name in names]
        cells += [moved(before, after, "sampled", "tokens", digits=1)]
        cells += [f"{run['rollout_tokens_per_s']:.0f}", f"{run['rollout_share']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{before['prompts']} held-out prompts; {result['arguments']['answers']} answers sampled to each."]
    for seed in result["runs"]:
        for prompt, text in result["rewards"][seed]["greedy"]["texts"].items():
            lines.append(f"seed {seed}: {prompt!r}: {before['greedy']['texts'][prompt]!r} -> {text!r}")
    return "\n".join(lines)


def moved(before: dict[str, Any], after: dict[str, Any], *path: str, digits: int = 2) -> str:
    """Return a value before and after."""
    found = []
    for values in (before, after):
        for name in path:
            values = values[name]
        found.append(f"{values:.{digits}f}")
    return " to ".join(found)


def main(argv: Sequence[str]) -> int:
    """Train, measure, print; return 0, or 1 if a process failed."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="reward-learning-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {}
        try:
            for seed in args.seeds:
                runs[str(seed)] = run = train(args, folder, seed)
                line = f"seed {seed}: {run['steps']} steps in {run['seconds']:.0f} s"
                print(f"{line}, trained reward {run['trained_rewards'][-1][1]:.2f}", file=sys.stderr, flush=True)
            rewards = measure(args, folder)
        except ChildFailed as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
    result = {**environment(), "arguments": vars(args), "runs": runs, "rewards": rewards}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(render(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
