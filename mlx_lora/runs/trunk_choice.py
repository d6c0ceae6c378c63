"""Decide whether a run keeps the output of the frozen blocks below its first adapted one, and where.

    <cache>/trunk/<key>/     one folder for the training rows, one for the validation rows

The key covers everything that decides the bytes: the rows and their batches of epoch 0, the frozen weights, the kernels,
the dtype, the device and the code. So a changed base or another seed never reads what an earlier run wrote, while a run
with another learning rate or rank does. Folders stay after a run, up to a limit, like encoded data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata, resources

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.model_shape import model_shape
from mlx_lora.artifacts.checkpoint import Checkpoint
from mlx_lora.data.batches import Batch, BatchPlan
from mlx_lora.data.row_store import MOST_KEPT_BYTES, RowStore, evict, used_bytes
from mlx_lora.models.fingerprint import parameter_sums
from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.load import Base
from mlx_lora.models.trunk import Trunk, trunk_outputs
from mlx_lora.objectives.objective import Objective
from mlx_lora.planner.ceilings import ceilings_here
from mlx_lora.planner.fitting import run_of
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.planner.trunk_plan import ROOM_LEFT_BYTES, TrunkPlan, no_use, plan_trunk
from mlx_lora.settings.config import TrainSettings
from mlx_lora.system import device
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.distributed import Ranks
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import free_on_disk, sha256_of
from mlx_lora.training.objective_loss import Task
from mlx_lora.training.trial import StepVariant
from mlx_lora.training.trunk_check import trunk_problem
from mlx_lora.training.trunk_rows import Record, TrunkRows, with_trunk

KEPT = "kept_trunk"  # in a checkpoint's identity: the number of frozen blocks whose output the run keeps


@dataclass(frozen=True)
class TrunkAsked:
    """What a run is asked to do with its frozen blocks' output, and what it depends on.

    Attributes:
        settings: of the run, in which nothing is open.
        base: adapted.
        plan, validation: its batches; None without validation.
        epochs: of the run.
        ranks: its processes.
        before: the number of blocks whose output the run to resume keeps; None: there is no such run.
    """

    settings: TrainSettings
    base: Base
    plan: BatchPlan
    validation: BatchPlan | None
    epochs: float
    ranks: Ranks
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
        for_steps, for_validation: take a task, and return the one that starts at the first adapted block.
    """

    blocks: int = 0
    words: str = ""
    for_steps: Callable[[Task], Task] = lambda task: task
    for_validation: Callable[[Task], Task] = lambda task: task

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


def choose_trunk(of: TrunkAsked, variant: StepVariant, objective: Objective) -> KeptTrunk:
    """Return whether the run keeps the output of its frozen blocks.

    Args:
        of: the run.
        variant: what computes its step.
        objective: of the run.

    Raises:
        InputError: it is asked to, but cannot.
    """
    if of.asked == "off":
        return KeptTrunk()
    problem, words = _layout_problem(of, objective), ""
    if problem is None:
        shape = model_shape(of.base.model, of.base.config)
        problem = no_use(shape.first_trained, of.epochs, of.asked)  # before anything is measured
    if problem is None:
        planned = _planned(of, shape)
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


def _layout_problem(of: TrunkAsked, objective: Objective) -> str | None:
    """Return in a few words why the rows of a run cannot start above its frozen blocks, None if they can."""
    if of.ranks.size > 1:
        return f"{of.ranks.size} processes share the rows"
    return rows_problem(of.plan.rows.starts is not None, objective)


def rows_problem(shared: bool, objective: Objective) -> str | None:
    """Return in a few words why rows cannot start above frozen blocks, None if they can.

    Args:
        shared: whether a row holds a prompt and several answers.
        objective: of the run.
    """
    if objective.samples:
        return "answers are sampled during the run"
    if shared:
        return "a row holds a prompt and several answers (--shared-prefix off gives each its own row)"
    if objective.records == "rated":
        return "rated answers are also compared with others before each step"
    return None


def _planned(of: TrunkAsked, shape: ModelShape) -> TrunkPlan:
    """Return the costs, by the planner."""
    settings, rows = of.settings, of.plan.rows
    machine = this_machine(settings.model.dtype)
    largest = max(of.plan.shapes, key=lambda shape: shape[0] * shape[1])
    run = run_of(settings, *largest[:2], settings.loop.grad_checkpoint, largest[2])
    validated = 0 if of.validation is None else sum(b.real_tokens for b in _held_out(of))
    positions = int(rows.lengths.sum()) - len(rows) + validated
    high, low = mx.random.state[0].tolist()  # measuring draws numbers; dropout's must not depend on --cache-trunk
    ceilings = ceilings_here(settings.model.dtype)
    mx.random.seed(high << 32 | low)
    return plan_trunk(shape, run, machine, ceilings, positions, of.epochs, free_bytes())


def _held_out(of: TrunkAsked) -> Iterable[Batch]:
    return (
        ()
        if of.validation is None
        else of.validation.batches(-1 if of.settings.loop.val_batches is None else of.settings.loop.val_batches)
    )


def free_bytes() -> int:
    """Return the bytes that the kept output may take: what is free on the cache's disk, and what earlier runs left there."""
    room = cache_dir("trunk")
    return free_on_disk(room) + sum(map(used_bytes, room.iterdir() if room.is_dir() else ()))


def _kept(of: TrunkAsked, variant: StepVariant, planned: TrunkPlan) -> KeptTrunk | str:
    """Return the tasks that start above the frozen blocks, or in a few words why there are none."""
    model, choose = of.base.model, variant.choose
    trunk = Trunk(model, min(planned.blocks, len(model.layers) - 1))
    outputs = trunk_outputs(model, trunk, variant.attend, choose, variant.compiled)
    record = trunk_problem(model, variant, trunk, outputs, of.plan.rows)
    if isinstance(record, str):
        return record
    key = _key(of, variant, trunk, record)
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
    return KeptTrunk(
        trunk.blocks,
        planned.words(),
        lambda task: with_trunk(task, trunk, kept[0]),
        lambda task: with_trunk(task, trunk, kept[-1]),
    )


def _key(of: TrunkAsked, variant: StepVariant, trunk: Trunk, record: Record) -> str:
    """Return a text of everything that decides the bytes of a row, besides the rows."""
    own = {id(a) for block in of.base.model.layers[trunk.blocks :] for _, a in tree_flatten(block.parameters())}
    trained = {id(a) for _, a in tree_flatten(of.base.model.trainable_parameters())}
    choice = variant.choose
    parts = {
        "blocks": trunk.blocks,
        "weights": parameter_sums(of.base.model, own | trained),
        "config": of.base.config,
        "record": [record.shape, str(record.dtype)],
        "kernels": [sorted(choice.classes.items()) if isinstance(choice, KernelChoice) else "", variant.attend is None],
        "products": of.base.matmul_paths.describe(),
        "compiled": [variant.compiled, device.compiles()],
        "machine": device.measured_on(),
        "packages": metadata.version("mlx-lm"),
        "code": _code_hash(),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def key_of_rows(key: str, plan: BatchPlan) -> str:
    """Return the name of the folder for a plan's rows."""
    layout = hashlib.sha256()
    for width, numbers in plan.layout(0):
        layout.update(f"{width} {len(numbers)} ".encode() + numbers.astype(np.int64).tobytes())
    return sha256_of(f"{key} {plan.rows.fingerprint} {layout.hexdigest()}")[:32]


def _code_hash() -> str:
    """Return a hash of the code that computes a model's layers: another version may round in another way."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("mlx_lora.models").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
