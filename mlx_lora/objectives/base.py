"""What an objective is: which records it reads, what its loss is, and what it reports.

An objective's loss is computed from whole answers, not from tokens. Its inputs are the log-probability of each row's answer,
summed by the fused loss, and a few numbers per row that come from the data or the reference. For a reward model, the
score of the answer replaces the log-probability. A method (LoRA, DoRA ...) decides what is trained, an objective what it
is trained toward; every method works with every objective.

    records    rows of an example     loss is a mean over
    examples   the example            tokens                imitation (sft, distill), which needs none of this
    pairs      chosen, rejected       pairs
    rated      answer, another        answers
    prompts    G sampled answers      answers, or tokens if a teacher scores them
    labeled    text                   texts
    candidates K documents            queries, pairs or documents

Shapes: B rows of a batch, E = B / K examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.data.load import DataSplits, Seen, load_data, load_eval_set
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.losses.check import Compute
    from mlx_lora.losses.divergence import DivergenceOptions
    from mlx_lora.losses.policy import PolicyOptions
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.vision_encoder import PromptPictures
    from mlx_lora.planner.memory import MemoryPlan
    from mlx_lora.planner.shapes import ModelShape
    from mlx_lora.trainer.guards import StepsDone


@dataclass(frozen=True)
class AnswerSums:
    """The inputs of an objective's loss; arrays are (B,) float32.

    Attributes:
        logps: summed log-probability of each row's answer under the policy; of a reward model, its score.
        tokens: number of the answer's tokens.
        likelihood: negative log-likelihood of each row's trained tokens, weighted so that its sum over a step's rows,
            divided by the step's examples, is the mean over tokens.
        reference: the answer's log-probability under the reference, 0 without one.
        labels: from the data: the margin that a pair should have, or 1 for a good answer and 0 for a bad one.
        real: 1 for a row, 0 for padding.
        divergence: scalar, see `Objective.divergence`.
    """

    logps: mx.array
    tokens: mx.array
    likelihood: mx.array
    reference: mx.array
    labels: mx.array
    real: mx.array
    divergence: mx.array

    def side(self, number: int, group: int = 2) -> AnswerSums:
        """Return the sums of each example's row `number`, (E,)."""
        names = ("logps", "tokens", "likelihood", "reference", "labels", "real")
        return replace(self, **{name: getattr(self, name)[number::group] for name in names})


LossOfAnswers = Callable[[AnswerSums], tuple[mx.array, dict[str, mx.array]]]
"""AnswerSums -> ((E,) losses, name -> (E,) numbers to report as means)."""


class WholeSetLoss(Protocol):
    """Measures an objective on a whole set, where a mean over batches would depend on the batches."""

    def __call__(
        self,
        model: nn.Module,
        arrays_of: Callable[[Batch], Arrays],
        batches: Iterable[Batch],
        strategy: Strategy,
    ) -> tuple[float, int, dict[str, float]]: ...

    def above(self, given: Callable[[Callable[..., Any]], Callable[..., Any]]) -> WholeSetLoss:
        """Return it with `given` around what computes the sums of a batch's answers."""
        ...


@dataclass(frozen=True)
class BoundObjective:
    """An objective's loss on a model, as steps and validations compute it.

    Attributes:
        loss: the sum of the loss, and the count to divide it by.
        arrays_of: returns the loss's arguments for a batch.
        prepare: brings all batches of a step into the form that the loss needs.
        reports: names of the sums that the loss returns in addition to its own.
        finish: see `Objective`.
        rates: reads what a report of steps adds on the time since the last one.
        whole_set: how a set is measured, if the loss is of whole answers; None: as a mean over tokens or examples.
    """

    loss: Loss
    arrays_of: Callable[[Batch], Arrays] = token_arrays
    prepare: Callable[[list[Batch], Strategy], list[Batch]] = lambda batches, strategy: batches
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict
    rates: Callable[[], dict[str, float]] = dict
    whole_set: WholeSetLoss | None = None


@dataclass
class RunRecord:
    """What a run's header says, and what a resumed run must have in common with its checkpoint.

    Attributes:
        identity: name -> JSON value.
        shared: name -> JSON value that all ranks must have in common, beside the identity.
        lines: header lines of the objective.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


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
    compute: Compute | None = None
    memory: MemoryPlan | None = None
    record: RunRecord = field(default_factory=RunRecord)
    ignore_fingerprint: bool = False

    @property
    def plain_base(self) -> Base:
        """The model without an adapter; until the run puts one on it, that is `base`."""
        return self.untrained or self.base

    @property
    def chosen(self) -> Compute:
        """What computes the numbers.

        Raises:
            ValueError: it is not chosen yet.
        """
        if self.compute is None:
            raise ValueError("nothing has chosen what computes the run's numbers")
        return self.compute


@dataclass(frozen=True)
class FixedPrompt:
    """A held-out prompt.

    Attributes:
        tokens: up to where the answer begins.
        fact: what rewards see of it.
    """

    tokens: list[int]
    fact: dict[str, Any]


class HeldOutBatches(Protocol):
    """Batches to measure: a `BatchPlan`, or one whose answers are sampled."""

    rows: EncodedSet

    def __len__(self) -> int: ...

    def batches(self, limit: int = -1, first: int = 0, every: int = 1) -> Iterator[Batch]: ...


@dataclass(eq=False)
class Objective:
    """One objective, with its options bound. This class is imitation (sft); the others override what differs.

    An instance belongs to one run: methods that take its context may keep state in it. They are listed in the order in
    which a run calls them.

    Attributes:
        name: as in --objective.
        records: the kind of records that the data must have: `examples`, `pairs`, `rated`, `prompts`, `labeled` or
            `candidates`.
        description: for the run header.
        loss: computed from whole answers; None for imitation, which sums the loss over tokens.
        reference: whether the loss compares the policy with a reference model.
        likelihood: the tokens whose likelihood is part of the loss: `none`, `answers`, or `rows` if the prompts of the
            chosen rows count too (ORPO).
        scores: whether a score head reads each row's last token; a reward model's number replaces the log-probability, and a
            classifier has one for each label.
        divergence: whether the loss needs the mean log-ratio of policy to reference on each example's second row. No
            gradient goes through it, so that row is not trained (KTO).
        policy: the loss of sampled answers that are rewarded; None: it has another.
        distills: how tokens are compared with a teacher's; None: there is no teacher.
        room: how many answers are sampled to a prompt, and the most tokens of one.
        outputs: numbers that the score head gives a row; set before an adapter is on the base.
        head_scale: of the score head's random start, as a share of transformers'.
        reports: names of the numbers that the loss reports.
        finish: turns the means of these numbers into the numbers that users see.
        updates: steps on the same batches; a run is saved and ended between them only.
        compiles: whether the loss and its gradient may be compiled.
        sorts: the losses that sort the pairs of a batch, in words, so that a batch in parts has another loss; empty: none does.
    """

    name: str
    records: str = "examples"
    description: str = ""
    loss: LossOfAnswers | None = None
    reference: bool = False
    likelihood: str = "none"
    divergence: bool = False
    scores: bool = False
    policy: PolicyOptions | None = None
    distills: DivergenceOptions | None = None
    room: tuple[int, int] = (1, 0)
    outputs: int = 1
    head_scale: float = 1.0
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict
    updates: int = 1
    compiles: bool = True
    sorts: str = ""

    needs_data: ClassVar[bool] = True  # False: the run can write its own

    @property
    def samples(self) -> bool:
        """Whether the answers are sampled during the run."""
        return self.records == "prompts"

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers to a prompt may share its row (--shared-prefix)."""
        return False

    @property
    def writes(self) -> bool:
        """Whether its model writes text, and does not only score or embed it."""
        return not self.scores and not self.vectors

    @property
    def vectors(self) -> bool:
        """Whether its model gives vectors of texts; then it may be an encoder, whose padding has to be masked."""
        return False

    @property
    def on_encoders(self) -> bool:
        """Whether its model may be an encoder although it gives no vectors: its scores mask the padding."""
        return False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Numbers of a validation by which the best one may be chosen, the higher the better."""
        return tuple(name for name in self.reports if name == "accuracy")

    @property
    def head(self) -> dict[str, Any] | None:
        """What the score head's outputs mean, as JSON values that are kept with the adapter; None: nothing to say."""
        return None

    @property
    def details(self) -> dict[str, Any]:
        """What the last measurement found besides numbers, such as a table of labels, as JSON values."""
        return {}

    def measures_with(self, head: Mapping[str, Any] | None) -> None:
        """Take what an adapter that is measured says of its score head, before the data are read; it is of this objective."""

    def goes_on_with(self, head: Mapping[str, Any] | None) -> None:
        """Take what the adapter of a checkpoint says of its score head, which a validation of the run chose."""

    def targets_of(self, rows: EncodedSet) -> EncodedSet:
        """Return encoded rows with the targets that this objective trains on."""
        if self.scores:
            return rows.with_end_scores()
        if self.samples:
            return rows.with_room(*self.room)
        return rows.with_whole_rows() if self.likelihood == "rows" else rows

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Refuse, before anything is loaded, what the objective's settings name and what cannot be used."""

    def open(self, ctx: RunContext) -> None:
        """Load what must be there before an adapter is on the base, such as reward models."""

    def shown_tools(
        self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]
    ) -> list[dict[str, Any]] | None:
        """Return the schemas of tools that prompts show; None: there are none.

        Raises:
            InputError: a tool cannot be used.
        """
        return None

    def load_data(self, ctx: RunContext) -> DataSplits:
        """Read the run's data and encode it.

        Raises:
            InputError: there is no usable data.
        """
        return self.read_data(ctx, ctx.settings.data)

    def read_data(self, ctx: RunContext, data: DataSettings, teacher_prompt: str | None = None) -> DataSplits:
        """Read some data for this objective; see `load_data`."""
        seed = ctx.settings.loop.seed
        seen = Seen(teacher_prompt, self.shown_tools(ctx.settings.objective, ctx.functions))
        splits = load_data(data, ctx.base.hf_tokenizer, seed, ctx.today, self.records, seen)
        return splits.changed(lambda sets: {name: self.targets_of(rows) for name, rows in sets.items()})

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        """Read one set to measure; see `load_data`."""
        prompt = read_teacher_prompt(ctx.settings.objective.teacher_prompt)
        seen = Seen(prompt, self.shown_tools(ctx.settings.objective, ctx.functions))
        return load_eval_set(data.data or "", data, ctx.base.hf_tokenizer, self.records, seen)

    def read_planned(
        self,
        settings: TrainSettings,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        config: dict[str, Any],
        today: date | None,
        records: str,
    ) -> DataSplits:
        """Read a run's data for a plan, without the model's weights.

        Args:
            settings: of the run; its data are there.
            tokenizer: of the model.
            folder: of the model, at least with what reads data.
            config: its config.json.
            today, records: as for `load_data`.
        """
        prompt = read_teacher_prompt(settings.objective.teacher_prompt)
        seen = Seen(prompt, self.shown_tools(settings.objective, {}))
        return load_data(settings.data, tokenizer, settings.loop.seed, today, records, seen)

    def settled_by(self, settings: TrainSettings, rows: EncodedSet) -> TrainSettings:
        """Return the settings of a plan with what the training rows decide in a run."""
        return settings

    def adapted(self, adapter: AdapterSettings) -> AdapterSettings:
        """Return the settings by which the base is adapted, with what this objective put beside the language model."""
        return adapter

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        """Return the sets with what another model says about their rows, while the base has no adapter.

        Args:
            ctx: of the run; its record may get a line.
            sets: name -> rows.
        """
        return sets

    def lay_out(self, ctx: RunContext, rows: EncodedSet) -> None:
        """Choose how the answers to a prompt lie in rows, and loss and kernels (`ctx.compute`) if they depend on that."""

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings with what `lay_out` decided."""
        return settings

    def arrange(self, data: DataSplits) -> DataSplits:
        """Return the data with its rows in the layout that `lay_out` chose."""
        return data

    def after_fit(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        """Do what needs the memory plan (`ctx.memory`, which it may change), and return the data.

        Args:
            ctx: of the run, with settings in which nothing is open.
            data: rows apart.
            shape: of the adapted model.
        """
        return data

    def begin_measuring(self, ctx: RunContext, loss: Loss) -> None:
        """Get ready to measure a set, where nothing is trained.

        Args:
            ctx: of the measurement; the adapter is on the base.
            loss: of tokens, chosen for the base.
        """

    def held_out(self, plan: BatchPlan) -> HeldOutBatches:
        """Return what is measured of held-out rows."""
        return plan

    def token_loss(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> Loss:
        """Return the loss that this objective computes of tokens, from that of cross-entropy."""
        return loss

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        """Return the loss on a model.

        Args:
            loss: of tokens, whose kernels are kept.
            model: that is trained or measured.

        Raises:
            ValueError: the objective has a loss of whole answers, which this class does not compute.
        """
        if self.loss is not None:
            raise ValueError(f"{self.name}: its loss of whole answers is not computed here; make it a `Preference`")
        return BoundObjective(loss)

    def kept_choices(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a checkpoint's identity a resumed run may choose anew, as the checkpoint has it."""
        return {}

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        """Return words for the header's line on the run."""
        return []

    def steps(self, batches: list[Batch], done: StepsDone) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each of the next `updates` optimizer steps.

        Args:
            batches: planned, the same for all of these steps.
            done: where the run is.
        """
        yield batches

    def fixed_prompts(self, rows: EncodedSet, most: int) -> list[FixedPrompt]:
        """Return held-out prompts that are answered at every validation; none where the data have the answers."""
        return []

    def greedy_answers(self, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
        """Return an answer to each of the fixed prompts with its rewards, as plain values.

        Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
        without one) and `rewards` by name. No random stream of the run is used.

        Raises:
            RunError: a reward failed.
        """
        return []

    def other_models_bytes(self, settings: TrainSettings) -> int:
        """Return the bytes of models that stay in memory beside the base, such as reward models."""
        return 0

    def outlined(self, model: nn.Module, settings: TrainSettings) -> AdapterSettings:
        """Return the settings by which a model without weights is adapted for a plan, as `adapted` does for a run.

        Args:
            model: gets what this objective puts beside its language model.
            settings: of the run.
        """
        return settings.adapter

    def with_pictures(self, shape: ModelShape, settings: TrainSettings, model: nn.Module) -> ModelShape:
        """Return the shape of a run's model with the memory of the pictures in the data, which were read.

        Args:
            shape, settings: of the run.
            model: the adapted one, with weights or without.
        """
        return shape

    def pictures_of(self, number: int | None) -> PromptPictures | None:
        """Return the pictures of a row; None: it has none.

        Args:
            number: that the row has for its pictures (`EncodedSet.pictures`); None: it has no pictures.
        """
        return None
