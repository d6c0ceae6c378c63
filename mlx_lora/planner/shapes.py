"""The planner's types: a model's shape, a machine, and a run's largest batch.

models/meta.py fills them in from a module tree, planner/machine.py from a device, and planner/speed.py from a table.

Shapes: T positions of a batch (rows x width), P trained positions, D model width, V vocabulary, A trained numbers.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Protocol, Self


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


class NotKnown(Exception):
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

    @property
    def slice_rows(self) -> int:
        """The rows of the head that are at hand at a time."""
        return self.head_rows or self.vocabulary


@dataclass(frozen=True)
class KernelTerms:
    """The properties of a run's kernels that decide memory; the default is our kernels (kernels/choose.py).

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
