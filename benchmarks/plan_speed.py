"""Compare the planner's predicted tokens/s with measured ones on this machine, using its measured peak rates.

    python benchmarks/plan_speed.py --model smol=DIR --model gemma=DIR --rounds 5

Each round measures the rates, takes a step, and measures the rates again, so that both sides have the same machine load;
a round's prediction uses the better of its two measurements of each rate. The results are medians over the rounds without
the first step, which traces. Each model and mode has its own process, so that none slows the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from _environment import environment
from _processes import child_environment

from mlx_lora.planner.machine import this_machine


def one(
    folder: str, rows: int, width: int, rank: int, mode: str, share: float, rounds: int, cpu_clock: bool
) -> dict[str, Any]:
    """Measure one case in this process."""
    clock = time.process_time if cpu_clock else time.perf_counter
    import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

    import mlx.core as mx  # isort: skip
    import numpy as np

    from mlx_lora.adapters.inject import adapt_model
    from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.kernels.attention import tiled_attention
    from mlx_lora.losses.check import choose_loss
    from mlx_lora.models.load import load_base
    from mlx_lora.models.meta import model_shape
    from mlx_lora.planner.machine import measure_ceilings
    from mlx_lora.planner.shapes import Run
    from mlx_lora.planner.speed import Ceilings, step_seconds
    from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
    from mlx_lora.trainer.optimizer import build_optimizer
    from mlx_lora.trainer.step import Step
    from mlx_lora.utils import device

    device.set_cache_limit()
    base = load_base(ModelSettings(model=folder))
    adapt_model(base.model, AdapterSettings(rank=rank), 0)
    loss = choose_loss(base.model, base.config)
    tape = apply_checkpointing(base.model, mode)
    attend = tape.attend if tape else tiled_attention
    step = Step(base.model, build_optimizer(OptimizerSettings(), 100), loss.train, 1.0, attend)
    random = np.random.default_rng(0)
    ids = random.integers(0, 256, (rows, width + 1)).astype(np.int32)
    mask = random.random((rows, width)) < share
    batch = Batch.of(ids[:, :-1], ids[:, 1:], mask, mask.size)
    shape, machine = model_shape(base.model, base.config), this_machine()
    run = Run(rows, width, len(batch.positions), mode)
    mx.eval(step([batch]), step.state)
    measured, predicted, found = [], [], []
    for _ in range(rounds):
        before = measure_ceilings(clock=clock)
        start = clock()
        mx.eval(step([batch]), step.state)
        measured.append(clock() - start)
        after = measure_ceilings(clock=clock)
        rates = ("flops_per_s", "bytes_per_s", "exponentials_per_s")
        ceilings = Ceilings(*(max(getattr(c, name) for c in (before, after)) for name in rates))
        found.append(ceilings)
        predicted.append(step_seconds(shape, run, machine, ceilings)[0])
    tokens = run.positions
    return {
        "predicted_tokens_per_s": tokens / statistics.median(predicted),
        "measured_tokens_per_s": tokens / statistics.median(measured),
        "ratio": statistics.median(m / p for m, p in zip(measured, predicted, strict=True)),
        "ratios": [round(m / p, 3) for m, p in zip(measured, predicted, strict=True)],
        "gflops": statistics.median(c.flops_per_s for c in found) / 1e9,
        "gb_per_s": statistics.median(c.bytes_per_s for c in found) / 1e9,
        "exponentials_per_s": statistics.median(c.exponentials_per_s for c in found),
    }


def main(argv: Sequence[str]) -> int:
    """Run each case in its own process and print Markdown, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER; may be repeated.")
    parser.add_argument("--shapes", nargs="+", default=["5x204", "1x1024"], help="ROWSxWIDTH.")
    parser.add_argument("--checkpointing", nargs="+", default=["none", "block"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--supervised", type=float, default=1.0, help="Fraction of the positions that are trained.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-clock", action="store_true", help="Count this process's CPU seconds, on one thread: for a busy machine."
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child's case as JSON
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return 0
    print("| model | rows | checkpointing | predicted tokens/s | measured | predicted / measured (rounds) |")
    print("|---|---|---|---|---|---|")
    results = []
    environment_of_child = child_environment()
    if args.cpu_clock:
        # One thread, because threads that wait for each other would count as working.
        environment_of_child |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    for pair in args.model:
        name, folder = pair.split("=", 1)
        for text in args.shapes:
            rows, width = map(int, text.split("x"))
            for mode in args.checkpointing:
                case = {"folder": folder, "rows": rows, "width": width, "rank": args.rank, "mode": mode}
                case |= {"share": args.supervised, "rounds": args.rounds, "cpu_clock": args.cpu_clock}
                command = [sys.executable, __file__, "--model", pair, "--one", json.dumps(case)]
                done = subprocess.run(command, capture_output=True, text=True, env=environment_of_child, check=True)
                result = json.loads(done.stdout)
                results.append({**case, **result})
                print(
                    f"| {name} | {rows} x {width} | {mode} | {result['predicted_tokens_per_s']:.0f} "
                    f"| {result['measured_tokens_per_s']:.0f} | {result['ratio']:.2f} "
                    f"({min(result['ratios']):.2f}-{max(result['ratios']):.2f}) |",
                    flush=True,
                )
    print(json.dumps({"results": results, "environment": environment()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
