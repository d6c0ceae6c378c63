"""The losses that a client may name, as functions of the log-probabilities of its target tokens.

Every loss is a sum over tokens, and tokens of one micro-batch lie one behind the other, so a client's request may be cut anywhere
between its examples. With p = exp(logprob) under the adapter and q under the policy that sampled the token, A its advantage:

    cross_entropy         -w log p
    importance_sampling   -(p / q) A
    ppo                   -min((p / q) A, clip(p / q, low, high) A)                 arXiv 1707.06347, equation 7, per token
    cispo                 -sg[clip(p / q, low, high)] A log p                       arXiv 2506.13585, equation 4
    dro                   -(A log p - beta / 2 (log p - log q)^2)                   arXiv 2405.19107
    gspo                  -min(s A, clip(s, low, high) A), s = sg[exp(mean of log p / q over the example's masked tokens)] p / sg[p]
                                                                                    arXiv 2507.18071, equation 13 (GSPO-token)

sg has no gradient. The formulas and names are those of Tinker's documentation (tinker-docs.thinkingmachines.ai/tinker/losses).

Shapes: P target tokens of a micro-batch, D its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_lora.utils.errors import InputError

Given = Mapping[str, mx.array]
"""What an example brings beside its targets, by the protocol's names: (P,) float32, and `datum`, (P,) int32, its number."""
TokenLoss = Callable[[mx.array, Given, Mapping[str, float]], mx.array]
"""(logprobs (P,), given, config) -> (P,) float32, whose sum is the loss."""

LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
RATIO_MASK = "sequence_ratio_mask"
SAMPLED = ("logprobs", "advantages")


def cross_entropy(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return the weighted cross-entropy; weights may have any sign, which is how a client differentiates a loss of its own."""
    return -logprobs * given["weights"]


def importance_sampling(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return REINFORCE, corrected for the policy that sampled."""
    return -mx.exp(logprobs - given["logprobs"]) * given["advantages"]


def ppo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return PPO's clipped objective, token by token."""
    return _clipped(mx.exp(logprobs - given["logprobs"]), given, config)


def cispo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return REINFORCE whose weight is the clipped ratio, so a clipped token still has a gradient."""
    low, high = _bounds(given, config)
    ratio = mx.clip(mx.exp(logprobs - given["logprobs"]), low, high)
    return -mx.stop_gradient(ratio) * logprobs * given["advantages"]


def dro(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return the advantage-weighted likelihood with a quadratic penalty on the log-ratio."""
    away = mx.square(logprobs - given["logprobs"])
    return -(logprobs * given["advantages"] - 0.5 * config["beta"] * away)


def gspo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return PPO's objective with the ratio of the whole example, which every token carries with its own gradient."""
    held = mx.stop_gradient(logprobs)
    inside = (given[RATIO_MASK] != 0).astype(mx.float32)  # (P,)
    datum = given["datum"]
    own = (datum[None, :] == mx.arange(int(datum.max().item()) + 1)[:, None]).astype(mx.float32)  # (D, P)
    log_ratio = (own @ ((held - given["logprobs"]) * inside)) / mx.maximum(own @ inside, 1.0)  # (D,)
    return _clipped(mx.exp(log_ratio[datum] + logprobs - held), given, config)


def _clipped(ratio: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    low, high = _bounds(given, config)
    advantages = given["advantages"]
    return -mx.minimum(ratio * advantages, mx.clip(ratio, low, high) * advantages)


def _bounds(given: Given, config: Mapping[str, float]) -> tuple[mx.array | float, mx.array | float]:
    """Return the bounds of a ratio: an example's own, one for each token, come before those of the request."""
    return given.get(LOW, config[LOW]), given.get(HIGH, config[HIGH])


@dataclass(frozen=True)
class LossRow:
    """A loss by name.

    Attributes:
        of_tokens: the function.
        needs: the inputs that every example must bring.
        may: inputs that it may bring.
        config: the numbers that a request may set, with their defaults; None: it must set it.
    """

    of_tokens: TokenLoss
    needs: tuple[str, ...] = SAMPLED
    may: tuple[str, ...] = ()
    config: Mapping[str, float | None] | None = None


# PPO's and CISPO's bounds are Tinker's. Its documentation does not say those of GSPO, so they are those of the paper's section 5.1.
PPO_BOUNDS, GSPO_BOUNDS = {LOW: 0.8, HIGH: 1.2}, {LOW: 1 - 3e-4, HIGH: 1 + 4e-4}
LOSSES: Mapping[str, LossRow] = {
    "cross_entropy": LossRow(cross_entropy, needs=(), may=("weights",)),
    "importance_sampling": LossRow(importance_sampling),
    "ppo": LossRow(ppo, may=(LOW, HIGH), config=PPO_BOUNDS),
    "cispo": LossRow(cispo, may=(LOW, HIGH), config=PPO_BOUNDS),
    "dro": LossRow(dro, config={"beta": None}),
    "gspo": LossRow(gspo, (*SAMPLED, RATIO_MASK), (LOW, HIGH), GSPO_BOUNDS),
}
# Names that Tinker's client knows and this server does not compute.
NOT_HERE = {
    "stable_reinforce": "its formula is not published; use importance_sampling, ppo, cispo or gspo",
    "custom": "custom losses run in the client; give forward_backward_custom a function",
}


def find_loss(name: str, config: Mapping[str, float | str]) -> tuple[LossRow, dict[str, float]]:
    """Return a loss and its numbers.

    Raises:
        InputError: there is no such loss, or its config has something else than the numbers that it takes.
    """
    row = LOSSES.get(name)
    if row is None:
        raise InputError(f"loss_fn {name[:40]!r}: {NOT_HERE.get(name, 'no such loss; use ' + ', '.join(LOSSES))}")
    known = dict(row.config or {})
    strange = [key for key, value in config.items() if key not in known or isinstance(value, str)]
    if strange:
        takes = ", ".join(known) or "nothing"
        raise InputError(
            f"loss_fn_config of {name}: {strange[0][:40]!r} is not a number that it takes; it takes {takes}"
        )
    numbers = {**known, **{key: float(value) for key, value in config.items()}}
    missing = [key for key, value in numbers.items() if value is None]
    if missing:
        raise InputError(
            f"loss_fn_config of {name}: {missing[0]} is missing; give loss_fn_config={{{missing[0]!r}: 0.05}}"
        )
    return row, {key: value for key, value in numbers.items() if value is not None}
