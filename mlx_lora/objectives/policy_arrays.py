"""The loss of sampled answers, from the losses of their tokens, as steps and validations use it.

Shapes: B rows, A answers (B, or B K where a row holds K), T columns, P positions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.losses.cross_entropy import PLAIN_LOGITS, Arrays, Loss, token_arrays
from mlx_lora.losses.fused import head_loss
from mlx_lora.losses.grpo import PolicyOptions, SampledTokens, policy_loss
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.prefix_attention import answers_at, shared_caches
from mlx_lora.planner.machine import loss_tile_bytes

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.parallel.strategy import Strategy

# What a batch of sampled answers has beside its tokens: (B, T) of each target, and of each answer (B,), or (B, K) where a
# row holds K.
OLD, REFERENCE, SHARE = "old", "reference", "share"
ADVANTAGES, REWARDS, LENGTHS, TRUNCATED = "advantages", "reward", "length", "truncated"
KL, CLIPPED = "kl", "clipped"  # what a policy loss reports


def more_reports(reports: tuple[str, ...]) -> tuple[str, ...]:
    """Return the reports that a batch has of each of its answers, beside those of every policy loss."""
    return tuple(name for name in reports if name not in (REWARDS, LENGTHS, TRUNCATED, KL, CLIPPED))


def policy_arrays(batch: Batch, more: tuple[str, ...] = ()) -> Arrays:
    """Copy a batch of sampled answers to the device.

    Args:
        batch: with what was sampled.
        more: names of further reports; what the batch does not have is 0.

    Returns:
        In addition to `token_arrays`, all float32: `old` and `reference` (P,), log-probabilities under the policy that sampled
        them, and under the reference; `advantages`, `reward`, `length`, `truncated`, `real` (A,); `share` (2,), answers / tokens
        of the step, and 1 if `old` is the policy itself, whose ratio is 1; `more` (M, A), what else is reported of each answer.
    """
    sampled = batch.columns
    answers = len(batch.inputs) * batch.answers_per_row
    nothing = np.zeros(batch.slots, np.float32)

    def of_tokens(name: str) -> mx.array:
        return mx.array(sampled[name].ravel()[batch.positions] * batch.weights if name in sampled else nothing)

    def of_answers(name: str) -> mx.array:
        return mx.array(sampled[name].ravel() if name in sampled else np.zeros(answers, np.float32))

    real = np.repeat(batch.real, batch.answers_per_row).astype(np.float32)
    share = (sampled[SHARE][0] if SHARE in sampled else 0.0, float(OLD not in sampled))
    others = mx.stack([of_answers(name) for name in more]) if more else mx.zeros((1, answers))
    tokens = {name: of_tokens(name) for name in (OLD, REFERENCE)}
    values = {name: of_answers(name) for name in (ADVANTAGES, REWARDS, LENGTHS, TRUNCATED)}
    step = {"real": mx.array(real), "share": mx.array(np.array(share, np.float32)), "more": others}
    return token_arrays(batch) | tokens | values | step


def policy_loss_of(loss: Loss, options: PolicyOptions, words: str, more: tuple[str, ...] = ()) -> Loss:
    """Return the loss of sampled answers from that of tokens; its measure is minus the mean reward.

    Args:
        loss: of tokens.
        options: of the policy loss.
        words: on the objective, for the run header.
        more: names of what else is reported, as for `policy_arrays`.
    """

    def train(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        logps, (share, own) = -loss.tokens(model, arrays), arrays["share"]  # (P,)
        old = mx.where(own > 0, mx.stop_gradient(logps), arrays[OLD])
        sampled = SampledTokens(
            logps, old, arrays[REFERENCE], arrays["weights"], answers_at(arrays), arrays[ADVANTAGES],
            mx.stop_gradient(share),
        )  # fmt: skip
        losses, reports = policy_loss(sampled, options)  # (A,)
        return _summed(arrays, losses, reports, more)

    def measure(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        nothing = mx.full(arrays[REWARDS].shape, math.nan)  # a step reports these, a validation does not
        return _summed(arrays, -arrays[REWARDS], {KL: nothing, CLIPPED: nothing}, more)

    return replace(loss, train=train, measure=measure, description=f"{words}; {loss.description}")


def _summed(
    arrays: Arrays, losses: mx.array, reports: dict[str, mx.array], more: tuple[str, ...]
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """Return sums over real answers of the loss, of 1, and of what is reported."""
    known, real = {name: arrays[name] for name in (REWARDS, LENGTHS, TRUNCATED)}, arrays["real"]
    known |= {name: arrays["more"][place] for place, name in enumerate(more)}
    sums = {name: (values * real).sum() for name, values in (known | reports).items()}
    return (losses * real).sum(), real.sum(), sums


def prepared(batches: list[Batch], strategy: Strategy) -> list[Batch]:
    """Compute what depends on a whole step: answers divided by tokens.

    All ranks have the same batches by now, each other's answers included (rollouts/rollout.py).
    """
    answers = sum(int(b.real.sum()) * b.answers_per_row for b in batches)
    tokens = sum(int(b.mask.sum()) for b in batches)
    share = answers / max(1, tokens)
    return [batch.with_columns(**{SHARE: np.full(len(batch.inputs), share)}) for batch in batches]


def at_temperature(loss: Loss, model: nn.Module, config: dict[str, Any], temperature: float) -> Loss:
    """Return the loss of tokens under the distribution that answers are sampled from: logits / temperature, as in TRL.

    Args:
        loss: of tokens, chosen for this model.
        model, config: the model and its config.json.
        temperature: of sampling.
    """
    if temperature == 1:
        return loss
    head = None if loss.kernel == PLAIN_LOGITS else find_head(model, config)
    if isinstance(head, Head) and head.soft_cap is None:
        return head_loss(replace(head, scale=head.scale / temperature), loss.kernel, loss_tile_bytes())

    def tokens(model: nn.Module, arrays: Arrays) -> mx.array:
        weights, targets = arrays["weights"], arrays["targets"]
        logits = model(arrays["inputs"], **shared_caches(model, arrays)).astype(mx.float32) / temperature  # (B, T, V)
        logps = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1) - mx.logsumexp(logits, axis=-1)
        return mx.where(weights > 0, -logps.reshape(-1)[arrays["positions"]] * weights, 0.0)

    return replace(loss, tokens=tokens, measure_tokens=None, kernel=PLAIN_LOGITS)


def token_logps(model: nn.Module, loss: Loss, batch: Batch) -> np.ndarray:
    """Return the log-probabilities of a batch's trained targets under the model as it is, (B, T) float32."""
    tokens = loss.measure_tokens or loss.tokens
    found = np.zeros(batch.mask.shape, np.float32).ravel()
    with loss.measuring(model):
        logps = np.array(-tokens(model, token_arrays(batch)).astype(mx.float32))
    real = batch.weights > 0
    found[batch.positions[real]] = logps[real]
    return found.reshape(batch.mask.shape)
