"""How the processes of a run divide its work: one class per way, chosen once (trainer/fit.py) and carried by the run.

    Strategy         one process computes everything
    DataParallel     each rank has the whole model and computes some rows of every micro-batch
    ShardedBase      the same, and each rank keeps a part of the frozen base (parallel/sharded_base.py)
    OffloadedBase    one process reads the frozen base from its files (parallel/offloaded_base.py)

Every rank has the same batch plan as a single process: it lays out the whole step and takes its own rows, so that the
sums of losses, tokens and gradients over all ranks are those of the whole batch. So neither the order of the data nor
the position of a run depends on the number of ranks.

A rank that calls the model, or a collective, once more than the others hangs. Where that matters, `lockstep` says so, and
the batches of a step or a measurement come from here, equally many for every rank.

Shapes: B rows, T columns, P slots for trained targets of a micro-batch; N ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import __version__
from mlx_lora.config.settings import ROWS, LoopSettings, TrainSettings
from mlx_lora.data.batch import Batch, nothing_of, share_of
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import package_version

if TYPE_CHECKING:
    from mlx_lora.models.load import Base
    from mlx_lora.planner.memory import ModelShape


DISK_WAIT = "disk_wait_share"  # in reports: of a step's time, waiting for a base that is read from its files


class Strategy:
    """One process with the whole model. The strategies below override what differs; callers ask, and do not look at the class.

    Attributes:
        ranks: all processes of the run.
        lockstep: whether all ranks must call the model equally often, because each call sends messages.
        divides_base: the flag by which a process keeps only a part of the base's weights, which are not read before it is
            known which; empty: it keeps all.
        whole_blocks: why a block is always computed in whole, in words; empty: it need not be.
        words: on the division of the base, for the run header; empty until it is divided.
    """

    lockstep: bool = False
    divides_base: str = ""
    whole_blocks: str = ""
    words: str = ""

    def __init__(self, ranks: Ranks = ALONE, seed: int = 0):
        """Set up.

        Args:
            ranks: all processes of the run.
            seed: of the run; dropout's random numbers of several ranks depend on (seed, step, rank).
        """
        self.ranks, self.seed = ranks, seed

    @property
    def row_words(self) -> str:
        """On the division of rows, for the run header."""
        return ""

    def everyone(self, measured: Any) -> list[Any]:
        """Return what every rank measured, by rank.

        They finish at different times, so the host waits for the others first, not the device.

        Args:
            measured: a JSON value.
        """
        self.ranks.meet()
        return self.ranks.everyone(measured)

    # The base

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        """Leave only this rank's part of the base in memory, and return the settings with what that decides.

        Args:
            base: adapted; its weights may not have been read yet.
            settings: of the run.

        Raises:
            InputError: parts that do not fit the processes, or a model that cannot be divided.
        """
        return settings

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        """Return the planned shape of this rank's part.

        Args:
            shape: of the adapted model; its layers are divided by now.
            model: the outline that it was read from.
        """
        return shape

    def hidden_from(self, settings: TrainSettings, shape: ModelShape, width: int) -> int:
        """Return from how many positions a micro-batch hides what the strategy waits for; 0: it waits for nothing.

        Args:
            settings: of the run.
            shape: of the adapted model.
            width: positions of the longest row.
        """
        return 0

    def check_checkpointing(self, config: dict[str, Any], left_out: bool) -> None:
        """Refuse blocks that are not checkpointed: each would keep its weights until the backward pass.

        Raises:
            InputError: the base is divided and there are some, because they pass a state to each other.
        """
        if left_out and self.divides_base:
            raise InputError(
                f"{self.divides_base}: blocks of {config.get('model_type')} pass a state to the next block, so every block "
                f"would have to keep its weights until the backward pass; leave {self.divides_base} out"
            )

    def check_read(self, bad: mx.array, config: dict[str, Any]) -> None:
        """Refuse a model that has computed without weights that are elsewhere.

        Args:
            bad: whether numbers are not finite; lazy, and computed only where the base is divided.
            config: of the model.

        Raises:
            InputError: it has.
        """
        if self.divides_base and bad.any().item():
            raise InputError(
                f"{self.divides_base}: mlx-lm's {config.get('model_type')} reads weights of its blocks outside of them, where "
                "this process does not have them; leave it out"
            )

    def value_and_grad(self, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., tuple[Any, dict]]:
        """Return the loss and its gradient by the trainable parameters, as `nn.value_and_grad` does."""
        return nn.value_and_grad(model, loss)

    def only_planned(self, model: nn.Module) -> AbstractContextManager:
        """Return a context in which a model only plans what it computes: for those who look at the plan."""
        return nullcontext()

    def end_of_trial(self, model: nn.Module) -> None:
        """Forget what was planned while steps were tried and is not computed."""

    def bound_memory(self, peak_bytes: int) -> None:
        """Bound what is allocated ahead of the computation, if the base is divided, to a run's planned peak."""
        if self.divides_base:
            device.wait_beyond(peak_bytes)

    # A step

    def split(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> list[Batch]:
        """Return the micro-batches of a step as they are counted, cut by `divide` unless each rank cuts its own part."""
        return divide(batches)

    def own(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> Iterator[Batch]:
        """Yield this rank's part of each micro-batch that has one for it.

        Args:
            batches: from `split`, of all ranks together.
            divide: cuts this rank's part further, to save memory.
        """
        yield from batches

    def reseed(self, step: int) -> None:
        """Seed this rank's random numbers for a step; a single process goes on with its stream."""

    def reduce(self, total: list, asked: bool) -> tuple[list, mx.array | None]:
        """Add up every rank's part of a step, in one message.

        Args:
            total: loss_sum, tokens (float32 scalars), reports (a dict of them) and gradients (a dict of float32 arrays).
            asked: whether this rank was asked to stop.

        Returns:
            The same, summed; and how many ranks were asked to, None for a single process.
        """
        return total, None

    def measured_shares(self, spent_s: float) -> dict[str, float]:
        """Return by name what share of the seconds of the steps since the last report went into what is not computing."""
        return {}

    # A measurement

    def held_out(self, plan: Any, most: int) -> Iterator[Batch]:
        """Yield the batches of a held-out plan that this rank measures.

        Args:
            plan: of all ranks: a `BatchPlan`, or `HeldOutRollouts`.
            most: batches of all ranks; -1: all.
        """
        ranks = self.ranks
        yield from plan.batches(most, ranks.rank, ranks.size)
        count = len(plan) if most < 0 else min(most, len(plan))
        if self.lockstep and ranks.rank >= count % ranks.size > 0:
            yield from map(nothing_of, plan.batches(1))  # a batch without rows, so that all compute equally many

    def held_out_count(self, plan: Any, most: int) -> int:
        """Return the number of batches with rows in `held_out`."""
        count = len(plan) if most < 0 else min(most, len(plan))
        return len(range(self.ranks.rank, count, self.ranks.size))

    def dealt(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches of a step that this rank measures; as in `held_out`."""
        ranks = self.ranks
        yield from batches[ranks.rank :: ranks.size]
        if self.lockstep and ranks.rank >= len(batches) % ranks.size > 0:
            yield nothing_of(batches[0])

    # One text, one set of parameters

    def same_choice(self, model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """Return a function that chooses the next token as rank 0 does, if ranks generate together.

        Args:
            model: that generates.
            choose: log-probabilities (1, V) -> a token, (1,) uint32.
        """
        return choose

    def await_messages(self, model: nn.Module) -> None:
        """Wait for the messages that were submitted ahead: a rank must not end before the others have them."""

    def check_same(self, settings: TrainSettings, identity: dict[str, Any]) -> None:
        """Refuse ranks whose model, data, settings or versions differ from rank 0's.

        Args:
            settings: of this rank.
            identity: everything that this rank's run depends on, with fingerprints, as JSON values.

        Raises:
            InputError: on every rank, with all differences between rank 0 and the first rank that differs.
        """
        versions = {"mlx": mx.__version__, "mlx_lm": package_version("mlx-lm"), "mlx_lora": __version__}
        facts = {**versions, "compute dtype": str(device.compute_dtype(settings.model.dtype))}
        facts |= {name: value for name, value in identity.items() if name not in ROWS}
        facts |= {name: value for name, value in settings.to_flat().items() if not ROWS[name].per_machine}
        first, *others = self.ranks.everyone(facts)
        for rank, other in enumerate(others, start=1):
            differ = [f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}" for name in {**first, **other}
                      if first.get(name) != other.get(name)]  # fmt: skip
            if differ:
                raise InputError(
                    f"rank {rank} is not in the same run: {'; '.join(differ)}; give every machine the same model, data, "
                    "settings and versions"
                )


SINGLE_DEVICE = Strategy()


class DataParallel(Strategy):
    """Each rank computes some rows of every micro-batch, and all add up their results."""

    @property
    def row_words(self) -> str:
        return f"rows shared by {self.ranks.size} processes"

    def split(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> list[Batch]:
        return batches  # each divides its own part

    def own(self, batches: list[Batch], divide: Callable[[list[Batch]], list[Batch]]) -> Iterator[Batch]:
        for batch, dealt in zip(batches, deal_rows(batches, self.ranks.size), strict=True):
            rows = dealt[self.ranks.rank]
            if self.lockstep:
                yield share_of(batch, rows) if len(rows) else nothing_of(batch)
            elif len(rows):
                yield from divide([share_of(batch, rows)])

    def reseed(self, step: int) -> None:
        """Seed this rank's random numbers for a step.

        The seed depends on the step's number, so a resumed run does not need the other ranks' random keys: with the same
        number of ranks as before, it draws the same dropout.
        """
        digest = hashlib.sha256(f"{self.seed} {step} {self.ranks.rank}".encode()).digest()
        mx.random.seed(int.from_bytes(digest[:8], "little"))

    def reduce(self, total: list, asked: bool) -> tuple[list, mx.array | None]:
        loss_sum, tokens, reports, grads = total
        names, leaves = zip(*grads.items(), strict=True)
        scalars = mx.stack([loss_sum, tokens, mx.array(float(asked)), *reports.values()])
        parts = [scalars, *(leaf.reshape(-1) for leaf in leaves)]
        message = mx.concatenate(parts)
        message = self.ranks.sum(message)
        ends = list(accumulate(part.size for part in parts))
        scalars, *flat = mx.split(message, ends[:-1])
        summed = {name: part.reshape(leaf.shape) for name, part, leaf in zip(names, flat, leaves, strict=True)}
        reported = {name: scalars[3 + i] for i, name in enumerate(reports)}
        return [scalars[0], scalars[1], reported, summed], scalars[2]


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


# What the settings ask for


def dividing_flag(loop: LoopSettings) -> str:
    """Return the flag that leaves only a part of the base in a process; empty: none does."""
    asked = {
        "--offload-base": loop.offload_base == "on",
        "--shard-base": loop.shard_base != "off",
    }
    return next((flag for flag, is_asked in asked.items() if is_asked), "")


def offloaded(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a run that reads its base from files.

    Each block is computed again, and no texts are written.
    """
    loop = settings.loop
    checkpointing = "block" if loop.grad_checkpoint == "auto" else loop.grad_checkpoint
    given = {"offload_base": "on", "grad_checkpoint": checkpointing, "sample_tokens": 0}
    return replace(settings, loop=replace(loop, **given))
