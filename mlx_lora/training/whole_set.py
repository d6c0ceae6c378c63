"""Measure an objective on held-out answers: one loss over all of them together, however they were divided into batches.

Some losses are not means over examples: a likelihood is a mean over tokens (ORPO, CPO, RPO), KTO compares each answer with
the mean divergence of others, and AOT sorts all margins. A mean over batches of these depends on the batches. So a batch
only gives the sums of its answers, a few numbers each, and the loss is computed once, at the end.

Shapes: B rows of a batch, N answers of the set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import Batch
from mlx_lora.objectives.objective import AnswerSums, LossOfAnswers
from mlx_lora.system.distributed import Ranks

ARRAYS = ("logps", "tokens", "likelihood", "reference", "labels", "real")
UNWEIGHTED = (1.0, 0.0)  # `Batch.shares` for sums whose likelihood is not yet divided by tokens


@dataclass(frozen=True)
class WholeSet:
    """How an objective is measured on a whole set.

    Attributes:
        sums: (model, *arrays of a batch) -> the sums of its answers.
        loss: of the objective.
        rated: whether an example is one rated answer, with a second row that only tells the divergence.
        divergence: whether the loss needs that.
    """

    sums: Callable[..., AnswerSums]
    loss: LossOfAnswers
    rated: bool
    divergence: bool


def whole_set_loss(
    model: nn.Module,
    whole: WholeSet,
    arrays_of: Callable[[Batch], tuple[mx.array, ...]],
    batches: Iterable[Batch],
    ranks: Ranks,
    counted: bool = True,
) -> tuple[float, int, dict[str, float]]:
    """Return the mean loss over all examples of all ranks' batches, their number, and the means that are reported.

    Args:
        model: In eval mode.
        whole: The objective's part.
        arrays_of: Returns the arguments of `WholeSet.sums` for a batch.
        batches: This rank's.
        ranks: That call this together.
        counted: False: another rank has computed the same batches, and counts them.
    """
    found, targets = [np.zeros((len(ARRAYS), 0), np.float32)], 0
    for batch in batches:
        sums = whole.sums(model, *arrays_of(replace(batch, shares=UNWEIGHTED)))
        rows = np.array(mx.stack([getattr(sums, name) for name in ARRAYS]))  # (6, B)
        if counted:
            found.append(rows[:, rows[-1] > 0])  # without padding
            targets += batch.first_targets
    ranks.meet()  # they finish at different times, and the host must wait for the others, not the device
    told = ranks.everyone([targets, np.concatenate(found, axis=1).tolist()])
    rows = np.concatenate([np.array(one, np.float32).reshape(len(ARRAYS), -1) for _, one in told], axis=1)
    examples = rows.shape[1] // 2
    if not examples:
        return math.nan, 0, {}
    sums = _sums_of(rows, examples / max(1, sum(number for number, _ in told)), whole)
    losses, reports = whole.loss(sums)
    return _mean(losses), examples, {name: _mean(values) for name, values in reports.items()}


def _sums_of(rows: np.ndarray, share: float, whole: WholeSet) -> AnswerSums:
    """Return the sums of a set's answers, (6, N), as the loss takes them; `share` is the set's examples per target."""
    named = dict(zip(ARRAYS, rows, strict=True))
    divergence = 0.0
    if whole.divergence:
        ratios = (named["logps"] - named["reference"])[1::2]
        divergence = max(0.0, float(ratios.mean(dtype=np.float64)))
    named["likelihood"] = named["likelihood"] * np.float32(share)
    sums = AnswerSums(**{name: mx.array(values) for name, values in named.items()}, divergence=mx.array(divergence))
    return sums.side(0) if whole.rated else sums


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean(dtype=np.float64))
