"""A tiny model with an adapter, batches of random tokens, and a training step over them."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from conftest import TINY, quantized, tiny_model
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config.settings import AdapterSettings, OptimizerSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.choose import training_kernels
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.method_events import make_events, rates_of, restart_every, restart_warmup
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

CHECKPOINT_MODES = ["selective", "block", "2"]


def adapted(bits: int | None = None, seed: int = 0, move_b: bool = True) -> nn.Module:
    """Return the tiny model with adapters on all linear layers, frozen base, random factors."""
    model = tiny_model(seed)
    if bits:
        quantized(model, bits)
        use_measured_matmul(model)
    inject(model, select_targets(model).paths, rank=4, scale=2.0, seed=seed)
    return moved(model) if move_b else model


def with_adapter(model: nn.Module, size: float = 0.02, rank: int = 4, seed: int = 0) -> nn.Module:
    """Freeze a model, adapt all its linear layers and move the factors away from where they start."""
    model.freeze()
    inject(model, select_targets(model).paths, rank=rank, scale=2.0, seed=seed)
    return moved(model, size).train()


def moved(model: nn.Module, size: float = 0.02) -> nn.Module:
    """Give every lora_b random numbers: a zero one hides every gradient of lora_a."""
    for name, value in adapter_parameters(model).items():
        if name.endswith("lora_b"):
            model.load_weights([(name, size * mx.random.normal(value.shape))], strict=False)
    return model


def batch(rows: int, width: int, seed: int, share: float = 0.5) -> Batch:
    """Return random tokens, of which `share` are supervised."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 288, (rows, width + 1)).astype(np.int32)
    return Batch.of(ids[:, :-1], ids[:, 1:], random.random((rows, width)) < share)


def make_step(model: nn.Module, steps: int = 20, clip: float = 1.0, **changes) -> Step:
    """Return a step with a constant learning rate and without warm-up; `changes` are optimizer settings."""
    settings = OptimizerSettings(**{"learning_rate": 1e-2, "lr_schedule": "constant", "warmup": 0.0, **changes})
    return Step(model, build_optimizer(settings, steps), plain_loss, clip)


def method_step(
    model: nn.Module, of: AdapterSettings, steps: int, rate: float = 5e-3, optimizer: str = "adamw"
) -> Step:
    """Return a step as the train command makes it for a method, with the method's own restarts, rates and events."""
    settings = OptimizerSettings(optimizer=optimizer, learning_rate=rate, lr_schedule="constant", warmup=0.0)
    built = build_optimizer(settings, steps, restart_every(of, steps), restart_warmup(of, steps))
    options = StepOptions(events=make_events(of, model, steps, seed=1), rate_of=rates_of(of))
    return Step(model, built, choose_loss(model, TINY).train, 1.0, options)


def losses_of(step: Step, batches: list[Batch]) -> list[float]:
    """Take one step with each batch and return the losses."""
    results = [step([one]) for one in batches]
    return [result.loss_sum.item() / result.count.item() for result in results]


def factors(model: nn.Module) -> np.ndarray:
    """Return all adapter parameters as one vector."""
    return np.concatenate([np.array(v).ravel() for _, v in sorted(adapter_parameters(model).items())])


def gradients(model: nn.Module, mode: str, kernels: bool = True, width: int = 70) -> dict[str, mx.array]:
    """Return the gradient of each factor with this checkpointing mode, with or without the training kernels."""
    tape = apply_checkpointing(model, mode)
    arrays = token_arrays(batch(2, width, seed=1))
    with training_kernels(model, *([tape.attend] if tape else [])) if kernels else nullcontext():
        _, grads = nn.value_and_grad(model, plain_loss)(model, arrays)
    return dict(tree_flatten(grads))
