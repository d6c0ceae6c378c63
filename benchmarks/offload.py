"""Measure what a step costs whose base is read from its files, against the same step in memory.

    python benchmarks/offload.py --model DIR --tokens 256 1024 4096
    python benchmarks/offload.py --model DIR --tokens 256 --disk-gb-per-s 0.5 1 3

Both models are in this process, with the same adapter and one row of random tokens, and take steps by turns: medians of
--rounds. The difference in processor time is fairer if other programs run, but has no waiting in it. Another disk than this
machine's is a reader that waits after each piece until it has taken as long as that disk.
What the planner says of the step (planner/speed.py) is computed from the seconds that it and a forward pass take in memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np
from _harness import environment, options, record, say, table

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import OptimizerSettings, TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import exchanging
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import Loss, token_arrays
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel import offloaded_base as base_reader
from mlx_lora.parallel.offloaded_base import BaseReader, OffloadedBase, copy_rate
from mlx_lora.parallel.sharded_base import units_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.planner.speed import Reading
from mlx_lora.trainer.adapter import adapt
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device

OPTIONS = (
    ("--model", ..., "Folder of a converted model."),
    ("--tokens", [256, 1024], "Of the row."),
    ("--disk-gb-per-s", [0.0], "Rates of disks to imitate; 0: this machine's own."),
    ("--rank", 8, "Of the adapter."),
    ("--rounds", 3, "Of both ways."),
    ("--seed", 0, "Of the tokens."),
)
HEAD = (
    "disk, GB/s", "tokens", "in memory, s", "offloaded, s", "difference", "processor time", "waited, s", "planned wait, s",
    "predicted step",
)  # fmt: skip


def slow(bytes_per_s: float) -> Callable[[int, memoryview, int], int] | None:
    """Return a read call that takes as long as a disk of this rate; None for this machine's own disk."""
    if not bytes_per_s:
        return None

    def read(descriptor: int, into: memoryview, offset: int) -> int:
        start = time.perf_counter()
        found = base_reader.system_read(descriptor, into, offset)
        time.sleep(max(0.0, found / bytes_per_s - (time.perf_counter() - start)))
        return found

    return read


class Side:
    """A model and its step."""

    def __init__(self, settings: TrainSettings, strategy: Strategy):
        self.base, self.strategy = load_base(settings.model, read=not strategy.divides_base), strategy
        adapt(settings, self.base, objective_of(settings.objective), None)
        self.blocks = units_of(self.base.model).blocks
        with device.own_memory_limit():  # a bound for the one side would slow the other
            strategy.divide(self.base, settings)
        model, config = self.base.model, self.base.config
        self.loss: Loss = choose_loss(model, config, "ours", strategy=strategy, whole_because="it is read in whole")
        tape = apply_checkpointing(model, "block")
        own = tape.attend if tape else attend
        optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-4), 100)
        self.step = Step(model, optimizer, self.loss.train, 1.0, StepOptions(exchanging(own), compiled=False), strategy)

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Take a step, and return its seconds, and those of the processor."""
        start, used = time.perf_counter(), time.process_time()
        mx.eval(self.step([batch]), self.step.state)
        return time.perf_counter() - start, time.process_time() - used

    def forward_seconds(self, batch: Batch) -> float:
        """Compute the loss, and return its seconds."""
        start = time.perf_counter()
        mx.eval(self.loss.measure(self.base.model, token_arrays(batch))[0])
        return time.perf_counter() - start


def batch_of(tokens: int, vocabulary: int, seed: int) -> Batch:
    """Return a row of random tokens, all trained."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (1, tokens + 1)).astype(np.int32)
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((1, tokens), bool))


def compare(memory: Side, offloaded: Side, reading: BaseReader, batch: Batch, args: Any) -> dict[str, float]:
    """Return the medians of both ways, and the share of waiting."""
    warming = batch_of(min(batch.inputs.shape[1], 1024), memory.base.model.args.vocab_size, args.seed)
    for side in (memory, offloaded):  # a short row is enough: kernels are built for any length
        side.seconds(warming)
    times: dict[str, list[float]] = {
        name: [] for name in ("memory_s", "memory_cpu_s", "forward_s", "offloaded_s", "offloaded_cpu_s", "waited_s")
    }
    for _ in range(args.rounds):
        for name, side in (("memory", memory), ("offloaded", offloaded)):
            before = reading.statistics.waited_s
            for kind, spent_s in zip(("_s", "_cpu_s"), side.seconds(batch), strict=True):
                times[name + kind].append(spent_s)
        times["forward_s"].append(memory.forward_seconds(batch))
        times["waited_s"].append(reading.statistics.waited_s - before)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    settings = train_settings({"model": args.model, "data": "none", "rank": args.rank, "offload_base": "on"})
    memory, rows = Side(settings, SINGLE_DEVICE), []
    copied_per_s = copy_rate(max(memory.blocks))
    say(f"Blocks: {sum(memory.blocks) / 1e6:,.0f} MB, copied at {copied_per_s / 1e9:.1f} GB/s; {environment()}")
    vocabulary = memory.base.model.args.vocab_size
    for rate in args.disk_gb_per_s:
        reader = BaseReader("--offload-base", slow(rate * 1e9))
        offloaded = Side(settings, OffloadedBase(reader=reader))
        for tokens in args.tokens:
            found = compare(memory, offloaded, reader, batch_of(tokens, vocabulary, args.seed), args)
            disk = rate * 1e9 or reader.statistics.bytes_per_s
            planned = Reading(memory.blocks, 0, disk, copied_per_s, "measured here")
            waits_s = planned.waiting_s(found["forward_s"], found["memory_s"])
            predicted_s = found["memory_s"] + waits_s + planned.copying_s + planned.planning_s
            record({"tokens": tokens, "disk_gb_per_s": rate, "predicted_s": predicted_s, **found})
            rows.append([
                rate or f"own ({planned.bytes_per_s / 1e9:.2f})", f"{tokens:,}", f"{found['memory_s']:.2f}", f"{found['offloaded_s']:.2f}",
                f"{found['offloaded_s'] / found['memory_s'] - 1:+.0%}",
                f"{found['offloaded_cpu_s'] / found['memory_cpu_s'] - 1:+.0%}", f"{found['waited_s']:.2f}", f"{waits_s:.2f}",
                f"{predicted_s / found['offloaded_s'] - 1:+.0%}",
            ])  # fmt: skip
    say(table(HEAD, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
