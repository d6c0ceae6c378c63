"""Random tensors of every GGUF block type."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mlx_lora.gguf.reader import GGUFTensor

ROWS, WIDTH = 6, 512
K_TYPES = {Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}


def random_tensor(kind: Kind, seed: int = 0) -> GGUFTensor:
    """A (ROWS, WIDTH) tensor; K blocks, which the gguf package cannot make, get random bytes and sane scales."""
    rng = np.random.default_rng(seed)
    if kind not in K_TYPES:
        values = rng.normal(0.1, 1, (ROWS, WIDTH)).astype(np.float32)
        return GGUFTensor("t", kind, (ROWS, WIDTH), gguf.quants.quantize(values, kind))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * WIDTH // block, block_bytes)).astype(np.uint8)
    at_end = {Kind.Q2_K: (-4, -2), Kind.Q3_K: (-2,), Kind.Q6_K: (-2,)}
    for place in at_end.get(kind, (0, 2)):
        scales = rng.normal(0, 0.01, (len(blocks), 1)).astype("<f2").view(np.uint8)
        blocks[:, place % block_bytes : place % block_bytes + 2] = scales
    return GGUFTensor("t", kind, (ROWS, WIDTH), blocks.reshape(ROWS, -1))
