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
    per_token = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    loss, metrics = dpo_objective(per_token, torch.tensor(reference), mask, loss_types, weights, **options)
    loss.backward()
    return loss.item(), per_token.grad.numpy(), metrics


def dpo_objective(per_token, reference, mask, loss_types, weights=None, **options):
    """Return TRL's DPO loss, a tensor with its graph, and what TRL reports; arguments as in `dpo_loss`, as tensors."""
    from trl.trainer.dpo_trainer import DPOTrainer

    full = _with_first(mask)
    trainer = _trainer(
        per_token,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=weights or [1.0] * len(loss_types),
        use_weighting=False,
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
    )
    chosen, rejected = reference.chunk(2)
    inputs = {**_inputs(full), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, False), _metrics(trainer)


def kto_objective(per_token, reference, mask, good, kl_logps, kl_reference, beta=0.1, weights=(1.0, 1.0)):
    """Return TRL's KTO loss with its graph, and what TRL reports.

    Args:
        per_token: (E, T) log-probabilities of answer tokens.
        reference: (E,) summed.
        mask: (E, T) bool.
        good: (E,) bool.
        kl_logps, kl_reference: (E,) of the answers to other prompts.
        beta, weights: TRL's beta, desirable_weight and undesirable_weight.
    """
    from trl.trainer.kto_trainer import KTOTrainer

    full = _with_first(mask)
    trainer = _trainer(
        per_token, loss_type="kto", calculate_KL=True, beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], _compute_kl_logps=lambda model, batch: kl_logps,
    )  # fmt: skip
    inputs = {**_inputs(full), "label": torch.tensor(good), "ref_logps": reference, "ref_KL_logps": kl_reference}
    return KTOTrainer._compute_loss(trainer, trainer.model, inputs, False), _metrics(trainer)


def reward_loss(model, input_ids, margin, center=None):
    """Return TRL's RewardTrainer loss of a sequence classification model, a tensor with its graph, and what TRL reports.

    Args:
        model: on torch, with one label.
        input_ids: (2 E, T) int64, chosen rows first, padded with the model's pad_token_id.
        margin: (E,) float; None: the data have none.
        center: TRL's center_rewards_coefficient.
    """
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = SimpleNamespace(
        model=model,
        accelerator=_Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = (input_ids != model.config.pad_token_id).long()
    inputs = {"input_ids": input_ids, "attention_mask": mask, **({} if margin is None else {"margin": margin})}
    model.train()
    return RewardTrainer.compute_loss(trainer, model, inputs), _metrics(trainer)


def _with_first(mask):
    return torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), torch.tensor(np.asarray(mask))], dim=1)


def _inputs(full):
    return {
        "input_ids": torch.zeros(full.shape, dtype=torch.long),
        "attention_mask": torch.ones(full.shape, dtype=torch.long),
        "completion_mask": full.long(),
    }


def _trainer(per_token, **attributes):
    """Return what TRL's loss code reads of its trainer, with a model that gives these log-probabilities."""
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )
    return SimpleNamespace(
        model=_Model(outputs),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def _metrics(trainer):
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def cpo_loss(loss_type, chosen, rejected, **options):
    """Return TRL's CPO or SimPO losses, (E,), of log-probabilities (E,), arrays or tensors with their graph."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        simpo_gamma=options.get("simpo_gamma", 0.5),
        accelerator=_Accelerator(),
    )
    return _same_kind(CPOTrainer.cpo_loss(trainer, *_tensors(chosen, rejected))[0], chosen)


def orpo_loss(chosen, rejected, beta):
    """Return the part of TRL's ORPO loss that compares the answers, (E,), of mean log-probabilities (E,)."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=_Accelerator())
    # TRL subtracts this from the likelihood's loss.
    return _same_kind(-ORPOTrainer.odds_ratio_loss(trainer, *_tensors(chosen, rejected))[0], chosen)


def preference_loss(settings, model, batch, reference):
    """Return TRL's loss of one of our batches, and what it reports.

    Args:
        settings: of the objective.
        model: (rows, T) int64, the chosen rows first -> what has their `logits`.
        batch: of pairs or rated answers, a row for each.
        reference: (R,) float32, of all rows of the set.
    """
    kept = batch.numbers >= 0
    order = np.concatenate([np.flatnonzero(kept)[0::2], np.flatnonzero(kept)[1::2]])
    inputs, targets = (torch.tensor(array[order].astype(np.int64)) for array in (batch.inputs, batch.targets))
    answer_mask = (batch.columns.get("answers", batch.mask))[order]
    every = torch.log_softmax(model(inputs).logits, dim=-1).gather(2, targets[..., None]).squeeze(2)
    answers = every * torch.tensor(answer_mask)
    half = len(order) // 2
    known = torch.tensor(reference[batch.numbers[order]])
    if settings.objective == "dpo":
        names = settings.loss_type.split(",")
        weights = None if settings.loss_weights is None else [float(w) for w in settings.loss_weights.split(",")]
        weights = weights or [1.0] * len(names)
        options = {"beta": settings.beta, "label_smoothing": settings.label_smoothing}
        return dpo_objective(answers, known, answer_mask, names, weights, **options)
    if settings.objective == "kto":
        sums = answers.detach().sum(dim=1)
        good = batch.columns["labels"][order][:half] > 0
        weights = settings.desirable_weight, settings.undesirable_weight
        return kto_objective(
            answers[:half], known[:half], answer_mask[:half], good, sums[half:], known[half:], settings.beta, weights
        )
    tokens = torch.tensor(answer_mask.sum(axis=1))
    sums, means = answers.sum(dim=1), answers.sum(dim=1) / tokens
    if settings.objective == "simpo":
        options = {"beta": settings.beta, "simpo_gamma": settings.simpo_gamma}
        return cpo_loss("simpo", means[:half], means[half:], **options).mean(), {}
    trained = torch.tensor(batch.mask[order][:half])  # with the prompt for ORPO
    likelihood = -every[:half][trained].mean()
    if settings.objective == "cpo":
        losses = cpo_loss("sigmoid", sums[:half], sums[half:], beta=settings.beta)
        return losses.mean() + settings.cpo_alpha * likelihood, {}
    return orpo_loss(means[:half], means[half:], settings.beta).mean() + likelihood, {}


def _tensors(*values):
    return [value if torch.is_tensor(value) else torch.tensor(value) for value in values]


def _same_kind(result, argument):
    return result if torch.is_tensor(argument) else result.numpy()


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
    return logps, logps.sum(axis=1) + random.normal(0, 2.0, 2 * pairs), mask
