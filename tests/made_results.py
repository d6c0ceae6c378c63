"""Result files as machines that nobody has would write them: numbers made up for tests, and for nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mlx_lora.bench.run import WORKLOADS, Workload, spread

GIB = 1 << 30


def made_entry(workload: Workload = WORKLOADS[0], speed: float = 1000.0, memory: int = 2 * 10**9) -> dict[str, Any]:
    """Return a measured entry."""
    power = {
        "source": "ac",
        "low_power_mode": False,
        "thermal_state": "nominal",
        "temperature_c": None,
        "load_average": 0.5,
    }
    return {
        "workload": workload.definition(),
        "status": "measured",
        "reason": None,
        "shortened": False,
        "data_sha256": "d" * 64,
        "base": {"model": "a/b", "revision": None, "fingerprint": "f00"},
        "power_before": power,
        "power_after": dict(power),
        "figures": {
            "tokens_per_s": spread([speed * 0.9, speed, speed * 1.1]),
            "supervised_tokens_per_s": spread([speed * 0.5, speed * 0.6, speed * 0.7]),
            "step_s": spread([0.9, 1.0, 1.1]),
            "overall_tokens_per_s": speed,
            "first_step_s": 5.0,
            "warmup_steps": 9,
            "counted_steps": 18,
            "counted_s": 18.0,
            "real_tokens": 18000,
            "supervised_tokens": 11000,
            "positions": 18432,
            "shapes": {"5x204": 18},
            "peak_memory_bytes": memory,
            "process_peak_bytes": 2 * memory,
            "skipped_steps": 0,
            "last_loss": 3.5,
            "useful_flops_per_s": 1e12,
            "mfu": 0.4,
            "mfu_listed": None,
            "energy_j": None,
            "energy_source": "none: made up",
        },
        "predicted": {
            "tokens_per_s": speed * 1.25,
            "peak_memory_bytes": memory,
            "needed_bytes": memory,
            "fits": True,
            "ceilings": "measured here",
        },
    }


def made_result(chip: str = "Apple M2 Pro", entries: list[dict[str, Any]] | None = None, **changes: Any) -> dict:
    """Return a valid result; `changes` replace top-level values."""
    content = {
        "schema": "mlx-lora-bench",
        "schema_version": 1,
        "created": "2026-01-02T03:04:05+0000",
        "tiers": ["embedded"],
        "machine": {
            "chip": chip,
            "model": "Mac14,9",
            "architecture": "arm64",
            "cpu_cores": 10,
            "performance_cores": 6,
            "efficiency_cores": 4,
            "gpu_cores": 16,
            "memory_bytes": 16 * GIB,
            "system": "macOS",
            "system_version": "15.1",
            "system_build": "24B83",
        },
        "device": {
            "name": chip,
            "backend": "metal",
            "memory_bytes": 16 * GIB,
            "working_set_bytes": 11 * GIB,
            "blas": None,
            "compute_dtype": "bfloat16",
        },
        "software": {
            "commit": "abc",
            "python": "3.12.0",
            "versions": {"mlx-lora": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"},
            "variables": {"OMP_NUM_THREADS": None},
            "removed_variables": [],
        },
        "rates": made_rates(),
        "results": [made_entry()] if entries is None else entries,
    }
    return copy.deepcopy({**content, **changes})


def made_rates(dtype: str = "bfloat16") -> dict[str, Any]:
    """Return rates."""
    return {
        "gemm_flops_per_s": {"float32": 5e12, "bfloat16": 5e12, "float16": 5e12},
        "quantized_matmul_flops_per_s": {"1": 1e11, "1024": 4e12, "dequantize_then_gemm": 4e12},
        "copy_bytes_per_s": 1.5e11,
        "triad_bytes_per_s": 1.5e11,
        "ceilings": {
            "dtype": dtype,
            "flops_per_s": 5e12,
            "bytes_per_s": 1.5e11,
            "exponentials_per_s": None,
            "launch_s": 5e-6,
        },
    }


def write(path: Path, content: Any) -> Path:
    """Write JSON, folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
