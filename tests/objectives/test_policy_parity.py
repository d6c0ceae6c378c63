"""Frozen rollouts and rewards: the loss here and TRL's over PEFT on torch, with every factor's gradient."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from curves import assert_same_gradients, over_peft
from frozen_answers import LONGEST, frozen_batch, moved_base
from mlx.utils import tree_flatten
from torch_judge import torch_base

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.policy import RATIO_OF
from mlx_lora.objectives.policy_arrays import ADVANTAGES, OLD, REFERENCE, token_logps
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
# rloo takes the divergence from the reward.
CASES = [(name, beta) for name in RATIO_OF for beta in (0.0, 0.2) if name != "rloo" or not beta]


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_loss_and_every_gradient_are_trls(name, beta, tiny_folder):
    import torch
    from trl_policy_judge import policy_objective

    base, initial = moved_base(tiny_folder)
    loss = choose_loss(base.model, base.config)
    batch = frozen_batch()
    random = np.random.default_rng(9)
    old = token_logps(base.model, loss, batch)
    old += random.normal(0, 0.2, old.shape).astype(np.float32) * batch.mask
    reference = old + random.normal(0, 0.3, old.shape).astype(np.float32) * batch.mask
    batch = batch.with_columns(**{OLD: old, REFERENCE: reference})
    asked = ObjectiveSettings("rloo") if name == "rloo" else ObjectiveSettings("grpo", grpo_loss=name, kl_beta=beta)
    asked = replace(asked, epsilon=0.15, epsilon_high=0.25, max_new_tokens=LONGEST, reward="exact_match")
    task = bind(objective_of(asked), loss, base)
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (total, count, _), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(ready))
    ours = {key: np.array(value / count) for key, value in tree_flatten(grads)}

    model, trained = over_peft(torch_base(tiny_folder), initial)
    model.train()
    inputs, targets = (torch.tensor(values.astype(np.int64)) for values in (batch.inputs, batch.targets))
    logps = torch.log_softmax(model(inputs).logits, dim=-1).gather(2, targets[..., None]).squeeze(2)
    others = [torch.tensor(values) for values in (old, reference, batch.mask, batch.columns[ADVANTAGES])]
    options = {"beta": beta, "low": 0.15, "high": 0.25, "longest": LONGEST}
    wanted, _ = policy_objective(logps, *others, name, **options)
    wanted.backward()
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert_same_gradients(ours, trained)
