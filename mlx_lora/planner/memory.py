"""Predict the bytes that a run holds at its peak, part by part, by arithmetic.

A run has phases, and its peak is that of the largest phase:

    load       the weights, and what casts and checks hold temporarily
    check      one block of each kind, and the plain loss of a few tokens, with whole logits (losses/cross_entropy.py)
    loss       everything that the blocks keep, and tiles of logits (losses/fused.py)
    backward   everything that the blocks keep, and the gradients of one block; or less and less of what they keep, and
               those of an earlier block
    tower      what a trained vision tower keeps of a batch's pictures (in the two before, too), and its gradients
    pictures   if the tower is frozen, its forward pass for one picture, before the batch
    last       the adapter's gradients, and one block
    measure    tiles of logits without a gradient, of which more are ahead: a reference, or a validation
    update     gradients, and the new optimizer state in addition to the old
    teacher    the base, a teacher's weights, and its forward pass; only with --teacher. Before the first step, or if it
               scores sampled answers, between the steps
    rollout    keys and values of sampled answers, and the scores of the vocabulary; only if a run samples answers

In all phases: the base, the adapter's float32 masters, the optimizer's moments, a teacher that stays. What a block keeps,
and what its backward pass allocates at a time, is read from the block's graph (trainer/fit.py) and given as
`Block.memory`. If a graph cannot be read, the formulas here count the block as a llama block, and the plan says that its
memory is not known. docs/development/planner.md compares predictions with measurements.

A rollout has two moments (models/generator.py). First, prompts are computed one by one, and each layer keeps a prompt's
keys and values. Then these are copied for each answer, and grow with it: mlx-lm's caches by CACHE_STEP tokens at a time. A
layer's old buffer is there until its new one is filled.

Shapes: T positions of a batch (rows x width), P trained positions, D model width, V vocabulary, A trained numbers. In a
rollout: N prompts, G answers to each, N G rows.
Source: arXiv 2205.05198, section 4 (activations of a block).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from math import ceil
from typing import Protocol, Self

from mlx_lora.config.presets import OPTIMIZERS
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, checkpoint_every
from mlx_lora.utils.errors import InputError

# The planner's types: a model's shape, a machine, and a run's largest batch. models/meta.py fills them in from a module tree,
# planner/machine.py from a device, and planner/speed.py from a table.


@dataclass(frozen=True)
class Layer:
    """One matrix of a block.

    Attributes:
        parent: path of the module that holds it, within the block (`self_attn`).
        name: its name there, such as `q_proj`.
        inputs, outputs: widths.
        experts: the number of matrices of this shape; 1 for a plain layer.
        active: the number of them that each position uses.
        packed: whether it is quantized.
        rank: of its adapter; 0 without one.
        keeps_product: whether its adapter also keeps the output that it scales, as DoRA does.
        rounds_to: the format (`affine`, `mxfp4`) in which it computes its fused weight, with --qat; None: it does not.
    """

    parent: str
    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1
    packed: bool = False
    rank: int = 0
    keeps_product: bool = False
    rounds_to: str | None = None

    @property
    def numbers(self) -> int:
        """The number of weights of all its matrices."""
        return self.inputs * self.outputs * self.experts

    @property
    def is_end(self) -> bool:
        """Whether its output is only added to the residual stream, so that it need not be kept."""
        return self.name in BRANCH_ENDS


# The names of the last layer of a branch in mlx-lm's architectures.
BRANCH_ENDS = frozenset(
    [
        "o_proj",
        "out_proj",
        "wo",
        "dense",
        "down_proj",
        "w2",
        "c_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "linear_out",
        "output_linear",
        "ff_out",
        "proj_out",
    ]
)


class NotKnown(InputError):
    """The memory of a block is not known; the message says which block and why."""


@dataclass(frozen=True)
class Numbers:
    """Numbers that are added and multiplied field by field; the base of others."""

    def plus(self, other: Self) -> Self:
        """Return the sum."""
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Self:
        """Return this with each field multiplied by `factor`."""
        return type(self)(*(factor * a for a in astuple(self)))


@dataclass(frozen=True)
class BlockBytes(Numbers):
    """The bytes that one block takes for one batch.

    Attributes:
        kept: from its forward to its backward pass, without checkpointing.
        window: what its backward pass adds to that at its peak.
        ends: its input and attention's output, which a checkpointed block keeps.
        nodes: the number of operations in its graph.
        early: what the beginning of its backward pass adds, while arrays of the loss are still there.
    """

    kept: float
    window: float
    ends: float
    nodes: float = 0
    early: float = 0

    def minus(self, other: BlockBytes) -> BlockBytes:
        """Return the difference, field by field, at least zero."""
        return BlockBytes(*(max(0.0, a - b) for a, b in zip(astuple(self), astuple(other), strict=True)))


class BlockMemory(Protocol):
    """Returns the bytes that a block takes for a batch."""

    def at(self, rows: int, width: int, on_gpu: bool) -> BlockBytes:
        """Return the bytes, or raise NotKnown."""
        ...


@dataclass(frozen=True)
class Block:
    """One block of the model.

    Attributes:
        layers: its matrices.
        norms: the width of each of its norms.
        heads, key_heads, head_width: of its attention; 0 heads if the block has no attention that we know.
        gated: `silu` (our lean kernel applies) or `other` (mlx's own operations).
        window: the most keys that a query sees; None: all keys before it.
        memory: its memory, read from its graph; None: counted from its matrices, as for a llama block.
        chunked: the same if its MLP is computed in chunks of positions where a batch is large; None: it never is.
        at_one: the same if only one position is computed beyond attention; None: all are, as in any block but the last.
    """

    layers: tuple[Layer, ...]
    norms: tuple[int, ...] = ()
    heads: int = 0
    key_heads: int = 0
    head_width: int = 0
    gated: str = "silu"
    window: int | None = None
    memory: BlockMemory | None = field(default=None, compare=False)
    chunked: BlockMemory | None = field(default=None, compare=False)
    at_one: BlockMemory | None = field(default=None, compare=False)

    @property
    def widths(self) -> int:
        """The sum of the input and output widths of the matrices that each position uses."""
        return sum((layer.inputs + layer.outputs) * layer.active for layer in self.layers)


@dataclass(frozen=True)
class TowerBytes:
    """The bytes that a vision tower takes for the pictures of one batch.

    Attributes:
        kept: from its forward to its backward pass; 0 if nothing of it is trained.
        window: what its backward pass adds to that at its peak, its gradients included, or its forward pass if that takes more; if
            nothing is trained, the peak of its forward pass, which computes one picture at a time before the batch.
    """

    kept: float
    window: float


class TowerMemory(Protocol):
    """Returns the bytes that a tower takes for the pictures of a batch."""

    def at(self, rows: int, on_gpu: bool) -> TowerBytes:
        """Return the bytes for so many rows with different pictures."""
        ...


@dataclass(frozen=True)
class TowerShape:
    """The vision tower of a run, with its connector.

    Attributes:
        memory: what it takes for pictures.
        trained: the numbers of both that are trained; they are part of `ModelShape.trained`.
        rows_each: rows of a batch that show the same pictures, such as the two answers of a pair.
    """

    memory: TowerMemory = field(compare=False)
    trained: int = 0
    rows_each: int = 1


CACHE_STEP = 256  # tokens by which a cache of mlx-lm grows


@dataclass(frozen=True)
class LayerCache:
    """What a layer keeps of one row while answers are sampled.

    Attributes:
        token_bytes: of each token's key and value.
        most_tokens: that it keeps, with a sliding window; None: all.
        fixed_bytes: of states, which do not grow.
    """

    token_bytes: int = 0
    most_tokens: int | None = None
    fixed_bytes: int = 0


def in_steps(tokens: int) -> int:
    """Return the tokens that a cache of mlx-lm makes room for."""
    return -(-max(0, tokens) // CACHE_STEP) * CACHE_STEP


@dataclass(frozen=True)
class Rollout:
    """The largest batch of prompts that answers are sampled to.

    Attributes:
        prompts: how many.
        group: answers to each.
        prompt_tokens: of the longest prompt.
        new_tokens: the most of an answer, in all of its turns.
        several_turns: whether the keys and values of an answer are kept until the environment has replied.
    """

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    several_turns: bool = False

    @property
    def cached_tokens(self) -> int:
        """The tokens of one answer's row that there is room for in the end; mlx-lm's caches grow in steps, from each turn's begin."""
        if self.several_turns:
            return self.kept_tokens + in_steps(1)
        return self.prompt_tokens - 1 + in_steps(self.new_tokens)

    @property
    def kept_tokens(self) -> int:
        """The tokens of one answer's row that are kept at the end of a turn, at most."""
        return self.prompt_tokens - 1 + self.new_tokens


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model and its adapter that decide memory and speed.

    Attributes:
        model_type: mlx-lm's.
        width: D.
        vocabulary: V.
        blocks: in order.
        base_bytes: bytes of the frozen parameters in memory.
        trained: A, how many numbers are trained.
        trained_arrays: how many arrays hold them.
        trained_alone: how many of the numbers are in arrays that are too large for the optimizer's flat array.
        frozen_adapter_bytes: what a method keeps beside them (PiSSA's initial factors).
        beside_bytes: bytes of other models that are held during the run (reward models).
        first_trained: the first block that has a backward pass; those before it keep nothing.
        head_packed: whether the output head is quantized.
        shared: whether ranks share the base, and this is the part of one of them.
        head_rows: rows of the head that are at hand at a time, if ranks share it; 0: all.
        plain_loss: whether the loss needs the model's own logits for all positions.
        source_bytes: bytes of the stored weights if loading casts them; otherwise 0.
        not_known: kinds of blocks whose memory could not be read, each with the reason.
        teacher: a model that is in memory beside the base, before the first step only; None: there is none.
        teacher_stays: whether it is in memory during the whole run.
        rounded_share: of the steps, those in which layers with `rounds_to` compute with their fused weights.
        caches: what its layers keep while answers are sampled; only for a run that samples.
        parameters: of the model without its adapter, packed ones unpacked.
        trained_share: of the positions of a batch, by the data; 1 if not known. Fewer positions make wider tiles of logits,
            which take more of a quantized head at a time.
        most_tokens: of a row; 0: any number. An encoder has an embedding for each of its positions and no more.
        tower: that sees the pictures of the data; None: there are none.
    """

    model_type: str
    width: int
    vocabulary: int
    blocks: tuple[Block, ...]
    base_bytes: int
    trained: int
    trained_arrays: int = 1
    trained_alone: int = 0
    frozen_adapter_bytes: int = 0
    beside_bytes: int = 0
    first_trained: int = 0
    head_packed: bool = False
    shared: bool = False
    head_rows: int = 0
    plain_loss: bool = False
    source_bytes: int = 0
    not_known: tuple[str, ...] = ()
    teacher: ModelShape | None = None
    teacher_stays: bool = False
    rounded_share: float = 1.0
    caches: tuple[LayerCache, ...] = ()
    parameters: int = 0
    trained_share: float = 1.0
    most_tokens: int = 0
    tower: TowerShape | None = None


@dataclass(frozen=True)
class KernelTerms:
    """The properties of a run's kernels that decide memory; the default is our kernels (kernels/table.py).

    Attributes:
        attention: (keys, kept, ahead) for each row length that mlx's attention is chosen for, in arrays of scores with a
            number for each query and key of each head: those kept for the backward pass, and those that it adds.
        tiled: row lengths that our attention is chosen for.
        gate_arrays: arrays that a gated activation keeps beside its inputs and its product; None: one if exponentials
            are expensive, otherwise none.
        loss: `tiles` or `rows`, how logits are computed (losses/fused.py).
    """

    attention: tuple[tuple[int, float, float], ...] = ()
    tiled: tuple[int, ...] = ()
    gate_arrays: float | None = None
    loss: str = "tiles"

    @classmethod
    def of_mlx(cls, backend: str) -> KernelTerms:
        """Return the terms of mlx's own kernels if they were not measured.

        On a CPU, attention was measured to keep about all scores. On a GPU, the backward pass is blocked since mlx 0.32.4
        and keeps none (a prediction, not measured on a Mac).
        """
        return cls(attention=((1024, 1.1, 2.3) if backend == "cpu" else (1024, 0.0, 0.0),), gate_arrays=2.0)

    def scores(self, width: int) -> tuple[float, float] | None:
        """Return (kept, ahead) if mlx's attention is chosen for the nearest row length, None if ours is."""
        ours = [(abs(keys - width), None) for keys in self.tiled]
        theirs = [(abs(keys - width), (kept, ahead)) for keys, kept, ahead in self.attention]
        return min([*theirs, *ours], key=lambda one: one[0], default=(0, None))[1]


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide memory.

    Attributes:
        name: chip or processor.
        backend: `cpu`, `metal` or `cuda`.
        memory_bytes: of the machine.
        working_set_bytes: the most that a run should use.
        number_bytes: of an activation: 4 on a CPU, 2 on a GPU, unless --dtype says otherwise.
        kernels: the memory terms of the kernels that were chosen for it.
        compiles_from: steps of a run from which its step is compiled (utils/device.py); 0: always.
    """

    name: str
    backend: str
    memory_bytes: int
    working_set_bytes: int
    number_bytes: int
    kernels: KernelTerms = KernelTerms()
    compiles_from: int = 0

    @property
    def keeps_exponentials(self) -> bool:
        """Whether exponentials are kept for the backward pass: they are only expensive on mlx's CPU backend."""
        return self.backend == "cpu"

    @property
    def dense_copies(self) -> int:
        """Arrays of a weight's size that dequantizing it takes: one kernel on a GPU, several operations on a CPU."""
        return 2 if self.backend == "cpu" else 1

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile of the fused loss's logits.

        A tile is large enough for its products to fill the machine, but small because several are in memory at once.
        """
        return min(16 << 20, self.working_set_bytes // 64)

    @property
    def cache_bytes(self) -> int:
        """The limit for MLX's buffer cache: batches of many shapes leave buffers that no later one can use."""
        return self.working_set_bytes // 16

    @property
    def dense_experts_bytes(self) -> int:
        """Bytes that one layer's experts may take as floats during their product."""
        return self.working_set_bytes // 16


@dataclass(frozen=True)
class RunShape:
    """The settings of a run that decide memory.

    Attributes:
        rows, width: of the largest batch; T is their product.
        trained_positions: the largest P; None: all positions.
        checkpointing: `none`, `selective`, `block` or n.
        optimizer: its name.
        dropout: whether dropout is applied to the adapters' inputs.
        accumulates: whether a step adds up the gradients of several micro-batches.
        teacher_top_k: how many tokens of a teacher are compared at each trained position, 0: all; None: no teacher.
        rollout: the answers that are sampled for that batch; None: the data have them.
        steps: of the run, which decide whether it is compiled; None: not known.
        offloads_activations: whether what blocks keep for the backward pass is on the disk.
        measures: whether losses are also computed without a gradient: of a reference, or of a validation.
    """

    rows: int
    width: int
    trained_positions: int | None = None
    checkpointing: str = "none"
    optimizer: str = "adamw"
    dropout: bool = False
    accumulates: bool = False
    teacher_top_k: int | None = None
    rollout: Rollout | None = None
    steps: int | None = None
    offloads_activations: bool = False
    measures: bool = False

    def of_step(self, compiled: float, uncompiled: float, machine: Machine) -> float:
        """Return the number for a compiled step or one that is not; if the run's length is not known, their mean."""
        if self.steps is None:
            return (compiled + uncompiled) / 2 if machine.compiles_from else compiled
        return compiled if self.steps >= machine.compiles_from else uncompiled

    @property
    def positions(self) -> int:
        """The number of positions, T."""
        return self.rows * self.width

    @property
    def slots(self) -> int:
        """The number of slots for trained targets, P."""
        return self.positions if self.trained_positions is None else min(self.trained_positions, self.positions)


# The arithmetic

ROLLOUT = "rollout"  # the phase in which answers are sampled
SINGLE = 4  # bytes of a float32
# Tokens of the check of losses and kernels before the first step (two tiles of attention).
CHECK_TOKENS = 128
LOSS_TOKENS = CHECK_TOKENS // 2  # for the plain loss and those compared with it: the plain one makes all logits of each
# Fewer tokens for the gradient of mlx-lm's own recurrences, which keeps several states per token.
RECURRENT_CHECK_TOKENS = 8
# On Metal a product over a 256k inner dimension has aborted the process (mlx#1363, Gemma).
MAX_SLICE = 32768
# More rows in a tile would not fill a machine better, but would make its slices of the vocabulary narrow.
MAX_ROWS = 2048
# Queries of one tile of attention: small enough to leave out nearly half of the scores (those above the diagonal) even in
# short rows, large enough for a tile's products to fill the machine.
TILE_QUERIES = 64
# With a sliding window a tile's scores do not grow with the row, so tiles have more queries, whose products fill the machine
# better: up to half a window, beyond which much of what is computed is masked, and up to so many scores for each head.
MOST_TILE_QUERIES, TILE_SCORES = 256, 1 << 19
# A GPU takes more queries at a time in short rows, up to so many bytes of one row's scores: 64 queries of 16 heads have that many
# in a row of 1,024. Each tile is some 20 launches, which take longer there than the scores above the diagonal. Models of fewer than
# 8 heads count as having 8, so that rows of 2,048 have 64 queries in all: longer rows are planned by what those take.
SCORE_TILE_BYTES, FEWEST_HEADS = 2 << 20, 8
# If exponentials are expensive (utils/device.py), rows of up to this many keys keep their probabilities, which then take
# no more memory than the block's other activations do (SmolLM2: about three quarters of them at this length).
MAX_KEPT_KEYS = 1536
# With --offload-activations, what a block keeps is in memory only for the block that is computed, and so is its gradient.
OFFLOADED_ENDS = 2
# A checkpointed block's MLP is computed in chunks of positions if the outputs of its layers take more than this
# (trainer/gradient_checkpointing.py). A chunk has at most so many bytes of them: enough positions for products to fill the machine.
CHUNKED_FROM_BYTES, CHUNK_BYTES = 256 << 20, 64 << 20
# What MLX allocates at a time, including work that it has not run yet; fitted on a CPU. It runs a fixed number of operations
# ahead, so a tile that takes more of them is ahead fewer times: dequantizing takes some, and a step that is not compiled
# has one for each that compiling would join.
TILES_AHEAD = (4.6, 3.55)  # tiles of the loss with a float head: compiled, not compiled
MEASURED_AHEAD = (5.6, 4.1)  # the same without a gradient, where a tile takes fewer operations
FEW_TILES = {
    "tiles": 1.15,
    "polynomial": 1.5,
}  # if there are few tiles, each has more than the two arrays of one that is ahead
PACKED_TILES_AHEAD = (2.7, 1.95)  # the same with a quantized head
ROW_ARRAYS = 5.0  # arrays of a chunk's logits if they are computed in whole rows
TOP_K_ARRAYS, ALL_TOKENS_ARRAYS = 8.3, 22.0  # the same with a teacher's likeliest tokens, and with all of them
PACKED_COPIES = 3  # copies of a quantized head as floats, in the same case
HEAD_COPIES = 2.5  # the same where the model's own head computes all logits; times `Machine.dense_copies`
BACKWARD_AHEAD = 1.45  # of a block's layers, widths in and out summed, per position
ATTENTION_AHEAD = 30.0  # tile-sized arrays of scores
# Also fitted: what mlx's own operations keep, in arrays of their width.
GATE_ARRAYS = 3.1  # of a gated activation that is not the lean one (GELU by tanh), beside inputs and product
NORM_ARRAYS = 2.0  # of a norm behind a branch
HEAD_NORM_ARRAYS = 2.5  # of the norms of queries and keys
DROPPED_ARRAYS = 1.2  # of an input with dropout: the result and its mask
# An elementwise optimizer gets the trained arrays joined to flat ones of up to this many numbers, since hundreds of updates are
# thousands of launches. Larger arrays, such as modules trained in full, stay as they are.
FLAT_UP_TO = 1 << 21
ARRAYS_AHEAD, FLAT_AHEAD = 23, 6  # arrays in an update at a time, as they are and flat


@dataclass(frozen=True)
class MemoryPlan:
    """The peak and its parts.

    Attributes:
        phase: the phase with the peak.
        parts: part -> bytes at that moment; their sum is the peak.
        phases: phase -> its own peak.
        cache_bytes: what MLX's buffer cache may hold in addition to the peak.
        budget_bytes: what the run may use.
        not_known: kinds of blocks whose memory is only a rough estimate, each with the reason.
    """

    phase: str
    parts: dict[str, int]
    phases: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0
    budget_bytes: int = 0
    not_known: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The peak of MLX's allocator, `peak_memory_bytes` in a run's reports."""
        return sum(self.parts.values())

    def with_phase(self, name: str, parts: dict[str, int]) -> MemoryPlan:
        """Return the plan with a further phase, whose parts are the peak's if it needs the most."""
        phases = {**self.phases, name: sum(parts.values())}
        if phases[name] <= self.peak_bytes:
            return replace(self, phases=phases)
        return replace(self, phase=name, parts=parts, phases=phases)

    @property
    def needed_bytes(self) -> int:
        """The peak and the buffer cache."""
        return self.peak_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether the needed bytes are within the budget."""
        return self.needed_bytes <= self.budget_bytes


def plan_memory(shape: ModelShape, run: RunShape, machine: Machine, budget_bytes: int | None = None) -> MemoryPlan:
    """Return the memory plan of one run.

    Args:
        shape: the model with its adapter.
        run: its largest batch and settings.
        machine: the machine that it will run on.
        budget_bytes: what it may use; default: the machine's working set.
    """
    budget = machine.working_set_bytes if budget_bytes is None else min(budget_bytes, machine.working_set_bytes)
    return largest_phase(phase_parts(shape, run, machine), machine, budget, shape.not_known)


def largest_phase(
    phases: dict[str, dict[str, int]], machine: Machine, budget: int, not_known: tuple[str, ...]
) -> MemoryPlan:
    """Return the plan whose parts are those of the phase that needs the most.

    Args:
        phases: phase -> part -> bytes.
        machine: that it will run on.
        budget: what it may use, in bytes.
        not_known: see `MemoryPlan`.
    """
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(sums, key=sums.__getitem__)
    parts = {name: size for name, size in phases[peak].items() if size}
    return MemoryPlan(peak, parts, sums, min(machine.cache_bytes, budget // 16), budget, not_known)


def phase_parts(shape: ModelShape, run: RunShape, machine: Machine) -> dict[str, dict[str, int]]:
    """Return what each phase of a run holds in memory: phase -> part -> bytes; arguments as for `plan_memory`."""
    if run.trained_positions is None:
        run = replace(run, trained_positions=ceil(shape.trained_share * run.positions))
    masters = SINGLE * shape.trained
    optimizer = OPTIMIZERS[run.optimizer]
    uncompiled = optimizer.update_copies if optimizer.uncompiled_copies is None else optimizer.uncompiled_copies
    copies = run.of_step(optimizer.update_copies, uncompiled, machine)
    # A few arrays are updated at a time. A step that is not compiled divides all gradients before it updates the first, and still
    # holds the sums.
    alone = (shape.trained_alone if optimizer.elementwise else shape.trained) / max(1, shape.trained)
    at_once = alone * min(1.0, ARRAYS_AHEAD / max(1, shape.trained_arrays))
    at_once += min(1 - alone, FLAT_AHEAD * FLAT_UP_TO / max(1, shape.trained))
    divided = run.of_step(0.0, 1.0, machine)
    copies = divided + (copies - divided) * at_once
    held = {
        "base": shape.base_bytes,
        "other models": shape.beside_bytes,
        "adapter": masters + shape.frozen_adapter_bytes,
        "optimizer": optimizer.state_copies * masters,
    }
    if shape.teacher is not None and shape.teacher_stays:
        held["teacher"] = shape.teacher.base_bytes
    kept = _kept_by_blocks(shape, run, machine)
    activations = {"activations": _together(kept, run), "gradients": masters * run.accumulates}
    tower, pictures = shape.tower, TowerBytes(0, 0)
    if tower is not None:
        pictures = tower.memory.at(-(-run.rows // tower.rows_each), machine.backend != "cpu")
    of_pictures = {"pictures": int(pictures.kept)} if int(pictures.kept) else {}
    activations |= of_pictures
    if run.teacher_top_k is not None:  # log-probabilities, with 16 bits on disk, and int32 ids
        most, number = run.teacher_top_k or shape.vocabulary, SINGLE if shape.teacher_stays else 2
        records = run.slots * min(number * shape.vocabulary, number * (most + 1) + 4 * most)
        activations["records"] = records
    ahead = int(max((_window(block, run, machine) for block in shape.blocks), default=0))
    one_block = int(max((kept_by(block, run, machine) for block in shape.blocks), default=0))
    check, check_gradients, logits = _check_parts(shape, machine)
    last_tile = 0 if shape.plain_loss else min(2 * machine.tile_bytes, 2 * SINGLE * run.slots * shape.vocabulary)
    phases = {
        "load": {
            "base": shape.base_bytes,
            "other models": shape.beside_bytes,
            "weights being cast": shape.source_bytes // 3,  # are read but not cast yet, because MLX reads ahead
        },
        "check": {**held, "optimizer": 0, "activations": check, "gradients": check_gradients, "logits": logits},
        "loss": {**held, **activations, "logits": _loss_window(shape, run, machine)},
        "backward": {**held, **activations, **_backward_parts(shape, run, machine, kept, last_tile)},
        "last": {**held, **of_pictures, "gradients": masters, "block": one_block, "work ahead": ahead},
        "update": {**held, "gradients": masters, "new state": int(copies * masters)},
    }
    if run.measures:
        phases["measure"] = {**held, "logits": _loss_window(shape, run, machine, gradient=False)}
    if tower is not None and pictures.window:
        # A trained tower is differentiated after the language model, when the blocks' gradients are there; what it keeps is in
        # memory all that time. A frozen one sees one picture at a time, before the batch, and keeps nothing.
        name, parts = "pictures", {"work ahead": int(pictures.window)}
        if tower.trained:
            # Its own gradients are part of the window, unless those of earlier micro-batches are there.
            others = shape.trained - (0 if run.accumulates else tower.trained)
            name, parts = "tower", {"gradients": SINGLE * others, **parts}
        phases[name] = {**held, **of_pictures, **parts}
    if shape.teacher is not None:
        # It is asked one block at a time, for chunks of logits.
        beside = held if shape.teacher_stays else {"base": shape.base_bytes}
        asked = RunShape(1, max(DEFAULT_BATCH_TOKENS, run.positions))
        block = max((kept_by(block, asked, machine) for block in shape.teacher.blocks), default=0)
        logits = int(ROW_ARRAYS * max(machine.tile_bytes, SINGLE * shape.teacher.vocabulary))
        parts = {"teacher": shape.teacher.base_bytes, "block": int(block), "logits": logits}
        phases["teacher"] = {**beside, **parts}
    if run.rollout is not None:
        phases[ROLLOUT] = held | rollout_parts(shape, run.rollout, machine)
    return phases


# Blocks


def kept_by(block: Block, run: RunShape, machine: Machine) -> float:
    """Return the bytes that a block keeps for the backward pass without checkpointing, attention's probabilities included."""
    kept = _traced(block, run, machine, "kept")
    if kept is not None:
        return kept
    own = block_numbers(block, run, machine) * run.positions + probabilities(block, run, machine) * run.rows
    return own * machine.number_bytes


def _traced(block: Block, run: RunShape, machine: Machine, name: str) -> float | None:
    """Return a figure of `BlockBytes` as this run computes the block; None: its graph was not read.

    Where only trained positions are computed beyond attention, as in the last block of some models, it grows with these from
    what a single one takes.
    """
    chunks = run.checkpointing == "block" and not run.dropout and block.chunked
    memory, case = block.chunked if chunks else block.memory, (run.rows, run.width, machine.backend != "cpu")
    if memory is None:
        return None
    whole = getattr(memory.at(*case), name)
    if block.at_one is None:
        return whole
    at_one = getattr(block.at_one.at(*case), name)
    return at_one + max(0.0, whole - at_one) * run.slots / run.positions


def _ends(block: Block, run: RunShape, machine: Machine) -> float:
    """Return the bytes of a block's input and of attention's output."""
    if block.memory is not None:
        return block.memory.at(run.rows, run.width, machine.backend != "cpu").ends
    return (_width(block) + block.heads * block.head_width) * run.positions * machine.number_bytes


def block_numbers(block: Block, run: RunShape, machine: Machine) -> float:
    """Return the numbers per position that a block keeps for the backward pass without checkpointing.

    These are the residual stream twice; each layer's input, once for all layers that share it; each layer's output, unless
    it is only added to the residual stream; attention's output twice, in its own order and in the next layer's; a gated
    activation's exponential; the inputs of further norms.
    """
    width = _width(block)
    # Arrays that a gated activation keeps beside its two inputs and its product.
    gate_arrays = GATE_ARRAYS if block.gated == "other" else machine.kernels.gate_arrays
    gate_arrays = float(machine.keeps_exponentials) if gate_arrays is None else gate_arrays
    kept = 2.0 * width
    for parent in dict.fromkeys(layer.parent for layer in block.layers):
        layers = [layer for layer in block.layers if layer.parent == parent]
        first = [layer for layer in layers if not layer.is_end]
        kept += max((layer.inputs * layer.active for layer in first), default=0)
        kept += sum(layer.outputs * layer.active for layer in first)
        kept += sum(layer.inputs * layer.active for layer in layers if layer.is_end)
        # Experts' outputs are multiplied by weights, which have a gradient, and then reordered.
        kept += sum(2 * layer.outputs * layer.active for layer in layers if layer.is_end and layer.active > 1)
        if len(first) > 1 and "attn" not in parent and "attention" not in parent:
            kept += first[0].outputs * first[0].active * gate_arrays
        # Some adapters also keep the output that they scale, and dropout keeps its result for each input.
        kept += sum(layer.active * (layer.rank + layer.outputs * layer.keeps_product) for layer in layers)
        kept += DROPPED_ARRAYS * sum(layer.active * layer.inputs for layer in layers if layer.rank and run.dropout)
    kept += block.heads * block.head_width
    # What norms keep, beyond the two at the start of the branches.
    further = max(0, sum(norm == width for norm in block.norms) - 2) * width
    heads = any(norm == block.head_width != width for norm in block.norms)
    return kept + (
        NORM_ARRAYS * further + HEAD_NORM_ARRAYS * heads * (block.heads + block.key_heads) * block.head_width
    )


def _width(block: Block) -> int:
    """Return D, the input width of the branches."""
    return block.layers[0].inputs if block.layers else 0


def probabilities(block: Block, run: RunShape, machine: Machine) -> float:
    """Return how many attention probabilities are kept per row and layer: tiles of 64 queries by the keys that they see.

    For mlx's own attention this is the measured number, about all scores on a CPU.
    """
    own = machine.kernels.scores(run.width)
    if own is not None:
        return own[0] * block.heads * run.width * run.width
    if not machine.keeps_exponentials or run.width > MAX_KEPT_KEYS:
        return 0.0
    tiles = max(1, round(run.width / TILE_QUERIES))
    return block.heads * run.width * run.width * (tiles + 1) / (2 * tiles)


def _kept_by_blocks(shape: ModelShape, run: RunShape, machine: Machine) -> list[tuple[float, float]]:
    """Return of each block that has a backward pass the bytes that it keeps, and those that it computes again if checkpointed."""
    every, found = checkpoint_every(run.checkpointing), []
    for index, block in enumerate(shape.blocks[shape.first_trained :], shape.first_trained):
        everything = kept_by(block, run, machine)
        if every is None or index % every:
            found.append((everything, 0.0))
            continue
        kept = _ends(block, run, machine)
        if run.checkpointing == "selective":  # also keeps every layer's output, except that of the last product
            products = sum(layer.outputs * layer.active for layer in block.layers) - _width(block)
            kept += products * run.positions * machine.number_bytes
        found.append((kept, everything))
    return found


def _together(kept: Sequence[tuple[float, float]], run: RunShape) -> int:
    """Return the bytes that some blocks keep together."""
    together = sum(bytes_ for bytes_, _ in kept)
    largest = max((bytes_ for bytes_, again in kept if again), default=0.0)
    return int(min(together, OFFLOADED_ENDS * largest) if run.offloads_activations else together)


def _backward_parts(
    shape: ModelShape, run: RunShape, machine: Machine, kept: Sequence[tuple[float, float]], last_tile: int
) -> dict[str, int]:
    """Return what the backward pass of the blocks holds at its peak, in addition to what is held anyway.

    It begins with the last block, and each block's kept arrays are free before the block before it is differentiated. So where
    the last block is computed at few positions, the one before it may decide.

    Args:
        shape, run, machine: as for `plan_memory`.
        kept: as `_kept_by_blocks` returns it.
        last_tile: bytes of the loss that are not free yet while the first operations of the last block are prepared.
    """
    moments: list[dict[str, int]] = [{"activations": 0, "block": 0, "work ahead": last_tile}]
    for number, block in enumerate(shape.blocks[shape.first_trained :]):
        again, ahead = kept[number][1], _window(block, run, machine)
        if number + 1 == len(kept) and not again:
            ahead = max(ahead, _window(block, run, machine, early=True) + last_tile)
        activations = _together(kept[: number + 1], run)
        moments.append({"activations": activations, "block": int(again), "work ahead": int(ahead)})
    return max(moments, key=lambda parts: sum(parts.values()))


def offloaded_bytes(shape: ModelShape, run: RunShape, machine: Machine) -> int:
    """Return the bytes that a micro-batch writes with --offload-activations, and reads again."""
    blocks = shape.blocks[shape.first_trained :] if run.offloads_activations else ()
    return int(sum(_ends(block, run, machine) for block in blocks))


def _window(block: Block, run: RunShape, machine: Machine, early: bool = False) -> float:
    """Return the bytes that a block's backward pass, or its beginning, allocates at a time, in addition to what it keeps."""
    ahead = _traced(block, run, machine, "early" if early else "window")
    if ahead is not None:
        return ahead
    size = machine.number_bytes
    layers = BACKWARD_AHEAD * block.widths * run.positions * size
    own = machine.kernels.scores(run.width)
    ahead = ATTENTION_AHEAD * planned_queries(block, run, machine)  # scores per key
    if own is not None:
        ahead = (own[1] if run.checkpointing == "none" else own[0] + own[1]) * run.width
    scores = ahead * run.rows * block.heads * run.width * size
    # A quantized layer's product is computed with floats; for experts, only if all together are small.
    dense = [layer.numbers for layer in block.layers if layer.packed and (
        layer.experts == 1 or layer.numbers * size <= machine.dense_experts_bytes)]  # fmt: skip
    return max(layers + sum(dense) * size, scores)


# Loss, check and loading


def _loss_window(shape: ModelShape, run: RunShape, machine: Machine, gradient: bool = True) -> int:
    """Return the bytes of the loss: tiles of logits and exponentials, slices of the head, sums of the gradient if there is one."""
    slots, size = run.slots, machine.number_bytes
    if shape.plain_loss:
        # The logits, their softmax and their gradient, and the head as floats, in both directions.
        logits = run.positions * shape.vocabulary * (3 * SINGLE + (size if size < SINGLE else 0))
        copies = HEAD_COPIES * machine.dense_copies if shape.head_packed else 0
        return int(logits + copies * shape.vocabulary * shape.width * size)
    if not slots:
        return 0
    if machine.kernels.loss == "rows" or run.teacher_top_k is not None:  # distillation computes whole rows, too
        rows = chunk_rows(slots, shape.vocabulary, machine.tile_bytes)
        dense = PACKED_COPIES * shape.vocabulary * shape.width * size if shape.head_packed else 0
        logits = rows * shape.vocabulary * SINGLE
        compared = TOP_K_ARRAYS if run.teacher_top_k else 0.0 if run.teacher_top_k is None else ALL_TOKENS_ARRAYS
        window = max(ROW_ARRAYS * logits + dense, compared * logits)
        return int(window + 2 * slots * shape.width * size)
    rows, columns = tile_shape(slots, shape.head_rows or shape.vocabulary, machine.tile_bytes)
    tiles = -(-slots // rows) * -(-shape.vocabulary // columns)
    logits = rows * columns * (2 * SINGLE + (2 * size if size < SINGLE else 0))
    pulled = 2 * rows * shape.width * SINGLE
    dense = columns * shape.width * size * machine.dense_copies if shape.head_packed else 0
    most = PACKED_TILES_AHEAD if shape.head_packed else TILES_AHEAD if gradient else MEASURED_AHEAD
    ahead = min(FEW_TILES[machine.kernels.loss] * tiles, run.of_step(*most, machine))
    if shape.shared:
        # All positions keep their sums and their targets' rows; nothing is allocated ahead (`_check_parts`).
        return int(logits + dense + slots * shape.width * (2 * SINGLE + 2 * size))
    return int(ahead * (logits + pulled + dense) + 2 * slots * shape.width * size)


def _check_bytes(shape: ModelShape, machine: Machine, tokens: int) -> int:
    """Return the bytes of the plain loss of some tokens and its gradient: whole logits twice, and slices of a quantized head."""
    size = machine.number_bytes
    rows = min(shape.head_rows or shape.vocabulary, int(PACKED_TILES_AHEAD[0] * MAX_SLICE))
    dense = rows * shape.width * size * machine.dense_copies if shape.head_packed else 0
    logits = 2 * tokens * shape.vocabulary * (SINGLE + (size if size < SINGLE else 0))
    # Slice by slice, the last one is dequantized while there are no whole logits yet.
    if shape.shared:
        return max(dense + logits // 2, logits)
    # It is compared with the run's own loss, at three in four of the tokens (losses/agree.py).
    fused = 0 if shape.plain_loss else _loss_window(shape, RunShape(1, tokens, tokens * 3 // 4), machine)
    return max(dense + logits, fused)


def _check_parts(shape: ModelShape, machine: Machine) -> tuple[int, int, int]:
    """Return what blocks keep in the check, its gradients, and its logits or, if a shared block needs more, that block.

    One block of each kind is checked (models/meta.py), and the gradients of two computations are compared. Ranks that
    share a base check all blocks. Theirs are checkpointed from the beginning, and MLX does not allocate ahead then
    (utils/device.py).
    """
    gradients = 2 * SINGLE * shape.trained
    tokens = CHECK_TOKENS if shape.plain_loss else LOSS_TOKENS
    if not shape.shared:
        run = RunShape(1, CHECK_TOKENS)
        kinds = {(block, id(block.memory)): block for block in shape.blocks}
        kept = sum(kept_by(block, run, machine) for block in kinds.values())
        # The tower is checked in whole: it has no blocks that could be left out.
        of_tower = 0 if shape.tower is None else 2 * SINGLE * shape.tower.trained
        share = len(kinds) / max(1, len(shape.blocks))
        return int(kept), of_tower + int((gradients - of_tower) * share), _check_bytes(shape, machine, tokens)
    run = RunShape(1, CHECK_TOKENS, checkpointing="block")
    kept = _kept_by_blocks(shape, run, machine)
    ahead = int(max((_window(block, run, machine) for block in shape.blocks), default=0))
    block = int(max((again for _, again in kept), default=0)) + ahead
    return _together(kept, run), gradients, max(_check_bytes(shape, machine, tokens), block)


def tile_shape(positions: int, vocabulary: int, tile_bytes: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of the fused loss, so that tiles fit the byte budget and are about equal."""
    rows = _even(positions, MAX_ROWS)
    return rows, _even(vocabulary, min(MAX_SLICE, tile_bytes // (4 * rows)))


def chunk_rows(positions: int, vocabulary: int, tile_bytes: int) -> int:
    """Return the rows of a chunk of the loss that computes whole rows of logits (losses/fused.py)."""
    return _even(positions, min(MAX_ROWS, tile_bytes // (4 * vocabulary)))


def position_chunks(outputs_bytes: int) -> int:
    """Return in how many chunks of positions an MLP is computed, a power of two, so that few are traced.

    Args:
        outputs_bytes: of its layers for all positions of a batch.
    """
    if outputs_bytes <= CHUNKED_FROM_BYTES:
        return 1
    return 1 << (-(-outputs_bytes // CHUNK_BYTES) - 1).bit_length()


def tile_queries(window: int | None, heads: int = 0, head_bytes: int = 0) -> int:
    """Return about how many queries a tile of attention has.

    Args:
        window: the most keys that a query sees; None: all keys before it.
        heads, head_bytes: the bytes of a query's scores in each head, on a device where launches decide; 0: exponentials do.
    """
    if window is None:
        of_query = max(FEWEST_HEADS, heads) * head_bytes
        return max(TILE_QUERIES, SCORE_TILE_BYTES // of_query if of_query else 0)
    return max(TILE_QUERIES, min(MOST_TILE_QUERIES, window // 2, TILE_SCORES // window))


def planned_queries(block: Block, run: RunShape, machine: Machine) -> int:
    """Return about how many queries a tile of a block's attention has, without a window."""
    head_bytes = 0 if machine.keeps_exponentials else run.width * machine.number_bytes
    return min(run.width, tile_queries(None, block.heads, head_bytes))


def _even(length: int, most: int) -> int:
    """Return the size of parts if `length` is split into the fewest equal parts of at most `most`."""
    parts = max(1, -(-length // max(1, most)))
    return max(1, -(-length // parts))


# Sampled answers

PREFILL_TOKENS = 512  # of a prompt that are computed at once (models/generator.py)
# Fitted on a CPU (tests/planner/test_rollout_memory.py compares with measured peaks).
GROWING_LAYERS = 1  # layers whose old keys and values, and room for new ones, are there in addition to both together
SCORE_ARRAYS = 6.0  # arrays of (N G, V): logits, their softmax, and the noise that a token is drawn with
# Rows from which a CPU multiplies by a quantized head as floats (kernels/quantized_matmul.py measures it).
DENSE_ROWS = 4
PREFILL_ARRAYS = 1.0  # of a block's layers, widths in and out summed, per position
PREFILL_SCORES = 3.0  # arrays of mlx's attention on a CPU: scores, masked scores, their softmax


def rollout_parts(shape: ModelShape, rollout: Rollout, machine: Machine) -> dict[str, int]:
    """Return what sampling takes at its peak in addition to the held parts, by name.

    Args:
        shape: the model, with what its layers keep.
        rollout: the largest batch of prompts.
        machine: that it runs on.
    """
    rows = rollout.prompts * rollout.group
    of_prompts = rollout.prompts * _cache_bytes(shape.caches, in_steps(rollout.prompt_tokens - 1))
    whole = rows * _cache_bytes(shape.caches, rollout.cached_tokens)
    first = {"keys and values": of_prompts, "work ahead": _prefill_window(shape.blocks, rollout, machine)}
    logits = int(SCORE_ARRAYS * rows * shape.vocabulary * SINGLE)
    if shape.head_packed and machine.backend == "cpu" and rows >= DENSE_ROWS:  # a GPU multiplies by the packed head
        logits += shape.vocabulary * shape.width * machine.number_bytes * machine.dense_copies
    grown = int(whole * min(1.0, GROWING_LAYERS / max(1, len(shape.caches))))
    later = {"keys and values": whole, "copies of them": grown, "logits": logits}
    moments = [first, later]
    # Caches of a sliding window are not kept (models/generator.py).
    if rollout.several_turns and all(cache.most_tokens is None for cache in shape.caches):
        kept = rows * _cache_bytes(shape.caches, rollout.kept_tokens)
        moments.append({"keys and values": whole, "kept from turn to turn": kept, "logits": logits})
    return max(moments, key=lambda parts: sum(parts.values()))


def _cache_bytes(caches: Iterable[LayerCache], tokens: int) -> int:
    """Return the bytes that all layers keep of a row with room for so many tokens."""
    return sum(
        cache.fixed_bytes
        + cache.token_bytes * (tokens if cache.most_tokens is None else min(tokens, cache.most_tokens))
        for cache in caches
    )


def _prefill_window(blocks: Iterable[Block], rollout: Rollout, machine: Machine) -> int:
    """Return the bytes of a forward pass over a prompt, or its first part, of which one block is in memory at a time."""
    tokens, size = min(PREFILL_TOKENS, rollout.prompt_tokens), machine.number_bytes
    most = 0.0
    for block in blocks:
        layers = PREFILL_ARRAYS * block.widths * tokens
        packed = max((layer.numbers for layer in block.layers if layer.packed and layer.experts == 1), default=0)
        scores = PREFILL_SCORES * block.heads * tokens * rollout.prompt_tokens if machine.backend == "cpu" else 0
        most = max(most, max(layers + packed * machine.dense_copies, scores))
    return int(most * size)


# Several adapters that are trained at a time on one base, which is there once.
#
# Runs in one pass (`train --runs`) hold the base, and each its masters, optimizer and frozen factors. During a step there are
# also the activations of all rows that are computed together, which are as many as fit. So the least that several runs need is
# the state of all and the largest step of one.
#
# Clients of a server (`serve --training`) hold masters, Adam's moments, and, from a client's first forward_backward to its
# optim_step, a gradient that waits. Requests are computed one at a time, so the activations are those of one micro-batch whatever
# the number of clients. Answers are sampled between requests, from copies of the factors.

# Arrays like a model's masters that a step of Adam makes before it can let go of the old ones: the scaled gradient, new masters and
# moments, and what is computed ahead of them. Fitted on a CPU.
STEP_COPIES = 6.0


def held_bytes(shape: ModelShape, optimizer: str) -> int:
    """Return what a run holds between its steps beside the base: masters, the optimizer's moments and frozen factors."""
    masters = SINGLE * shape.trained
    return masters * (1 + OPTIMIZERS[optimizer].state_copies) + shape.frozen_adapter_bytes


def activation_bytes(memory: MemoryPlan) -> int:
    """Return what grows with the rows of a step: the most of what any phase has beside base, adapter and optimizer."""
    fixed = sum(memory.parts.get(name, 0) for name in ("base", "adapter", "optimizer", "gradients"))
    return max(0, memory.peak_bytes - fixed)


def most_that_fit(base_bytes: int, held: Sequence[int], steps: Sequence[int], budget_bytes: int) -> int:
    """Return how many of some runs fit in memory together, taken in their order.

    Args:
        base_bytes: of the base.
        held: what each holds between its steps.
        steps: what the step of each needs in addition, computed by itself.
        budget_bytes: what all may use.
    """
    total = base_bytes
    for count, (own, step) in enumerate(zip(held, steps, strict=True)):
        total += own
        if total + max(steps[: count + 1], default=step) > budget_bytes:
            return count
    return len(held)


def plan_clients(
    shape: ModelShape, clients: int, run: RunShape, rollout: Rollout, sets: int, machine: Machine, budget_bytes: int
) -> MemoryPlan:
    """Return the memory plan of a training server.

    Args:
        shape: the model with one client's adapter.
        clients: models that are trained at a time, each of that shape.
        run: the largest micro-batch of a request.
        rollout: the answers that are sampled at a time.
        sets: of weights that the server keeps in memory to sample from, at most.
        machine: that it runs on.
        budget_bytes: what it may use.
    """
    masters = SINGLE * shape.trained
    saved = min(clients, sets) * shape.trained * machine.number_bytes
    others = {
        "other clients": (clients - 1) * 3 * masters,
        "gradients that wait": (clients - 1) * masters,
        "weights to sample from": saved,
    }
    # A server compiles no step. The sum of a request's gradients is there from its second micro-batch on.
    phases = phase_parts(shape, replace(run, steps=0, optimizer="adamw", accumulates=True), machine)
    phases = {name: parts if name == "load" else parts | others for name, parts in phases.items()}
    phases["update"]["new state"] = int(STEP_COPIES * masters)
    held = {"base": shape.base_bytes, "adapter": masters, "optimizer": 2 * masters, "gradients": masters}
    sampled = rollout_parts(shape, rollout, machine)
    # While rows join the batch, all their keys and values are copied, and the weights in use are in the layers as well.
    sampled["copies of them"] = sampled["keys and values"]
    phases[ROLLOUT] = held | others | {"weights to sample from": 2 * saved} | sampled
    return largest_phase(phases, machine, min(budget_bytes, machine.working_set_bytes), shape.not_known)
