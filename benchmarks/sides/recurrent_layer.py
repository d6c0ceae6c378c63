"""One recurrent layer, forward and backward, by mlx-lm's own loop or by our kernels: its time and its memory.

Run by benchmarks/recurrent.py as `recurrent_layer.py JOB`, in a process of its own. A new kind of layer is a row of KINDS.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_lora import device  # loads the BLAS, so it comes before mlx

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import kimi_linear, qwen3_5

from mlx_lora.models.kernels import training_kernels


def gated_delta(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Qwen3.5's layer: one gate per head."""
    args = qwen3_5.TextModelArgs(
        hidden_size=hidden,
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
    )
    return qwen3_5.GatedDeltaNet(args)


def kimi_delta(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Kimi-Linear's layer: one gate per channel."""
    args = kimi_linear.ModelArgs.from_dict(
        {
            "model_type": "kimi_linear",
            "vocab_size": 64,
            "hidden_size": hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": hidden,
            "head_dim": width,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "linear_attn_config": {"num_heads": heads, "head_dim": width, "kda_layers": [1], "full_attn_layers": []},
            "model_max_length": 4096,
            "num_experts": 0,
            "moe_intermediate_size": hidden,
            "kv_lora_rank": 16,
        }
    )
    return kimi_linear.KimiDeltaAttention(args, 0)


KINDS: dict[str, Callable[[int, int, int], nn.Module]] = {"gated-delta": gated_delta, "kimi-delta": kimi_delta}
"""(heads, head width, hidden width) -> a layer of mlx-lm's, (B, T, D) to (B, T, D)."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one layer at one length."""
    mx.random.seed(0)
    layer = KINDS[job["kind"]](job["heads"], job["width"], job["hidden"])
    layer.train()
    x, d = (mx.random.normal((1, job["tokens"], job["hidden"])) for _ in range(2))
    weights = [value for _, value in tree_flatten(layer.parameters())]
    mx.eval(x, d, weights)
    seconds, processor_s, checks = [], [], []
    for _ in range(job["rounds"]):
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        begun, begun_processor = time.perf_counter(), time.process_time()
        with training_kernels(layer) if job["side"] == "ours" else nullcontext():
            (y,), (d_x,) = mx.vjp(lambda x: [layer(x)], [x], [d])
        mx.eval(y, d_x)
        seconds.append(time.perf_counter() - begun)
        processor_s.append(time.process_time() - begun_processor)
        checks = [(y * d).sum().item(), mx.linalg.norm(d_x).item()]
        peak_bytes = mx.get_peak_memory() - held
        del y, d_x
    return {
        "seconds": statistics.median(seconds),
        "processor_s": statistics.median(processor_s),
        "peak_bytes": peak_bytes,
        "check": checks,
        "device": device.current_device().header(),
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["result"]).write_text(json.dumps(measure(asked)), encoding="utf-8")
