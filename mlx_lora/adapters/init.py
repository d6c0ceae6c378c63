"""Initial factors: a pure function of seed, layer path and shape, whatever the order of injection."""

from __future__ import annotations

import hashlib
import math

import mlx.core as mx


def kaiming_factors(
    path: str, in_width: int, out_width: int, rank: int, seed: int, experts: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return `lora_a` uniform in +-1/sqrt(in) and `lora_b` zero, so that a fresh adapter changes nothing.

    PEFT's `kaiming_uniform_(a=sqrt(5))` and mlx-lm draw from this same distribution.

    Args:
        path: the layer's path in the model, such as `model.layers.0.self_attn.q_proj`.
        in_width, out_width: the base's widths (an embedding's input width is its vocabulary).
        rank: r.
        seed: the run's seed.
        experts: E, for a layer of experts: each gets a draw of its own.

    Returns:
        (in, r) and (r, out), float32; with experts (E, r, in) and (E, out, r), mlx-lm's orientation there.

    Source: LoRA, arXiv 2106.09685, section 4.1; He et al., arXiv 1502.01852.
    """
    bound = 1 / math.sqrt(in_width)
    if experts is not None:
        shape = (experts, rank, in_width)
        return mx.random.uniform(-bound, bound, shape, key=path_key(path, seed)), mx.zeros((experts, out_width, rank))
    lora_a = mx.random.uniform(-bound, bound, (in_width, rank), key=path_key(path, seed))
    return lora_a, mx.zeros((rank, out_width))


def path_key(path: str, seed: int) -> mx.array:
    """Return the random key of one layer: it does not depend on which other layers are adapted."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
