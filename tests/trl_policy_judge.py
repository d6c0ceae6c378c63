"""TRL's own GRPO and RLOO loss code on given log-probabilities, without a model: the judge of our policy losses."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch


class _Accelerator:
    """What TRL's loss code asks of accelerate, for one process."""

    device, num_processes, process_index = torch.device("cpu"), 1, 0

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction="sum"):
        return value


def policy_objective(
    per_token, old, reference, mask, advantages, loss, *, beta=0.0, low=0.2, high=0.2, longest=16, tool_mask=None
):
    """Return TRL's loss, a tensor with its graph, and what TRL reports.

    Args:
        per_token: (A, T) log-probabilities of sampled tokens, a tensor.
        old, reference: (A, T) under the policy that sampled, and under the reference.
        mask: (A, T) bool tensor.
        advantages: (A,).
        loss: our name of the loss.
        beta, low, high: TRL's beta, epsilon and epsilon_high.
        longest: TRL's max_completion_length.
        tool_mask: (A, T) of the tokens that the model sampled, among those of `mask`; None: all of them.
    """
    if loss == "rloo":
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer
    else:
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type="grpo" if loss == "gspo" else loss,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        max_completion_length=longest,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (per_token, torch.zeros_like(per_token), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.to(per_token.dtype),
        "advantages": advantages,
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum() if tool_mask is None else (mask * tool_mask).sum(),
    }
    if tool_mask is not None:
        inputs["tool_mask"] = tool_mask.to(per_token.dtype)
    found = Trainer._compute_loss(trainer, trainer.model, inputs)
    return found, {name: values[-1] for name, values in trainer._metrics["train"].items()}
