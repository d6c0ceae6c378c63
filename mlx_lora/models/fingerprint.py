"""Names a base model by what no quantisation touches, so that a QLoRA adapter still knows its float base."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def base_fingerprint(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 16 hex digits that are equal for one model at every quantisation and dtype.

    Hashed are the model type and every one-dimensional float parameter (norm weights, biases of norms)
    rounded to bfloat16: converters quantise matrices and leave these. Two fine-tunes of one base differ
    in them, so their adapters are kept apart. Adapter factors are two-dimensional and do not count.

    Args:
        model: an mlx-lm model, adapted or not.
        config: its config.json.
    """
    digest = hashlib.sha256(str(config.get("model_type")).encode())
    vectors = [
        (name, p) for name, p in tree_flatten(model.parameters()) if p.ndim == 1 and mx.issubdtype(p.dtype, mx.floating)
    ]
    for name, value in sorted(vectors):
        rounded = value.astype(mx.bfloat16).view(mx.uint16)
        digest.update(name.replace(".linear.", ".").encode())  # an adapted layer holds its bias one level down
        digest.update(np.array(rounded).tobytes())
    return digest.hexdigest()[:16]


def weights_checksum(model: nn.Module, skip: frozenset[str] = frozenset()) -> str:
    """Return the SHA-256 of every parameter's name and bytes: the proof that a base did not change.

    Args:
        model: any module.
        skip: last name parts to leave out (`lora_a`, `lora_b`).
    """
    digest = hashlib.sha256()
    for name, value in sorted(tree_flatten(model.parameters())):
        if name.rsplit(".", 1)[-1] in skip:
            continue
        digest.update(name.replace(".linear.", ".").replace(".embedding.", ".").encode())
        raw = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
        digest.update(np.array(raw).tobytes())
    return digest.hexdigest()
