"""Compute a base model's fingerprint from what no quantization changes, so that a QLoRA adapter fits its float base.

0123456789abcdef               a model as it was published, at any quantization and dtype
0123456789abcdef+89abcdef      the same with an adapter fused into it, which changes its matrices but not its vectors
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

FUSED_KEY = "mlx_lora.fused"  # in a GGUF file's metadata
PIECES, PIECE_BYTES = 512, 4096  # of each file of weights, in the sample that tells two folders apart


def base_fingerprint(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 16 hex digits that are the same at every quantization and dtype, and the mark of what is fused into it.

    The hash covers the model type and every one-dimensional float parameter (norm weights, biases of norms), rounded
    to bfloat16: converters quantize matrices and leave these alone. Two fine-tunes of one base differ in them, so adapters
    of one are not taken for adapters of the other. Adapter factors are two-dimensional and not included.

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
        digest.update(name.replace(".linear.", ".").encode())  # an adapted layer has its bias one level deeper
        digest.update(np.array(rounded).tobytes())
    mark = fused_mark(config)
    return digest.hexdigest()[:16] + (f"+{mark}" if mark else "")


def model_sample(folder: Path) -> str:
    """Return a hash of a folder's config.json and of pieces of its weights, evenly spaced, with their files' sizes.

    What is computed with a model and kept for later runs is kept under it. A base's fingerprint is the same for all
    quantizations, and for what other programs fused into it. This is not, and it takes no time, however large the model is.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("config.json")):
        digest.update(path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(piece * max(0, size - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def without_mark(fingerprint: str) -> str:
    """Return the fingerprint without the mark, as earlier versions wrote it."""
    return fingerprint.partition("+")[0]


def fused_mark(config: dict[str, Any]) -> str:
    """Return config.json's mark of what is fused into the model, empty for a model as it was published."""
    own = config.get("mlx_lora")
    mark = own.get("fused") if isinstance(own, dict) else None
    return mark[:40] if isinstance(mark, str) else "fused" if mark else ""  # earlier versions wrote true


def merge_mark(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 8 hex digits that identify the adapter on `model` and whatever was fused into its base before.

    Args:
        model: adapted.
        config: its base's config.json.
    """
    digest = hashlib.sha256(fused_mark(config).encode())
    for path, layer in model.named_modules():
        for name in ("lora_a", "lora_b", "m"):
            if isinstance(layer.get(name), mx.array):
                digest.update(f"{path}.{name}".encode())
                digest.update(np.array(layer[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:8]


def parameter_sums(model: nn.Module, without: Collection[int] = ()) -> dict[str, int]:
    """Return a check sum of the bytes of each parameter, which any change of dtype, quantization or weights changes.

    Args:
        model: its arrays are read once, about a second per gigabyte.
        without: ids of arrays to leave out.
    """
    sums = {}
    for name, value in tree_flatten(model.parameters()):
        if id(value) not in without:
            # numpy has no bfloat16; other views are not copied
            array = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value, copy=False)
            sums[f"{name} {value.dtype} {value.shape}"] = zlib.crc32(np.ascontiguousarray(array).data)
    return sums
