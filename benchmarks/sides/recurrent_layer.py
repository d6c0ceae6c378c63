"""One recurrent layer, forward and backward, by mlx-lm's own loop or by our kernels: its time and its memory.

Run by benchmarks/recurrent.py in a process of its own. A new kind of layer is a row of KINDS.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from mlx_lora.utils import device  # `mlx_lora` loads the BLAS, so it comes before mlx

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import jamba, mamba, mamba2, qwen3_5, rwkv7
from mlx_lm.models.ssm import ssm_update
from shared import read_job, write_result

from mlx_lora.kernels.table import training_kernels


class Called(nn.Module):
    """A layer that is called with more than its input, and may return more than its output."""

    def __init__(self, layer: nn.Module, *more: Any):
        super().__init__()
        self.layer = layer
        self.more = more

    def __call__(self, x: mx.array) -> mx.array:
        found = self.layer(x, *self.more)
        return found[0] if isinstance(found, tuple) else found


class Alone(nn.Module):
    """Mamba-2's recurrence without the layer around it: its input holds all that it reads, heads x width + 256 + heads."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.shape = (heads, width)
        self.A_log = mx.log(mx.linspace(1.0, 4.0, heads))
        self.D = mx.ones((heads,))

    def __call__(self, x: mx.array) -> mx.array:
        heads, width = self.shape
        channels = heads * width
        x, b, c, dt = mx.split(x, [channels, channels + 128, channels + 256], axis=-1)
        split, bias = x.reshape(*x.shape[:2], heads, width), mx.zeros((heads,))
        y, _ = ssm_update(split, self.A_log, b[:, :, None], c[:, :, None], self.D, dt - 2.0, bias)  # one group
        return mx.concatenate([y.flatten(2), b, c, dt], axis=-1)


def gated_delta(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Qwen3.5's layer: one gate per head."""
    args = qwen3_5.TextModelArgs(
        hidden_size=hidden, linear_num_value_heads=heads, linear_num_key_heads=heads, linear_key_head_dim=width,
        linear_value_head_dim=width,
    )  # fmt: skip
    return qwen3_5.GatedDeltaNet(args)


def ssd(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Mamba-2's layer: a state of 128 numbers per channel, one decay per head."""
    args = mamba2.ModelArgs(
        model_type="mamba2", num_heads=heads, head_dim=width, vocab_size=64, hidden_size=hidden,
        intermediate_size=heads * width, state_size=128, num_hidden_layers=1, layer_norm_epsilon=1e-5, conv_kernel=4,
        n_groups=1, use_bias=False, use_conv_bias=True, tie_word_embeddings=True, time_step_limit=(0.0, 100.0),
        time_step_rank=8,
    )  # fmt: skip
    return Called(mamba2.Mamba2Block(args, 0), None)


def selective_scan(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Mamba's layer, heads x width channels wide: a state of 16 numbers per channel, each with its decay."""
    args = mamba.ModelArgs(
        model_type="mamba", vocab_size=64, hidden_size=hidden, intermediate_size=heads * width, state_size=16,
        num_hidden_layers=1, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank="auto",
    )  # fmt: skip
    return Called(mamba.MambaBlock(args), None)


def jamba_scan(heads: int, width: int, hidden: int) -> nn.Module:
    """Return Jamba's layer, twice `hidden` channels wide."""
    args = jamba.ModelArgs.from_dict({
        "model_type": "jamba", "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": heads, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
        "mamba_dt_rank": "auto", "num_experts": 1, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "vocab_size": 64,
    })  # fmt: skip
    return Called(jamba.JambaMambaMixer(args), None)


def wkv7(heads: int, width: int, hidden: int) -> nn.Module:
    """Return RWKV-7's layer, `hidden` being heads x width."""
    args = rwkv7.ModelArgs("rwkv7", 64, heads * width, heads * width, 1e-5, width, 1, 64, 32, 128, 64)
    layer = rwkv7.Rwkv7TimeMixing(args, 0)
    # It starts with zeros where a key's length is divided by.
    layer.k_k, layer.k_a, layer.r_k = (mx.ones(layer.k_k.shape) for _ in range(3))
    return Called(layer, None, None)


KINDS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "gated-delta": gated_delta,
    "ssd": ssd,
    "ssd-alone": lambda heads, width, hidden: Alone(heads, width),
    "selective-scan": selective_scan,
    "jamba-scan": jamba_scan,
    "wkv7": wkv7,
}
"""(heads, head width, hidden width) -> a layer of mlx-lm's, (B, T, D) to (B, T, D)."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one layer at one length."""
    mx.random.seed(0)
    layer = KINDS[job["kind"]](job["heads"], job["width"], job["hidden"]).train()
    x, d = (mx.random.normal((1, job["tokens"], job["hidden"])) for _ in range(2))
    mx.eval(x, d, [value for _, value in tree_flatten(layer.parameters())])
    seconds, processor_s, checks, peak_bytes = [], [], [], 0
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
    times = {"seconds": statistics.median(seconds), "processor_s": statistics.median(processor_s)}
    return {**times, "peak_bytes": peak_bytes, "check": checks, "device": device.current_device().header()}


if __name__ == "__main__":
    asked = read_job()
    write_result(asked, measure(asked))
