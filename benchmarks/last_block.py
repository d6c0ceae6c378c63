"""Measure what a step saves whose last block computes only the trained positions.

    python benchmarks/last_block.py --model smollm2 --data alpaca.json
    python benchmarks/last_block.py --model smollm2 --prompt 700 --answer 100     # random tokens in rows of one length

Loss and gradient of one batch, with the whole last block and without its dead half, in alternating rounds; medians of
processor time, because other work on the machine does not count there, and peak memory. For each number of adapted
blocks there are two cases: all blocks are computed, or only the adapted ones, which is what an epoch costs that starts at
kept hidden states.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np
from _harness import environment, options, record, say, table

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings, DataSettings, ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.load import load_data
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.table import exchanging
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import Arrays
from mlx_lora.models.load import Base, load_base
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils import device

OPTIONS = (
    ("--model", ..., "As for the train command."),
    ("--data", str, "As for the train command; without it, the tokens are random."),
    ("--prompt", 700, "Tokens of a random prompt."),
    ("--answer", 100, "Tokens of its answer."),
    ("--batch-tokens", 2048, "Positions of the step."),
    ("--grad-checkpoint", "none", "As for the train command."),
    ("--num-layers", [-1, 8, 1], "Adapted blocks of each case; -1: all."),
    ("--rounds", 5, "Of both ways."),
)


def batch_of(args: argparse.Namespace, base: Base) -> Batch:
    """Return the batch to measure: of the data's median share of trained positions, or random."""
    if args.data is None:
        width = args.prompt + args.answer
        rows = max(1, args.batch_tokens // width)
        ids = np.random.default_rng(0).integers(0, 256, (rows, width + 1)).astype(np.int32)
        mask = np.broadcast_to(np.arange(width) >= args.prompt, (rows, width)).copy()
        return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), mask, rows * width)
    rows = load_data(DataSettings(data=args.data), base.hf_tokenizer, 0).train
    plan = BatchPlan(rows, batch_tokens=args.batch_tokens, batch_size=None, seed=0)
    batches = sorted(plan.batches(), key=lambda batch: len(batch.positions) / batch.inputs.size)
    return batches[len(batches) // 2]


def measure(base: Base, batch: Batch, args: argparse.Namespace) -> dict[str, Any]:
    """Return medians of processor seconds and peak bytes, with the whole last block and with a part of it."""
    tape = apply_checkpointing(base.model, args.grad_checkpoint)
    arrays = Arrays.of(batch)
    functions, seconds = {}, {}
    for name, why in (("whole", "measured for comparison"), ("part", "")):
        loss = choose_loss(base.model, base.config, "ours", False, why)
        if loss.part_of_last != (name == "part"):
            raise SystemExit(f"the {name} block is not measured: {loss.description}")
        functions[name] = differentiation(base.model, loss.train, exchanging(tape.attend if tape else attend))
        seconds[name] = []
    peaks, found = {}, {}
    for _ in range(args.rounds + 1):
        for name, function in functions.items():
            mx.reset_peak_memory()
            start = time.process_time()
            loss_sum, *_, grads = function(*arrays)
            mx.eval(loss_sum, grads)
            seconds[name].append(time.process_time() - start)
            peaks[name], found[name] = mx.get_peak_memory(), loss_sum.item()
            del grads
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    return {
        "whole_s": medians["whole"],
        "part_s": medians["part"],
        "saved": 1 - medians["part"] / medians["whole"],
        "whole_gb": peaks["whole"] / 1e9,
        "part_gb": peaks["part"] / 1e9,
        "loss_apart": abs(found["part"] / found["whole"] - 1),
    }


def main(argv: Sequence[str]) -> int:
    """Print a row for each case, and all figures as JSON at the end."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    device.compile_for(args.rounds)  # as in a short run on a CPU
    original = load_base(ModelSettings(model=args.model, dtype="float32"))
    batch = batch_of(args, original)
    rows, width = batch.inputs.shape
    print(f"{rows} x {width} positions, {batch.mask.mean():.0%} of them trained; {original.describe()}")
    figures = []
    for adapted in args.num_layers:
        for computed in ("all", "adapted") if adapted > 0 else ("all",):
            base = replace(original, model=copy.deepcopy(original.model))
            adapt_model(base.model, AdapterSettings(rank=8, num_layers=adapted), 0)
            if computed == "adapted":
                base.model.model.layers = base.model.layers[-adapted:]
            one = measure(base, batch, args) | {"adapted": "all" if adapted < 0 else adapted, "computed": computed}
            figures.append(one)
            say(f"{one['adapted']} blocks adapted, {computed} computed: {one['saved']:.1%} saved")
    forms = {"whole_s": ".2f", "part_s": ".2f", "saved": ".1%", "whole_gb": ".3f", "part_gb": ".3f"}
    head = ("adapted blocks", "computed", "whole s", "part s", "saved", "whole GB", "part GB")
    print(
        table(
            head,
            [
                [one["adapted"], one["computed"], *(format(one[name], form) for name, form in forms.items())]
                for one in figures
            ],
        )
    )
    record({"environment": environment(), "settings": vars(args), "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
