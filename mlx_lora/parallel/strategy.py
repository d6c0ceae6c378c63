"""Divide an optimizer step among ranks: each computes some rows of every micro-batch, and all ranks add up their results.

Every rank has the same batch plan as a single process: it lays out the whole step and takes its own rows, so that the
sums of losses, tokens and gradients over all ranks are those of the whole batch. So neither the order of the data nor
the position of a run depends on the number of ranks. Ranks with parts of the layers all compute all rows instead.

Shapes: B rows, T columns, P slots for trained targets of a micro-batch; N ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.data.batch import Batch, nothing_of, share_of
from mlx_lora.parallel.ranks import Ranks
from mlx_lora.parallel.sharded_base import is_shared
from mlx_lora.parallel.tensor import in_branches, is_cut


def sharing_of(model: nn.Module, ranks: Ranks, seed: int) -> Sharing | SameRows | None:
    """Return how ranks divide each step: not at all, by rows, or by parts of the layers."""
    if ranks.size == 1:
        return None
    return SameRows(ranks, seed, in_branches(model)) if is_cut(model) else Sharing(ranks, seed, is_shared(model))


def called_together(model: nn.Module) -> bool:
    """Return whether every rank must call the model equally often: its weights or its layers are in parts."""
    return is_shared(model) or is_cut(model)


class Sharing:
    """Divides a step's work among ranks, and adds up their results."""

    def __init__(self, ranks: Ranks, seed: int, equally_often: bool = False):
        """Set up.

        Args:
            ranks: all ranks of the run.
            seed: of the run; dropout's random numbers depend on (seed, step, rank).
            equally_often: whether all ranks must compute equally many micro-batches, because they share the base.
        """
        self._ranks, self._seed, self._equally_often = ranks, seed, equally_often

    def own(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> Iterator[Batch]:
        """Yield this rank's part of each micro-batch that has one for it.

        Args:
            batches: of all ranks together.
            divide: cuts this rank's part further, to save memory.
        """
        for batch, dealt in zip(batches, deal_rows(batches, self._ranks.size), strict=True):
            rows = dealt[self._ranks.rank]
            if self._equally_often:
                yield share_of(batch, rows) if len(rows) else nothing_of(batch)
            elif len(rows):
                yield from divide([share_of(batch, rows)])

    def reseed(self, step: int) -> None:
        """Seed this rank's random numbers for a step.

        The seed depends on the step's number, so a resumed run does not need the other ranks' random keys: with the same
        number of ranks as before, it draws the same dropout.
        """
        reseed(self._seed, step, self._ranks.rank)

    def own_gradients(self, grads: dict) -> dict:
        """Return this rank's part of its gradients: with rows of its own, all of them."""
        return grads

    def sums(self, total: list, flag: bool) -> tuple[list, mx.array]:
        """Add up every rank's part of a step, in one message.

        Args:
            total: loss_sum, tokens (float32 scalars), reports (a dict of them) and gradients (a dict of float32 arrays).
            flag: a yes or no of this rank.

        Returns:
            The same, summed; and how many ranks said yes.
        """
        loss_sum, tokens, reports, grads = total
        names, leaves = zip(*grads.items(), strict=True)
        scalars = mx.stack([loss_sum, tokens, mx.array(float(flag)), *reports.values()])
        parts = [scalars, *(leaf.reshape(-1) for leaf in leaves)]
        message = mx.concatenate(parts)
        message = self._ranks.sum(message)
        ends = list(accumulate(part.size for part in parts))
        scalars, *flat = mx.split(message, ends[:-1])
        summed = {name: part.reshape(leaf.shape) for name, part, leaf in zip(names, flat, leaves, strict=True)}
        reported = {name: scalars[3 + i] for i, name in enumerate(reports)}
        return [scalars[0], scalars[1], reported, summed], scalars[2]


class SameRows(Sharing):
    """All ranks compute all rows, each with its part of the model; what all have in whole is counted once, by rank 0."""

    def __init__(self, ranks: Ranks, seed: int, in_parts: frozenset[str]):
        """Set up.

        Args:
            ranks, seed: as for `Sharing`.
            in_parts: the names of parameters whose gradient on a rank is a part of the whole one.
        """
        super().__init__(ranks, seed)
        self._in_parts = in_parts

    def own(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> Iterator[Batch]:
        """Yield each micro-batch as it is: a rank that divided it alone would compute more often than the others."""
        yield from batches

    def reseed(self, step: int) -> None:
        """Seed the random numbers of a step, which are the same on all ranks."""
        reseed(self._seed, step, 0)

    def own_gradients(self, grads: dict) -> dict:
        """Return the gradients that are this rank's to count; rank 0 counts those that all ranks have in whole.

        They are multiplied by 0 and not replaced: every rank must compute them, because messages are sent on the way.
        """
        if self._ranks.leads:
            return grads
        return tree_unflatten([(name, g if name in self._in_parts else 0 * g) for name, g in tree_flatten(grads)])

    def sums(self, total: list, flag: bool) -> tuple[list, mx.array]:
        """Add up gradients; loss, tokens and reports are rank 0's."""
        if not self._ranks.leads:
            loss_sum, tokens, reports, grads = total
            total = [*tree_map(lambda value: 0 * value, [loss_sum, tokens, reports]), grads]
        return super().sums(total, flag)


def deal_rows(batches: list[Batch], size: int) -> list[list[np.ndarray]]:
    """Deal the rows of a step's micro-batches to ranks, so that all have about the same work.

    The rows of an example stay together. Every rank gets as many examples of a micro-batch as any other or one more;
    the rank with the fewest positions in the step so far gets one more. Among these, targets are evened out.

    Args:
        batches: micro-batches of one step.
        size: N.

    Returns:
        For each micro-batch, for each rank, (rows,) row numbers in rising order; none for a rank without work.
    """
    positions = np.zeros(size, np.int64)
    dealt = []
    for batch in batches:
        group, (rows, width) = batch.group, batch.inputs.shape
        examples = rows // group
        quota = np.full(size, examples // size)
        quota[np.argsort(positions, kind="stable")[: examples % size]] += 1
        positions += quota * group * width
        counts = batch.mask.reshape(examples, -1).sum(axis=1)
        targets = np.zeros(size, np.int64)
        own: list[list[int]] = [[] for _ in range(size)]
        for example in np.argsort(-counts, kind="stable"):
            open_ranks = [rank for rank in range(size) if len(own[rank]) < quota[rank]]
            rank = min(open_ranks, key=lambda r: targets[r])
            own[rank].append(int(example))
            targets[rank] += counts[example]
        numbers = [np.array(sorted(examples_of), np.int64) for examples_of in own]
        dealt.append([(of[:, None] * group + np.arange(group)).ravel() for of in numbers])
    return dealt


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed this process's random numbers by (seed, step, rank)."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    mx.random.seed(int.from_bytes(digest[:8], "little"))


class Batches(Protocol):
    """A held-out plan, as `BatchPlan` and `HeldOutRollouts` are."""

    def __len__(self) -> int: ...

    def batches(self, limit: int = -1, first: int = 0, every: int = 1) -> Iterator[Batch]: ...


def own_batches(plan: Batches, most: int, ranks: Ranks, together: bool) -> Iterator[Batch]:
    """Yield the batches of a held-out plan that this rank measures.

    Args:
        plan: of all ranks.
        most: batches of all ranks; -1: all.
        ranks: that divide them.
        together: whether all ranks must compute equally many, because they share the base; a rank for which none is left
            then computes one without rows.
    """
    yield from plan.batches(most, ranks.rank, ranks.size)
    count = len(plan) if most < 0 else min(most, len(plan))
    if together and count % ranks.size and ranks.rank >= count % ranks.size:
        yield from map(nothing_of, plan.batches(1))


def dealt_batches(batches: list[Batch], ranks: Ranks, together: bool) -> Iterator[Batch]:
    """Yield the batches of a step that this rank measures; see `own_batches`."""
    yield from batches[ranks.rank :: ranks.size]
    if together and ranks.rank >= len(batches) % ranks.size > 0:
        yield nothing_of(batches[0])
