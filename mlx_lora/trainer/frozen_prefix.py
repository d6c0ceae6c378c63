"""Keep the output of the frozen blocks below the first adapted one (the trunk), for later epochs and later runs.

    <cache>/trunk/<key>/     one folder for the training rows, one for the validation rows

A row's output is computed when it is first needed, kept on disk, and read from then on. It is always what was computed for
the row in its batch of epoch 0, at that batch's shape, and a loss always reads it from the store. So a step does not depend
on what had been stored before: a resumed run whose store was lost, or is from a run that was interrupted in its first epoch,
takes the same steps bit for bit as one that never stopped.

The key covers everything that decides the bytes: the rows and their batches of epoch 0, the frozen weights, the kernels,
the dtype, the device and the code. So a changed base or another seed never reads what an earlier run wrote, while a run
with another learning rate or rank does. Folders stay after a run, up to a limit, like encoded data.

A model may hand more past its blocks than their output: keys that later blocks share, embeddings that they add again. No
list of architectures is kept; rows of the data are computed both ways, and a step that starts at the first adapted block
must give the same loss and gradient as a whole one.

Shapes: B rows, T columns, D the trunk's width, W bytes of a position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.compat.foreign import KEPT_SHARE
from mlx_lora.data.batch import EMPTY, Batch
from mlx_lora.data.dataset import EncodedSet, RowStore
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.choose import KernelChoice, has_recurrence, training_kernels
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.agree import disagreement, package_sum, probe
from mlx_lora.losses.cross_entropy import Arrays, token_arrays
from mlx_lora.models.blocks import output_of, start_at
from mlx_lora.models.config import is_encoder
from mlx_lora.models.folder import FOREIGN_ERRORS, parameter_sums, raise_if_ours, short
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.machine import ceilings_here, this_machine
from mlx_lora.planner.memory import CHECK_TOKENS, RECURRENT_CHECK_TOKENS, ModelShape
from mlx_lora.planner.speed import ROOM_LEFT_BYTES, TrunkPlan, no_use, plan_trunk
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.files import MOST_KEPT_BYTES, cache_dir, evict, free_on_disk, sha256_of, used_bytes
from mlx_lora.utils.text import package_version

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.losses.agree import StepVariant
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import BoundObjective
    from mlx_lora.trainer.checkpoint import Checkpoint

# Decision

KEPT = "kept_trunk"  # in a checkpoint's identity: the number of frozen blocks whose output the run keeps


@dataclass(frozen=True)
class TrunkAsked:
    """What a run is asked to do with its frozen blocks' output, and what it depends on.

    Attributes:
        settings: of the run, in which nothing is open.
        base: adapted.
        plan, validation: its batches; None without validation.
        epochs: of the run.
        shape: of the adapted model.
        strategy: of the run.
        before: the number of blocks whose output the run to resume keeps; None: there is no such run.
    """

    settings: TrainSettings
    base: Base
    plan: BatchPlan
    validation: BatchPlan | None
    epochs: float
    shape: ModelShape
    strategy: Strategy = SINGLE_DEVICE
    before: int | None = None

    @property
    def asked(self) -> str:
        """`on`, `off`, or `auto` if the run may choose."""
        if self.before is None:
            return self.settings.loop.cache_trunk
        return "on" if self.before else "off"

    @property
    def identity(self) -> dict[str, int]:
        """What the identity of the run to resume has of it."""
        return {KEPT: self.before} if self.before else {}


@dataclass(frozen=True)
class KeptTrunk:
    """What a run does with its frozen blocks' output.

    Attributes:
        blocks: how many; 0: every epoch computes everything.
        words: for the run header; may be empty.
        rows: the output for the rows to train on, and for the held-out ones if there are any.
    """

    blocks: int = 0
    words: str = ""
    rows: tuple[TrunkRows, ...] = ()

    def under(self, bound: BoundObjective, rows: int) -> BoundObjective:
        """Return the objective that starts at the first adapted block, for the rows with this index in `rows`."""
        return with_trunk(bound, self.blocks, self.rows[rows]) if self.rows else bound

    @property
    def identity(self) -> dict[str, int]:
        """What a resumed run must have in common with its checkpoint."""
        return {KEPT: self.blocks} if self.blocks else {}

    def end(self) -> None:
        """After a complete run, leave what the cache's limit allows for the next one."""
        if self.blocks:
            evict(cache_dir("trunk"), MOST_KEPT_BYTES)


def blocks_before(found: Checkpoint | None, asked: str) -> int | None:
    """Return the number of blocks whose output the run to resume keeps, None if no run is resumed.

    Args:
        found: its checkpoint.
        asked: --cache-trunk.

    Raises:
        InputError: it asks for what that run did not do, and steps would not be the same bit for bit.
    """
    if found is None:
        return None
    before = int(found.identity.get(KEPT, 0))
    then = "on" if before else "off"
    if asked not in ("auto", then):
        raise InputError(f"--cache-trunk {asked}: the run that you resume has it {then}; leave the flag out")
    return before


def choose_trunk(of: TrunkAsked, variant: StepVariant) -> KeptTrunk:
    """Return whether the run keeps the output of its frozen blocks.

    Args:
        of: the run.
        variant: what computes its step.

    Raises:
        InputError: it is asked to, but cannot.
    """
    if of.asked == "off":
        return KeptTrunk()
    words, ranks, shared = "", of.strategy.ranks.size, of.plan.rows.starts is not None
    if ranks > 1:
        problem = f"{ranks} processes share the rows"
    elif is_encoder(of.base.model):
        problem = "an encoder's blocks depend on the length of a row"
    else:  # what needs no measurement first
        problem = rows_problem(shared, of.settings.objective) or no_use(of.shape.first_trained, of.epochs, of.asked)
    if problem is None:
        planned = _planned(of)
        problem = planned.problem(of.asked)
        if problem is None:
            kept = _kept(of, variant, planned)
            if isinstance(kept, KeptTrunk):
                return kept
            problem, words = kept, f"frozen blocks computed in every epoch ({kept})"
    if of.asked == "auto":
        return KeptTrunk(words=words)
    if of.before:
        raise InputError(f"--resume: the run kept the output of its frozen blocks, but {problem}; start a new run")
    raise InputError(f"--cache-trunk on: {problem}; leave the flag out")


def rows_problem(shared: bool, objective: ObjectiveSettings) -> str | None:
    """Return in a few words why rows cannot start above frozen blocks, None if they can.

    Args:
        shared: whether a row holds a prompt and several answers.
    """
    if objective.samples:
        return "answers are sampled during the run"
    if shared:
        return "a row holds a prompt and several answers (--shared-prefix off gives each its own row)"
    if objective.row.trained:
        return "rated answers are also compared with others before each step"
    return None


def _planned(of: TrunkAsked) -> TrunkPlan:
    """Return the costs, by the planner."""
    settings, rows = of.settings, of.plan.rows
    machine = this_machine(settings.model.dtype)
    largest = max(of.plan.shapes, key=lambda shape: shape[0] * shape[1])
    run = run_of(settings, *largest[:2], settings.loop.grad_checkpoint, largest[2])
    positions = int(rows.lengths.sum()) - len(rows)
    if of.validation is not None:
        most = of.settings.loop.val_batches
        positions += sum(batch.real_tokens for batch in of.validation.batches(-1 if most is None else most))
    high, low = mx.random.state[0].tolist()  # measuring draws numbers; dropout's must not depend on --cache-trunk
    ceilings = ceilings_here(settings.model.dtype)
    mx.random.seed(high << 32 | low)
    return plan_trunk(of.shape, run, machine, ceilings, positions, of.epochs, free_bytes())


def free_bytes() -> int:
    """Return the bytes that the kept output may take: what is free on the cache's disk, and what earlier runs left there."""
    room = cache_dir("trunk")
    return free_on_disk(room) + sum(map(used_bytes, room.iterdir() if room.is_dir() else ()))


def _kept(of: TrunkAsked, variant: StepVariant, planned: TrunkPlan) -> KeptTrunk | str:
    """Return what is kept, or in a few words why nothing can be."""
    model = of.base.model
    blocks = min(planned.blocks, len(model.layers) - 1)
    outputs = trunk_outputs(model, blocks, variant)
    record = trunk_problem(model, variant, blocks, outputs, of.plan.rows, of.strategy)
    if isinstance(record, str):
        return record
    key = _key(of, variant, blocks, record)
    plans = [plan for plan in (of.plan, of.validation) if plan is not None]
    folders = [cache_dir("trunk") / key_of_rows(key, plan) for plan in plans]
    crowded = free_on_disk(cache_dir("trunk")) < planned.disk_bytes + ROOM_LEFT_BYTES
    evict(cache_dir("trunk"), 0 if crowded else MOST_KEPT_BYTES, folders)
    try:
        kept = [
            TrunkRows(plan.rows, plan.layout(0), RowStore(folder, plan.rows.lengths - 1, record.bytes), record, outputs)
            for plan, folder in zip(plans, folders, strict=True)
        ]
    except OSError as error:
        return f"the cache cannot be written ({error.strerror or error})"
    return KeptTrunk(blocks, planned.words(), tuple(kept))


class NoTrunk(Exception):
    """A model's blocks are not called one after the other with one array; the message says what was found."""


def trunk_outputs(model: nn.Module, blocks: int, variant: StepVariant) -> Callable[[mx.array], mx.array]:
    """Return a function from token ids (B, T) to the output of the first blocks, computed as in a step, without gradient."""

    def outputs(inputs: mx.array) -> mx.array:
        training = model.training
        model.train()  # as in a step: some models compute other kernels in eval mode
        try:
            with left_unchanged(model), training_kernels(model, variant.attend, variant.choose):
                found = output_of(model, blocks - 1, inputs)
        finally:
            model.train(training)
        if not isinstance(found, mx.array) or found.shape[:2] != inputs.shape or found.ndim < 3:
            raise NoTrunk("it does not pass one array from block to block")
        return found

    return mx.compile(outputs, inputs=[model.state]) if variant.compiled else outputs


def _key(of: TrunkAsked, variant: StepVariant, blocks: int, record: StoredOutput) -> str:
    """Return a text of everything that decides the bytes of a row, besides the rows."""
    own = {id(a) for block in of.base.model.layers[blocks:] for _, a in tree_flatten(block.parameters())}
    trained = {id(a) for _, a in tree_flatten(of.base.model.trainable_parameters())}
    choice, frozen = variant.choose, {id(block) for block in of.base.model.layers[:blocks]}
    paths = tuple(f"{path}." for path, module in of.base.model.named_modules() if id(module) in frozen)
    # Of an array that is not in memory, but read from the base's files.
    in_files = {path: at.check_sum() for path, at in of.base.stored.items() if path.startswith(paths)}
    parts = {
        "blocks": blocks,
        "weights": parameter_sums(of.base.model, own | trained) | in_files,
        "config": of.base.config,
        "record": [record.shape, str(record.dtype)],
        "kernels": [sorted(choice.classes.items()) if isinstance(choice, KernelChoice) else "", variant.attend is None],
        "products": of.base.matmul_paths.describe(),
        "compiled": [variant.compiled, device.compiles()],
        "machine": device.measured_on(),
        "packages": package_version("mlx-lm"),
        "code": package_sum(),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def key_of_rows(key: str, plan: BatchPlan) -> str:
    """Return the name of the folder for a plan's rows."""
    layout = hashlib.sha256()
    for width, numbers in plan.layout(0):
        layout.update(f"{width} {len(numbers)} ".encode() + numbers.astype(np.int64).tobytes())
    return sha256_of(f"{key} {plan.rows.fingerprint} {layout.hexdigest()}")[:32]


# Check on the model

CHECKED_ROWS = 2
NEARER = 4.0  # kept outputs must be this many times nearer to the whole model's losses than outputs in another order


def trunk_problem(
    model: nn.Module,
    variant: StepVariant,
    blocks: int,
    outputs: Callable[[mx.array], mx.array],
    rows: EncodedSet,
    strategy: Strategy = SINGLE_DEVICE,
) -> StoredOutput | str:
    """Return what is kept for a position, or in a few words why this model's trunk cannot be kept.

    Args:
        model: adapted, with checkpointing.
        variant: the loss and the kernels of the run.
        blocks: that are frozen.
        outputs: computes their output.
        rows: of the run's data.
        strategy: how the run computes gradients.
    """
    dropping = [m for block in model.layers[:blocks] for m in block.modules() if isinstance(m, nn.Dropout)]
    if any(KEPT_SHARE.of(m) < 1 for m in dropping):
        return "its frozen blocks have dropout"
    recurrent = variant.attend is None and has_recurrence(model)
    most = (RECURRENT_CHECK_TOKENS if recurrent else CHECK_TOKENS) // CHECKED_ROWS
    # The first rows, cut so that one has padding; all of it is trained.
    chosen = [rows.row(number % len(rows))[0][: most + 1 - most // 4 * number] for number in range(CHECKED_ROWS)]
    cut = EncodedSet.from_rows([(tokens, np.arange(len(tokens)) > 0) for tokens in chosen])
    plan = BatchPlan(cut, batch_tokens=CHECKED_ROWS * most, batch_size=CHECKED_ROWS, seed=0)
    arrays = token_arrays(plan.batch(0, 0))
    try:
        with training_kernels(model, variant.attend, variant.choose):
            whole = probe(model, lambda model: variant.loss.tokens(model, arrays), strategy=strategy)
            output = outputs(arrays["inputs"])
            kept = StoredOutput.of(output).to_array(StoredOutput.of(output).to_bytes(output))
            with start_at(model, blocks, kept):
                above = probe(model, lambda model: variant.loss.tokens(model, arrays), strategy=strategy)
            with start_at(model, blocks, kept[:, ::-1]):
                other = probe(model, lambda model: variant.loss.tokens(model, arrays), gradient=False)
    except NoTrunk as error:
        return str(error)
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        return f"fails on this model: {short(error, 100)}"
    problem = disagreement(model, whole, above)
    if problem:
        return f"a step from it {problem}"
    difference, wrong = (mx.abs(one.losses - whole.losses).max().item() for one in (above, other))
    if not difference * NEARER <= wrong or not wrong:
        return "this model's losses do not depend on it, or rounding is too large to tell"
    return StoredOutput.of(output)


# Rows

Result = TypeVar("Result")
# numpy has no bfloat16: an array's bytes pass as integers of its size.
CARRIERS = {2: (np.uint16, mx.uint16), 4: (np.uint32, mx.uint32)}


@dataclass(frozen=True)
class StoredOutput:
    """What is kept for a position.

    Attributes:
        shape: of the array; (D,) for nearly all models.
        dtype: of its numbers, which are kept as they are.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, output: mx.array) -> StoredOutput:
        """Return the record of a trunk's output, (B, T, D)."""
        return cls(tuple(output.shape[2:]), output.dtype)

    @property
    def bytes(self) -> int:
        """The size of a record, W."""
        return int(np.prod(self.shape)) * self.dtype.size

    def to_bytes(self, output: mx.array) -> np.ndarray:
        """Return a trunk's output as (B, T, W) uint8."""
        carried = np.array(output.view(CARRIERS[self.dtype.size][1]))
        return carried.reshape(*output.shape[:2], -1).view(np.uint8)

    def to_array(self, values: np.ndarray) -> mx.array:
        """Return what `to_bytes` was given."""
        carrier, device_type = CARRIERS[self.dtype.size]
        carried = mx.array(values.view(carrier).reshape(*values.shape[:2], *self.shape))
        return carried if self.dtype == device_type else carried.view(self.dtype)


class TrunkRows:
    """The trunk's output for the rows of one encoded set."""

    def __init__(
        self,
        rows: EncodedSet,
        layout: list[tuple[int, np.ndarray]],
        store: RowStore,
        record: StoredOutput,
        outputs: Callable[[mx.array], mx.array],
    ):
        """Set up; nothing is computed.

        Args:
            rows: the set.
            layout: width and row numbers of each batch of epoch 0.
            store: of these rows.
            record: what it keeps.
            outputs: token ids (B, T) -> the trunk's output.
        """
        self._rows, self._layout, self._store, self._record, self._outputs = rows, layout, store, record, outputs
        self._batch_of = {int(row): index for index, (_, numbers) in enumerate(layout) for row in numbers}

    def of(self, batch: Batch) -> mx.array:
        """Return the trunk's output for a batch of these rows, (B, T, D).

        Raises:
            RunError: there is no space left on the disk.
        """
        numbers: Any = batch.numbers  # there are some: the batch is of a set
        found = np.empty((*batch.inputs.shape, self._record.bytes), np.uint8)
        real = numbers[batch.real]
        for i, number in enumerate(numbers):
            # Padding gets values that occur: layers that divide by a vector's length cannot take zeros.
            values = self._values(int(number if number != EMPTY else real[0] if len(real) else 0))
            found[i, : len(values)] = values
            found[i, len(values) :] = values[-1]
        return self._record.to_array(found)

    def _values(self, row: int) -> np.ndarray:
        values = self._store.read(row)
        if values is None:
            self._compute(self._batch_of[row])
            values = self._store.read(row)
        if values is None:
            raise RunError(
                "--cache-trunk: what was just written to the disk of the cache cannot be read; check that disk"
            )
        return values

    def _compute(self, index: int) -> None:
        """Compute a batch of epoch 0 and store its rows."""
        width, numbers = self._layout[index]
        inputs = np.zeros((len(numbers), width), np.int32)
        texts = [self._rows.row(int(number))[0][:-1] if number != EMPTY else () for number in numbers]
        for i, text in enumerate(texts):
            inputs[i, : len(text)] = text
        output = self._outputs(mx.array(inputs))
        mx.eval(output)
        found = self._record.to_bytes(output)
        try:
            for i, number in enumerate(numbers):
                if number != EMPTY:
                    self._store.write(int(number), found[i, : len(texts[i])])
        except OSError as error:
            raise RunError(
                f"--cache-trunk: the outputs of frozen blocks could not be kept ({error.strerror}); make room on the disk "
                "of the cache"
            ) from error


def with_trunk(bound: BoundObjective, blocks: int, rows: TrunkRows) -> BoundObjective:
    """Return the objective on a model that starts at its first adapted block.

    Args:
        bound: on rows that hold one text each.
        blocks: that are frozen.
        rows: the trunk's output for the rows of the batches.
    """

    def above(function: Callable[..., Result]) -> Callable[..., Result]:
        def of_kept(model: nn.Module, arrays: Arrays) -> Result:
            with start_at(model, blocks, arrays["trunk"]):
                return function(model, arrays)

        return of_kept

    return bound.within(above, "trunk", rows.of)
