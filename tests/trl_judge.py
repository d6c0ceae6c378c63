"""TRL's own loss code on given log-probabilities, without a model: the judge of our preference losses."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch


class _Accelerator:
    """What TRL's loss code asks of accelerate, for one process."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def dpo_loss(loss_types, logps, reference, mask, *, weights=None, **options):
    """Return TRL's DPO loss and its gradient with respect to the log-probabilities per token.

    Args:
        loss_types: names of TRL's.
        logps: (2 E, T) float, of answer tokens (0 elsewhere); chosen rows first.
        reference: (2 E,) float, summed.
        mask: (2 E, T) bool, answer tokens.
        weights: of the loss types.
        options: beta, label_smoothing, discopop_tau.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    per_token = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    full = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), torch.tensor(mask)], dim=1)
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )
    model = _Model(outputs)
    chosen, rejected = torch.tensor(reference, dtype=torch.float64).chunk(2)
    trainer = SimpleNamespace(
        model=model,
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=weights or [1.0] * len(loss_types),
        use_weighting=False,
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(full.shape, dtype=torch.long),
        "attention_mask": torch.ones(full.shape, dtype=torch.long),
        "completion_mask": full.long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), per_token.grad.numpy(), metrics


def cpo_loss(loss_type, chosen, rejected, **options):
    """Return TRL's CPO or SimPO losses, (E,), of log-probabilities (E,)."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        simpo_gamma=options.get("simpo_gamma", 0.5),
        accelerator=_Accelerator(),
    )
    return CPOTrainer.cpo_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def orpo_loss(chosen, rejected, beta):
    """Return the part of TRL's ORPO loss that compares the answers, (E,), of mean log-probabilities (E,)."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=_Accelerator())
    # TRL subtracts this from the likelihood's loss.
    return -ORPOTrainer.odds_ratio_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


class _Model:
    def __init__(self, outputs):
        self.outputs, self.training = outputs, True

    def __call__(self, **inputs):
        return self.outputs


def random_answers(pairs: int, width: int, seed: int = 0):
    """Return log-probabilities per token (2 E, T), the reference's sums (2 E,) and the mask (2 E, T)."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, width, 2 * pairs)
    mask = np.arange(width)[None, :] < lengths[:, None]
    logps = -random.gamma(1.0, 1.0, (2 * pairs, width)) * mask
    reference = logps.sum(axis=1) + random.normal(0, 2.0, 2 * pairs)
    return logps, reference, mask
