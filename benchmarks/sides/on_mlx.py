"""What sides on MLX share: factors in their own LoRA layers, settings of loops, what they compute in, the rate of products."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX a fast BLAS)
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from shared import NEVER


def put_factors(model: nn.Module, file: str, who: str) -> None:
    """Load our factors into another trainer's LoRA layers.

    Raises:
        ValueError: it adapts other layers than we do.
    """
    factors = mx.load(file)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    if names != set(factors):
        raise ValueError(f"{who} adapts other layers than we do: {sorted(names ^ set(factors))[:4]}")
    model.load_weights(list(factors.items()), strict=False)


def loop_settings(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of mlx-lm's loop, which mlx-lm-lora's also takes: no end, no validation, a report of each step."""
    return {
        "batch_size": job["batch_size"], "iters": NEVER, "val_batches": 0, "steps_per_report": 1, "steps_per_eval": NEVER,
        "steps_per_save": NEVER, "adapter_file": str(Path(job["result"]).with_suffix(".safetensors")),
        "max_seq_length": job["max_seq_length"], "grad_checkpoint": job["grad_checkpoint"],
    }  # fmt: skip


def facts_of(model: nn.Module, *packages: str) -> dict[str, Any]:
    """Return what a side computes in and with, and versions of its packages."""
    dtypes = {str(p.dtype).removeprefix("mlx.core.") for _, p in tree_flatten(model.parameters())}
    facts = {"blas": mlx_lora.BLAS.name, "fast_blas": mlx_lora.BLAS.fast, "dtypes": sorted(dtypes)}
    return {**facts, "versions": {name: metadata.version(name) for name in packages}} if packages else facts


def gemm_gflops(size: int = 1024, repeats: int = 5) -> float:
    """Measure float32 GEMM here: what the fast BLAS is worth, said in every result file."""
    x = mx.random.normal((size, size))
    mx.eval(x @ x)
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(x @ x)
        best_s = min(best_s, time.perf_counter() - start)
    return round(2 * size**3 / best_s / 1e9, 1)
