"""Count what a training step computes and moves, and predict its time from a chip's listed peak rates.

Each part has floating-point operations, and the numbers that its passes read and write without fusion across parts:
weights once per product, activations once per pass. Its time is the longer of the two at full speed; real kernels are
slower, so a predicted step is a lower bound.

Shapes: T tokens of a step, D hidden width, F feed-forward width, P trained positions, V vocabulary.
Source: roofline, Williams et al. 2009 (CACM 52:4); chips: docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from _harness import table

from mlx_lora.models.head import find_head

# Chip: float32 TFLOPS and GB/s as published; a launch takes about 5 us of the host's time.
CHIPS = {"M1 (8 cores)": (2.6, 68), "M3 Pro": (6.4, 150), "M4 Max": (17.4, 546), "M2 Ultra": (27.2, 800)}
LAUNCH_S = 5e-6
HALF, SINGLE = 2, 4  # bytes of an activation on a GPU, and of a logit


@dataclass(frozen=True)
class Count:
    """One part of the step, forward and backward, in all blocks.

    Attributes:
        flops: floating-point operations.
        moved_bytes: read and written, activations in 16 bits and logits in 32.
    """

    flops: float
    moved_bytes: float

    def seconds(self, tflops: float, gb_per_s: float) -> float:
        """Return the longer time of computing and moving."""
        return max(self.flops / tflops / 1e12, self.moved_bytes / gb_per_s / 1e9)


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


def predictions(parts: dict[str, Count], launches: int) -> str:
    """Return a Markdown table of the chips: seconds of computing, of moving, of both by part, of launches."""
    flops, moved = sum(p.flops for p in parts.values()), sum(p.moved_bytes for p in parts.values())
    rows = []
    for chip, (tflops, gb_per_s) in CHIPS.items():
        slow = [n for n, p in parts.items() if p.moved_bytes / gb_per_s / 1e9 > p.flops / tflops / 1e12]
        roofline = sum(p.seconds(tflops, gb_per_s) for p in parts.values())
        times = flops / tflops / 1e12, moved / gb_per_s / 1e9, roofline, launches * LAUNCH_S
        rows.append([chip, *(f"{seconds:.3f}" for seconds in times), ", ".join(slow)])
    return table(["predicted, not measured", "FLOPs s", "bytes s", "roofline s", "launches s", "bound by bytes"], rows)
