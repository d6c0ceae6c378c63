"""Compute the initial factors, a pure function of seed, layer path, shape and, for PiSSA, the base's weight.

`a` is (in, r) and `b` (r, out), where an embedding's in is its vocabulary. For experts they are mlx-lm's (E, r, in) and
(E, out, r), drawn separately for each expert.
"""

from __future__ import annotations

import hashlib
import math

import mlx.core as mx
import numpy as np

# PiSSA's singular vectors are exact up to this narrower side. Above it an eigendecomposition would take seconds per
# layer, so the subspace iteration below is used, which takes only products.
EXACT_UP_TO = 1024
OVERSAMPLING, ROUNDS = 16, 16


def kaiming_factors(
    path: str, in_width: int, out_width: int, rank: int, seed: int, experts: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return `lora_a` uniform in +-1/sqrt(in) and `lora_b` zero, so that a new adapter changes nothing.

    PEFT's `kaiming_uniform_(a=sqrt(5))` and mlx-lm draw from this same distribution.

    Args:
        path: the layer's path in the model, such as `model.layers.0.self_attn.q_proj`.
        in_width, out_width: the base's widths (an embedding's input width is its vocabulary).
        rank: r.
        seed: the run's seed.
        experts: E, for a layer of experts, each with its own draw.

    Returns:
        (in, r) and (r, out), float32; with experts (E, r, in) and (E, out, r), as in mlx-lm.

    Source: LoRA, arXiv 2106.09685, section 4.1; He et al., arXiv 1502.01852.
    """
    bound = 1 / math.sqrt(in_width)
    if experts is not None:
        shape = (experts, rank, in_width)
        return mx.random.uniform(-bound, bound, shape, key=path_key(path, seed)), mx.zeros((experts, out_width, rank))
    lora_a = mx.random.uniform(-bound, bound, (in_width, rank), key=path_key(path, seed))
    return lora_a, mx.zeros((rank, out_width))


def normal_factors(
    path: str, in_width: int, out_width: int, rank: int, seed: int, experts: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return both factors, normal with standard deviation 0.02, for a layer whose gains start at zero.

    Arguments and shapes as in kaiming_factors.

    Source: AdaLoRA, arXiv 2303.10512, section 3.1; the standard deviation is from its code and PEFT.
    """
    a_key, b_key = mx.random.split(path_key(path, seed))
    shapes = ((in_width, rank), (rank, out_width))
    if experts is not None:
        shapes = ((experts, rank, in_width), (experts, out_width, rank))
    return 0.02 * mx.random.normal(shapes[0], key=a_key), 0.02 * mx.random.normal(shapes[1], key=b_key)


def principal_factors(matrix: mx.array, rank: int, scale: float, key: mx.array) -> tuple[mx.array, mx.array]:
    """Return factors whose product is the best approximation of `matrix` with this rank:

        scale a b = U_r S_r V_r^T,   a = U_r sqrt(S_r / scale),   b = sqrt(S_r / scale) V_r^T

    Args:
        matrix: (in, out), float.
        rank: at most the narrower side.
        scale: the factor that the product will be multiplied by.
        key: random key of the subspace iteration, used if the narrower side is above EXACT_UP_TO.

    Returns:
        (in, r) and (r, out), float32.

    Source: PiSSA, arXiv 2404.02948, eq. 2 to 4; Halko et al., arXiv 0909.4061, algorithm 4.4.
    """
    matrix = matrix.astype(mx.float32)
    if matrix.shape[0] < matrix.shape[1]:
        b, a = principal_factors(matrix.T, rank, scale, key)
        return a.T, b.T
    narrow = matrix.shape[1]
    directions = _exact_directions(matrix, rank) if narrow <= EXACT_UP_TO else _iterated(matrix, rank, key)
    images = matrix @ directions  # (in, r) = U_r S_r
    sizes = mx.maximum(mx.linalg.norm(images, axis=0), 1e-20)  # S_r
    root = mx.sqrt(sizes / scale)
    return images / sizes * root, root[:, None] * directions.T


def _exact_directions(matrix: mx.array, rank: int) -> mx.array:
    """Return the leading right singular vectors, (narrow, r), from the Gram matrix in float64 on the host.

    Squaring halves the digits: of float64's sixteen, eight remain, more than float32 has.
    """
    tall = np.array(matrix)
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    for start in range(0, len(tall), 8192):  # a whole embedding in float64 would take gigabytes
        part = tall[start : start + 8192].astype(np.float64)
        gram += part.T @ part
    _, vectors = np.linalg.eigh(gram)  # ascending
    return mx.array(np.ascontiguousarray(vectors[:, ::-1][:, :rank]), dtype=mx.float32)


def _iterated(matrix: mx.array, rank: int, key: mx.array) -> mx.array:
    """Return the leading right singular vectors, (narrow, r), by subspace iteration on the device.

    They are exact if singular values decrease fast; in a flat spectrum they are mixed with those just below rank r.
    """
    width = min(matrix.shape[1], rank + OVERSAMPLING)
    space = mx.random.normal((matrix.shape[1], width), key=key)
    for _ in range(ROUNDS):
        space, _ = mx.linalg.qr(matrix.T @ (matrix @ space), stream=mx.cpu)
        mx.eval(space)
    images = matrix @ space
    _, vectors = mx.linalg.eigh(images.T @ images, stream=mx.cpu)
    return space @ vectors[:, ::-1][:, :rank]


def path_key(path: str, seed: int) -> mx.array:
    """Return the random key of one layer, which does not depend on the other adapted layers."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
