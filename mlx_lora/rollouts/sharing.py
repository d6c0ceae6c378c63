"""Divide the prompts of a step among ranks: each answers some of them, rewards its answers, and all get everything.

What is exchanged is small: tokens and one number for each answer. Afterwards every rank has the same batches as a single
process, so all that depends on a whole step (advantages, tokens of the step, the division of the training pass) is
computed from them as by a single process. The random streams belong to the answers, not to the ranks that sample them.

Shapes: G answers to one prompt, B rows, T columns; N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.data.batch import Batch, share_of
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.parallel.ranks import Ranks


@dataclass(frozen=True)
class Planned:
    """A planned batch whose prompts are to be answered.

    Attributes:
        batch: with room for the answers.
        facts: what rewards see of each prompt.
        rollout: its number, which decides the random streams.
        rows: the set that the batch is of.
    """

    batch: Batch
    facts: Sequence[dict[str, Any]]
    rollout: int
    rows: EncodedSet


@dataclass(frozen=True)
class Answered:
    """The answers to some prompts, one group after the other.

    Attributes:
        answers: tokens of each answer.
        rewards: (answers, functions) float64, NaN without one.
        notes: lines on rewards that failed and were skipped.
    """

    answers: list[list[int]]
    rewards: np.ndarray
    notes: list[str] = field(default_factory=list)


def deal_prompts(counts: Sequence[int], size: int) -> list[list[list[int]]]:
    """Deal the prompts of a step's batches to ranks in turn, on from one batch to the next.

    Args:
        counts: prompts of each batch.
        size: N.

    Returns:
        For each batch, for each rank, the numbers of its prompts.
    """
    dealt, begin = [], 0
    for count in counts:
        dealt.append([[prompt for prompt in range(count) if (begin + prompt) % size == rank] for rank in range(size)])
        begin += count
    return dealt


def gathered(own: Sequence[Answered], dealt: Sequence[list[list[int]]], group: int, ranks: Ranks) -> list[Answered]:
    """Return the answers to all prompts of each batch, the same on every rank.

    Args:
        own: this rank's, for each batch.
        dealt: from `deal_prompts`.
        group: G.
        ranks: all ranks of the run.
    """
    every = ranks.everyone([[one.answers, one.rewards.tolist(), one.notes] for one in own])
    whole = []
    for number, prompts_of in enumerate(dealt):
        count = group * sum(map(len, prompts_of))
        found = Answered([[] for _ in range(count)], np.zeros((count, own[number].rewards.shape[1])))
        for rank, prompts in enumerate(prompts_of):
            answers, rewards, notes = every[rank][number]
            rows = [group * prompt + place for prompt in prompts for place in range(group)]
            for row, answer, reward in zip(rows, answers, rewards, strict=True):
                found.answers[row], found.rewards[row] = answer, reward
            found.notes.extend(f"rank {rank}: {note}" if rank else note for note in notes)
        whole.append(found)
    return whole


def of_own_rows(
    compute: Callable[[Batch], np.ndarray],
    batch: Batch,
    rows: np.ndarray,
    ranks: Ranks,
    depth: tuple[int, ...] = (),
) -> np.ndarray:
    """Return float32 numbers for each target of a batch, (B, T, *depth), of which this rank computes only its own rows.

    Args:
        compute: returns the numbers of a batch's targets.
        batch: the same on every rank.
        rows: of this rank; every row belongs to one rank, or to none if its numbers are 0.
        ranks: all ranks of the run.
        depth: the shape of the numbers of one target.
    """
    if ranks.size == 1:
        return compute(batch)
    found = np.zeros((*batch.mask.shape, *depth), np.float32)
    if len(rows):
        found[rows] = compute(share_of(batch, rows))
    return np.array(ranks.sum(mx.array(found)))
