"""Measure what it saves to compute a group's prompt once in the training pass of sampled answers.

    python benchmarks/group_training.py --model smollm2
    python benchmarks/group_training.py --model smollm2 --cases 300:60 20:100 --group-size 8 --shortest 20

Each case is a prompt and G answers of random tokens, with random advantages: loss and gradients of the same answers, in rows
of their own and in one row, in alternating rounds; medians of processor time, because other work on the machine does not
count there, and peak memory. A case is PROMPT:ANSWER, in tokens; with --shortest, answers have random lengths from there on.
`--shared-prefix auto` goes by the predicted figure, which counts products only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np
from _environment import environment
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import choose_model_kernels
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.load import Base, load_base
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.policy_task import ADVANTAGES, LENGTHS
from mlx_lora.objectives.prefix_sharing import Joining, joined_batch, sharing_problem, work_of
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.task import task_of
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.rollouts.rollout import WIDTH_STEP
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils import device

APART, TOGETHER = "apart", "together"


def group_of(prompt: int, answer: int, args: argparse.Namespace) -> tuple[Batch, np.ndarray]:
    """Return one prompt with its answers, a row for each, and the column of each row's first target."""
    random = np.random.default_rng(prompt + answer)
    shortest = min(answer, args.shortest or answer)
    lengths = random.integers(shortest, answer + 1, args.group_size)
    width = -(-(prompt - 1 + int(lengths.max())) // WIDTH_STEP) * WIDTH_STEP
    ids = random.integers(0, 256, (args.group_size, width + 1)).astype(np.int32)
    ids[:, :prompt] = ids[0, :prompt]
    columns = np.arange(width)
    mask = (columns >= prompt - 1) & (columns < prompt - 1 + lengths[:, None])
    sampled = {
        LENGTHS: lengths.astype(np.float32),
        ADVANTAGES: random.normal(0, 1, args.group_size).astype(np.float32),
    }
    batch = Batch.of(
        ids[:, :-1].copy(), ids[:, 1:].copy(), mask, int(mask.sum()), int(mask.sum()), group=args.group_size,
        sampled=sampled,
    )  # fmt: skip
    return batch, np.full(args.group_size, prompt - 1)


def measure(base: Base, args: argparse.Namespace, prompt: int, answer: int) -> dict[str, Any]:
    """Return medians of processor seconds and peak bytes in both layouts, and the work that is predicted to be saved."""
    batch, begins = group_of(prompt, answer, args)
    batches = {APART: batch, TOGETHER: joined_batch(batch, begins)}
    tape = apply_checkpointing(base.model, args.grad_checkpoint)
    loss = choose_loss(base.model, base.config, args.kernels, print)
    lengths = {name: [one.inputs.shape[1]] for name, one in batches.items()}
    kernels = choose_model_kernels(base.model, lengths[APART], args.kernels, mx.float32, print, lengths[TOGETHER])
    task = task_of(objective_of(ObjectiveSettings("grpo", reward="length:1")), loss, base.model)
    run = differentiation(base.model, task.loss.train, tape.attend if tape else attend, kernels)
    arrays = {name: task.arrays_of(*task.prepare([one], ALONE)) for name, one in batches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    peaks, found, gradients = {}, {}, {}
    for _ in range(args.rounds + 1):
        for name, given in arrays.items():
            mx.reset_peak_memory()
            start = time.process_time()
            loss_sum, _, _, grads = run(*given)
            mx.eval(loss_sum, grads)
            seconds[name].append(time.process_time() - start)
            peaks[name], found[name] = mx.get_peak_memory(), loss_sum.item()
            gradients[name] = sum(mx.square(part).sum().item() for _, part in tree_flatten(grads)) ** 0.5
            del grads
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    joining = Joining(work_of(model_shape(base.model, base.config)), False)
    return {
        "prompt": prompt,
        "answer": answer,
        "positions": {name: one.inputs.size for name, one in batches.items()},
        "seconds": medians,
        "groups_per_s": {name: 1 / median for name, median in medians.items()},
        "saved": 1 - medians[TOGETHER] / medians[APART],
        "predicted": joining.saved(batch, batches[TOGETHER]),
        "peak_gb": {name: peak / 1e9 for name, peak in peaks.items()},
        "loss_apart": abs(found[TOGETHER] / found[APART] - 1),
        "gradient_norm_apart": abs(gradients[TOGETHER] / gradients[APART] - 1),
    }


def main() -> None:
    """Print a row for each case, and all figures as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", nargs="+", default=["300:60", "100:60", "20:100"])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--shortest", type=int, help="tokens of the shortest answer; default: all have the case's")
    parser.add_argument("--grad-checkpoint", default="none")
    parser.add_argument("--kernels", choices=("auto", "ours", "mlx"), default="auto", help="as for train")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device.compile_for(args.rounds)  # as in a short run on a CPU
    base = load_base(ModelSettings(model=args.model, dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=8), 0)
    rotate_by_token(base.model)
    problem = sharing_problem(base.model, base.config, choose_loss(base.model, base.config, args.kernels, print))
    if problem:
        raise SystemExit(problem)
    print(f"{args.group_size} answers to a prompt; {base.describe()}")
    print("prompt + answer | positions | groups/s apart | together | saved | predicted | GB apart | together")
    figures = []
    for case in args.cases:
        one = measure(base, args, *map(int, case.split(":")))
        figures.append(one)
        size, rate, peak = one["positions"], one["groups_per_s"], one["peak_gb"]
        print(
            f"{one['prompt']} + {one['answer']} | {size[APART]:,} / {size[TOGETHER]:,} | {rate[APART]:.3f} | "
            f"{rate[TOGETHER]:.3f} | {one['saved']:.0%} | {one['predicted']:.0%} | {peak[APART]:.2f} | {peak[TOGETHER]:.2f}",
            flush=True,
        )
    print(json.dumps({"environment": environment(), "settings": vars(args), "figures": figures}))


if __name__ == "__main__":
    main()
