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

Check the examples of a request, and put them into micro-batches.

An example is one row: its input tokens, and as many targets. Targets may have K columns, alternatives at each position, as in
distillation from a teacher's likeliest tokens; then it is K rows with the same inputs, because a row of a batch has one target at each
position. Rows of similar length share a micro-batch, padded on the right, which a causal model does not see.

Shapes: N tokens of an example, K columns; B rows, T columns and P targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

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


# Check the examples of a request, and put them into micro-batches

MOST_COLUMNS = 64


@dataclass(frozen=True)
class Example:
    """One example of a request.

    Attributes:
        tokens: (N,) int32, the inputs.
        targets: (N,) or (N, K) int64, what to predict at each position.
        given: the loss's other inputs by name, each float32 and shaped like `targets`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    given: dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelLimits:
    """What a model can take: its vocabulary, and the most tokens of a row."""

    vocabulary: int
    context: int


def check_tokens(tokens: np.ndarray, limits: ModelLimits, what: str) -> None:
    """Refuse token ids without a row in the embedding, which MLX would read from beyond it.

    Raises:
        InputError: there are such ids, or too many or no tokens.
    """
    if not 0 < len(tokens) <= limits.context:
        raise InputError(f"{what}: has {len(tokens)} tokens; give 1 to {limits.context}")
    if tokens.min() < 0 or tokens.max() >= limits.vocabulary:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(
            f"{what}: token {wrong} is not in the model's vocabulary of {limits.vocabulary}; check the tokenizer"
        )


def check_examples(examples: Sequence[Example], name: str, row: LossRow, limits: ModelLimits) -> None:
    """Refuse what a loss cannot be computed of.

    Raises:
        InputError: names the first example that is wrong, by its place in the request.
    """
    if not examples:
        raise InputError("data: empty; give at least one example")
    for number, example in enumerate(examples):
        what = f"data[{number}]"
        check_tokens(example.tokens, limits, f"{what}.model_input")
        shape = example.targets.shape
        if len(shape) not in (1, 2) or shape[0] != len(example.tokens):
            raise InputError(
                f"{what}: target_tokens are {shape}, model_input has {len(example.tokens)} tokens; give as many"
            )
        if len(shape) == 2 and (name != "cross_entropy" or not 0 < shape[1] <= MOST_COLUMNS):
            raise InputError(
                f"{what}: target_tokens are {shape}; several columns, at most {MOST_COLUMNS}, go with cross_entropy"
            )
        check_tokens(
            example.targets.reshape(-1), ModelLimits(limits.vocabulary, example.targets.size), f"{what}.target_tokens"
        )
        missing = [one for one in row.needs if one not in example.given]
        if missing:
            raise InputError(f"{what}: {name} needs {', '.join(missing)} in loss_fn_inputs")
        for key, value in example.given.items():
            if key not in (*row.needs, *row.may):
                raise InputError(f"{what}: {name} does not take {key[:40]!r} in loss_fn_inputs; leave it out")
            if value.shape != shape:
                raise InputError(f"{what}: {key} are {value.shape}, target_tokens {shape}; give one for each target")
        uneven = [one for one in row.may if (one in example.given) != (one in examples[0].given)]
        if uneven:
            raise InputError(f"{what}: {uneven[0]} is in some examples' loss_fn_inputs only; give it in all or none")
        if RATIO_MASK in row.needs and not example.given[RATIO_MASK].any():
            raise InputError(f"{what}: {RATIO_MASK} marks no token; mark the sampled ones")


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a request, with the names of a run's batch, so that a joint pass takes it as one.

    Attributes:
        inputs, targets, mask: (B, T).
        positions, weights: (P,), all tokens of the rows, in order, and ones.
        given: the loss's inputs at these positions, (P,) on the device, and `datum`, each position's row.
        rows: (example, column, tokens) of each row.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    given: dict[str, mx.array]
    rows: list[tuple[int, int, int]]
    answers_per_row: ClassVar[int] = 1
    starts: ClassVar[None] = None


def micro_batches(examples: Sequence[Example], row: LossRow, most_positions: int) -> Iterator[MicroBatch]:
    """Yield all rows of a request, the longest first.

    Args:
        examples: checked.
        row: of the loss.
        most_positions: of a micro-batch, padding included; a row that is longer has one of its own.
    """
    rows = [
        (number, column, len(example.tokens))
        for number, example in enumerate(examples)
        for column in range(example.targets.shape[1] if example.targets.ndim == 2 else 1)
    ]
    rows.sort(key=lambda one: -one[2])  # stable: equal requests have equal batches
    names = [name for name in (*row.needs, *row.may) if name in examples[0].given]
    names += ["weights"] if "weights" in row.may and "weights" not in names else []
    while rows:
        count = max(1, most_positions // rows[0][2])
        own, rows = rows[:count], rows[count:]
        shape = (len(own), own[0][2])
        inputs, targets, mask = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
        given: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for place, (number, column, length) in enumerate(own):
            example = examples[number]
            inputs[place, :length], mask[place, :length] = example.tokens, True
            targets[place, :length] = example.targets.reshape(length, -1)[:, column]
            for name in names:
                values = example.given.get(name, np.ones_like(example.targets, np.float32))
                given[name].append(values.reshape(length, -1)[:, column])
        positions = np.flatnonzero(mask).astype(np.int32)
        datum = np.repeat(np.arange(len(own), dtype=np.int32), [length for _, _, length in own])
        flat = {name: mx.array(np.concatenate(values).astype(np.float32)) for name, values in given.items()}
        weights = np.ones(len(positions), np.float32)
        yield MicroBatch(inputs, targets, mask, positions, weights, {**flat, "datum": mx.array(datum)}, own)


def by_example(
    examples: Sequence[Example], rows: Sequence[tuple[int, int, int]], values: np.ndarray, out: list[np.ndarray]
) -> None:
    """Put the values of a micro-batch's tokens, (P,), into arrays like the examples' targets."""
    start = 0
    for number, column, length in rows:
        out[number].reshape(length, -1)[:, column] = values[start : start + length]
        start += length
