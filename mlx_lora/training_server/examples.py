"""Check the examples of a request, and put them into micro-batches.

An example is one row: its input tokens, and as many targets. Targets may have K columns, alternatives at each position, as in
distillation from a teacher's likeliest tokens; then it is K rows with the same inputs, because a row of a batch has one target at each
position. Rows of similar length share a micro-batch, padded on the right, which a causal model does not see.

Shapes: N tokens of an example, K columns; B rows, T columns and P targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_lora.losses.cross_entropy import TOKEN_ARRAYS, Arrays
from mlx_lora.training_server.losses import RATIO_MASK, LossRow
from mlx_lora.utils.errors import InputError

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
    """Some rows of a request, on the device.

    Attributes:
        arrays: as a loss of tokens takes them, whose positions are all tokens of the rows, in order.
        given: the loss's inputs at these positions, (P,), and `datum`, each position's row.
        rows: (example, column, tokens) of each row.
    """

    arrays: Arrays
    given: dict[str, mx.array]
    rows: list[tuple[int, int, int]]


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
        yield _micro_batch(examples, rows[:count], names)
        rows = rows[count:]


def _micro_batch(examples: Sequence[Example], rows: list[tuple[int, int, int]], names: Sequence[str]) -> MicroBatch:
    shape = (len(rows), rows[0][2])
    inputs, targets, mask = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
    given: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for place, (number, column, length) in enumerate(rows):
        example = examples[number]
        inputs[place, :length], mask[place, :length] = example.tokens, True
        targets[place, :length] = _column(example.targets, column)
        for name in names:
            values = example.given.get(name)
            given[name].append(np.ones(length, np.float32) if values is None else _column(values, column))
    positions = np.flatnonzero(mask).astype(np.int32)
    columns = (inputs, targets, mask, positions, np.ones(len(positions), np.float32))
    arrays = {name: mx.array(values) for name, values in zip(TOKEN_ARRAYS, columns, strict=True)}
    datum = np.repeat(np.arange(len(rows), dtype=np.int32), [length for _, _, length in rows])
    flat = {name: mx.array(np.concatenate(values).astype(np.float32)) for name, values in given.items()}
    return MicroBatch(arrays, {**flat, "datum": mx.array(datum)}, rows)


def _column(values: np.ndarray, column: int) -> np.ndarray:
    return values[:, column] if values.ndim == 2 else values


def by_example(
    examples: Sequence[Example], rows: Sequence[tuple[int, int, int]], values: np.ndarray, out: list[np.ndarray]
) -> None:
    """Put the values of a micro-batch's tokens, (P,), into arrays like the examples' targets."""
    start = 0
    for number, column, length in rows:
        part = values[start : start + length]
        if examples[number].targets.ndim == 2:
            out[number][:, column] = part
        else:
            out[number][:] = part
        start += length
