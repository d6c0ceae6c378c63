"""Random prompts with random answers, and an adapted model to compute them with, for parity of losses on sampled answers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.models.load import load_base
from mlx_lora.objectives.policy_arrays import ADVANTAGES, REWARDS

RANK, ALPHA, PROMPTS, GROUP, LONGEST = 4, 8.0, 3, 4, 11


def frozen_batch(seed: int = 0) -> Batch:
    """Return random prompts with random answers, old and reference log-probabilities and advantages."""
    random = np.random.default_rng(seed)
    rows, width = PROMPTS * GROUP, 8 + LONGEST
    inputs, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    mask = np.zeros((rows, width), bool)
    for prompt in range(PROMPTS):
        asked = random.integers(0, 288, int(random.integers(3, 8)))
        for row in range(prompt * GROUP, (prompt + 1) * GROUP):
            text = np.concatenate([asked, random.integers(0, 288, int(random.integers(1, LONGEST + 1)))])
            inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
            mask[row, len(asked) - 1 : len(text) - 1] = True
    ones = np.ones(rows, np.float32)
    sampled = {ADVANTAGES: random.normal(0, 1, rows).astype(np.float32), REWARDS: ones}
    sampled |= {"length": mask.sum(axis=1).astype(np.float32), "truncated": 0 * ones}
    return Batch.of(inputs, targets, mask, int(mask.sum()) + 5, GROUP, **sampled)


def moved_base(folder):
    """Return an adapted base whose adapter is not zero, and its factors."""
    base = load_base(ModelSettings(model=str(folder)))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    random = np.random.default_rng(5)
    factors = adapter_parameters(base.model)
    moved = [(n, mx.array(random.normal(0, 0.05, v.shape).astype(np.float32))) for n, v in factors.items()]
    base.model.load_weights(moved, strict=False)
    return base, {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
