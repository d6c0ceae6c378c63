"""Divide the prompts of a step among ranks: each answers some of them, rewards its answers, and all get everything.

What is exchanged is small: tokens and a few numbers for each answer. Afterwards every rank has the same batches as a single
process, so all that depends on a whole step (advantages, tokens of the step, the division of the training pass) is
computed from them as by a single process. The random streams belong to the answers, not to the ranks that sample them.

Shapes: G answers to one prompt, B rows, T columns; N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.data.batch import Batch, share_of
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.parallel.ranks import Ranks
from mlx_lora.rollouts.environment import Episode, Played


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


def gathered(own: Sequence[Played], dealt: Sequence[list[list[int]]], group: int, ranks: Ranks) -> list[Played]:
    """Return the episodes of all prompts of each batch, the same on every rank.

    Args:
        own: this rank's, for each batch.
        dealt: from `deal_prompts`.
        group: G.
        ranks: all ranks of the run.
    """
    every = ranks.everyone([[one.prompts, one.written, one.rewards.tolist(), one.notes] for one in own])
    whole = []
    for number, prompts_of in enumerate(dealt):
        prompts = sum(map(len, prompts_of))
        shape = group * prompts, own[number].rewards.shape[1]
        found = Played([[] for _ in range(prompts)], [Episode() for _ in range(shape[0])], np.zeros(shape))
        for rank, dealt_to in enumerate(prompts_of):
            begun, episodes, rewards, notes = every[rank][number]
            for prompt, tokens in zip(dealt_to, begun, strict=True):
                found.prompts[prompt] = tokens
            rows = [group * prompt + place for prompt in dealt_to for place in range(group)]
            for row, episode, reward in zip(rows, episodes, rewards, strict=True):
                found.episodes[row], found.rewards[row] = Episode(*episode), reward
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
