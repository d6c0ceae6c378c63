"""What an objective is: which records it reads, what its loss is, and what it reports.

A method (LoRA, DoRA ...) decides what is trained, an objective what it is trained toward; every method works with every
objective. `mlx_lora.config.objectives` has what is known of each without its code.

    records    rows of an example     loss is a mean over
    examples   the example            tokens                imitation (sft, distill)
    pairs      chosen, rejected       pairs
    rated      answer, another        answers
    prompts    G sampled answers      answers, or tokens if a teacher scores them
    labeled    text                   texts
    candidates K documents            queries, pairs or documents

Shapes: B rows of a batch, E = B / K examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.load import DataSplits, Seen, load_data, load_eval_set
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import DataSettings, TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.losses.agree import Compute
    from mlx_lora.models.load import Base
    from mlx_lora.planner.memory import MemoryPlan, ModelShape
    from mlx_lora.trainer.guards import StepsDone


Given = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Returns a function of a model and a batch's arrays that computes within something, such as the batch's pictures."""


@dataclass(frozen=True)
class WholeSet:
    """Measures an objective on a whole set, where a mean over batches would depend on the batches.

    Attributes:
        compute: (model, arrays of a batch) -> what is computed of its rows.
        examples: (that as a numpy array, the batch, its arrays) -> what is kept of each example, (examples, ...) float32,
            without padding.
        measured: (what was kept of all examples) -> the loss, and the numbers to report.
    """

    compute: Callable[[nn.Module, Arrays], mx.array]
    examples: Callable[[np.ndarray, Batch, Arrays], np.ndarray]
    measured: Callable[[np.ndarray], tuple[float, dict[str, float]]]

    def __call__(
        self,
        model: nn.Module,
        arrays_of: Callable[[Batch], Arrays],
        batches: Iterable[Batch],
        strategy: Strategy,
    ) -> tuple[float, int, dict[str, float]]:
        """Return the mean loss over all examples of all ranks' batches, their number, and the means that are reported.

        Args:
            model: in eval mode.
            arrays_of: returns the arrays of a batch.
            batches: this rank's.
            strategy: how the ranks that call this divide the batches.
        """
        found: list[Any] = []
        for batch in batches:
            arrays = arrays_of(batch)
            found.extend(self.examples(np.array(self.compute(model, arrays)), batch, arrays))
        if strategy.ranks.size > 1:
            told = strategy.everyone([one.tolist() for one in found])
            found = [np.array(one, np.float32) for part in told for one in part]
        if not found:
            return math.nan, 0, {}
        loss, reports = self.measured(np.stack(found))
        return loss, len(found), reports


@dataclass(frozen=True)
class BoundObjective:
    """An objective's loss on a model, as steps and validations compute it.

    Attributes:
        loss: the sum of the loss, and the count to divide it by.
        arrays_of: returns the loss's arguments for a batch.
        prepare: brings all batches of a step into the form that the loss needs.
        reports: names of the sums that the loss returns in addition to its own.
        finish: turns the means of these into the numbers that users see.
        rates: reads what a report of steps adds on the time since the last one.
        whole_set: how a set is measured, if the loss is of whole answers; None: as a mean over tokens or examples.
        details: returns what the last measurement found besides numbers, such as a table of labels, as JSON values.
        sorts: the losses that sort the pairs of a batch, in words, so that a batch in parts has another loss; empty: none does.
    """

    loss: Loss
    arrays_of: Callable[[Batch], Arrays] = token_arrays
    prepare: Callable[[list[Batch], Strategy], list[Batch]] = lambda batches, strategy: batches
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict
    rates: Callable[[], dict[str, float]] = dict
    whole_set: WholeSet | None = None
    details: Callable[[], dict[str, Any]] = dict
    sorts: str = ""

    def within(self, given: Given, name: str, of: Callable[[Batch], Any]) -> BoundObjective:
        """Return it with all that is computed of a batch computed within `given`.

        Args:
            given: is put around each function of a model and a batch's arrays.
            name: of a further array of a batch.
            of: returns that.
        """
        loss, whole = self.loss, self.whole_set
        measure_tokens = None if loss.measure_tokens is None else given(loss.measure_tokens)
        return replace(
            self,
            loss=replace(
                loss, train=given(loss.train), measure=given(loss.measure), tokens=given(loss.tokens), measure_tokens=measure_tokens
            ),
            arrays_of=lambda batch: self.arrays_of(batch) | {name: of(batch)},
            whole_set=whole and replace(whole, compute=given(whole.compute)),
        )  # fmt: skip


class ScoreHead(NamedTuple):
    """What a score head is.

    Attributes:
        outputs: numbers that it gives a row.
        scale: of its random start, as a share of transformers'.
        about: what the outputs mean, as JSON values that are kept with the adapter; None: nothing to say.
        encoder_rate: multiple of the learning rate for an encoder's head. The pooled state is between -1 and 1, so that a head
            at the factors' rate learns more slowly than they do, and they may lose what tells texts apart before it can use it.
    """

    outputs: int = 1
    scale: float = 1.0
    about: dict[str, Any] | None = None
    encoder_rate: float = 1.0


@dataclass
class RunRecord:
    """What a run's header says, and what a resumed run must have in common with its checkpoint.

    Attributes:
        identity: name -> JSON value.
        shared: name -> JSON value that all ranks must have in common, beside the identity.
        lines: header lines of the objective.
        about: words of the objective for the header's line on the run.
        may_change: names of the identity that a resumed run may have chosen anew.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    may_change: set[str] = field(default_factory=set)


@dataclass
class RunContext:
    """A run, or a measurement, while it is built.

    Attributes:
        settings: replaced as open settings are chosen.
        objective: of the run.
        base: the model; an adapter is put on it.
        strategy: how processes divide the work.
        functions: rewards that were given in Python, by what --reward calls them.
        today: what chat templates show as today, unless --chat-date names a day; None: the day of the call.
        trains: False: an adapter is only measured.
        untrained: the model without an adapter, if `base` already has one.
        resumed: the identity of the checkpoint to go on from; None: the run begins.
        score_head: what the adapter that is measured, or gone on with, says of its score head.
        compute: what computes the numbers; None: not chosen yet.
        memory: the plan; None: not planned yet.
        record: what is said and kept.
        ignore_fingerprint: whether adapters of another base are taken.
    """

    settings: TrainSettings
    objective: Objective
    base: Base
    strategy: Strategy = SINGLE_DEVICE
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    today: date | None = None
    trains: bool = True
    untrained: Base | None = None
    resumed: Mapping[str, Any] | None = None
    score_head: Mapping[str, Any] | None = None
    compute: Compute | None = None
    memory: MemoryPlan | None = None
    record: RunRecord = field(default_factory=RunRecord)
    ignore_fingerprint: bool = False

    @property
    def plain_base(self) -> Base:
        """The model without an adapter; until the run puts one on it, that is `base`."""
        return self.untrained or self.base

    @property
    def planned(self) -> MemoryPlan:
        """The memory plan.

        Raises:
            ValueError: there is none yet.
        """
        if self.memory is None:
            raise ValueError("a run without a memory plan")
        return self.memory

    @property
    def chosen(self) -> Compute:
        """What computes the numbers.

        Raises:
            ValueError: it is not chosen yet.
        """
        if self.compute is None:
            raise ValueError("nothing has chosen what computes the run's numbers")
        return self.compute


@dataclass(eq=False)
class Objective:
    """One objective of one run, with its options bound. Its methods are listed in the order in which a run calls them.

    Attributes:
        options: its settings, whose `row` has what is known of it without its code.
        pictures: shows a batch's pictures to the model (`Pictures` in objectives/pictures.py); None: rows have none.
        rollouts: samples answers (`Rollouts` in rollouts/rollout.py); None: nothing does, or the run has not got that far.
    """

    options: ObjectiveSettings
    pictures: Any = field(default=None, init=False)
    rollouts: Any = field(default=None, init=False)

    @property
    def head(self) -> ScoreHead | None:
        """The score head that reads each row's last token; None: there is none."""
        return ScoreHead() if self.options.row.scores else None

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Refuse, before anything is loaded, what the objective's settings name and what cannot be used."""

    def open(self, ctx: RunContext) -> None:
        """Load what must be there before an adapter is on the base, such as reward models."""
        if self.pictures is not None:
            self.pictures.open(ctx, self._trains_prompts)

    def load_data(self, ctx: RunContext) -> DataSplits:
        """Read the run's data and encode it, after models have written what of it they write.

        Raises:
            InputError: there is no usable data.
        """
        return self.read_data(ctx, ctx.settings.data)

    def read_data(self, ctx: RunContext, data: DataSettings) -> DataSplits:
        """Read some data that is there, with the targets of this objective. A plan's base has no weights, and is not open."""
        settings = ctx.settings
        splits = load_data(
            data,
            ctx.base.hf_tokenizer,
            settings.loop.seed,
            ctx.today,
            settings.objective.records,
            self._seen(ctx, data),
        )
        return splits.changed(lambda sets: {name: self._with_targets(rows) for name, rows in sets.items()})

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        """Read one set that is only measured; see `read_data`."""
        records, seen = ctx.settings.objective.records, self._seen(ctx, data)
        return self._with_targets(load_eval_set(data.data or "", data, ctx.base.hf_tokenizer, records, seen))

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        """Return the sets with what another model says about their rows, while the base has no adapter.

        Args:
            ctx: of the run; its record may get a line.
            sets: name -> rows.
        """
        return sets

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Put what the rows decide into the context's settings, and return the data in the layout that the run has.

        Args:
            ctx: of the run, whose base is adapted; loss and kernels (`ctx.compute`) are chosen here if they depend on the layout.
            data: a text in each row.
        """
        if self.pictures is not None:
            self.pictures.settle(ctx)
        return data

    def finish_data(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        """Do what needs the memory plan (`ctx.memory`, which it may change), and return the data in the run's layout.

        Args:
            ctx: of the run, with settings in which nothing is open.
            data: a text in each row, as for `settle`.
            shape: of the adapted model.
        """
        return data

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        """Return the loss on the context's base.

        Args:
            ctx: of the run, or of a measurement, in which nothing was settled.
            loss: of tokens, whose kernels are kept.
            rows: to train on, or to measure.
        """
        raise NotImplementedError

    def steps(self, batches: list[Batch], done: StepsDone) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each of the next optimizer steps, `ObjectiveSettings.updates` of them.

        Args:
            batches: planned, the same for all of these steps.
            done: where the run is.
        """
        yield batches

    # For the objectives themselves

    @property
    def _trains_prompts(self) -> bool:
        """Whether the loss counts the tokens of prompts, too."""
        return False

    def _seen(self, ctx: RunContext, data: DataSettings) -> Seen:
        """Return what is seen beside the records of some data."""
        asked = ctx.settings.objective
        if self.pictures is not None:
            base = ctx.base
            return Seen(pictures=self.pictures.reader(base.folder, base.config, base.hf_tokenizer, data))
        return Seen(read_teacher_prompt(asked.teacher_prompt))

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        """Return encoded rows with the targets that this objective trains on."""
        return rows.with_end_scores() if self.options.row.scores else rows
