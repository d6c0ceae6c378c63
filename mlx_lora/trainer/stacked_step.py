"""The forward and backward pass of several runs' steps at once: one product of the base for the rows of all their batches.

    run 0   batch (B0, T0)  --.                                                       .-->  loss and gradients of run 0
    run 1   batch (B1, T1)  --+--> joint batch (U, T) --> stacked model --> losses --+-->  loss and gradients of run 1
    run 2   batch (B2, T2)  --'    right-padded           (adapters/stacked.py) (P,)  `-->  loss and gradients of run 2

The losses of tokens are cut into the runs' parts, and each run's objective computes its own loss of its part, as from its own
forward pass. No run's loss depends on another's factors, so one backward pass of their sum gives every run its own gradients.
Each run then updates its own factors (`Step.optim_step`), with its own optimizer, schedule, clip and guard against numbers that are
not finite.

Rows are padded to the widest batch of a group, so only batches of similar width are one group; a batch that is best alone is computed
by its own run's step. Which batches are grouped depends on their shapes only, so a resumed run computes the same sums.

Shapes: U rows of all runs, T the widest batch's columns, P all slots for trained targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_lora.adapters.stacked import Apart, Share, StackedLinear, holders_of, parts_of, stack_adapters
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import assumed, exchanging
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.agree import TRIAL_TOKENS, choose_step_variant
from mlx_lora.losses.cross_entropy import PLAIN, TOKEN_ARRAYS, Arrays, Loss
from mlx_lora.models.head import MOST_PICKED, find_head
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.planner.memory import activation_bytes
from mlx_lora.trainer.gradient_checkpointing import Kept, apply_checkpointing
from mlx_lora.trainer.step import StepSums

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.losses.agree import Compute
    from mlx_lora.models.load import Base
    from mlx_lora.trainer.trainer import StepWanted, Trainer

# Groups

# A batch joins others if that pads at most so many positions: about what a product, and the operations around it, cost before the
# first row (benchmarks/several_runs.py).
SAVED_POSITIONS = 128


@dataclass(frozen=True)
class RunBatch:
    """One micro-batch of a run.

    Attributes:
        run: its number.
        batch: that its objective has prepared.
        bytes_per_position: that a position takes in memory until the backward pass.
        picks: whether the run's last block computes the trained positions alone.
    """

    run: int
    batch: Batch
    bytes_per_position: float = 0.0
    picks: bool = True

    @property
    def rows(self) -> int:
        return len(self.batch.inputs)

    @property
    def width(self) -> int:
        return self.batch.inputs.shape[1]

    @property
    def kind(self) -> tuple[int, bool]:
        """What the batches of a group have in common."""
        return self.batch.answers_per_row, self.picks


def grouped(parts: Sequence[RunBatch], room_bytes: float = float("inf")) -> list[list[RunBatch]]:
    """Group batches that one product computes faster than several do.

    Args:
        parts: one batch of each run.
        room_bytes: for the activations of a group.
    """
    groups: list[list[RunBatch]] = []
    for part in sorted(parts, key=lambda part: (part.kind, -part.width, part.run)):
        last = groups[-1] if groups else []
        width = last[0].width if last else 0
        held = sum(p.bytes_per_position * p.rows for p in [*last, part]) * width
        # Where a run alone would compute the whole last block, so must all together, whatever padding does to the share.
        most_padded = SAVED_POSITIONS if part.picks else 0
        padded = (width - part.width) * part.rows
        if last and last[0].kind == part.kind and padded <= most_padded and held <= room_bytes:
            last.append(part)
        else:
            groups.append([part])
    return groups


def joint_arrays(parts: Sequence[RunBatch]) -> Arrays:
    """Return the arrays of a joint batch as the loss of tokens takes them.

    The slots that a run does not use point at its own first token, so that no number of another run gets there.
    """
    width, first = max(part.width for part in parts), 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*TOKEN_ARRAYS, "starts")}
    for part in parts:
        batch, missing = part.batch, ((0, 0), (0, width - part.width))
        for name in ("inputs", "targets", "mask"):
            columns[name].append(np.pad(getattr(batch, name), missing))
        row, column = np.divmod(batch.positions, part.width)
        columns["positions"].append(((first + row) * width + column).astype(np.int32))
        columns["weights"].append(batch.weights)
        columns["starts"] += [] if batch.starts is None else [batch.starts]
        first += part.rows
    return {name: mx.array(np.concatenate(values)) for name, values in columns.items() if values}


# The step


class StackedRun:
    """A run whose rows are stacked with others'.

    Attributes:
        trainer: of the run.
        names: of its trained arrays.
        bytes_per_position: that a position of its batches takes in memory until the backward pass.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._losses: Any = None  # of its tokens, which the joint forward pass has computed
        self._holders = holders_of(trainer.step.model)
        self.names = [name for name, *_ in self._holders]
        given = Loss(self._summed, self._summed, "given", lambda model, arrays: self._losses)
        self._loss = trainer.ctx.objective.bind(trainer.ctx, given, trainer.plan.rows).loss.train
        most = max(rows * width for rows, width, _ in trainer.plan.shapes)
        self.bytes_per_position = activation_bytes(trainer.ctx.memory) / most if trainer.ctx.memory else 0.0

    def _summed(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
        return self._losses.sum(), arrays["weights"].sum()

    def parameters(self) -> list[mx.array]:
        """Return its trained arrays, in the order of `names`."""
        return [layer[name] for _, layer, name in self._holders]

    def put(self, arrays: Sequence[mx.array]) -> None:
        """Set its trained arrays."""
        for (_, layer, name), array in zip(self._holders, arrays, strict=True):
            layer[name] = array

    def loss_of(self, losses: mx.array, arrays: Arrays) -> list[Any]:
        """Return its loss sum, count and reports, from the losses of its tokens and its own batch's arrays."""
        self._losses = losses
        loss_sum, count, *reports = self._loss(self.trainer.step.model, arrays)
        self._losses = None
        return [loss_sum, count, reports[0] if reports else {}]


class KeptStacked(Kept):
    """Records a stacked layer's dropout keys and output on the tape; a mixin that comes before its own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        keys = [self.tape.draw(lambda run=run: self._routing.draw(run)) for run in self.dropping()]
        return super().__call__(*args, **kwargs, keys=keys)


class StackedStep:
    """Computes the sums of several runs' steps, those of similar width together.

    Attributes:
        words: on what computes a joint step, for the log.
    """

    def __init__(
        self,
        base: Base,
        trainers: dict[int, Trainer],
        choose: Callable[[Base], Compute],
        checkpointing: str = "none",
        room_bytes: float = float("inf"),
    ):
        """Set up.

        Args:
            base: its own copy of the model, without an adapter.
            trainers: number -> a run whose rows can be stacked.
            choose: returns loss and kernels for a base.
            checkpointing: as in --grad-checkpoint.
            room_bytes: for the activations of a joint batch.
        """
        self._members = {number: StackedRun(trainer) for number, trainer in trainers.items()}
        self._model, self._room_bytes = base.model, room_bytes
        models = {number: trainer.step.model for number, trainer in trainers.items()}
        if any(trainer.plan.rows.starts is not None for trainer in trainers.values()):
            rotate_by_token(base.model)  # before kernels are recorded on such rows
        compute = choose(base)  # remembered for the plain model, and each run has tried its own
        self._routing = stack_adapters(base.model, models)
        head = find_head(base.model, base.config)
        loss = PLAIN if isinstance(head, str) else compute.loss  # a run may adapt the head
        tape = apply_checkpointing(base.model, checkpointing, {StackedLinear: KeptStacked, Apart: Kept})
        attention = (tape.attend if tape else attend) if compute.kernels else None
        kernels = compute.kernels or assumed
        self._model.train()
        # Not compiled: joint batches have nearly as many shapes as there are steps, and which of them had been compiled before would
        # depend on where a run was resumed.
        first = next(iter(trainers))
        with self._routing.to([Share(first, 1, TRIAL_TOKENS, TRIAL_TOKENS)], {first: mx.random.key(0)}):
            variant = choose_step_variant(
                base.model, base.config, loss, attention, base.model_id, kernels, compiles=False
            )
        self._kernels, self._loss = exchanging(variant.attend, variant.choose), variant.loss
        self.words = f"{self._loss.description}; {compute.words}"

    def joined(self, wanted: Mapping[int, StepWanted]) -> list[int]:
        """Return the runs of which a batch shares a product with another run's; the others' own steps are best.

        Args:
            wanted: number -> the next step.
        """
        batches = {number: step.batches for number, step in wanted.items() if number in self._members}
        return sorted({part.run for group in self._groups(batches) if len(group) > 1 for part in group})

    def sums(self, wanted: Mapping[int, StepWanted], keys: dict[int, mx.array]) -> dict[int, StepSums]:
        """Return the sums of the next step of some runs.

        Args:
            wanted: number -> the step, of runs that `joined` returns.
            keys: number -> state of the random stream of each run with dropout; replaced by that after the step.
        """
        batches = {run: step.trainer.bound.prepare(step.batches, SINGLE_DEVICE) for run, step in wanted.items()}
        totals: dict[int, list[Any]] = {}
        for group in self._groups(batches):
            for part, one in zip(group, self._group(group, keys), strict=True):
                before = totals.get(part.run)
                totals[part.run] = one if before is None else tree_map(mx.add, before, one)
            mx.async_eval(totals)  # one group's activations at a time
        return {number: StepSums(*total) for number, total in totals.items()}

    def _groups(self, batches: Mapping[int, list[Batch]]) -> Iterator[list[RunBatch]]:
        """Yield the groups of all micro-batches: of the first ones of all runs, then of the second ones, and so on."""
        for place in range(max(map(len, batches.values()), default=0)):
            parts = [self._part(run, own[place]) for run, own in batches.items() if place < len(own)]
            yield from grouped(parts, self._room_bytes)

    def _part(self, run: int, batch: Batch) -> RunBatch:
        picks = self._loss.part_of_last and len(batch.positions) <= MOST_PICKED * batch.inputs.size
        return RunBatch(run, batch, self._members[run].bytes_per_position, picks)

    def _group(self, group: list[RunBatch], keys: dict[int, mx.array]) -> list[list[Any]]:
        """Return loss sum, count, reports and gradients (laid out like the masters) of each part of a group."""
        members = [self._members[part.run] for part in group]
        own = [member.trainer.bound.arrays_of(part.batch) for member, part in zip(members, group, strict=True)]
        parameters = [member.parameters() for member in members]
        ends = [len(part.batch.positions) for part in group]

        def loss(parameters: list[list[mx.array]]) -> tuple[mx.array, list[list[Any]]]:
            for member, arrays in zip(members, parameters, strict=True):
                member.put(arrays)
            losses, results = self._loss.tokens(self._model, joint_arrays(group)), []
            for member, part, arrays in zip(members, parts_of(losses, ends), own, strict=True):
                results.append(member.loss_of(part, arrays))
            return mx.stack([result[0] for result in results]).sum(), results

        shares = [Share(part.run, part.rows, part.width, slots) for part, slots in zip(group, ends, strict=True)]
        with self._routing.to(shares, keys), left_unchanged(self._model), self._kernels(self._model):
            (_, results), gradients = mx.value_and_grad(loss)(parameters)
        return [
            [*result, member.trainer.step.masters.from_names(dict(zip(member.names, own_gradients, strict=True)))]
            for member, result, own_gradients in zip(members, results, gradients, strict=True)
        ]
