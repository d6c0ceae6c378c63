"""Measure where a training step's time goes: each part of a block alone, and the whole step.

    python benchmarks/profile_step.py --model DIR --rows 5 --width 204
    python benchmarks/profile_step.py --model DIR --rows 5 --width 204 --kernels polynomial --processor-time --not-compiled

Parts are compiled forward and backward passes on arrays of the model's shapes, medians of --rounds, times the number of
blocks. They do not exactly sum to the step, where neighbors share passes. Then the step's floating-point operations,
bytes in 16 bits are counted: each part reads and writes its numbers without fusion across parts, weights once per product, activations
once per pass. gpu_counts.py counts the whole step as a GPU computes it.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core
from mlx_lora.kernels.choose import exchanging
from mlx_lora.planner.machine import loss_tile_bytes

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from _harness import environment, options, record, say, table

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.config.settings import ModelSettings, OptimizerSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.activations import lean_swiglu, polynomial_swiglu
from mlx_lora.kernels.attention import Tiles, attend, tiled_attention
from mlx_lora.kernels.choose import POLYNOMIAL, Kernel, ShapeClass
from mlx_lora.losses.cross_entropy import TILES
from mlx_lora.losses.fused import fused_token_losses, head_loss
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base, load_base
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device

HALF, SINGLE = 2, 4  # bytes of an activation on a GPU, and of a logit

OPTIONS = (
    ("--model", ..., "Folder of a converted model."),
    ("--rows", 5, "Of the step."),
    ("--width", 204, "Of its rows, in tokens."),
    ("--rank", 8, "Of the adapter."),
    ("--supervised", 0.76, "Fraction of the positions that are trained."),
    ("--checkpointing", "none", "As in --grad-checkpoint."),
    ("--rounds", 7, "Of each part and of the step."),
    ("--kernels", "tiled", "Whose exponentials.", ("tiled", POLYNOMIAL)),
    ("--processor-time", False, "On a machine with other load."),
    ("--not-compiled", False, "As in a short run on a CPU."),
)


@dataclasses.dataclass(frozen=True)
class Way:
    """How parts and step are measured: the median of some rounds by a clock, with `tiled` or `polynomial` exponentials."""

    rounds: int
    clock: Callable[[], float]
    kernel: str

    @property
    def polynomial(self) -> bool:
        """Whether exponentials are polynomials."""
        return self.kernel == POLYNOMIAL

    def choose(self, kernel: Kernel, shape: ShapeClass) -> str:
        """Return the candidate for a kernel of the step."""
        return self.kernel if self.kernel in kernel.candidates else kernel.assumed


def seconds(function: Callable[..., Any], arrays: Sequence[mx.array], way: Way) -> float:
    """Return the median time of the forward and backward pass of `function`."""
    outputs = function(*arrays)
    cotangent = mx.random.normal(outputs.shape).astype(outputs.dtype)
    both = mx.compile(lambda d, *a: mx.vjp(lambda *p: [function(*p)], list(a), [d]))
    mx.eval(both(cotangent, *arrays))
    times = []
    for _ in range(way.rounds):
        start = way.clock()
        mx.eval(both(cotangent, *arrays))
        times.append(way.clock() - start)
    return statistics.median(times)


def parts_of_a_block(base: Base, rows: int, width: int, way: Way) -> dict[str, float]:
    """Return seconds per part, for all blocks together."""
    config, blocks = base.config, len(base.model.layers)
    block, heads = base.model.layers[0], config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads", heads)
    dims = config.get("head_dim") or config["hidden_size"] // heads
    dtype = device.compute_dtype()

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    adapters = [layer for _, layer in block.named_modules() if hasattr(layer, "lora_a")]
    linear = [(layer, random(rows, width, layer.lora_a.shape[0])) for layer in adapters]
    mx.eval([x for _, x in linear])
    plain = sum(seconds(layer.linear, [x], way) for layer, x in linear)
    adapted = sum(
        seconds(lambda x, a, b, layer=layer: _with_factors(layer, x, a, b), [x, layer.lora_a, layer.lora_b], way)
        for layer, x in linear
    )
    q, k, v = (random(rows, n, width, dims) for n in (heads, key_heads, key_heads))
    tiles = Tiles(dims**-0.5, "causal", kernel=way.kernel)
    sizes = config["intermediate_size"], config["intermediate_size"], config["hidden_size"]
    gate, up, x = (random(rows, width, size) for size in sizes)
    norm = mx.ones((config["hidden_size"],), dtype)
    turn = {"dims": dims, "traditional": False, "base": config.get("rope_theta", 1e4), "scale": 1.0, "offset": 0}
    lean = partial(lean_swiglu, device.keep_exponentials())
    activation = polynomial_swiglu if way.polynomial else lean
    each = {
        "products with base weights": plain,
        "adapter branch": adapted - plain,
        "attention": seconds(lambda q, k, v: tiled_attention(q, k, v, tiles), [q, k, v], way),
        "gated activation": seconds(activation, [gate, up], way),
        "two norms": 2 * seconds(lambda x: mx.fast.rms_norm(x, norm, 1e-5), [x], way),
        "rotations of q and k": sum(seconds(lambda a: mx.fast.rope(a, **turn), [a], way) for a in (q, k)),
    }
    return {name: blocks * value for name, value in each.items()}


def _with_factors(layer: Any, x: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
    """Call an adapter layer with the given factors, so that they are differentiated too, and then restore its own."""
    own = layer.lora_a, layer.lora_b
    layer.lora_a, layer.lora_b = lora_a, lora_b
    y = layer(x)
    layer.lora_a, layer.lora_b = own
    return y


def whole_step(base: Base, batch: Batch, mode: str, way: Way) -> tuple[float, int]:
    """Return the median seconds of a step, and MLX's peak bytes."""
    head = find_head(base.model, base.config)
    loss = head_loss(head, POLYNOMIAL if way.polynomial else TILES, loss_tile_bytes())
    tape = apply_checkpointing(base.model, mode)
    own = tape.attend if tape else attend
    optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-4), 100)
    step = Step(base.model, optimizer, loss.train, 1.0, StepOptions(exchanging(own, way.choose)))
    times = []
    mx.reset_peak_memory()
    for _ in range(way.rounds + 1):
        start = way.clock()
        mx.eval(step([batch]), step.state)
        times.append(way.clock() - start)
    say(f"First step {times[0]:.2f} s, the others {', '.join(f'{t:.2f}' for t in times[1:])}")
    return statistics.median(times[1:]), mx.get_peak_memory()


def loss_seconds(base: Base, supervised: int, way: Way) -> float:
    """Return the median time of the fused loss on this many positions."""
    head = find_head(base.model, base.config)
    hidden = mx.random.normal((supervised, base.config["hidden_size"])).astype(device.compute_dtype())
    targets, weights = mx.random.randint(0, head.vocabulary, (supervised,)), mx.ones((supervised,))
    mx.eval(hidden, targets, weights)
    given, tile, polynomial = (targets, weights), loss_tile_bytes(), way.polynomial
    return seconds(lambda h: fused_token_losses(head, h, *given, tile, polynomial=polynomial).sum(), [hidden], way)


@dataclasses.dataclass(frozen=True)
class Count:
    """One part of the step, forward and backward, in all blocks.

    Attributes:
        flops: floating-point operations.
        moved_bytes: read and written, activations in 16 bits and logits in 32.
    """

    flops: float
    moved_bytes: float


def count_step(model: nn.Module, config: dict[str, Any], rows: int, width: int, supervised: int) -> dict[str, Count]:
    """Count the parts of a step of `rows` x `width` on an adapted model of the llama family.

    A frozen weight is multiplied twice per token (output, input gradient), a factor three times (also for its
    gradient). Attention recomputes its probabilities in the backward pass, as on a GPU.
    """
    tokens, layers = rows * width, len(model.layers)
    adapted = [m for _, m in model.named_modules() if hasattr(m, "lora_a")]
    dims = [(m.lora_a.shape[0], m.lora_b.shape[1], m.lora_a.shape[1]) for m in adapted]
    weights = sum(i * o for i, o, _ in dims)
    ins, outs = sum(i for i, _, _ in dims), sum(o for _, o, _ in dims)
    factors = sum((i + o) * r for i, o, r in dims)
    hidden, feed = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or hidden // heads
    wide, kv_wide = heads * head_width, config.get("num_key_value_heads", heads) * head_width
    scores = heads * tokens * width / 2  # causal: half of them
    vocabulary = find_head(model, config).vocabulary
    logits = vocabulary * supervised
    per_token = HALF * tokens
    return {
        "products with base weights": Count(4 * weights * tokens, 2 * HALF * (tokens * (ins + outs) + weights)),
        # x is read for z and for dA and its gradient added to; the output is added to, its gradient read twice.
        "adapter branch": Count(6 * factors * tokens, per_token * 4 * (ins + outs)),
        # Seven products; scores are written and read around each softmax and product.
        "attention": Count(14 * head_width * scores * layers, HALF * layers * (14 * scores + 12 * tokens * wide)),
        "gated activation": Count(0, per_token * layers * 8 * feed),
        "two norms": Count(0, per_token * layers * 10 * hidden),
        "rotations of q and k": Count(0, per_token * layers * 4 * (wide + kv_wide)),
        # The tile is written, read for its largest, for the exponential, and for the gradient's product.
        "loss": Count(4 * logits * hidden, SINGLE * 5 * logits + HALF * 2 * vocabulary * hidden),
        "residuals": Count(0, per_token * layers * 12 * hidden),
    }


def report(parts: dict[str, float], step_s: float, counts: dict[str, Count], peak: int) -> str:
    """Return the figures as Markdown."""
    rows = []
    for name, value in {**parts, "residuals": step_s - sum(parts.values())}.items():
        label = name if name in parts else "residuals, and all else: copies, optimizer, host"
        sizes = f"{counts[name].flops / 1e9:.0f}", f"{counts[name].moved_bytes / 1e9:.2f}"
        rows.append([label, f"{value:.2f}", f"{value / step_s:.0%}", *sizes])
    flops, moved = sum(c.flops for c in counts.values()), sum(c.moved_bytes for c in counts.values())
    rows.append(["the step", f"{step_s:.2f}", "", f"{flops / 1e9:.0f}", f"{moved / 1e9:.2f}"])
    head = ["part, forward and backward, all blocks", "s", "share of the step", "GFLOP", "GB in 16 bits"]
    rates = f"Peak {peak / 1e9:.2f} GB, {flops / step_s / 1e9:.0f} GFLOP/s"
    return "\n\n".join([table(head, rows), rates])


def main(argv: Sequence[str]) -> int:
    """Profile one shape of one model and print Markdown, then one line of JSON."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    clock = time.process_time if args.processor_time else time.perf_counter
    way = Way(args.rounds, clock, args.kernels)
    device.compile_for(1 if args.not_compiled else device.COMPILE_FROM_STEPS)
    base = load_base(ModelSettings(model=args.model))
    inject(base.model, select_targets(base.model).paths, args.rank, 2.0)
    random = np.random.default_rng(0)
    ids = random.integers(0, 256, (args.rows, args.width + 1)).astype(np.int32)
    mask = random.random((args.rows, args.width)) < args.supervised
    batch = Batch.of(ids[:, :-1], ids[:, 1:], mask)
    supervised = len(batch.positions)
    parts = parts_of_a_block(base, args.rows, args.width, way)
    parts["loss"] = loss_seconds(base, supervised, way)
    step_s, peak = whole_step(base, batch, args.checkpointing, way)
    counts = count_step(base.model, base.config, args.rows, args.width, supervised)
    print(report(parts, step_s, counts, peak))
    counted = {name: dataclasses.asdict(count) for name, count in counts.items()}
    result = {"parts_s": parts, "step_s": step_s, "counts": counted, "peak_bytes": peak}
    record({**environment(), **result})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
